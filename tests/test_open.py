"""OPEN against a numpy version of its published description, by way of a file of the published
layout with numbers of its own."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert_open
import optimizers
from baselines.open import make_open, positions
from optim4rl import to_optax

H, M = 8, 16
# First index of each array in the file: of the published layout, for H = 8.
STARTS = {"hn.b": 0, "hn": 8, "hr": 72, "hz": 136, "in.b": 200, "in": 208, "ir.b": 360, "ir": 368}
STARTS |= {"iz.b": 520, "iz": 528, "d0.b": 680, "d0": 696, "ln1.b": 824, "ln1": 840, "d3.b": 856}
STARTS |= {"d3": 872, "ln4.b": 1128, "ln4": 1144, "d6.b": 1160, "d6": 1163}
DECAYS = np.array([0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])
EPOCHS, MINIBATCHES, ITERATIONS = 3, 2, 5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Reference:
    """One tensor of coordinates [n], features last."""

    def __init__(self, flat, n):
        self.flat, self.m, self.h = flat, np.zeros((6, n)), np.zeros((n, H))

    def array(self, name, *shape):
        start = STARTS[name]
        return self.flat[start : start + int(np.prod(shape))].reshape(shape)

    def norm(self, name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * self.array(name, M) + self.array(f"{name}.b", M)

    def step(self, p, g, k, layer):
        self.m = DECAYS[:, None] * self.m + (1 - DECAYS[:, None]) * g
        x = [p, *np.sign(self.m), *np.log(np.abs(self.m) + 1e-13), np.sign(g)]
        x = np.array([*x, np.log(np.abs(g) + 1e-13)])
        x = (x / np.sqrt(1e-5 + (x**2).mean(1, keepdims=True))).T
        t = (k // (MINIBATCHES * EPOCHS)) / (ITERATIONS - 1)
        b = ((k // MINIBATCHES) % EPOCHS) / (EPOCHS - 1)
        x = np.concatenate([x, np.tile([t, layer, b, 1.0], (len(p), 1))], axis=1)
        w = {name: self.array(name, 19, H) for name in ("in", "ir", "iz")}
        w |= {name: self.array(name, H, H) for name in ("hn", "hr", "hz")}
        bias = {name: self.array(f"{name}.b", H) for name in ("hn", "in", "ir", "iz")}
        r = sigmoid(x @ w["ir"] + bias["ir"] + self.h @ w["hr"])
        z = sigmoid(x @ w["iz"] + bias["iz"] + self.h @ w["hz"])
        n = np.tanh(x @ w["in"] + bias["in"] + r * (self.h @ w["hn"] + bias["hn"]))
        self.h = (1 - z) * n + z * self.h
        y = self.h @ self.array("d0", H, M) + self.array("d0.b", M)
        y = np.maximum(self.norm("ln1", y), 0) @ self.array("d3", M, M) + self.array("d3.b", M)
        o = np.maximum(self.norm("ln4", y), 0) @ self.array("d6", M, 3) + self.array("d6.b", 3)
        return 1e-3 * o[:, 0] * np.exp(1e-3 * o[:, 1])


@pytest.fixture
def flat():
    flat = np.random.default_rng(0).normal(size=1211).astype(np.float32)
    flat[STARTS["d6"] + 2 : STARTS["d6"] + 3 * M : 3] = 0  # o_2, no noise
    flat[STARTS["d6.b"] + 2] = 0
    return flat


def convert(flat, path, monkeypatch):
    np.save(path / "published.npy", flat)
    argv = ["convert_open", str(path / "published.npy"), str(path / "open.npz")]
    monkeypatch.setattr(sys, "argv", argv)
    convert_open.main()
    learned, theta, header = optimizers.load_learned(str(path / "open.npz"))
    assert header["optimizer"] == "open"
    return learned, theta


PARAMS = {
    "policy": {"0": {"w": (2, 3), "b": (3,)}, "1": {"w": (3, 1), "b": (1,)}},
    "value": {"0": {"w": (2, 4), "b": (4,)}, "1": {"w": (4, 4)}, "2": {"w": (4, 1)}},
}
LAYERS = {"policy": {"0": 0.0, "1": 1.0}, "value": {"0": 0.0, "1": 0.5, "2": 1.0}}


def draw(rng, scale=1.0):
    leaves, treedef = jax.tree.flatten(PARAMS, is_leaf=lambda x: isinstance(x, tuple))
    arrays = [np.float32(scale * rng.normal(size=shape)) for shape in leaves]
    return jax.tree.unflatten(treedef, arrays)


def test_the_update_is_the_published_one(flat, tmp_path, monkeypatch):
    learned, theta = convert(flat, tmp_path, monkeypatch)
    rng = np.random.default_rng(1)
    params = draw(rng)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    references = [Reference(flat.astype(float), p.size) for _, p in leaves]
    state, total = learned.init_state(params), EPOCHS * MINIBATCHES * ITERATIONS
    one_update = jax.jit(
        lambda grads, state, extra: learned.update(*(theta, grads, state, params, 1.0), **extra)
    )
    for k in range(14):
        grads = draw(rng, scale=0.02 if k % 2 else 3.0)  # below and above the clipped norm
        extra = {"fraction": k / total, "num_steps": float(total), "num_epochs": EPOCHS}
        extra |= {"num_minibatches": MINIBATCHES, "iteration_step": k % (EPOCHS * MINIBATCHES)}
        updates, state = one_update(grads, state, extra)
        norms = {
            name: np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads[name]))) for name in grads
        }
        us = []
        for (path, p), reference in zip(leaves, references, strict=True):
            network, layer, array = (key.key for key in path)
            g = grads[network][layer][array] * min(1, 0.5 / norms[network])
            us.append(reference.step(p.ravel(), g.ravel(), k, LAYERS[network][layer]))
        mean = np.concatenate(us).mean()
        for update, u in zip(jax.tree.leaves(updates), us, strict=True):
            np.testing.assert_allclose(np.ravel(update), mean - u, rtol=2e-3, atol=2e-6)


def test_noise_moves_the_actor_only_and_changes_with_steps_and_parameters(
    flat, tmp_path, monkeypatch
):
    flat[STARTS["d6.b"] : STARTS["d6.b"] + 3], flat[STARTS["d6"] : STARTS["d6"] + 3 * M] = 0, 0
    flat[STARTS["d6.b"] + 2] = 1.0  # o = (0, 0, 1): nothing but noise of 0.001
    learned, theta = convert(flat, tmp_path, monkeypatch)
    params = {"policy": {"w": jnp.ones((60, 50))}, "value": {"w": jnp.ones((60, 50))}}
    update = jax.jit(lambda params, state: learned.update(theta, params, state, params, 1.0))
    first, state = update(params, learned.init_state(params))
    second, _ = update(params, state)
    np.testing.assert_allclose(np.std(first["policy"]["w"]), 1e-3, rtol=0.05)
    assert np.ptp(first["value"]["w"]) == 0  # the mean, which is subtracted everywhere
    np.testing.assert_allclose(np.mean(jnp.concatenate(jax.tree.leaves(first))), 0, atol=1e-9)
    others = jax.tree.map(lambda x: 2 * x, params)
    third, _ = update(others, learned.init_state(others))
    for noise in (second, third):
        together = np.corrcoef(np.ravel(first["policy"]["w"]), np.ravel(noise["policy"]["w"]))
        assert abs(together[0, 1]) < 0.1

    # Other parameters are one network: all of it has noise, whatever its parts are called.
    other = {"value": params["value"], "other": params["policy"]}
    one, _ = update(other, learned.init_state(other))
    assert np.ptp(one["value"]["w"]) > 0


def test_params_are_needed(flat, tmp_path, monkeypatch):
    learned, theta = convert(flat, tmp_path, monkeypatch)
    optimizer, grads = to_optax(learned, theta, 1.0), {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="this optimizer needs params"):
        optimizer.update(grads, optimizer.init(grads))


@pytest.mark.parametrize("size, config", convert_open.SIZES.items())
def test_every_number_of_the_file_is_used_once(size, config, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(size, dtype=np.float32))
    theta, found = convert_open.load_published(str(tmp_path / "x.npy"))
    numbers = np.concatenate([np.ravel(x) for x in jax.tree.leaves(theta)])
    assert found == config and sorted(numbers) == list(range(size))
    optimizers.check_theta("x", make_open(**config), theta)


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_another_file_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "x.npy"
    if content is None:
        np.save(path, np.zeros(10))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="not OPEN's published weights") as error:
        convert_open.load_published(str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        convert_open.load_published(str(tmp_path / "absent.npy"))


def test_positions_are_by_depth_whatever_the_alphabet_says():
    a2c = {name: {"w": jnp.zeros((2, 2))} for name in ("conv", "dense", "actor", "critic")}
    deep = {str(i): {"w": jnp.zeros((2, 2))} for i in range(11)}
    ppo = {"policy": deep, "value": {"0": {"w": jnp.zeros(2)}}}
    found = {path[0].key: x for path, x in positions(a2c).items()}
    assert found == {"conv": 0, "dense": 0.5, "actor": 1, "critic": 1}
    found = {(path[0].key, path[1].key): x for path, x in positions(ppo).items()}
    assert found["policy", "2"] == 0.2 and found["policy", "10"] == 1 and found["value", "0"] == 0
