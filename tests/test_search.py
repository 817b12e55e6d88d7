"""The search for adam4rl's theta: its tasks, its lifetimes and its fitness."""

import contextlib
import json
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gridworld
import lifetimes
import optimizers
import search
import search_tasks
import tasks
from adam4rl import NUM_INPUTS, SIZES, make_adam4rl
from optim4rl import to_optax

KEY = jax.random.key(0)  # of a step: the tasks are deterministic
NUMBERS = sum(SIZES.values())
SPACE = search.search_space(search.Args())


def with_rate(rate):
    """Adam with e^rate times its learning rate, as a vector."""
    theta = make_adam4rl().init_theta(jax.random.key(0))
    return ravel_pytree(theta | {"rate": jnp.array([rate, 0.0])})[0]


def test_ranks_are_symmetric_and_equal_scores_share_one():
    np.testing.assert_allclose(lifetimes.ranks(np.array([3.0, 1.0, 2.0])), [1 / 3, -1 / 3, 0])
    np.testing.assert_allclose(
        lifetimes.ranks(np.array([1.0, 1.0, 5.0, 0.0])), [0, 0, 3 / 8, -3 / 8]
    )
    assert (lifetimes.ranks(np.full(4, 2.0)) == 0).all()


def test_fitness_is_the_mean_rank_of_both_scores():
    scores = np.array([[[3.0, 1.0], [1.0, 2.0], [2.0, 3.0]]])  # ranks 1/3 -1/3 0 and -1/3 0 1/3
    np.testing.assert_allclose(lifetimes.fitness(scores), [0, -1 / 6, 1 / 6], atol=1e-12)


def test_points_of_the_search_are_multiples_of_the_scales_from_the_start(tmp_path):
    space = search.search_space(search.Args())
    assert (space.adam == 0).all() and (space.start == 0).all() and (space.scale > 0).all()
    theta = space.unflatten(jnp.float32(space.thetas(np.full((1, NUMBERS), 2.0))[0]))
    for name, scale in search.SCALES.items():
        np.testing.assert_allclose(theta[name], 2 * np.array(scale), rtol=1e-6)
    # The network alone, on top of that theta.
    path = str(tmp_path / "theta.npz")
    optimizers.save_theta(path, theta, "adam4rl", {}, {})
    args = search.Args(theta=path, network_size=3, only_network=True)
    space = search.search_space(args)
    weights = 3 * NUM_INPUTS + 3 + 2 * 3 + 2
    assert np.count_nonzero(space.scale) == weights and len(space.start) == NUMBERS + weights
    moved = space.unflatten(jnp.float32(space.thetas(np.full((1, weights), -1.0))[0]))
    untrained = make_adam4rl(3).init_theta(jax.random.key(args.seed))
    for name in search.SCALES:
        np.testing.assert_allclose(moved[name], theta[name], rtol=1e-6)
    change = jax.tree.map(jnp.subtract, moved["network"], untrained["network"])
    jax.tree.map(lambda x: np.testing.assert_allclose(x, -0.3, atol=1e-6), change)


def test_theta_is_the_average_over_the_last_third_of_generations():
    means = [np.array([x, 1.0]) for x in (9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 4.0)]
    assert search.late_mean(means).tolist() == [14 / 3, 1.0]  # three of seven
    assert search.late_mean(means[:1]).tolist() == [9.0, 1.0]


def test_several_environments_are_independent_copies():
    one = tasks.make_learner("cartpole").env
    three = search_tasks.several(one, 3)
    state, obs = three.reset(jax.random.key(0))
    assert obs.shape == (three.obs_size,) and three.action_size == 3 * one.action_size
    action = jnp.array([0.5, -1.0, 1.0])
    state, obs, reward, terminated = three.step(KEY, state, action)
    _, start = three.reset(jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 3)
    expected = [one.step(KEY, one.reset(key)[0], action[i : i + 1]) for i, key in enumerate(keys)]
    np.testing.assert_allclose(obs, np.concatenate([e[1] for e in expected]), rtol=1e-6)
    np.testing.assert_allclose(reward, np.mean([e[2] for e in expected]), rtol=1e-6)
    assert not terminated and np.unique(start).size > one.obs_size  # other starts
    step = jax.jit(three.step)
    for _ in range(200):  # all the way to the right: only the last copy leaves the track
        state, *_, terminated = step(KEY, state, jnp.array([0.0, 0.0, 1.0]))
        if terminated:
            break
    assert terminated


def test_mixed_observations_are_of_the_same_environment():
    plain = tasks.make_learner("pendulum").env
    mixed = search_tasks.mixed(plain, 50)
    state, obs = mixed.reset(jax.random.key(0))
    same, plain_obs = plain.reset(jax.random.key(0))
    step = mixed.step(KEY, state, jnp.ones(1)), plain.step(KEY, same, jnp.ones(1))
    assert step[0][2] == step[1][2] and obs.shape == (mixed.obs_size,) == (50,)
    # Invertible: the plain observation is a linear function of the mixed one.
    mixing = jax.random.normal(jax.random.key(0), (3, 50)) / np.sqrt(3)
    found = np.linalg.lstsq(np.asarray(mixing).T, np.arctanh(obs), rcond=None)[0]
    np.testing.assert_allclose(found, plain_obs, rtol=1e-3, atol=1e-3)


def test_moving_objects_move_one_column_a_step_around_the_grid():
    grid = gridworld.Grid(6, 8, 2, 0.5, 1000)
    env, stay = search_tasks.moving(grid), jnp.int32(gridworld.MOVES.index((0, 0)))
    state, obs = env.reset(jax.random.key(2))

    def places(obs):  # row and column of agent and objects, without the wall
        return [
            tuple(int(x) - 1 for x in np.argwhere(plane)[0]) for plane in np.moveaxis(obs, 2, 0)
        ]

    (agent, *start) = places(np.asarray(obs))
    assert all(row != agent[0] for row, _ in start)  # none is collected
    for t in range(1, 20):
        state, obs, reward, done = env.step(jax.random.key(t), state, stay)
        left = [(row, (col - t) % 8) for row, col in start[::2]]
        right = [(row, (col + t) % 8) for row, col in start[1::2]]
        assert places(np.asarray(obs)) == [agent, left[0], right[0], left[1], right[1]]
        assert reward == 0 and not done


SMALL = {"num_envs": 4, "batch_size": 2, "num_minibatches": 2, "num_epochs": 1, "rollout_steps": 4}
SMALL |= {"policy_layers": (8,), "value_layers": (8,)}


@pytest.fixture(scope="module")
def score():
    """Compiled once: all tests have four candidates."""
    small = search_tasks.SearchTask(
        lambda: search_tasks.ppo_on("cartpole", **SMALL), "reward", 2, 4
    )
    return lifetimes.make_lifetimes(small)


def test_candidates_share_seeds_and_one_that_diverges_scores_lowest(score):
    thetas = jnp.stack([with_rate(rate) for rate in (0.0, 0.0, 1.0, 200.0)])
    scores = score(thetas, jax.random.key(1), 12)
    assert (scores[0] == scores[1]).all() and (scores[0] != scores[2]).any()
    assert (scores[3] == -1e9).all() and np.isfinite(scores[:3]).all()


def test_a_lifetimes_scores_are_the_means_of_all_and_of_the_last_tenth(score):
    num_updates = 8  # the last tenth is one update at least
    agent = search_tasks.ppo_on("cartpole", **SMALL)
    theta = with_rate(-4.0)  # small steps, so that rounding does not grow
    optimizer = to_optax(make_adam4rl(), SPACE.unflatten(theta), 1.0)
    learn = jax.jit(agent.learn, static_argnums=2)
    key_init, key_learn = jax.random.split(jax.random.key(1))
    state, rewards = agent.init(key_init, optimizer), []
    for n in range(num_updates):
        key = jax.random.fold_in(key_learn, n)
        state, _, metrics = learn(key, state, optimizer, n, num_updates)
        rewards.append(metrics["reward"])
    scores = score(jnp.tile(theta, (4, 1)), jax.random.key(1), num_updates)
    np.testing.assert_allclose(scores[0], [np.mean(rewards), rewards[-1]], rtol=1e-3)


def test_on_an_accelerator_threads_answer_and_a_failure_is_raised(score, monkeypatch):
    monkeypatch.setattr(lifetimes, "compiled", lambda name, size: {"one": score}[name])
    monkeypatch.setattr(lifetimes.jax, "default_backend", lambda: "gpu")
    thetas = np.array([with_rate(rate) for rate in (0.0, 1.0, -1.0, 0.5)])
    drawn = [("one", 1, 6), ("one", 2, 4)]
    with lifetimes.start_workers(0) as submit:
        scores = lifetimes.train(thetas, drawn, submit)
        with pytest.raises(KeyError, match="other"):
            lifetimes.train(thetas, [("other", 1, 6)], submit)
    for (_, seed, num_updates), found in zip(drawn, scores, strict=True):
        expected = score(jnp.float32(thetas), jax.random.key(seed), num_updates)
        np.testing.assert_array_equal(found, expected)


class Halving:
    """In place of CMA-ES: its mean goes half of the way to the best candidate."""

    def __init__(self, start, sigma, options):
        self.mean, self.sigma, self.countiter, self.N = start, sigma, 0, len(start)
        assert (options["popsize"], options["seed"]) == (3, 7)

    def ask(self):
        return [self.mean + shift for shift in (-1.0, 0.0, 1.0)]

    def tell(self, candidates, losses):
        self.mean = (self.mean + candidates[np.argmin(losses)]) / 2
        self.countiter += 1


def test_a_search_is_continued_by_more_generations(tmp_path, monkeypatch, capsys):
    def train(thetas, drawn, *_, **__):  # best where theta's numbers are large
        return np.tile(thetas.sum(axis=1)[:, None], (len(drawn), 1, 2))

    monkeypatch.setattr(search, "start_workers", contextlib.nullcontext)
    monkeypatch.setattr(search, "train", train)
    cma = types.SimpleNamespace(CMAEvolutionStrategy=Halving)
    monkeypatch.setitem(sys.modules, "cma", cma)
    for name, runs in {"once": (5,), "continued": (2, 5)}.items():
        for generations in runs:
            flags = ["--generations", str(generations), "--out", str(tmp_path / name)]
            flags += ["--population", "3", "--seed", "7"]
            monkeypatch.setattr("sys.argv", ["search.py", *flags])
            search.main()
    rows = (tmp_path / "once.jsonl").read_text()
    assert (tmp_path / "continued.jsonl").read_text() == rows
    assert [json.loads(row)["generation"] for row in rows.splitlines()] == [1, 2, 3, 4, 5]
    # The mean moves by half a scale in each; the last third of 0, .5 ... 2.5 is 2 and 2.5.
    for name in ("once", "continued"):
        _, theta, header = optimizers.load_learned(str(tmp_path / f"{name}.npz"))
        np.testing.assert_allclose(theta["momenta"], 2.25 * np.array(search.SCALES["momenta"]))
        assert header["trained"]["generations"] == 5
    for flag, value, begun in (("network-size", "2", "0"), ("seed", "8", "7")):
        monkeypatch.setattr("sys.argv", ["search.py", *flags, f"--{flag}", value])
        with pytest.raises(SystemExit):
            search.main()
        assert f"continued.pkl was begun with --{flag} {begun};" in capsys.readouterr().err


def refused(monkeypatch, capsys, *flags):
    """-> the line that search.py ends with"""
    monkeypatch.setattr("sys.argv", ["search.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        search.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    return err


def test_a_search_is_not_continued_from_another_theta_or_file(tmp_path, monkeypatch, capsys):
    cma = types.SimpleNamespace(CMAEvolutionStrategy=Halving)
    monkeypatch.setitem(sys.modules, "cma", cma)
    theta = make_adam4rl().init_theta(jax.random.key(0))
    start, out = tmp_path / "start.npz", tmp_path / "out"
    optimizers.save_theta(start, theta, "adam4rl", {}, {})
    args = search.Args(theta=str(start), out=str(out), population=3, seed=7)
    space = search.search_space(args)
    search.save(args, space, *search.begin(args, space))
    flags = ["--theta", start, "--population", 3, "--seed", 7, "--out"]
    optimizers.save_theta(start, theta | {"whitening": jnp.ones(1)}, "adam4rl", {}, {})
    assert "start.npz has changed since" in refused(monkeypatch, capsys, *flags, out)
    assert "would be overwritten" in refused(monkeypatch, capsys, *flags, tmp_path / "start")
    old = pickle.dumps((vars(args) | {"minutes": 9}, space.start))
    other = pickle.dumps((1, 2))
    missing = b"cnosuchmodule\nname\n."
    for written in (b"something else", old, other, missing):
        out.with_suffix(".pkl").write_bytes(written)
        assert "out.pkl: not of search.py" in refused(monkeypatch, capsys, *flags, out)


def test_shipped_weights_are_not_overwritten_by_a_search_from_them(monkeypatch, capsys):
    flags = ["--theta", "pretrained/adam4rl", "--out", optimizers.PRETRAINED / "adam4rl"]
    assert "would be overwritten" in refused(monkeypatch, capsys, *flags)


def test_tasks_are_drawn_from_those_given(monkeypatch, tmp_path):
    seen = []

    def train(thetas, drawn, *_, **__):
        seen.extend(name for name, *_ in drawn)
        return np.zeros((len(drawn), len(thetas), 2))

    monkeypatch.setattr(search, "start_workers", contextlib.nullcontext)
    monkeypatch.setattr(search, "train", train)
    cma = types.SimpleNamespace(CMAEvolutionStrategy=Halving)
    monkeypatch.setitem(sys.modules, "cma", cma)
    flags = ["--population", "3", "--seed", "7", "--generations", "3", "--out", tmp_path / "x"]
    flags += ["--tasks-per-generation", "2", "--tasks", "pendulum", "cartpole", "5 x 5"]
    monkeypatch.setattr("sys.argv", ["search.py", *map(str, flags)])
    search.main()
    assert sorted(seen) == sorted(["pendulum", "cartpole", "5 x 5"] * 2)  # each once before again
    trained = optimizers.load_learned(str(tmp_path / "x.npz"))[2]["trained"]
    assert trained["env_name"] == ["pendulum", "cartpole", "5 x 5"]


def test_an_unknown_task_is_refused(monkeypatch, capsys):
    assert "--tasks: 'catch' is none of" in refused(monkeypatch, capsys, "--tasks", "catch")
    assert "--tasks" in refused(monkeypatch, capsys, "--tasks")


@pytest.mark.parametrize("trained", [{}, {"trained": None}, {"trained": "by hand"}])
def test_a_theta_that_does_not_say_how_it_was_trained_is_loaded(trained, tmp_path):
    theta = make_adam4rl().init_theta(jax.random.key(0))
    header = {"format": optimizers.FORMAT, "optimizer": "adam4rl", "config": {}, **trained}
    np.savez(path := tmp_path / "x.npz", header=np.array(json.dumps(header)), **theta)
    assert search.load(str(path))[1:] == (0, {})
