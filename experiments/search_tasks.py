"""The tasks that search.py trains candidates on: A2C and PPO on gridworlds, PPO on control tasks.

All are cheap: a lifetime takes seconds of a core. They differ in what decides a good step: the
network's width and depth, the number of updates, environments, noise, the scale of rewards,
clipping, whether objects move.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import a2c
import gridworld
import ppo
import tasks
from environments import swimmer


class SearchTask(NamedTuple):
    """What candidates are trained on."""

    make_agent: Callable  # () -> a2c.Agent or ppo.Agent
    metric: str  # "return", or on control tasks "reward", the mean of a step
    fewest: int  # updates
    most: int


def a2c_on(grid: gridworld.Grid, num_envs: int, make=gridworld.make_grid, **sizes) -> a2c.Agent:
    return a2c.make_agent(make(grid), a2c.Args(num_envs=num_envs, **sizes))


def moving(grid: gridworld.Grid) -> gridworld.Env:
    """The gridworld with objects that move: one column a step, the first, third, ... to the left,
    the others to the right, and from one side to the other. As in a game, where to go depends on
    where things will be."""
    env = gridworld.make_grid(grid)
    direction = jnp.where(jnp.arange(2 * grid.num_each) % 2, 1, -1)

    def step(key, state, action):
        state, _, reward, done = env.step(key, state, action)
        row, col = state.objects // grid.cols, state.objects % grid.cols
        state = state._replace(objects=row * grid.cols + (col + direction) % grid.cols)
        return state, gridworld.grid_observe(state, grid), reward, done

    return env._replace(step=step)


def ppo_on_moving(grid: gridworld.Grid) -> ppo.Agent:
    """PPO where objects move, in the setting of MinAtar's games."""
    args = tasks.agent_args("minatar_breakout")
    return ppo.make_agent(tasks.flat_gridworld(moving(grid)), args)


def ppo_on(name: str, copies: int = 1, obs_size: int = 0, links: int = 0, **changes) -> ppo.Agent:
    """PPO on a task, on some copies of it at once, with obs_size mixtures as observations, or on a
    swimmer of so many links."""
    learner = tasks.make_learner(name, "ppo", **changes)
    env = ppo.Env(*swimmer.make(name, links)) if links else learner.env
    env = several(env, copies) if copies > 1 else env
    return ppo.make_agent(mixed(env, obs_size) if obs_size else env, learner.args)


def several(env: ppo.Env, copies: int) -> ppo.Env:
    """Independent copies as one environment, which ends with the first copy that ends. Its reward
    is their mean, so that, as on Brax's robots, an action is seen through the noise of others."""

    def reset(key):
        states, obs = jax.vmap(env.reset)(jax.random.split(key, copies))
        return states, obs.reshape(-1)

    def step(key, states, action):
        keys, actions = jax.random.split(key, copies), action.reshape(copies, -1)
        states, obs, rewards, terminated = jax.vmap(env.step)(keys, states, actions)
        return states, obs.reshape(-1), jnp.mean(rewards), jnp.any(terminated)

    sizes = copies * env.obs_size, copies * env.action_size
    return env._replace(reset=reset, step=step, obs_size=sizes[0], action_size=sizes[1])


def mixed(env: ppo.Env, obs_size: int) -> ppo.Env:
    """Observations are fixed random mixtures of the environment's: many, and redundant."""
    mixing = jax.random.normal(jax.random.key(0), (env.obs_size, obs_size))
    mixing /= math.sqrt(env.obs_size)

    def reset(key):
        state, obs = env.reset(key)
        return state, jnp.tanh(obs @ mixing)

    def step(key, state, action):
        state, obs, reward, terminated = env.step(key, state, action)
        return state, jnp.tanh(obs @ mixing), reward, terminated

    return env._replace(reset=reset, step=step, obs_size=obs_size)


# As on Brax: short rollouts, a deep critic, rewards scaled by 10. Some of these lifetimes are long:
# else a large number of updates and a deep network would mean the same.
DEEP = {"policy_layers": (32,) * 4, "value_layers": (64,) * 5, "num_envs": 128}
DEEP |= {"rollout_steps": 5, "batch_size": 64, "num_minibatches": 8, "reward_scale": 10.0}
# 128 updates an iteration: in few of these the policy changes much in each.
FEW = DEEP | {"batch_size": 128, "num_minibatches": 32}
LARGE_REWARDS = {"reward_scale": 100.0}  # more of the critic's gradients are clipped
UNCLIPPED = {"grad_clip": math.inf}  # on some tasks, as it may be where theta is used
SQUARE, OBLONG = gridworld.Grid(5, 5, 2, 0.2, 100), gridworld.Grid(5, 6, 2, 0.3, 200)
MOVING = gridworld.Grid(6, 8, 2, 0.05, 200)
TASKS = {
    **{
        name: SearchTask(partial(a2c_on, gridworld.GRIDS[name], 512), "return", 120, 400)
        for name in ("small_dense_short", "small_sparse_long", "small_dense_long")
    },
    "5 x 5": SearchTask(partial(a2c_on, SQUARE, 128, hidden_size=64), "return", 200, 800),
    "5 x 6, convolution": SearchTask(
        partial(a2c_on, OBLONG, 512, conv_filters=16), "return", 120, 240
    ),
    "pendulum": SearchTask(partial(ppo_on, "pendulum", reward_scale=10.0), "reward", 30, 100),
    "cartpole": SearchTask(partial(ppo_on, "cartpole", **UNCLIPPED), "reward", 30, 240),
    "two_link_reacher": SearchTask(partial(ppo_on, "two_link_reacher"), "reward", 30, 240),
    "acrobot, deep": SearchTask(
        partial(ppo_on, "acrobot", entropy_weight=1e-2, **DEEP), "reward", 40, 320
    ),
    "cartpole, few iterations": SearchTask(
        partial(ppo_on, "cartpole", **FEW | LARGE_REWARDS), "reward", 8, 24
    ),
    "4 cartpoles, deep": SearchTask(
        partial(ppo_on, "cartpole", copies=4, **DEEP | LARGE_REWARDS), "reward", 40, 320
    ),
    "3 pendulums, mixed": SearchTask(
        partial(ppo_on, "pendulum", copies=3, obs_size=40, **DEEP, **UNCLIPPED), "reward", 40, 320
    ),
    "swimmer": SearchTask(partial(ppo_on, "purcell_swimmer", **UNCLIPPED), "reward", 40, 320),
    "swimmer of 9, mixed": SearchTask(
        partial(ppo_on, "purcell_swimmer", links=9, obs_size=120, **DEEP), "reward", 40, 320
    ),
    "small_dense_short by ppo": SearchTask(
        partial(ppo_on, "small_dense_short", **UNCLIPPED), "return", 30, 100
    ),
    "6 x 8, moving": SearchTask(partial(ppo_on_moving, MOVING), "return", 30, 120),
    "6 x 8, moving, by a2c": SearchTask(
        partial(a2c_on, MOVING, 128, moving, hidden_size=64), "return", 200, 800
    ),
}


def draw(rng, name: str) -> tuple:
    """-> the task's name, a seed, the number of updates of its lifetimes"""
    fewest, most = TASKS[name].fewest, TASKS[name].most
    return name, int(rng.integers(2**31)), int(np.exp(rng.uniform(np.log(fewest), np.log(most))))
