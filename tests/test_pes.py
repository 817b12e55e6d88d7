"""Persistent evolution strategies: on a problem whose gradient is known, and against plain evolution strategies."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from a2c import Agent
from meta_gradient import Unit, pes
from optim4rl import LearnedOptimizer
from pipeline_train import Args, fill_in
from units import Task, new_unit, schedule

# An agent is a point x that moves by theta at every update and is paid minus half its squared distance from `goal`; after T
# updates from 0 it is at T theta, so the mean pay of a life of T updates is -1/2 mean_t (t theta - goal)^2.
GOAL = jnp.array([1.0, -2.0])
SIGMA = 0.05


class State(NamedTuple):
    params: jax.Array
    opt_state: tuple
    reward_factor: jax.Array


def make_point():
    def init(key, optimizer):
        del key
        x = jnp.zeros(2)
        return State(x, optimizer.init(x), jnp.ones(()))

    def learn(key, state, optimizer, progress):
        del key, progress
        updates, opt_state = optimizer.update(jnp.zeros(2), state.opt_state, state.params)
        x = optax.apply_updates(state.params, updates)
        reward = -0.5 * jnp.sum((x - GOAL) ** 2)
        return State(x, opt_state, state.reward_factor), (), {"reward": reward, "return": reward}

    return Agent(init, learn, None, 1)


MOVE = LearnedOptimizer(
    init_theta=lambda key: {"step": jnp.zeros(2)},
    init_state=lambda params: (),
    update=lambda theta, grads, state, params, learning_rate, **extra: (learning_rate * theta["step"], state),
    rule=None,
)


def life_gradient(theta, length):
    """d/d theta of the mean over t = 1 .. T of 1/2 |t theta - goal|^2, by hand."""
    t = np.arange(1, length + 1)[:, None]
    return np.mean(t * (t * np.asarray(theta) - np.asarray(GOAL)), axis=0)


def estimate(num_units, num_windows, inner_updates):
    """The mean over the windows of a life of pes' estimates at one theta."""
    theta = {"step": jnp.array([0.1, -0.05])}
    estimator = functools.partial(pes, agent=make_point(), learned=MOVE, inner_updates=inner_updates, lifetime=9, sigma=SIGMA)
    agent = jax.vmap(lambda _: make_point().init(None, optax.identity()))(jnp.arange(num_units))
    agent = agent._replace(opt_state=())
    perturbation = {"step": jnp.zeros((num_units, 2))}
    units, signs = Unit(agent, jnp.ones(num_units), perturbation), 1.0 - 2 * (jnp.arange(num_units) % 2)
    total = 0.0
    for window in range(num_windows):
        keys = jnp.repeat(jax.random.split(jax.random.key(window), num_units // 2), 2)
        gradient, units, _ = jax.jit(estimator)(theta, keys, units, jnp.full(num_units, window), signs)
        total += gradient["step"] / num_units
    return total / num_windows, units, theta["step"]


def test_one_window_a_life_is_plain_evolution_strategies():
    """-> sum over pairs of (f(theta + e) - f(theta - e)) e / (2 sigma^2), with the noise drawn as pes draws it."""
    found, _, theta = estimate(6, 1, 4)

    def loss(theta):
        return np.mean([0.5 * np.sum((t * theta - np.asarray(GOAL)) ** 2) for t in range(1, 5)])

    expected = np.zeros(2)
    for key in jax.random.split(jax.random.key(0), 3):
        key_perturb = jax.random.split(key)[0]
        noise = SIGMA * np.asarray(optax.tree.random_like(key_perturb, {"step": theta}, jax.random.normal)["step"])
        expected += (loss(theta + noise) - loss(theta - noise)) * noise / (2 * SIGMA**2) / 3
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_windows_add_up_to_the_gradient_of_the_whole_life():
    """Without bias: truncated evolution strategies would miss how early windows move later ones."""
    found, _, theta = estimate(40_000, 3, 2)
    np.testing.assert_allclose(found, life_gradient(theta, 6), rtol=0.05)
    # What a window alone would say: x is given when it begins, and only t theta within it counts.
    t, start = np.tile([1, 2], 3)[:, None], np.repeat([0, 2, 4], 2)[:, None]
    truncated = np.mean(t * ((start + t) * np.asarray(theta) - np.asarray(GOAL)), axis=0)
    assert np.abs(truncated - life_gradient(theta, 6)).min() > 0.3


def test_perturbations_add_up_and_are_opposite_in_a_pair():
    _, units, _ = estimate(4, 3, 2)
    sums = units.perturbation["step"]
    np.testing.assert_allclose(sums[0], -sums[1], rtol=1e-6)
    keys = [jax.random.split(jax.random.split(jax.random.key(window), 2)[0])[0] for window in range(3)]
    noise = sum(optax.tree.random_like(key, jnp.zeros(2), jax.random.normal) for key in keys)
    np.testing.assert_allclose(sums[0], SIGMA * noise, rtol=1e-5)


def test_pairs_share_keys_and_slots_and_a_reset_clears_the_sum():
    args = fill_in(Args(env_name=("catch",), meta_estimator="pes", num_units=6, reset_interval=5, num_iterations=9))
    for t in range(7):
        plan = schedule(jax.random.key(1), jnp.int32(t), args)
        for field in (plan.due, plan.age, jax.random.key_data(plan.key)):
            np.testing.assert_array_equal(field[::2], field[1::2])
        np.testing.assert_array_equal(plan.sign, [1, -1, 1, -1, 1, -1])
        np.testing.assert_array_equal(plan.due[::2], [t % 5 == 0, t % 5 == 1, t % 5 == 3])
    theta, task = {"step": jnp.ones(2)}, Task(make_point(), 0.3)
    unit = new_unit(jax.random.key(0), theta, task, MOVE, args)
    np.testing.assert_array_equal(unit.perturbation["step"], [0, 0])
