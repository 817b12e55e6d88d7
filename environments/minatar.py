"""Four games of MinAtar (Young & Tian 2019, arXiv 1903.03176), from gymnax, for PPO.

gymnax is not in requirements.txt, because it needs an older jax: pip install gymnax six. (It
imports six without requiring it.)
"""

import math

import jax.numpy as jnp

from networks import CATEGORICAL
from ppo import Env

GAMES = {
    "minatar_asterix": "Asterix-MinAtar",
    "minatar_breakout": "Breakout-MinAtar",
    "minatar_freeway": "Freeway-MinAtar",
    "minatar_space_invaders": "SpaceInvaders-MinAtar",
}
NAMES = tuple(GAMES)


def make(name: str) -> Env:
    """The game of that name, with flat observations. Raises a one-line ValueError without
    gymnax."""
    try:
        import gymnax
    except ImportError as error:
        advice = "pip install gymnax six, with jax below 0.12"
        raise ValueError(f"--env-name {name}: it needs gymnax ({advice}): {error}") from None
    env, params = gymnax.make(GAMES[name])
    params = params.replace(max_steps_in_episode=2**30)  # the agent sets the limit

    def flat(obs):
        return obs.reshape(-1).astype(jnp.float32)

    def reset(key):
        obs, state = env.reset_env(key, params)
        return state, flat(obs)

    def step(key, state, action):
        obs, state, reward, done, _ = env.step_env(key, state, action, params)
        return state, flat(obs), reward.astype(jnp.float32), done

    size = math.prod(env.observation_space(params).shape)
    return Env(reset, step, size, env.num_actions, CATEGORICAL)
