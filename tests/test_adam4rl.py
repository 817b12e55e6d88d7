"""Adam4RL: Adam where theta is zero, and its equation in numpy where it is not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim4rl
from adam4rl import KNOTS, adam4rl, inverse_root, make_adam4rl
from optim4rl import to_optax

PARAMS = {"w": jnp.ones((6, 5)), "b": jnp.zeros(5), "log_std": jnp.float32(1)}


def gradients(t):
    """Of a size that changes by decades."""
    keys = jax.random.split(jax.random.key(t), 3)
    scale = 10.0 ** (t % 5 - 3)
    leaves = [
        scale * jax.random.normal(k, jnp.shape(p))
        for k, p in zip(keys, PARAMS.values(), strict=True)
    ]
    return dict(zip(PARAMS, leaves, strict=True))


def zero(network_size=0):
    return make_adam4rl(network_size).init_theta(jax.random.key(1))


@pytest.mark.parametrize("network_size", [0, 4])
def test_untrained_it_is_adam_at_nine_over_the_number_of_updates(network_size):
    ours, adam = adam4rl(zero(network_size), num_steps=300), optax.adam(9 / 300)
    state, adam_state, update = ours.init(PARAMS), adam.init(PARAMS), jax.jit(ours.update)
    for t in range(30):
        updates, state = update(gradients(t), state, PARAMS)
        expected, adam_state = adam.update(gradients(t), adam_state, PARAMS)
        jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=5e-5), updates, expected)


def numpy_updates(theta, grads, num_steps, shape):
    """The updates of one tensor, from the docstring's equation."""
    gram, updates = 0.0, []
    for n in range(1, len(grads) + 1):
        rate, d = numpy_direction(theta, grads[:n], num_steps, shape)
        if len(shape) > 1:
            x = d.reshape(-1, shape[-1])
            gram = 0.8 * gram + 0.2 * (x @ x.T if len(x) <= shape[-1] else x.T @ x)
            d = whitened(d, theta["whitening"][0], gram)
        updates.append(-rate * d)
    return updates


def numpy_direction(theta, grads, num_steps, shape):
    """-> the learning rate and d of the last of len(grads) updates"""
    m, v = {b: 0.0 for b in (0.5, 0.9, 0.99)}, {c: 0.0 for c in (0.9, 0.99, 0.999)}
    for g in grads:
        m = {b: b * old + (1 - b) * g for b, old in m.items()}
        v = {c: c * old + (1 - c) * g**2 for c, old in v.items()}
    n = len(grads)
    m = [old / (1 - b**n) for b, old in m.items()]
    v = [old / (1 - c**n) for c, old in v.items()]
    w = [0, 0, 1, 0] + theta["momenta"]
    u = w[0] * grads[-1] + w[1] * m[0] + w[2] * m[1] + w[3] * m[2]
    a = np.append(theta["squares"], 1 - theta["squares"].sum())
    r = np.exp(sum(a[i] * np.log(np.sqrt(v[i]) + 1e-8) for i in range(3)))
    d = u / r
    if "network" in theta:
        root, f = np.sqrt(v[1]), np.full(shape, (n - 1) / num_steps)
        x = [np.clip(np.sign(u) * y / root, -3, 3) for y in (grads[-1], *m)]
        logs = np.log([np.abs(u / r), np.abs(m[1]) / np.sqrt(v[0]), np.sqrt(v[0] / v[2])])
        x += [*np.clip(logs, -5, 5) / 2]
        x = np.array([*x, np.full(shape, np.log(num_steps / 1000)), f])
        layers = theta["network"]
        hidden = np.tensordot(layers["0"]["w"], x, 1)
        hidden = np.maximum((hidden.T + layers["0"]["b"]).T, 0)
        o = (np.tensordot(layers["1"]["w"], hidden, 1).T + layers["1"]["b"]).T
        d = d * np.exp(o[0]) + np.sign(u) * o[1]
    rate = 9 * np.exp(theta["rate"][0]) * 1000 ** theta["rate"][1]
    rate *= num_steps ** (-1 - theta["rate"][1])
    rate *= np.exp(np.interp((n - 1) / num_steps, KNOTS, theta["schedule"]))
    widest = np.prod(shape[:-1]) if len(shape) > 1 else 1
    x = theta["shape"]
    rate *= (np.clip(widest, 64, 512) / 64) ** x[0] * (3 / 6) ** x[1]  # one matrix, or none
    return rate, d


def whitened(d, weight, gram):
    """By eigenvalues, of which Newton-Schulz iterations are polynomials. -> D(d)"""
    values, vectors = np.linalg.eigh(gram / np.trace(gram) + 1e-4 / len(gram) * np.eye(len(gram)))
    s = np.sqrt(values)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert np.all(s > 0.6) and np.all(s < 1.3)  # so that what follows is about gram^-1/2
    matrix = d.reshape(-1, d.shape[-1])
    root = vectors * s / np.sqrt(values) @ vectors.T
    white = root @ matrix if len(root) == len(matrix) else matrix @ root
    size = lambda x: np.sqrt(np.mean(x**2))
    mixed = (1 - weight) * matrix / size(matrix) + weight * white / size(white)
    return (mixed * size(matrix) / size(mixed)).reshape(d.shape)


@pytest.mark.parametrize("network_size", [0, 4])
@pytest.mark.parametrize("shape", [(400, 7), (3, 4, 5), (11,)])
def test_the_update_is_the_equation(shape, network_size):
    rng = np.random.default_rng(0)
    theta = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape), zero(network_size))
    optimizer = adam4rl(jax.tree.map(jnp.float32, theta), num_steps=40)
    params = {"x": jnp.zeros(shape)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    grads = rng.normal(size=(12, *shape))
    for g, expected in zip(grads, numpy_updates(theta, grads, 40, shape), strict=True):
        updates, state = update({"x": jnp.float32(g)}, state, params)
        np.testing.assert_allclose(updates["x"], expected, rtol=2e-3, atol=1e-6)


def test_matrices_of_one_shape_are_whitened_each_by_its_own(shapes=((12, 5), (12, 5), (4, 9))):
    """Two tall ones, as of PPO's layers, and a wide one."""
    rng = np.random.default_rng(0)
    theta = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape), zero())
    theta["whitening"] = np.ones(1)
    optimizer = adam4rl(jax.tree.map(jnp.float32, theta), num_steps=40)
    params = {f"layer {i}": jnp.zeros(shape) for i, shape in enumerate(shapes)}
    grads = {name: rng.normal(size=(4, *p.shape)) for name, p in params.items()}
    expected = {n: numpy_updates(theta, g, 40, params[n].shape) for n, g in grads.items()}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for t in range(4):
        given = {name: jnp.float32(g[t]) for name, g in grads.items()}
        updates, state = update(given, state, params)
        for name, u in updates.items():
            np.testing.assert_allclose(u, expected[name][t], rtol=2e-3, atol=1e-6)


def test_the_schedule_is_linear_between_six_points_of_training():
    """Of a gradient that is always 1, Adam's step is the learning rate."""
    logs = np.array([-1.0, 0.5, 1.0, 0.0, -0.5, -2.0])
    optimizer = adam4rl(zero() | {"schedule": jnp.float32(logs)}, num_steps=20)
    params = {"b": jnp.zeros(3)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for t in range(20):
        updates, state = update({"b": jnp.ones(3)}, state, params)
        rate = 9 / 20 * np.exp(np.interp(t / 20, [0, 0.1, 0.25, 0.5, 0.75, 1], logs))
        np.testing.assert_allclose(updates["b"], -rate, rtol=1e-4)


def test_a_coordinate_moves_by_at_most_150_root_mean_squares():
    for weight, expected in ((99.0, 100.0), (999.0, 150.0)):
        theta = zero() | {"momenta": jnp.array([weight, 0.0, 0.0, 0.0])}  # u = m_.9 + weight g
        optimizer = adam4rl(theta, num_steps=1000)
        params = {"b": jnp.zeros(2)}
        updates, _ = optimizer.update({"b": jnp.array([2.0, -2.0])}, optimizer.init(params), params)
        step = expected * 9 / 1000
        np.testing.assert_allclose(updates["b"], [-step, step], rtol=1e-4)


@pytest.mark.parametrize("cpu", [True, False])
def test_a_gradient_whose_square_is_not_finite_harms_no_update_and_no_other(cpu, monkeypatch):
    monkeypatch.setattr(optim4rl, "on_cpu", lambda: cpu)
    optimizer = adam4rl(zero() | {"whitening": jnp.ones(1)}, num_steps=100)
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    calm = jax.tree.map(lambda x: x + 0.1, params)
    state = optimizer.init(params)
    for g in (1e30, 0.1, 0.1):
        grads = calm | {"b": calm["b"].at[0].set(g), "w": calm["w"].at[0, 0].set(g)}
        updates, state = optimizer.update(grads, state, params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
        np.testing.assert_allclose(updates["b"][1:], -9 / 100, rtol=1e-4)


@pytest.mark.parametrize("size", [8, 256])
def test_the_root_of_a_gram_matrix_without_full_rank_is_positive_and_bounded(size):
    """As of the first updates, which have seen few directions."""
    x = np.random.default_rng(0).normal(size=(size, 3))
    root = np.asarray(inverse_root(jnp.float32(x @ x.T)[None])[0], float)
    values, vectors = np.linalg.eigh(x @ x.T)
    found = np.diag(vectors.T @ root @ vectors)
    # Where the matrix is 0, five iterations give 3.4445^5 = 485.
    assert np.all(found > 0.6) and np.all(found < 490)
    scaled = np.sqrt(values[-3:] / values.sum()) * found[-3:]
    assert np.all(scaled > 0.6) and np.all(scaled < 1.3)


@pytest.mark.parametrize(
    "added, factor",
    [
        ([(4, 4, 4, 3)], 2.0),
        ([(144, 3)], 2 / 1.5),
        ([(4096, 3)], 2 / 8**0.5),
        ([(4, 9, 4, 3), (7,)], 2 / 1.5),
        ([(3, 3)] * 11, 0.5),
    ],
)
def test_every_step_has_powers_of_the_largest_fan_in_and_of_the_number_of_matrices(added, factor):
    theta = zero() | {"shape": jnp.array([-0.5, -1.0])}
    params = PARAMS | {"more": [jnp.ones(shape) for shape in added]}  # PARAMS has one matrix
    grads = jax.tree.map(jnp.ones_like, params)
    updates = [
        jax.jit((opt := adam4rl(t, num_steps=300)).update)(grads, opt.init(params))[0]
        for t in (zero(), theta)
    ]
    for usual, found in zip(*map(jax.tree.leaves, updates), strict=True):
        np.testing.assert_allclose(found, factor * usual, rtol=1e-5)


def test_the_drop_in_is_the_agents_optimizer_and_takes_a_schedule():
    theta = {name: x + 0.1 for name, x in zero().items()}
    dropped_in = adam4rl(theta, num_steps=4, learning_rate=optax.linear_schedule(1.0, 0.0, 4))
    agents = to_optax(make_adam4rl(), theta, 1.0)
    state, agents_state = dropped_in.init(PARAMS), agents.init(PARAMS)
    update, agents_update = jax.jit(dropped_in.update), jax.jit(agents.update)
    for t in range(4):
        updates, state = update(gradients(t), state, PARAMS)
        extra_args = {"fraction": t / 4, "num_steps": 4.0, "value": 0.0}
        expected, agents_state = agents_update(gradients(t), agents_state, PARAMS, **extra_args)
        jax.tree.map(
            lambda u, e, t=t: np.testing.assert_allclose(u, (1 - t / 4) * e, rtol=1e-5),
            updates,
            expected,
        )


def test_tensors_of_any_kind_keep_their_shapes_and_types():
    """None, a scalar, an empty one; a step in bfloat16 is that in float32, rounded."""
    theta = {name: x + 0.1 for name, x in zero().items()}
    optimizer = adam4rl(theta, num_steps=10)
    odd = [None, jnp.float32(2.0), jnp.zeros((0, 4))]
    half = {"w": gradients(3)["w"], "b": jnp.ones(7), "odd": odd}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), half)
    whole, update = jax.tree.map(jnp.float32, half), jax.jit(optimizer.update)
    state = optimizer.init(half)
    updates, after = update(half, state, half)
    expected, _ = update(whole, optimizer.init(whole), whole)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, half)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
    jax.tree.map(np.testing.assert_array_equal, updates, rounded)
