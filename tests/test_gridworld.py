"""Gridworlds against hand-set states and counted frequencies; Catch against all its action
sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import gridworld
from gridworld import Grid, GridState, distinct_cells, grid_observe, grid_reset_state, grid_step

MOVES = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)]


def make_state(agent, objects, present=None, time=0):
    present = [True] * len(objects) if present is None else present
    return GridState(
        jnp.int32(agent), jnp.array(objects, jnp.int32), jnp.array(present), jnp.int32(time)
    )


def steps(grid, state, action, num_keys, seed=0):
    """The same step under many keys."""
    keys = jax.random.split(jax.random.key(seed), num_keys)
    return jax.jit(jax.vmap(lambda key: grid_step(key, state, action, grid)))(keys)


@pytest.mark.parametrize("agent", range(12))
def test_moves_and_walls_from_every_cell(agent):
    grid = Grid(3, 4, 1, 0.0, 50)
    others = [
        cell
        for cell in range(12)
        if abs(cell // 4 - agent // 4) > 1 or abs(cell % 4 - agent % 4) > 1
    ][:2]
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
    state, _, reward, _ = grid_step(
        jax.random.key(0), make_state(6, [6, 20], [False, True]), 0, grid
    )
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
        assert (
            scipy.stats.binomtest(int(after.present[:, 0].sum()), 20_000, probability).pvalue > 1e-3
        )


def test_objects_respawn_at_any_cell_independently():
    """Also in the agent's cell, and in another object's: the cells of two are uniform over all
    pairs."""
    grid = Grid(3, 4, 1, 1.0, 500)
    after = steps(grid, make_state(5, [0, 11], [False, True]), 0, 20_000)[0]
    assert np.all(after.present) and np.all(after.objects[:, 1] == 11)
    assert scipy.stats.chisquare(np.bincount(after.objects[:, 0], minlength=12)).pvalue > 1e-3
    after = steps(grid, make_state(5, [0, 11], [False, False]), 0, 20_000)[0]
    pairs = after.objects[:, 0] * 12 + after.objects[:, 1]
    assert scipy.stats.chisquare(np.bincount(pairs, minlength=144)).pvalue > 1e-3


@pytest.mark.parametrize("action, collected", [(0, True), (4, False)])
def test_an_object_that_respawns_on_the_agent_is_collected_by_a_later_step_that_ends_there(
    action, collected
):
    grid = Grid(3, 4, 1, 1.0, 500)
    state, obs, reward, _ = steps(grid, make_state(5, [0, 11], [False, True]), 0, 200)
    assert np.all(reward == 0.0)  # not in the step in which it lands there
    (i,) = np.flatnonzero(state.objects[:, 0] == 5)[:1]
    landed = jax.tree.map(lambda x: x[i], state)
    assert obs[i, 2, 2, 0] == obs[i, 2, 2, 1] == 1
    _, _, reward, done = grid_step(jax.random.key(0), landed, action, grid._replace(respawn=0.0))
    assert (float(reward), bool(done)) == (float(collected), False)


def test_two_objects_in_one_cell_are_both_collected():
    state, _, reward, done = steps(Grid(3, 8, 1, 0.0, 50), make_state(5, [6, 6]), 4, 10_000)
    assert np.all(reward == 0.0)
    assert scipy.stats.binomtest(int(done.sum()), 10_000, 0.5).pvalue > 1e-3
    assert not np.any(state.present[~np.asarray(done)])
    _, _, reward, done = steps(Grid(3, 8, 2, 0.0, 50), make_state(5, [6, 6, 6, 20]), 4, 10_000)
    assert np.all(reward == 1.0)
    assert scipy.stats.binomtest(int(done.sum()), 10_000, 0.5).pvalue > 1e-3
    _, _, reward, done = steps(Grid(3, 8, 2, 0.0, 50), make_state(5, [20, 21, 6, 6]), 4, 10_000)
    assert np.all(reward == -2.0)  # each of the two may end the episode
    assert scipy.stats.binomtest(int(done.sum()), 10_000, 0.75).pvalue > 1e-3


def test_every_draw_of_distinct_cells_comes_once():
    num_cells, k = 6, 4
    slots = itertools.product(*(range(num_cells - i) for i in range(k)))
    u = [[(slot + 0.5) / (num_cells - i) for i, slot in enumerate(draw)] for draw in slots]
    cells = jax.vmap(lambda u: distinct_cells(u, num_cells))(jnp.array(u))
    assert sorted(map(tuple, cells.tolist())) == sorted(itertools.permutations(range(num_cells), k))


@pytest.mark.parametrize("name", ["small_sparse_long", "big_dense_short"])
def test_start_cells_are_distinct_and_uniform(name):
    grid = gridworld.GRIDS[name]
    u = jax.random.uniform(jax.random.key(1), (10_000, 1 + 2 * grid.num_each))
    state = jax.vmap(lambda u: grid_reset_state(u, grid))(u)
    cells = np.concatenate([state.agent[:, None], state.objects], axis=1)
    assert all(len(set(row)) == len(row) for row in cells.tolist())
    for i in range(cells.shape[1]):
        assert (
            scipy.stats.chisquare(np.bincount(cells[:, i], minlength=grid.rows * grid.cols)).pvalue
            > 1e-4
        )


@pytest.mark.parametrize("name", ["small_sparse_long", "big_dense_short"])
def test_horizon_ends_the_episode_and_resets_it(name):
    grid, env = gridworld.GRIDS[name], gridworld.make(name)
    last = make_state(
        0, range(1, 1 + 2 * grid.num_each), [False] * 2 * grid.num_each, grid.horizon - 1
    )
    state, _, _, done = env.step(jax.random.key(0), last._replace(time=last.time - 1), 0)
    assert not done and int(state.time) == grid.horizon - 1
    state, obs, reward, done = env.step(jax.random.key(0), last, 0)
    assert done and int(state.time) == 0 and float(reward) == 0.0
    assert np.all(state.present)
    np.testing.assert_array_equal(obs, grid_observe(state, grid))


@pytest.mark.parametrize("bad, time", [(6, 0), (0, 49)])
def test_the_episode_after_one_that_ended_starts_anywhere(bad, time):
    """It ended by a bad object at the agent's next cell, or by the horizon."""
    grid = Grid(3, 4, 1, 0.0, 50)
    state, _, _, done = steps(grid, make_state(5, [11, bad], time=time), 4, 20_000)
    assert np.all(done) == (time == 49) and done.sum() > 9_000
    cells = np.column_stack([state.agent, state.objects])[np.asarray(done)]
    assert all(len(set(row)) == 3 for row in cells.tolist())
    for column in cells.T:
        assert scipy.stats.chisquare(np.bincount(column, minlength=12)).pvalue > 1e-3


# --- Whole episodes under a fixed policy, against the paper's rules written as plain Python ---

# reward, probability that the episode ends when it is collected; interior size, respawn, horizon:
# the paper's appendix
GOOD, BAD = (1.0, 0.0), (-1.0, 0.5)
PAPER = {
    "small_sparse_short": (3, 8, [GOOD, BAD], 0.05, 50),
    "small_sparse_long": (8, 3, [GOOD, BAD], 0.05, 500),
    "small_dense_short": (4, 6, [GOOD, BAD], 0.5, 50),
    "small_dense_long": (6, 4, [GOOD, BAD], 0.5, 500),
    "big_sparse_short": (10, 12, [GOOD, GOOD, BAD, BAD], 0.05, 50),
    "big_sparse_long": (12, 10, [GOOD, GOOD, BAD, BAD], 0.05, 500),
    "big_dense_short": (9, 13, [GOOD, GOOD, BAD, BAD], 0.5, 50),
    "big_dense_long": (13, 9, [GOOD, GOOD, BAD, BAD], 0.5, 500),
}


class NaiveGrid:
    """One gridworld; an absent object is None."""

    def __init__(self, name, rng):
        self.rows, self.cols, self.kinds, self.respawn, self.horizon = PAPER[name]
        self.rng, self.steps = rng, 0
        cells = [(row, col) for row in range(self.rows) for col in range(self.cols)]
        self.agent, *self.objects = (
            cells[i] for i in rng.permutation(len(cells))[: 1 + len(self.kinds)]
        )

    def step(self, action):
        row, col = self.agent[0] + MOVES[action][0], self.agent[1] + MOVES[action][1]
        if row in range(self.rows) and col in range(self.cols):
            self.agent = (row, col)
        total, done = 0.0, False
        for i, (reward, end_probability) in enumerate(self.kinds):
            if self.objects[i] == self.agent:
                total += reward
                done = done or self.rng.random() < end_probability
                self.objects[i] = None
            if self.objects[i] is None and self.rng.random() < self.respawn:
                self.objects[i] = (
                    int(self.rng.integers(self.rows)),
                    int(self.rng.integers(self.cols)),
                )
        self.steps += 1
        return total, done or self.steps == self.horizon


def distances(targets, walls):
    """Moves from every cell to the nearest target, not through walls; inf where there is no way.
    [B, rows, cols]"""
    distance = np.where(targets & ~walls, 0.0, np.inf)
    while True:
        padded = np.pad(distance, ((0, 0), (1, 1), (1, 1)), constant_values=np.inf)
        rows, cols = distance.shape[1:]
        near = np.min(
            [padded[:, 1 + r : 1 + r + rows, 1 + c : 1 + c + cols] for r, c in MOVES], axis=0
        )
        nearer = np.where(walls, np.inf, np.minimum(distance, near + 1))
        if np.array_equal(nearer, distance):
            return distance
        distance = nearer


def nearest_good(agent, good, bad):
    """Go to the nearest good object, around the bad ones if there is a way; stay if there is none
    to go to.

    agent, good, bad: where they are, [B, rows, cols] bool -> actions [B]
    """
    around, through = distances(good, bad), distances(good, np.zeros_like(bad))
    batch, row, col = np.nonzero(agent)
    assert np.array_equal(batch, np.arange(len(agent)))
    rows, cols = agent.shape[1:]
    costs = np.full((len(agent), 9), np.inf)
    for action, (d_row, d_col) in enumerate(MOVES):
        r, c = row + d_row, col + d_col
        inside = (0 <= r) & (r < rows) & (0 <= c) & (c < cols)
        r, c = np.clip(r, 0, rows - 1), np.clip(c, 0, cols - 1)
        some_way = np.minimum(around[batch, r, c], 1e3 + np.minimum(through[batch, r, c], 1e3))
        costs[:, action] = np.where(inside, some_way, np.inf)
    return np.argmin(costs, axis=1)


def play_naive(name, num_episodes):
    """-> returns and lengths of that many episodes"""
    rng = np.random.default_rng(0)
    envs = [NaiveGrid(name, rng) for _ in range(num_episodes)]
    shape, num_good = (num_episodes, *PAPER[name][:2]), len(PAPER[name][2]) // 2
    returns, lengths, over = (
        np.zeros(num_episodes),
        np.zeros(num_episodes),
        np.zeros(num_episodes, bool),
    )
    while not over.all():
        agent, good, bad = (np.zeros(shape, bool) for _ in range(3))
        for i, env in enumerate(envs):
            agent[i][env.agent] = True
            for j, cell in enumerate(env.objects):
                if cell is not None:
                    (good if j < num_good else bad)[i][cell] = True
        for i, action in enumerate(nearest_good(agent, good, bad)):
            if not over[i]:
                reward, over[i] = envs[i].step(action)
                returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
    return returns, lengths


def play(name, num_episodes):
    """The same with the project's environment, seen through its observations."""
    env, num_good = gridworld.make(name), gridworld.GRIDS[name].num_each
    key_reset, key_steps = jax.random.split(jax.random.key(0))
    state, obs = jax.vmap(env.reset)(jax.random.split(key_reset, num_episodes))
    step = jax.jit(jax.vmap(env.step))
    returns, lengths, over = (
        np.zeros(num_episodes),
        np.zeros(num_episodes),
        np.zeros(num_episodes, bool),
    )
    while not over.all():
        agent, *objects = np.moveaxis(np.asarray(obs, bool)[:, 1:-1, 1:-1], -1, 0)
        actions = nearest_good(
            agent, np.any(objects[:num_good], axis=0), np.any(objects[num_good:], axis=0)
        )
        keys = jax.random.split(jax.random.fold_in(key_steps, int(lengths.max())), num_episodes)
        state, obs, reward, done = step(keys, state, actions)
        returns, lengths = returns + np.where(over, 0, reward), lengths + ~over
        over = over | np.asarray(done)
    return returns, lengths


def test_the_grids_are_the_papers():
    for name, (rows, cols, kinds, respawn, horizon) in PAPER.items():
        assert gridworld.GRIDS[name] == Grid(rows, cols, len(kinds) // 2, respawn, horizon)
    assert set(gridworld.GRIDS) == set(PAPER)


@pytest.mark.parametrize("name", ["small_dense_long", "big_sparse_short", "big_dense_short"])
def test_returns_and_lengths_under_a_fixed_policy_are_those_of_the_rules(name):
    num_episodes = 200 if name.endswith("short") else 100
    for ours, naive in zip(play(name, num_episodes), play_naive(name, num_episodes), strict=True):
        standard_error = np.sqrt((ours.var() + naive.var()) / num_episodes)
        assert abs(ours.mean() - naive.mean()) <= 3 * standard_error


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
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )


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


def test_catch_shows_the_ball_and_the_paddle_where_they_are():
    obs = np.asarray(gridworld.catch_observe(gridworld.CatchState(3, 1, 4)))
    np.testing.assert_array_equal(np.argwhere(obs), [[3, 1, 0], [9, 4, 0]])


def test_the_ball_after_a_catch_starts_in_any_column():
    env = gridworld.make("catch")
    last = gridworld.CatchState(*map(jnp.int32, (8, 0, 2)))
    keys = jax.random.split(jax.random.key(0), 5_000)
    state, _, _, done = jax.vmap(lambda key: env.step(key, last, 1))(keys)
    assert np.all(done)
    assert scipy.stats.chisquare(np.bincount(state.ball_col, minlength=5)).pvalue > 1e-3


def test_catch_starts_are_uniform_over_the_columns():
    states = jax.vmap(gridworld.catch_reset_state)(jax.random.split(jax.random.key(0), 5_000))
    assert scipy.stats.chisquare(np.bincount(states.ball_col, minlength=5)).pvalue > 1e-3


def test_unknown_name():
    with pytest.raises(ValueError, match="small_dense_long"):
        gridworld.make("big_dense")
