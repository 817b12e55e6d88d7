"""Persistent and noise-reuse evolution strategies: on a problem whose gradient is known, and
against plain ones."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a2c import Agent
from meta_gradient import Unit, nres, pes
from optim4rl import LearnedOptimizer
from pipeline_train import Args, Schedule, Task, new_unit, schedule, train_group
from tasks import fill_in

# An agent is a point x that moves by theta at every update and is paid minus half its squared
# distance from `goal`; after T updates from 0 it is at T theta, so the mean pay of a life of T
# updates is -1/2 mean_t (t theta - goal)^2. `chance` is added to its pay, and is another wherever x
# is.
GOAL = jnp.array([1.0, -2.0])
SIGMA = 0.05


class State(NamedTuple):
    params: jax.Array
    opt_state: tuple
    reward_factor: jax.Array


def make_point(chance=0.0):
    def init(key, optimizer):
        del key
        x = jnp.zeros(2)
        return State(x, optimizer.init(x), jnp.ones(()))

    def learn(key, state, optimizer, progress):
        del key, progress
        updates, opt_state = optimizer.update(jnp.zeros(2), state.opt_state, state.params)
        x = optax.apply_updates(state.params, updates)
        reward = -0.5 * jnp.sum((x - GOAL) ** 2) + chance * jnp.sum(jnp.sin(1e4 * x))
        return State(x, opt_state, state.reward_factor), (), {"reward": reward, "return": reward}

    return Agent(init, learn, None, 1)


MOVE = LearnedOptimizer(
    init_theta=lambda key: {"step": jnp.zeros(2)},
    init_state=lambda params: (),
    update=lambda theta, grads, state, params, learning_rate, **extra: (
        learning_rate * theta["step"],
        state,
    ),
    rule=None,
)


def life_gradient(theta, length):
    """d/d theta of the mean over t = 1 .. T of 1/2 |t theta - goal|^2, by hand."""
    t = np.arange(1, length + 1)[:, None]
    return np.mean(t * (t * np.asarray(theta) - np.asarray(GOAL)), axis=0)


def estimate(estimator, num_pairs, num_windows, inner_updates, chance=0.0):
    """What pes or nres estimates at one theta, from each pair in each window of a life. -> [pairs,
    windows, 2], noise, theta"""
    theta = {"step": jnp.array([0.1, -0.05])}
    options = {
        "agent": make_point(chance),
        "learned": MOVE,
        "inner_updates": inner_updates,
        "lifetime": 9,
        "sigma": SIGMA,
    }
    twice = functools.partial(jnp.repeat, repeats=2, axis=1)  # [pairs, 1, ...] -> [pairs, 2, ...]
    agent = State(jnp.zeros((num_pairs, 2, 2)), (), jnp.ones((num_pairs, 2)))
    noise = jnp.zeros((num_pairs, 2)) if estimator is pes else life_noise(num_pairs)
    units = Unit(agent, jnp.ones((num_pairs, 2)), {"step": twice(noise[:, None])})

    def of_pair(keys, units, age):
        return estimator(
            theta, Schedule(None, jnp.full(2, age), jnp.array([1.0, -1.0]), keys), units, **options
        )[:2]

    of_pairs, found = jax.jit(jax.vmap(of_pair, (0, 0, None))), []
    for window in range(num_windows):
        keys = twice(jax.random.split(jax.random.key(window), num_pairs)[:, None])
        gradient, units = of_pairs(keys, units, window)
        found.append(gradient["step"] / 2)
    return np.stack(found, axis=1), units.noise["step"], theta["step"]


def life_noise(num_pairs):
    """What nres' pairs got when they began."""
    return jax.random.normal(jax.random.key(99), (num_pairs, 2))


def window_noise(window, num_pairs):
    """What pes draws for its pairs."""
    keys = jax.vmap(jax.random.split)(jax.random.split(jax.random.key(window), num_pairs))[:, 0]
    return jax.vmap(
        lambda key: optax.tree.random_like(key, {"step": jnp.zeros(2)}, jax.random.normal)["step"]
    )(keys)


@pytest.mark.parametrize("estimator", [pes, nres])
def test_one_window_a_life_is_plain_evolution_strategies(estimator):
    """-> mean over pairs of (f(theta + e) - f(theta - e)) e / (2 sigma^2)."""
    found, _, theta = estimate(estimator, 3, 1, 4)

    def loss(theta):
        return np.mean([0.5 * np.sum((t * theta - np.asarray(GOAL)) ** 2) for t in range(1, 5)])

    expected = np.zeros(2)
    for noise in SIGMA * np.asarray(window_noise(0, 3) if estimator is pes else life_noise(3)):
        expected += (loss(theta + noise) - loss(theta - noise)) * noise / (2 * SIGMA**2) / 3
    np.testing.assert_allclose(found.mean(axis=(0, 1)), expected, rtol=1e-3)


@pytest.mark.parametrize("estimator", [pes, nres])
def test_windows_add_up_to_the_gradient_of_the_whole_life(estimator):
    """Without bias: truncated evolution strategies would miss how early windows move later ones."""
    found, _, theta = estimate(estimator, 20_000, 3, 2)
    np.testing.assert_allclose(found.mean(axis=(0, 1)), life_gradient(theta, 6), rtol=0.05)
    # What a window alone would say: x is given when it begins, and only t theta within it counts.
    t, start = np.tile([1, 2], 3)[:, None], np.repeat([0, 2, 4], 2)[:, None]
    truncated = np.mean(t * ((start + t) * np.asarray(theta) - np.asarray(GOAL)), axis=0)
    assert np.abs(truncated - life_gradient(theta, 6)).min() > 0.3


def test_the_perturbations_of_pes_add_up_and_those_of_nres_stay():
    expected = sum(window_noise(window, 2) for window in range(3))
    for estimator, each in ((pes, expected), (nres, life_noise(2))):
        noise = estimate(estimator, 2, 3, 2)[1]
        np.testing.assert_allclose(noise, np.repeat(each[:, None], 2, axis=1), rtol=1e-5)


def test_what_chance_does_matters_less_to_nres():
    """By the number of windows that a life has had, if chance is nearly all: in mean (1 + 2 + .. +
    8) / 8 times."""

    def spread(estimator, chance):
        return estimate(estimator, 4000, 8, 1, chance)[0].mean(axis=1).var(axis=0)

    np.testing.assert_allclose(spread(pes, 100.0) / spread(nres, 100.0), 4.5, rtol=0.2)
    # Without any, pes has looked in more directions.
    assert np.all(spread(pes, 0.0) < spread(nres, 0.0))


def test_pairs_share_keys_and_slots():
    args = fill_in(
        Args(
            env_name=("catch",),
            meta_estimator="pes",
            num_units=6,
            reset_interval=5,
            num_iterations=9,
        )
    )
    for t in range(7):
        plan = schedule(jax.random.key(1), jnp.int32(t), args)
        for field in (plan.due, plan.age, jax.random.key_data(plan.key)):
            np.testing.assert_array_equal(field[::2], field[1::2])
        np.testing.assert_array_equal(plan.sign, [1, -1, 1, -1, 1, -1])
        np.testing.assert_array_equal(plan.due[::2], [t % 5 == 0, t % 5 == 1, t % 5 == 3])


def lives(estimator, num_iterations=7):
    """The units' noise after each iteration of pipeline training, and what was planned. -> [T, N,
    2], Schedule [T, ...]"""
    names = {pes: "pes", nres: "nres"}
    args = fill_in(
        Args(
            env_name=("catch",),
            meta_estimator=names[estimator],
            num_units=6,
            reset_interval=5,
            num_iterations=9,
        )
    )
    theta, task = {"step": jnp.ones(2)}, Task(make_point(), 0.3)
    start = jax.vmap(functools.partial(new_unit, theta=theta, task=task, learned=MOVE, args=args))

    def iteration(units, t):
        plan = schedule(jax.random.fold_in(jax.random.key(1), t), t, args)
        units = train_group(theta, plan, units, task, MOVE, args)[1]
        return units, (units.noise["step"], plan.due)

    units = start(schedule(jax.random.key(0), 0, args).key)
    return jax.jit(lambda units: jax.lax.scan(iteration, units, jnp.arange(num_iterations)))(units)[
        1
    ]


def test_in_a_life_nres_keeps_its_noise_and_the_next_has_another():
    noise, due = map(np.asarray, lives(nres))
    np.testing.assert_array_equal(noise[:, ::2], noise[:, 1::2])
    changed = np.any(noise[1:] != noise[:-1], axis=-1)
    np.testing.assert_array_equal(changed, due[1:])
    assert len(np.unique(noise[..., 0])) == 3 + due[1:, ::2].sum()  # all lives' are different


def test_in_a_life_the_noise_of_pes_adds_up_and_begins_again():
    noise, due = map(np.asarray, lives(pes, 400))
    np.testing.assert_array_equal(noise[:, ::2], noise[:, 1::2])
    # After the first, second ... fifth window of a life: variance 1, 2 ... 5.
    ages = (np.arange(400)[:, None] - np.argmax(due[:5], axis=0)) % 5
    found = [np.var(noise[5:, ::2][ages[5:, ::2] == age]) for age in range(5)]
    np.testing.assert_allclose(found, [1, 2, 3, 4, 5], rtol=0.25)
