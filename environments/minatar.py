"""Four games of MinAtar (Young & Tian 2019, arXiv 1903.03176), from gymnax, for PPO.

gymnax is not in requirements.txt, because it needs an older jax: pip install gymnax six. (It
imports six without requiring it.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from networks import CATEGORICAL, Distribution

GAMES = {
    "minatar_asterix": "Asterix-MinAtar",
    "minatar_breakout": "Breakout-MinAtar",
    "minatar_freeway": "Freeway-MinAtar",
    "minatar_space_invaders": "SpaceInvaders-MinAtar",
}
NAMES = tuple(GAMES)


class Env(NamedTuple):
    """A game, in the form of ppo.Env."""

    reset: Callable  # key -> state, obs [O]
    step: Callable  # state, action [] -> state, obs, reward, terminated
    obs_size: int
    action_size: int
    distribution: Distribution


def make(name: str) -> Env:
    """The game of that name, with flat observations and a key in its state. Raises a one-line
    ValueError without gymnax."""
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
        key_reset, key_steps = jax.random.split(key)
        obs, state = env.reset_env(key_reset, params)
        return (key_steps, state), flat(obs)

    def step(key_and_state, action):
        key, state = key_and_state
        key, key_step = jax.random.split(key)
        obs, state, reward, done, _ = env.step_env(key_step, state, action, params)
        return (key, state), flat(obs), reward.astype(jnp.float32), done

    size = math.prod(env.observation_space(params).shape)
    return Env(reset, step, size, env.num_actions, CATEGORICAL)
