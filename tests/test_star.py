"""STAR against a numpy version of the published equations, its parts against optax and by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from baselines import star
from optim4rl import to_optax

DECAYS = {"momentum": [0.9, 0.99, 0.999], "rms": [0.999], "adafactor": [0.9, 0.99, 0.999]}
TIMESCALES = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])
NOMINAL_STEP = 0.0010010005001667083  # 0.001 exp(0.001)


class Reference:
    """STAR in numpy, from the published layout: features last; a mean keeps its axis."""

    def __init__(self, theta, params):
        self.theta, self.t, self.means = theta, 0, [{} for _ in params]

    def mean(self, i, name, kind, x):
        """The running means of x, one for each decay of this kind. [*shape] -> [*shape, decays]"""
        decays = 1 - (1 - np.array(DECAYS[kind])) * np.exp(10 * self.theta["decays"][kind])
        self.means[i][name] = decays * self.means[i].get(name, 0.0) + (1 - decays) * x[..., None]
        return self.means[i][name]

    def tensor_update(self, i, p, g, rate):
        m, rms = self.mean(i, "m", "momentum", g), self.mean(i, "rms", "rms", g * g)
        square, rsqrt = g * g + 1e-30, 1 / np.sqrt(rms + 1e-6)
        if p.ndim > 1:
            second, largest = np.argsort(p.shape, kind="stable")[-2:]
            row = self.mean(i, "row", "adafactor", square.mean(largest, keepdims=True))
            col = self.mean(i, "col", "adafactor", square.mean(second, keepdims=True))
            share = row / (row.mean(second, keepdims=True) + 1e-9)
            scale_g = scale_m = 1 / np.sqrt(np.maximum(share, 1e-9) * np.maximum(col, 1e-9))
        else:
            row = col = self.mean(i, "v", "adafactor", square)
            scale_g, scale_m = 1 / np.sqrt(row + 1e-9), 1 / np.sqrt(row + 1e-6)
        found = [g[..., None], p[..., None], m, rms, m * rsqrt, rsqrt, g[..., None] * scale_g]
        found += [row, col, 1 / np.sqrt(row + 1e-8), 1 / np.sqrt(col + 1e-8), m * scale_m]
        axes = tuple(range(p.ndim))
        found = [x / np.sqrt(1e-5 + np.mean(x**2, axes, keepdims=True)) for x in found]
        found.append(np.tanh(self.t / TIMESCALES - 1))
        x = np.concatenate([np.broadcast_to(x, (*p.shape, x.shape[-1])) for x in found], axis=-1)
        for layer in "012":
            w, b = self.theta["network"][layer]["w"], self.theta["network"][layer]["b"]
            x = (x if layer == "0" else np.maximum(x, 0)) @ w.T + b
        nominal = NOMINAL_STEP * np.mean(m * rsqrt, axis=-1)
        return -rate * x[..., 0] * np.exp(1e-3 * x[..., 1]) - nominal

    def update(self, params, grads, rate):
        tensors = enumerate(zip(params, grads, strict=True))
        updates = [self.tensor_update(i, p, g, rate) for i, (p, g) in tensors]
        self.t += 1
        return updates


def random_theta(rng):
    """Nothing at zero, and as many inputs as were published: 28 features and 11 of time."""
    network, draw = {}, rng.normal
    for layer, inputs, outputs in (("0", 39, 4), ("1", 4, 4), ("2", 4, 2)):
        weights = draw(size=(outputs, inputs)) / inputs**0.5
        network[layer] = {"w": weights, "b": 0.3 * draw(size=outputs)}
    decays = {name: 0.02 * draw(size=len(initial)) for name, initial in DECAYS.items()}
    return {"network": network, "decays": decays}


def test_star_is_the_published_equations():
    """From the first update on, then with many left out, up to the longest timescale. Some
    gradients are tiny."""
    rng, shapes = np.random.default_rng(0), ((4, 3), (5,), (2, 6), (3, 3), (2, 6, 3), ())
    theta, params = random_theta(rng), [rng.normal(size=shape) for shape in shapes]
    scales = [np.geomspace(0.2, 2e-7, p.size).reshape(p.shape) for p in params]
    optimizer, reference = to_optax(star.make_star(), theta, 0.03), Reference(theta, params)
    with jax.enable_x64(True):
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for left_out in (0, 0, 0, 20, 500, 5_000, 60_000):
            state = state._replace(count=state.count + left_out)
            reference.t += left_out
            grads = [scale * rng.normal(size=scale.shape) for scale in scales]
            updates, state = update(grads, state, params)
            expected = reference.update(params, grads, 0.03)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8), updates, expected)
            params = [p + u for p, u in zip(params, expected, strict=True)]


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (5,), (2, 6, 3), (3, 3), ()])
def test_adafactor_is_optaxs(shape):
    """optax's decay at its step t is 1 - t^-0.8; ours is given the same."""
    reference = optax.scale_by_factored_rms(min_dim_size_to_factor=1, decay_rate=0.8, epsilon=1e-30)
    param = jnp.zeros(shape)
    state, moments = reference.init(param), star.init_moments(param)
    for t in range(1, 6):
        g = jax.random.normal(jax.random.key(t), shape) + 0.1
        decays = {name: jnp.full(len(initial), 1 - t**-0.8) for name, initial in DECAYS.items()}
        expected, state = reference.update(g, state, param)
        moments = star.update_moments(moments, g, decays)
        scales = star.adafactor_scales(moments, shape)[1]
        np.testing.assert_allclose(g * scales, expected, rtol=1e-4)


def make_theta():
    learned = star.make_star()
    return learned, learned.init_theta(jax.random.key(0))


def test_star_is_the_nominal_term_where_the_network_is_silent_and_more_where_not():
    learned, theta = make_theta()
    last = {"w": jnp.zeros((2, 4)), "b": jnp.zeros(2)}
    p, grads = {"w": jnp.ones((2, 3))}, np.random.default_rng(0).normal(size=(4, 2, 3))
    decays, update = np.array([0.9, 0.99, 0.999])[:, None, None], jax.jit(learned.update)
    for bias, expected in (([0.0, 5.0], 0.0), ([2.0, 300.0], -0.1 * 2.0 * np.exp(0.3))):
        silent = theta | {"network": theta["network"] | {"2": last | {"b": jnp.array(bias)}}}
        state, m, v = learned.init_state(p), 0.0, 0.0
        for g in grads:
            updates, state = update(silent, {"w": jnp.asarray(g, jnp.float32)}, state, p, 0.1)
            m, v = decays * m + (1 - decays) * g, 0.999 * v + 0.001 * g * g
            nominal = -NOMINAL_STEP * np.mean(m / np.sqrt(v + 1e-6), axis=0)
            np.testing.assert_allclose(updates["w"], nominal + expected, rtol=1e-4, atol=1e-7)


def test_stars_decays_move_with_theta():
    _, theta = make_theta()
    np.testing.assert_allclose(star.decays_of(theta)["momentum"], [0.9, 0.99, 0.999], rtol=1e-6)
    theta["decays"]["momentum"] = jnp.full(3, np.log(2) / 10)
    moved = star.decays_of(theta)
    np.testing.assert_allclose(moved["momentum"], [0.8, 0.98, 0.998], rtol=1e-5)


def test_what_star_reads_and_its_update_do_not_depend_on_the_gradients_scale():
    """To 2 %, the epsilons' part: with all decays at 1/2 the moments of gradients of 0.3 to 60 are
    far above them."""
    learned, theta = make_theta()
    theta["decays"] = {name: np.log(0.5 / (1 - np.array(d))) / 10 for name, d in DECAYS.items()}
    update = jax.jit(partial(learned.update, theta))
    p = jax.random.normal(jax.random.key(1), (8, 4))
    sign = jax.random.rademacher(jax.random.key(2), (8, 4), float)
    found = []
    for scale in (1.0, 100.0):
        state = learned.init_state(p)
        for seed in (3, 4):
            size = jax.random.uniform(jax.random.key(seed), (8, 4), minval=0.3, maxval=0.6)
            g = scale * sign * size
            step, state = update(g, state, p, 1.0)
        features = jnp.concatenate(list(star.features(p, g, state.moments).values()))
        found.append((star.normalise(features), step))
    (inputs, step), (scaled_inputs, scaled_step) = found
    np.testing.assert_allclose(scaled_inputs, inputs, rtol=0.02)
    np.testing.assert_allclose(scaled_step, step, atol=0.02 * np.std(step))
    np.testing.assert_allclose(np.mean(np.square(inputs), axis=(1, 2)), 1.0, rtol=0.01)
