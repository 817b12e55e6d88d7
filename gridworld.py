"""Eight gridworlds and Catch, as pure functions: `env = make("big_dense_long")`.

    state, obs = env.reset(key)
    state, obs, reward, done = env.step(key, state, action)

Each function acts on one environment; `vmap` it for more. Everything is traceable, and the name
fixes every shape. An environment resets itself when its episode ends: then `done` is that of the
step just taken, and `obs` is the first of the next episode.

The gridworlds are those of Oh et al. 2020, "Discovering Reinforcement Learning Algorithms", as used
by Lan et al. 2024, "Learning to Optimize for Reinforcement Learning", with the agent's position in
the observation.

Legend: R, C interior rows and columns; n objects. Cells are numbered row by row, 0 .. R*C - 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Env(NamedTuple):
    """An environment: two pure functions and the sizes that a network needs."""

    reset: Callable  # key -> state, obs
    step: Callable  # key, state, action -> state, obs, reward, done
    obs_shape: tuple[int, int, int]  # height, width, planes; uint8, 0 or 1
    num_actions: int


# --- Gridworlds ---


class Grid(NamedTuple):
    """The parameters of a gridworld. A good object gives +1. A bad one gives -1 and ends the
    episode with probability 0.5."""

    rows: int
    cols: int
    num_each: int  # number of good objects, and of bad ones
    respawn: float  # probability per step that an absent object comes back
    horizon: int


GRIDS = {
    "small_sparse_short": Grid(3, 8, 1, 0.05, 50),
    "small_sparse_long": Grid(8, 3, 1, 0.05, 500),
    "small_dense_short": Grid(4, 6, 1, 0.5, 50),
    "small_dense_long": Grid(6, 4, 1, 0.5, 500),
    "big_sparse_short": Grid(10, 12, 2, 0.05, 50),
    "big_sparse_long": Grid(12, 10, 2, 0.05, 500),
    "big_dense_short": Grid(9, 13, 2, 0.5, 50),
    "big_dense_long": Grid(13, 9, 2, 0.5, 500),
}
END_PROBABILITY = 0.5  # that a collected bad object ends the episode
# Stay, 4 straight, 4 diagonal.
MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


class GridState(NamedTuple):
    agent: jax.Array  # [] int32, the agent's cell
    objects: jax.Array  # [n] int32, each object's cell, or its last one; good ones first
    present: jax.Array  # [n] bool
    time: jax.Array  # [] int32, steps taken in this episode


def distinct_cells(u: jax.Array, num_cells: int) -> jax.Array:
    """Uniformly random distinct cells. u: [k] uniform in [0, 1) -> [k] int32

    The first k draws of a Fisher-Yates shuffle: draw i takes the entry of a random slot among the
    first num_cells - i, and the entry of the last of these slots moves there. The list is never
    built, because at most k slots change.
    """
    slots = (u * (num_cells - jnp.arange(u.size))).astype(jnp.int32)
    cells = []
    for i in range(u.size):
        cell = slots[i]
        for j in reversed(range(i)):
            cell = jnp.where(cell == slots[j], num_cells - 1 - j, cell)
        cells.append(cell)
    return jnp.stack(cells)


def grid_reset_state(u: jax.Array, grid: Grid) -> GridState:
    """Agent and objects at distinct uniformly random cells. u: [1 + n] uniform in [0, 1)."""
    cells = distinct_cells(u, grid.rows * grid.cols)
    return GridState(cells[0], cells[1:], jnp.ones(u.shape[0] - 1, bool), jnp.int32(0))


def grid_observe(state: GridState, grid: Grid) -> jax.Array:
    """-> [R + 2, C + 2, n + 1] uint8: a plane for the agent, then one for each object. The border
    is the wall."""
    cells = jnp.append(state.agent, state.objects)
    seen = jnp.append(True, state.present).astype(jnp.uint8)
    empty = jnp.zeros((grid.rows + 2, grid.cols + 2, cells.size), jnp.uint8)
    return empty.at[cells // grid.cols + 1, cells % grid.cols + 1, jnp.arange(cells.size)].set(seen)


def grid_step(key: jax.Array, state: GridState, action: jax.Array, grid: Grid):
    """Move, collect what is in the agent's cell, respawn, and reset where the episode ended.
    action: [] int in 0 .. 8.

    An absent object respawns at a uniformly random cell, occupied or not, perhaps in the step that
    collected it. If that is the agent's cell, a later step that ends there collects it (staying is
    one). Two objects in one cell are both collected.

    -> state, obs [R + 2, C + 2, n + 1], reward [] float32, done [] bool
    """
    k, n = grid.num_each, 2 * grid.num_each
    u = jax.random.uniform(key, (k + 3 * n + 1,))
    u_end, u_respawn, u_cell, u_reset = jnp.split(u, [k, k + n, k + 2 * n])

    move = jnp.array(MOVES)[action]
    row, col = state.agent // grid.cols + move[0], state.agent % grid.cols + move[1]
    inside = (0 <= row) & (row < grid.rows) & (0 <= col) & (col < grid.cols)
    agent = jnp.where(inside, row * grid.cols + col, state.agent)

    collected = state.present & (state.objects == agent)  # [n]
    good, bad = collected[:k], collected[k:]
    reward = jnp.sum(good, dtype=jnp.float32) - jnp.sum(bad)
    ended = jnp.any(bad & (u_end < END_PROBABILITY))

    present = state.present & ~collected
    respawn = ~present & (u_respawn < grid.respawn)
    objects = jnp.where(respawn, (u_cell * grid.rows * grid.cols).astype(jnp.int32), state.objects)

    done = ended | (state.time + 1 >= grid.horizon)
    state = GridState(agent, objects, present | respawn, state.time + 1)
    state = jax.tree.map(
        lambda new, old: jnp.where(done, new, old), grid_reset_state(u_reset, grid), state
    )
    return state, grid_observe(state, grid), reward, done


def make_grid(grid: Grid) -> Env:
    n = 2 * grid.num_each

    def reset(key):
        state = grid_reset_state(jax.random.uniform(key, (1 + n,)), grid)
        return state, grid_observe(state, grid)

    def step(key, state, action):
        return grid_step(key, state, action, grid)

    return Env(reset, step, (grid.rows + 2, grid.cols + 2, n + 1), len(MOVES))


# --- Catch ---

CATCH_ROWS, CATCH_COLS = 10, 5


class CatchState(NamedTuple):
    ball_row: jax.Array  # [] int32
    ball_col: jax.Array  # [] int32
    paddle: jax.Array  # [] int32, column; the paddle is in the bottom row


def catch_reset_state(key: jax.Array) -> CatchState:
    return CatchState(
        jnp.int32(0), jax.random.randint(key, (), 0, CATCH_COLS), jnp.int32(CATCH_COLS // 2)
    )


def catch_observe(state: CatchState) -> jax.Array:
    """-> [10, 5, 1] uint8: one plane with the ball and the paddle in it."""
    cells = jnp.arange(CATCH_ROWS * CATCH_COLS).reshape(CATCH_ROWS, CATCH_COLS, 1)
    ball = cells == state.ball_row * CATCH_COLS + state.ball_col
    paddle = cells == (CATCH_ROWS - 1) * CATCH_COLS + state.paddle
    return (ball | paddle).astype(jnp.uint8)


def catch_step(key: jax.Array, state: CatchState, action: jax.Array):
    """action: [] int, 0 left, 1 stay, 2 right. -> state, obs [10, 5, 1], reward [] float32,
    done [] bool"""
    paddle = jnp.clip(state.paddle + action - 1, 0, CATCH_COLS - 1)
    ball_row = state.ball_row + 1
    done = ball_row == CATCH_ROWS - 1
    reward = jnp.where(done, jnp.where(state.ball_col == paddle, 1.0, -1.0), 0.0)
    state = CatchState(ball_row, state.ball_col, paddle)
    state = jax.tree.map(lambda new, old: jnp.where(done, new, old), catch_reset_state(key), state)
    return state, catch_observe(state), reward, done


def make_catch() -> Env:
    def reset(key):
        state = catch_reset_state(key)
        return state, catch_observe(state)

    return Env(reset, catch_step, (CATCH_ROWS, CATCH_COLS, 1), 3)


NAMES = (*GRIDS, "catch")


def make(name: str) -> Env:
    """The environment of that name. Raises ValueError for a name that is not in NAMES."""
    if name not in NAMES:
        raise ValueError(f"unknown environment {name!r}; choose from {', '.join(NAMES)}")
    return make_catch() if name == "catch" else make_grid(GRIDS[name])
