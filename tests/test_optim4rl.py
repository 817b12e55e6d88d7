"""The optimizer against its equations written as a loop over scalars, and as a citizen of optax."""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optim4rl
import optimizers
from meta_gradient import streamed_replay_gradient
from optim4rl import BLOCK, load_theta, make_optim4rl, to_optax
from units import scalar_cell

KINDS = [
    (cell, inputs, layers)
    for cell in ("lstm", "gru")
    for inputs in ("raw", "log")
    for layers in ((), (5,))
]


def make_theta(cell="lstm", inputs="raw", layers=(), hidden=3, seed=0):
    """A theta with nothing left at zero, so that no term of the equations can hide."""
    theta = make_optim4rl(cell, inputs, hidden, layers).init_theta(jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(theta)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [
        leaf + 0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def pick(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


# --- The equations, a scalar at a time ---


def scalar_readout(layers, h):
    for i in range(len(layers)):
        w, b = np.asarray(layers[str(i)]["w"], float), np.asarray(layers[str(i)]["b"], float)
        h = [max(x, 0.0) for x in h] if i else h
        h = [sum(w[r, k] * h[k] for k in range(len(h))) + b[r] for r in range(len(b))]
    return h[0]


def scalar_optimizer(theta, gradients, cell, inputs, hidden, learning_rate, clip=1.0):
    """The updates of one coordinate that sees these gradients one after the other."""
    states, updates = [[[0.0] * hidden, [0.0] * hidden] for _ in range(2)], []
    for g in gradients:
        g = min(max(g, -clip), clip)
        log_g = math.log(abs(g) + 1e-8)
        sign = math.copysign(1.0, g) if g else 0.0
        x = ([g], [g * g]) if inputs == "raw" else ([sign, log_g], [2 * log_g])
        states = [scalar_cell(theta[f"rnn{i + 1}"], states[i], x[i], cell) for i in range(2)]
        m = sign * math.exp(scalar_readout(theta["readout1"], states[0][0]))
        v = math.exp(scalar_readout(theta["readout2"], states[1][0]))
        updates.append(-learning_rate * m / math.sqrt(v + 1e-8))
    return updates


@pytest.mark.parametrize("cell, inputs, layers", KINDS)
def test_update_is_the_equations_coordinate_by_coordinate(cell, inputs, layers):
    theta = make_theta(cell, inputs, layers)
    theta["readout2"][str(len(layers))]["b"] -= 18.4  # v is near 1e-8, so that EPS counts
    gradients = np.array([[0.3, -2.5, 0.0, 1e-6], [-0.7, 0.9, 1e-3, -1e-6], [0.2, 4.0, 0.0, 1e-4]])
    optimizer = optim4rl.optim4rl(theta, 0.01)
    params, update = jnp.zeros(4), jax.jit(optimizer.update)
    state = optimizer.init(params)
    for k in range(3):
        updates, state = update(jnp.asarray(gradients[k], jnp.float32), state, params)
        expected = [
            scalar_optimizer(theta, gradients[: k + 1, p], cell, inputs, 3, 0.01)[k]
            for p in range(4)
        ]
        np.testing.assert_allclose(updates, expected, rtol=2e-5)


def test_initial_theta_has_the_scale_of_its_fan_in_and_orthogonal_recurrent_weights():
    theta = optim4rl.init_theta(jax.random.key(0), hidden_size=200, readout_layers=(300,))
    for rnn in (theta["rnn1"], theta["rnn2"]):
        np.testing.assert_allclose(np.std(rnn["w_x"]), 1, rtol=0.1)  # one input
        for w in np.split(np.asarray(rnn["w_h"]), 4):
            np.testing.assert_allclose(w @ w.T, np.eye(200), atol=1e-5)
    for name, fan_in in (("0", 200), ("1", 300)):  # weights are [outputs, inputs]
        w = np.asarray(theta["readout1"][name]["w"])
        np.testing.assert_allclose(w.std(), fan_in**-0.5, rtol=4 / (2 * w.size) ** 0.5)


def test_untrained_with_raw_inputs_is_nearly_sign_descent_on_small_gradients():
    grads = jnp.array([1e-4, -1e-3, 1e-5])
    optimizer = optimizers.make_optimizer("untrained", 0.1)
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    np.testing.assert_allclose(updates, -0.1 * jnp.sign(grads), rtol=1e-3)


@pytest.mark.parametrize("clip", [1.0, 0.25, None])
def test_gradient_clipping(clip):
    optimizer = optim4rl.optim4rl(make_theta(), 0.01, grad_clip=clip)
    grads, limit = jnp.array([3.0, -0.5]), clip or np.inf
    update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(grads))[0])
    updates = update(grads)
    np.testing.assert_array_equal(updates, update(jnp.clip(grads, -limit, limit)))
    unclipped, _ = optim4rl.optim4rl(make_theta(), 0.01, grad_clip=None).update(
        grads, optimizer.init(grads)
    )
    assert (np.asarray(updates) == np.asarray(unclipped)).all() == (clip is None)


# --- As an optax optimizer ---


def odd_params():
    return {
        "a": jnp.ones((3, 5)),
        "list": [
            jnp.float32(2.0),
            None,
            jnp.zeros((0, 4)),
            {"deep": jnp.ones(BLOCK + 7, jnp.bfloat16)},
        ],
        "none": None,
    }


@pytest.mark.parametrize("cell, inputs, layers", [("lstm", "raw", ()), ("gru", "log", (5,))])
def test_any_pytree_under_chain_and_jit(cell, inputs, layers):
    params = odd_params()
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optim4rl.optim4rl(make_theta(cell, inputs, layers), 0.1)
    )
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, state, params)
    spec = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert spec(updates) == spec(params)
    assert spec(after) == spec(state)
    new = optax.apply_updates(params, updates)
    assert spec(new) == spec(params) and float(new["a"][0, 0]) < 1.0


def test_each_coordinate_is_on_its_own_wherever_it_lies():
    theta, key = make_theta(), jax.random.key(3)
    grads = jax.random.normal(key, (2 * BLOCK + 11,))
    optimizer = optim4rl.optim4rl(theta, 0.1)
    update = jax.jit(optimizer.update)
    whole, _ = update(grads, optimizer.init(grads))
    order = jax.random.permutation(key, grads.size)
    shuffled, _ = update(grads[order], optimizer.init(grads))
    np.testing.assert_allclose(shuffled, whole[order], rtol=1e-5)
    parts = {"a": grads[:5].reshape(5, 1), "b": [grads[5:]]}
    split, _ = optimizer.update(parts, optimizer.init(parts))
    np.testing.assert_array_equal(np.concatenate([split["a"].ravel(), split["b"][0]]), whole)


def test_empty_pytree():
    optimizer = optim4rl.optim4rl(make_theta(), 0.1)
    assert optimizer.update({"x": None}, optimizer.init({"x": None}))[0] == {"x": None}


def test_integer_leaves_are_refused():
    optimizer = optim4rl.optim4rl(make_theta(), 0.1)
    with pytest.raises(TypeError, match="floating point"):
        optimizer.update(jnp.arange(3), optimizer.init(jnp.arange(3)))


@pytest.mark.parametrize("theta_batched", [False, True])
def test_vmap_is_a_loop(theta_batched):
    thetas = jax.tree.map(
        lambda *xs: jnp.stack(xs),
        *[make_theta(seed=seed) for seed in (range(3) if theta_batched else [0] * 3)],
    )
    learned = make_optim4rl(hidden_size=3)
    grads = jax.random.normal(jax.random.key(0), (2, 3, BLOCK + 5))

    def two_steps(theta, grads):
        optimizer = to_optax(learned, theta, 0.1)
        state = optimizer.init(grads[0])
        first, state = optimizer.update(grads[0], state)
        return first, optimizer.update(grads[1], state)

    theta_axis, theta = (0, thetas) if theta_batched else (None, pick(thetas, 0))
    got, loop = jax.jit(jax.vmap(two_steps, (theta_axis, 1)))(theta, grads), jax.jit(two_steps)
    for i in range(3):
        expected = loop(pick(thetas, i), grads[:, i])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            pick(got, i),
            expected,
        )


def test_lstm_derivative_is_that_of_jax():
    weights = make_theta(inputs="log", hidden=3)["rnn1"]
    h, c, x, h_bar, c_bar = (
        jax.random.normal(jax.random.key(i), (2 if i == 2 else 3, 7)) for i in range(5)
    )

    def plain(weights, state, x):
        i, f, u, o = jnp.split(
            weights["w_h"] @ state[0] + weights["w_x"] @ x + weights["b"][:, None], 4
        )
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(u)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    got, expected = (
        jax.jit(lambda *at, cell=cell: jax.vjp(cell, *at)[1]((h_bar, c_bar)))(weights, (h, c), x)
        for cell in (optim4rl.lstm, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, expected)


def test_tanh_is_that_of_numpy():
    x = np.concatenate(
        [np.linspace(-12, 12, 100_001), np.logspace(-30, 1, 1000), [0, np.inf, -np.inf, np.nan]]
    )
    got = optim4rl.tanh(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, np.tanh(np.float32(x), dtype=np.float64), rtol=5e-7)
    slope = jax.vmap(jax.grad(optim4rl.tanh))(jnp.linspace(-3, 3, 101))
    np.testing.assert_allclose(slope, 1 - np.tanh(np.linspace(-3, 3, 101)) ** 2, rtol=2e-4)


def test_large_state_is_updated_in_place():
    params = jnp.ones(64 * BLOCK)
    optimizer = optim4rl.optim4rl(make_theta(hidden=8), 0.1)
    state = optimizer.init(params)
    compiled = jax.jit(optimizer.update, donate_argnums=1).lower(params, state).compile()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * state_bytes


def test_no_second_trace():
    optimizer, count = optim4rl.optim4rl(make_theta(), 0.1), []

    @jax.jit
    def update(grads, state):
        count.append(1)
        return optimizer.update(grads, state)

    state = optimizer.init(jnp.zeros(3))
    for _ in range(3):
        _, state = update(jnp.ones(3), state)
    assert len(count) == 1


# --- The branches for an accelerator, run on the CPU ---


def on_both(monkeypatch, compute):
    """What `compute`, traced again, gives here and where jax says that it runs on a GPU."""
    here = compute()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return here, compute()


def assert_close(one, other):
    """To 1e-6 of the largest number in each array."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


def two_steps(theta, grads):
    """Two updates by an optimizer made afresh, and the state after them. grads: [2, ...]"""
    optimizer = to_optax(make_optim4rl(hidden_size=3), theta, 0.1)
    first, state = optimizer.update(pick(grads, 0), optimizer.init(pick(grads, 0)))
    return first, *optimizer.update(pick(grads, 1), state)


def two_steps_of_one(theta, grads):
    return two_steps(theta, pick(grads, 0))


def derivative(theta, grads):
    def size(theta):
        return optax.tree.norm(two_steps_of_one(theta, grads)[:2], squared=True)

    return jax.grad(size)(theta)


VMAP = jax.vmap(two_steps, (None, 0))
UPDATES = {"one": two_steps_of_one, "vmap": VMAP, "derivative": derivative}


@pytest.mark.parametrize("how", UPDATES)
def test_an_accelerators_update_is_the_cpus_with_all_blocks_at_once(how, monkeypatch):
    theta, draw, key = make_theta(), jax.random.normal, jax.random.key
    grads = {"w": draw(key(1), (3, 2, BLOCK, 2)), "b": draw(key(2), (3, 2, 5))}

    def compute():
        traced = jax.jit(lambda *args: UPDATES[how](*args)).trace(theta, grads)
        return traced.lower().compile()(theta, grads), "scan" in str(traced.jaxpr)

    (here, loops_here), (there, loops_there) = on_both(monkeypatch, compute)
    assert_close(there, here)
    assert loops_here and not loops_there


@pytest.mark.parametrize("num_updates", [3, 5])  # few and many are replayed differently
def test_an_accelerators_streamed_replay_is_the_cpus(num_updates, monkeypatch):
    draw, key = jax.random.normal, jax.random.key
    with jax.enable_x64(True):  # the sum over blocks is rounded less
        learned, theta = make_optim4rl(hidden_size=3), optax.tree.cast(make_theta(), float)
        grads = {"w": draw(key(1), (2, num_updates, BLOCK)), "b": draw(key(2), (2, num_updates, 5))}
        cotangent = {"w": draw(key(3), (2, BLOCK)), "b": draw(key(4), (2, 5))}
        state = jax.tree.map(lambda x: x + 0.05, jax.vmap(learned.init_state)(cotangent))

        def compute():
            replay = jax.jit(lambda *args: streamed_replay_gradient(learned.rule, *args))
            return replay(theta, state, grads, cotangent, 0.1)

        here, there = on_both(monkeypatch, compute)
    assert_close(there, here)


# --- Files (what is wrong in one: test_bad_input.py, test_bad_files.py) ---


@pytest.fixture
def saved(tmp_path):
    config = {
        "cell": "gru",
        "inputs": "log",
        "hidden_size": 3,
        "readout_layers": [5],
        "grad_clip": None,
    }
    theta = make_theta("gru", "log", (5,))
    optimizers.save_theta(
        tmp_path / "theta.npz", theta, "optim4rl", config, {"env_name": ["catch"], "iterations": 3}
    )
    return tmp_path / "theta.npz", theta, config


def test_save_and_load(saved):
    path, theta, config = saved
    loaded, header = load_theta(path)
    jax.tree.map(np.testing.assert_array_equal, loaded, theta)
    assert (
        header["optimizer"] == "optim4rl"
        and header["config"] == config
        and header["trained"]["iterations"] == 3
    )
    assert os.listdir(path.parent) == ["theta.npz"]
    grads = jnp.linspace(-3, 3, 7)
    by_path, by_hand = (
        optimizers.make_optimizer(str(path), 0.1),
        optim4rl.optim4rl(theta, 0.1, grad_clip=None),
    )
    np.testing.assert_array_equal(
        by_path.update(grads, by_path.init(grads))[0], by_hand.update(grads, by_hand.init(grads))[0]
    )


@pytest.mark.parametrize("fails", ["header", "rename"])
def test_a_failed_save_leaves_the_old_file(saved, fails, monkeypatch):
    path, _, config = saved
    old = path.read_bytes()
    if fails == "rename":
        monkeypatch.setattr(os, "replace", lambda *_: os.stat("no such file"))
    trained = {"unwritable": object()} if fails == "header" else {}
    with pytest.raises(TypeError if fails == "header" else FileNotFoundError):
        optimizers.save_theta(path, make_theta(seed=9), "optim4rl", config, trained)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == ["theta.npz"]


# --- Any pytree ---

LEAVES = st.tuples(
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(0, 99),
).map(lambda made: jax.random.normal(jax.random.key(made[2]), made[0]).astype(made[1]))
TREES = st.recursive(
    st.one_of(LEAVES, st.none()),
    lambda some: st.one_of(
        st.lists(some, max_size=3),
        st.tuples(some, some),
        st.dictionaries(st.sampled_from("abc"), some, max_size=3),
    ),
    max_leaves=5,
)


UNTRAINED = optimizers.make_optimizer("untrained", 0.1)
UPDATE = jax.jit(UNTRAINED.update)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(TREES)
def test_any_pytree_is_updated_coordinate_by_coordinate(grads):
    """Structure, shapes and dtypes are kept, and each coordinate's updates are those that it has
    alone."""
    flat = [jnp.ravel(leaf) for leaf in jax.tree.leaves(grads)]
    state, alone = UNTRAINED.init(grads), {}
    for scale in (1.0, -0.1):
        g = jax.tree.map(lambda x, scale=scale: (scale * x).astype(x.dtype), grads)
        updates, state = UPDATE(g, state, grads)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
        for i, values in enumerate(flat):
            if values.size:
                one = jnp.ravel(jax.tree.leaves(g)[i])[-1:].astype(jnp.float32)
                expected, alone[i] = UPDATE(one, alone.get(i, UNTRAINED.init(one)))
                last = jnp.ravel(jax.tree.leaves(updates)[i])[-1:]
                np.testing.assert_array_equal(last, expected.astype(last.dtype))
