"""VeLO against a numpy version of the published equations, by way of a file of the published
structure."""

import functools
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert_velo
import optimizers
from baselines import velo
from optim4rl import to_optax


def published_weights(rng, lstm_size, num_bases):
    """A file of the published structure (Haiku's names, weights [inputs, outputs]) with numbers of
    its own."""
    sizes = [1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3]
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) * 0.3
    linear = lambda n, m: {"w": draw(n, m), "b": draw(m)}
    rnn = {name: linear(30, lstm_size) for name in ("linear", "linear_1", "linear_2")}
    rnn |= {"rnn/linear": linear(2 * lstm_size, 4 * lstm_size)}
    rnn |= {"rnn_to_controls": linear(lstm_size, num_bases), "step_size": linear(lstm_size, 1)}
    bases = {f"w0__{i}": draw(num_bases, n, 4) for i, n in enumerate(sizes)}
    bases |= {"b0": draw(num_bases, 4), "w1": draw(num_bases, 4, 4), "b1": draw(num_bases, 4)}
    bases |= {"w2": draw(num_bases, 4, 3), "b2": draw(num_bases, 3)}
    start = {"hidden": draw(1, lstm_size), "cell": draw(1, lstm_size)}
    return {
        "params": {"lstm_init_state": start, "rnn_params": rnn, "ff_mod_stack": {"~": bases}},
        "gen_id": "",
        "step": 1,
    }


class Reference:
    """VeLO in numpy, from the published layout: one vector of features per parameter, features
    last, matrices only."""

    decays = np.array([0.9, 0.99, 0.999])

    def __init__(self, stored, params, num_steps):
        self.w, self.num_steps, self.t = stored["params"], num_steps, 0
        tile = lambda x: np.repeat(x, len(params), axis=0)
        self.h, self.c = (tile(self.w["lstm_init_state"][name]) for name in ("hidden", "cell"))
        self.m = [np.zeros((*p.shape, 3)) for p in params]
        self.v = [np.zeros((*p.shape, 1)) for p in params]
        self.full = [np.zeros((*p.shape, 3)) for p in params]
        self.row = [np.zeros((p.shape[0], 3)) if p.ndim == 2 else None for p in params]
        self.col = [np.zeros((p.shape[-1], 3)) if p.ndim == 2 else None for p in params]
        self.loss_decays = np.exp(-1 / np.logspace(1, np.log10(num_steps), 10))
        self.loss_sums, self.lowest = np.zeros(10), np.full(10, 1e12)

    def loss(self, loss):
        d, t = self.loss_decays, self.t
        if t:
            loss = min(2 * abs((self.loss_sums / (1 - d ** (t + 1))).max()), loss)
        self.loss_sums = d * self.loss_sums + (1 - d) * loss
        means = self.loss_sums / (1 - d ** (t + 1))
        self.lowest = np.minimum(self.lowest, means)
        found = (means[:-1] - self.lowest[:-1]) / np.maximum(means[1:] - self.lowest[:-1], 1e-8)
        return np.clip(found - 1, -1, 1) * (t + 1 > 2)

    def tensor_features(self, i, p, loss):
        scale = 1 / np.sqrt(max(np.mean(p**2), 1e-9))
        m, v = scale * self.m[i].reshape(-1, 3), scale * self.v[i].reshape(-1, 1)
        log = lambda x: np.clip(np.log(1e-8 + np.abs(10 * x)), -5, 5) * 0.5
        rank = np.eye(5)[sum(n > 1 for n in p.shape)]
        done = np.tanh(
            (self.t / self.num_steps - np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1]))
            * 10
        )
        var_v = np.mean((v - m.mean(0)) ** 2, axis=0)
        return np.concatenate([done, loss, log(v.mean(0)), rank, log(m.var(0)), log(var_v)])

    def lstm(self, x):
        rnn = self.w["rnn_params"]
        linear = lambda name, x: x @ rnn[name]["w"] + rnn[name]["b"]
        sigmoid = lambda x: 1 / (1 + np.exp(-x))
        x = linear("linear_2", x) + np.maximum(linear("linear_1", x), 0).max(axis=0)
        i, g, f, o = np.split(linear("rnn/linear", np.concatenate([x, self.h], axis=1)), 4, axis=1)
        self.c = sigmoid(f + 1) * self.c + sigmoid(i) * np.tanh(g)
        self.h = sigmoid(o) * np.tanh(self.c)
        return linear("rnn_to_controls", self.h), linear("step_size", self.h)[:, 0]

    def tensor_update(self, i, p, g, control, multiplier):
        d, e = self.decays, np.expand_dims
        self.m[i] = d * self.m[i] + (1 - d) * e(g, -1)
        self.v[i] = 0.999 * self.v[i] + 0.001 * e(g * g, -1)
        m, v, square = self.m[i], self.v[i], e(g * g + 1e-30, -1)
        if p.ndim == 2:
            rows, cols = p.shape  # the larger axis is the one that `row` is a mean over
            along, across = (1, 0) if cols >= rows else (0, 1)
            if self.row[i].shape[0] != p.shape[across]:
                self.row[i], self.col[i] = (
                    np.zeros((p.shape[across], 3)),
                    np.zeros((p.shape[along], 3)),
                )
            self.row[i] = d * self.row[i] + (1 - d) * square.mean(along)
            self.col[i] = d * self.col[i] + (1 - d) * square.mean(across)
            row, col = e(self.row[i], along), e(self.col[i], across)
            scale = 1 / np.sqrt(
                np.maximum(row / (self.row[i].mean(0) + 1e-9), 1e-9) * np.maximum(col, 1e-9)
            )
            row, col = (np.broadcast_to(x, (*p.shape, 3)) for x in (row, col))
            m_scaled, g_scaled = m * scale, e(g, -1) * scale
        else:
            self.full[i] = d * self.full[i] + (1 - d) * square
            row = col = self.full[i]
            m_scaled, g_scaled = m / np.sqrt(row), e(g, -1) / np.sqrt(np.maximum(row + 1e-9, 1e-9))
        rsqrt = 1 / np.sqrt(v + 1e-6)
        inputs = [
            e(g, -1),
            e(np.clip(g, -0.1, 0.1), -1),
            e(p, -1),
            m,
            v,
            m * rsqrt,
            rsqrt,
            g_scaled,
            e(g, -1) * rsqrt,
        ]
        inputs += [row, col, 1 / np.sqrt(row + 1e-8), 1 / np.sqrt(col + 1e-8), m_scaled]
        axes = tuple(range(p.ndim))
        inputs = [x / np.sqrt(1e-5 + np.mean(x**2, axis=axes, keepdims=True)) for x in inputs]
        bases = self.w["ff_mod_stack"]["~"]

        def layer(name):
            return 100 * np.mean(
                bases[name] * control.reshape(-1, *[1] * (bases[name].ndim - 1)), axis=0
            )

        hidden = sum(x @ layer(f"w0__{k}") for k, x in enumerate(inputs)) + layer("b0")
        hidden = np.maximum(hidden, 0) @ layer("w1") + layer("b1")
        out = np.maximum(hidden, 0) @ layer("w2") + layer("b2")
        return (
            -1e-3
            * multiplier
            * out[..., 0]
            * np.exp(1e-3 * out[..., 1])
            * np.sqrt(np.mean(p**2) + 1e-9)
        )

    def update(self, params, grads, loss):
        loss = self.loss(loss)
        controls, multipliers = self.lstm(
            np.stack([self.tensor_features(i, p, loss) for i, p in enumerate(params)])
        )
        each = zip(range(len(params)), params, grads, controls, multipliers, strict=True)
        updates = [self.tensor_update(*one) for one in each]
        self.t += 1
        return updates


def test_velo_from_a_published_file_is_the_published_equations(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        convert_velo, "PUBLISHED", {"lstm_size": 6, "num_bases": 256, "step_size": 1e-3}
    )
    rng = np.random.default_rng(0)
    stored = published_weights(rng, 6, 256)
    (tmp_path / "params").write_bytes(flax.serialization.msgpack_serialize(stored))
    monkeypatch.setattr(
        sys, "argv", ["convert_velo.py", str(tmp_path / "params"), str(tmp_path / "velo.npz")]
    )
    convert_velo.main()
    assert "velo.npz" in capsys.readouterr().out

    path = str(tmp_path / "velo.npz")
    assert optimizers.own_rate(path) == 1e-3 and optimizers.own_rate("untrained:velo") is None
    optimizer = optimizers.make_optimizer(path, 1e-3)
    params = [rng.normal(size=shape) for shape in ((4, 3), (5,), (2, 6))]
    reference = Reference(stored, params, num_steps=40)
    with jax.enable_x64(True):
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for t in range(6):
            grads, loss = (
                [rng.normal(size=p.shape) * 0.2 for p in params],
                3.0 - 0.4 * t + 2 * rng.normal(),
            )
            updates, state = update(grads, state, params, value=loss, fraction=t / 40)
            expected = reference.update(params, grads, loss)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, expected
            )
            params = [p + 10 * u for p, u in zip(params, expected, strict=True)]


@pytest.mark.parametrize(
    "content", [b"", b"not msgpack", flax.serialization.msgpack_serialize({"params": {"a": 1}})]
)
def test_velo_refuses_another_file(tmp_path, content):
    (tmp_path / "params").write_bytes(content)
    with pytest.raises(ValueError, match="not VeLO's published weights"):
        convert_velo.load_published(str(tmp_path / "params"))


def test_velo_asks_for_what_it_reads():
    learned = velo.make_velo(lstm_size=16, num_bases=8)
    optimizer = to_optax(learned, learned.init_theta(jax.random.key(0)), 0.1)
    with pytest.raises(TypeError, match="'value' and 'fraction'"):
        optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)), jnp.ones(3))
