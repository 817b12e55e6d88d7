"""Gridworlds against hand-set states and counted frequencies; Catch against all its action sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import gridworld
from gridworld import Grid, GridState, free_cell, grid_observe, grid_reset_state, grid_step

MOVES = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)]


def make_state(agent, objects, present=None, time=0):
    present = [True] * len(objects) if present is None else present
    return GridState(jnp.int32(agent), jnp.array(objects, jnp.int32), jnp.array(present), jnp.int32(time))


def steps(grid, state, action, num_keys, seed=0):
    """The same step under many keys."""
    keys = jax.random.split(jax.random.key(seed), num_keys)
    return jax.jit(jax.vmap(lambda key: grid_step(key, state, action, grid)))(keys)


@pytest.mark.parametrize("agent", range(12))
def test_moves_and_walls_from_every_cell(agent):
    grid = Grid(3, 4, 1, 0.0, 50)
    others = [cell for cell in range(12) if abs(cell // 4 - agent // 4) > 1 or abs(cell % 4 - agent % 4) > 1][:2]
    absent = make_state(agent, others or [11 - agent, agent], [False, False])
    for action, (d_row, d_col) in enumerate(MOVES):
        row, col = agent // 4 + d_row, agent % 4 + d_col
        expected = row * 4 + col if 0 <= row < 3 and 0 <= col < 4 else agent
        state, _, reward, done = grid_step(jax.random.key(action), absent, action, grid)
        assert (int(state.agent), float(reward), bool(done)) == (expected, 0.0, False)


def test_good_object_is_collected_once_and_never_ends_the_episode():
    grid = Grid(3, 8, 1, 0.0, 50)
    state, obs, reward, done = steps(grid, make_state(5, [6, 20]), 4, 500)
    assert np.all(reward == 1.0) and not np.any(done)
    np.testing.assert_array_equal(state.present[0], [False, True])
    assert np.all(state.objects[:, 1] == 20)
    assert not np.any(obs[..., 1])  # its plane is empty
    state, _, reward, _ = grid_step(jax.random.key(0), make_state(6, [6, 20], [False, True]), 0, grid)
    assert float(reward) == 0.0


def test_bad_object_costs_one_and_ends_half_of_the_episodes():
    state, _, reward, done = steps(Grid(3, 8, 1, 0.0, 50), make_state(5, [20, 6]), 4, 10_000)
    assert np.all(reward == -1.0)
    assert scipy.stats.binomtest(int(done.sum()), 10_000, 0.5).pvalue > 1e-3
    assert np.all(state.present[np.asarray(done)])  # a new episode has all its objects
    assert not np.any(state.present[~np.asarray(done), 1])


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_respawn_probability_also_in_the_step_of_collection(probability):
    grid = Grid(6, 4, 1, probability, 500)
    for state in (make_state(5, [6, 20]), make_state(6, [6, 20], [False, True])):
        after = steps(grid, state, 4 if state.present[0] else 0, 20_000)[0]
        assert scipy.stats.binomtest(int(after.present[:, 0].sum()), 20_000, probability).pvalue > 1e-3


def test_respawn_cells_are_uniform_over_the_free_ones():
    grid = Grid(3, 4, 1, 1.0, 500)
    after = steps(grid, make_state(5, [0, 11], [False, True]), 0, 20_000)[0]
    counts = np.bincount(after.objects[:, 0], minlength=12)
    free = np.setdiff1d(np.arange(12), [5, 11])
    assert counts[[5, 11]].sum() == 0
    assert scipy.stats.chisquare(counts[free]).pvalue > 1e-3


def test_objects_that_come_back_together_find_different_free_cells():
    grid = Grid(3, 3, 2, 1.0, 500)
    after = steps(grid, make_state(4, [0, 1, 2, 3], [False] * 4), 0, 5_000)[0]
    cells = np.concatenate([after.agent[:, None], after.objects], axis=1)
    assert np.all(after.present)
    assert all(len(set(row)) == 5 for row in cells.tolist())
    for i in range(4):
        counts = np.bincount(after.objects[:, i], minlength=9)
        assert counts[4] == 0 and scipy.stats.chisquare(np.delete(counts, 4)).pvalue > 1e-3


def test_free_cell_against_a_list():
    num_cells = 7
    for occupied in itertools.permutations(range(num_cells + 1), 3):
        occupied = [min(cell, num_cells) for cell in occupied]
        free = [cell for cell in range(num_cells) if cell not in occupied]
        u = (jnp.arange(len(free)) + 0.5) / len(free)
        got = jax.vmap(lambda u, occupied=occupied: free_cell(u, jnp.array(occupied), num_cells))(u)
        np.testing.assert_array_equal(got, free)


@pytest.mark.parametrize("name", list(gridworld.GRIDS))
def test_start_cells_are_distinct_and_uniform(name):
    grid = gridworld.GRIDS[name]
    u = jax.random.uniform(jax.random.key(1), (10_000, 1 + 2 * grid.num_each))
    state = jax.vmap(lambda u: grid_reset_state(u, grid))(u)
    cells = np.concatenate([state.agent[:, None], state.objects], axis=1)
    assert all(len(set(row)) == len(row) for row in cells.tolist())
    for i in range(cells.shape[1]):
        assert scipy.stats.chisquare(np.bincount(cells[:, i], minlength=grid.rows * grid.cols)).pvalue > 1e-4


@pytest.mark.parametrize("name", list(gridworld.GRIDS))
def test_horizon_ends_the_episode_and_resets_it(name):
    grid, env = gridworld.GRIDS[name], gridworld.make(name)
    last = make_state(0, range(1, 1 + 2 * grid.num_each), [False] * 2 * grid.num_each, grid.horizon - 1)
    state, _, _, done = env.step(jax.random.key(0), last._replace(time=last.time - 1), 0)
    assert not done and int(state.time) == grid.horizon - 1
    state, obs, reward, done = env.step(jax.random.key(0), last, 0)
    assert done and int(state.time) == 0 and float(reward) == 0.0
    assert np.all(state.present)
    np.testing.assert_array_equal(obs, grid_observe(state, grid))


def test_observation_planes():
    grid = Grid(4, 6, 1, 0.5, 50)
    obs = np.asarray(grid_observe(make_state(0, [23, 8], [True, False]), grid))
    expected = np.zeros((6, 8, 3))
    expected[1, 1, 0] = expected[4, 6, 1] = 1
    np.testing.assert_array_equal(obs, expected)


@pytest.mark.parametrize("name", gridworld.NAMES)
def test_shapes_and_dtypes_are_fixed(name):
    env = gridworld.make(name)
    state, obs = env.reset(jax.random.key(0))
    after, obs_after, reward, done = env.step(jax.random.key(1), state, jnp.int32(0))
    assert obs.shape == obs_after.shape == env.obs_shape and obs.dtype == obs_after.dtype
    assert reward.shape == done.shape == () and reward.dtype == jnp.float32 and done.dtype == bool
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


@pytest.mark.parametrize("column", range(5))
def test_catch_every_action_sequence_to_the_end(column):
    actions = np.array(list(itertools.product(range(3), repeat=9)))
    paddle = np.full(len(actions), 2)
    for t in range(9):
        paddle = np.clip(paddle + actions[:, t] - 1, 0, 4)

    def play(actions):
        def step(state, action):
            state, obs, reward, done = gridworld.catch_step(jax.random.key(0), state, action)
            return state, (reward, done, obs.sum())

        start = gridworld.CatchState(jnp.int32(0), jnp.int32(column), jnp.int32(2))
        return jax.lax.scan(step, start, actions)

    state, (reward, done, lit) = jax.jit(jax.vmap(play))(jnp.asarray(actions))
    np.testing.assert_array_equal(reward[:, -1], np.where(paddle == column, 1.0, -1.0))
    assert not np.any(reward[:, :-1]) and not np.any(done[:, :-1]) and np.all(done[:, -1])
    assert np.all(lit == 2)
    assert np.all(state.ball_row == 0) and np.all(state.paddle == 2)


def test_catch_starts_are_uniform_over_the_columns():
    states = jax.vmap(gridworld.catch_reset_state)(jax.random.split(jax.random.key(0), 5_000))
    assert scipy.stats.chisquare(np.bincount(states.ball_col, minlength=5)).pvalue > 1e-3


def test_unknown_name():
    with pytest.raises(ValueError, match="small_dense_long"):
        gridworld.make("big_dense")
