"""Optim4RL, a learned optimizer for reinforcement learning (Lan et al. 2024, arXiv 2302.01470).

The same two small networks are applied to every scalar parameter ("coordinate"), each with its own
state:

    h1 <- RNN1(h1, g)      o1 = readout1(h1)      m = sign(g) exp(o1)
    h2 <- RNN2(h2, g^2)    o2 = readout2(h2)      v = exp(o2)
    update = -learning_rate * m / sqrt(v + 1e-8)

with g the gradient, clipped elementwise to [-1, 1]. Meta-training (pipeline_train.py) learns theta,
the weights of the two networks.

This file imports nothing of the project. To use it with optax, copy it into your own:

    theta, header = load_theta("theta.npz")
    optimizer = optim4rl(theta, learning_rate=1e-3, grad_clip=header["config"]["grad_clip"])
    opt_state = optimizer.init(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)

Legend: C coordinates in a block, M blocks, H hidden units, D inputs of a network (1 raw, 2 log).
"""

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_batching import custom_vmap

# Coordinates in a block. On a CPU a block and its intermediate values fit in the core's cache.
BLOCK = 512
MANY_LEAVES = 32  # from here on compiling a slice for each leaf takes seconds
EPS = 1e-8
MAX_BYTES = 2**28  # of a theta file, unpacked
FORMAT = 1  # version of theta files


class LearnedOptimizer(NamedTuple):
    """A family of optimizers, one for each theta. theta is always an argument, never part of the
    state."""

    init_theta: Callable  # key -> theta
    init_state: Callable  # params -> state
    update: Callable  # theta, grads, state, params, learning_rate, **extra_args -> updates, state
    # theta, g [C], state of a block -> step [C], state; None if it is not coordinate-wise
    rule: Callable | None = None
    own_rate: float | None = None  # the default learning rate; None: the environment's


# --- The rule ---


def optim4rl_rule(theta: dict, g: jax.Array, state: tuple, grad_clip: float | None = 1.0) -> tuple:
    """One step for a block of coordinates. g: [C]; state: (rnn1's, rnn2's)
    -> step m / sqrt(v + eps) [C], of which the update is -learning_rate times, state"""
    config, g = describe(theta), clip_and_stop_gradient(g, grad_clip)
    if config["inputs"] == "raw":
        x1, x2 = g[None], jnp.square(g)[None]
    else:  # the gradient processing of the paper's earlier version
        log_g = jnp.log(jnp.abs(g) + EPS)
        x1, x2 = jnp.stack([jnp.sign(g), log_g]), 2 * log_g[None]
    rnn = CELLS[config["cell"]]
    state1, state2 = rnn(theta["rnn1"], state[0], x1), rnn(theta["rnn2"], state[1], x2)
    m = jnp.sign(g) * jnp.exp(readout(theta["readout1"], state1[0])[0])
    v = jnp.exp(readout(theta["readout2"], state2[0])[0])
    return m / jnp.sqrt(v + EPS), (state1, state2)


def clip_and_stop_gradient(g: jax.Array, grad_clip: float | None) -> jax.Array:
    """An agent-gradient as optimizers read it: clipped elementwise, and a constant to the
    meta-gradient.

    Clipping makes an infinite one +-grad_clip. NaN stays NaN, so that the error shows: from then on
    its coordinate is lost, as with Adam, and the others are not affected.
    """
    g = jax.lax.stop_gradient(g)
    return g if grad_clip is None else jnp.clip(g, -grad_clip, grad_clip)


# --- theta: the weights of the two networks ---


def init_theta(key: jax.Array, cell="lstm", inputs="raw", hidden_size=8, readout_layers=()) -> dict:
    """Initial meta-parameters. With G gates, 4 of an LSTM (i, f, u, o) and 3 of a GRU (r, z, n):

    rnn1, rnn2: {w_x [G H, D], w_h [G H, H], b [G H]}, of a GRU also b_n [H]
    readout1, readout2: {"0": {w [outputs, inputs], b [outputs]}, "1": ...}

    Raises KeyError for a cell or inputs that are not in CELLS and INPUTS.
    """
    key_1, key_2, key_out_1, key_out_2 = jax.random.split(key, 4)
    sizes = (hidden_size, *readout_layers, 1)
    return {
        "rnn1": init_rnn(key_1, cell, INPUTS[inputs], hidden_size),
        "rnn2": init_rnn(key_2, cell, 1, hidden_size),
        "readout1": init_dense(key_out_1, sizes),
        "readout2": init_dense(key_out_2, sizes),
    }


def init_rnn(key: jax.Array, cell: str, num_inputs: int, hidden_size: int) -> dict:
    """Weights of one of CELLS: input weights LeCun normal, recurrent ones orthogonal."""
    lecun = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
    orthogonal = jax.nn.initializers.orthogonal()
    key_x, key_h = jax.random.split(key)
    rows = GATES[cell] * hidden_size
    w_h = [orthogonal(k, (hidden_size, hidden_size)) for k in jax.random.split(key_h, GATES[cell])]
    rnn = {
        "w_x": lecun(key_x, (rows, num_inputs)),
        "w_h": jnp.concatenate(w_h),
        "b": jnp.zeros(rows),
    }
    return rnn if cell == "lstm" else rnn | {"b_n": jnp.zeros(hidden_size)}


def init_dense(key: jax.Array, sizes: tuple) -> dict:
    """LeCun normal weights of dense layers, for `readout`. sizes: input, hidden ..., output"""
    lecun = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
    keys = jax.random.split(key, len(sizes) - 1)
    layers = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return {
        str(i): {"w": lecun(k, (n, m)), "b": jnp.zeros(n)} for i, (k, m, n) in enumerate(layers)
    }


def init_cell_state(cell: str, hidden_size: int) -> tuple:
    """The zero state of a block: (h, c) or (h,), each [H, C]."""
    return (jnp.zeros((hidden_size, BLOCK)),) * {"lstm": 2, "gru": 1}[cell]


def describe(theta: dict) -> dict:
    """The settings that theta's shapes imply: cell, inputs, hidden_size, readout_layers. Raises
    LookupError, TypeError or ValueError if it is not Optim4RL's."""
    gates, hidden = np.shape(theta["rnn1"]["w_h"])
    return {
        "cell": {GATES[cell] * hidden: cell for cell in CELLS}[gates],
        "inputs": {INPUTS[name]: name for name in INPUTS}[np.shape(theta["rnn1"]["w_x"])[1]],
        "hidden_size": hidden,
        "readout_layers": [
            np.shape(theta["readout1"][str(i)]["w"])[0] for i in range(len(theta["readout1"]) - 1)
        ],
    }


# --- The networks: hidden units are the first axis, a block's coordinates the last ---


def readout(layers: dict, h: jax.Array) -> jax.Array:
    """Dense layers, ReLU between them. h: [H, C] -> [outputs, C]"""
    for i in range(len(layers)):
        h = layers[str(i)]["w"] @ (jax.nn.relu(h) if i else h) + layers[str(i)]["b"][:, None]
    return h


def gru(weights: dict, state: tuple, x: jax.Array) -> tuple:
    """Gated recurrent unit (Cho et al. 2014), as in the authors' code. state: (h,), [H, C];
    x: [D, C]."""
    (h,) = state
    r, z, n = jnp.split(weights["w_x"] @ x + weights["b"][:, None], 3)
    h_r, h_z, h_n = jnp.split(weights["w_h"] @ h, 3)
    r, z = sigmoid(r + h_r), sigmoid(z + h_z)
    n = tanh(n + r * (h_n + weights["b_n"][:, None]))
    return ((1 - z) * n + z * h,)


# --- The LSTM, written for a CPU: derivative and tanh are explicit ---


@jax.custom_vjp
def lstm(weights: dict, state: tuple, x: jax.Array) -> tuple:
    """Long short-term memory (Hochreiter & Schmidhuber 1997, with forget gate).

    state: (h, c), each [H, C]; x: [D, C]. The derivative is written out below, for a fifth less
    time in a replay (reverse mode only: no jax.jvp).
    """
    return lstm_forward(weights, state, x)[0]


def lstm_forward(weights, state, x):
    h, c = state
    # W_h h + W_x x + b as one product: a sixth less time in a meta-gradient.
    w = jnp.concatenate([weights["w_h"], weights["w_x"], weights["b"][:, None]], axis=1)
    inputs = jnp.concatenate([h, x, jnp.ones_like(x[:1])])
    i, f, u, o = jnp.split(w @ inputs, 4)
    i, f, u, o = sigmoid(i), sigmoid(f), tanh(u), sigmoid(o)
    new_c = f * c + i * u
    tanh_c = tanh(new_c)
    return (o * tanh_c, new_c), (weights, inputs, c, i, f, u, o, tanh_c)


def lstm_backward(residuals, cotangent):
    weights, inputs, c, i, f, u, o, tanh_c = residuals
    h_bar, c_bar = cotangent
    c_bar = c_bar + h_bar * o * (1 - tanh_c * tanh_c)
    if on_cpu():
        # XLA fuses nothing across a product: one with the identity keeps it from recomputing
        # the c_bar of all later steps. (An accelerator would round.)
        c_bar = jnp.eye(len(c), dtype=c.dtype) @ c_bar
    z_bar = [
        c_bar * u * i * (1 - i),
        c_bar * c * f * (1 - f),
        c_bar * i * (1 - u * u),
        h_bar * tanh_c * o * (1 - o),
    ]
    z_bar = jnp.concatenate(z_bar)
    # Transposed before the product: XLA is slow at transposing inside it.
    before_bar = jax.lax.optimization_barrier(weights["w_h"].T) @ z_bar
    x_bar = jax.lax.optimization_barrier(weights["w_x"].T) @ z_bar
    w_bar = (inputs @ z_bar.T).T
    w_h_bar, w_x_bar, b_bar = jnp.split(w_bar, [len(c), len(inputs) - 1], axis=1)
    return {"w_h": w_h_bar, "w_x": w_x_bar, "b": b_bar[:, 0]}, (before_bar, c_bar * f), x_bar


lstm.defvjp(lstm_forward, lstm_backward)


@jax.custom_jvp
def tanh(x: jax.Array) -> jax.Array:
    """tanh, to 4e-7 in float32: a ratio of two polynomials with the coefficients of Eigen's fast
    tanh.

    On a CPU it takes a third of the time of jnp.tanh where XLA does not fuse jnp.tanh with anything
    else, as in a network's layers.
    """
    if x.dtype != jnp.float32:
        return jnp.tanh(x)
    x = jnp.clip(x, -7.9, 7.9)
    s = x * x
    p = 5.12229709e-8 + s * (-8.60467152e-11 + s * (2.00018790e-13 + s * -2.76076848e-16))
    p = 4.89352456e-3 + s * (6.37261929e-4 + s * (1.48572236e-5 + s * p))
    q = 4.89352519e-3 + s * (2.26843463e-3 + s * (1.18534706e-4 + s * 1.19825840e-6))
    return x * p / q


tanh.defjvps(lambda x_dot, y, x: (1 - y * y) * x_dot)


def sigmoid(x: jax.Array) -> jax.Array:
    return 0.5 * tanh(0.5 * x) + 0.5


CELLS = {"lstm": lstm, "gru": gru}
GATES = {"lstm": 4, "gru": 3}
INPUTS = {"raw": 1, "log": 2}  # D of the first network; the second always has one input


# --- From a rule for a block to an optimizer for any pytree ---


def to_blocks(tree: Any) -> jax.Array:
    """All coordinates of a pytree in blocks, padded with zeros. -> [M, BLOCK], float32 (float64
    with jax_enable_x64)"""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"parameters and gradients must be floating point, got a leaf of {leaf.dtype}"
            )
    flat = jnp.concatenate([jnp.zeros(0), *(leaf.ravel().astype(float) for leaf in leaves)])
    return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)


def from_blocks(blocks: jax.Array, like: Any) -> Any:
    """The inverse of to_blocks: shapes and dtypes are those of `like`."""
    leaves, treedef = jax.tree.flatten(like)
    if not blocks.size:
        return jax.tree.map(jnp.zeros_like, like)
    sizes = [np.size(leaf) for leaf in leaves]
    starts = [int(start) for start in np.cumsum([0, *sizes[:-1]])]
    if len(leaves) > MANY_LEAVES:
        starts = unknown_to_xla(starts, blocks)
    flat = blocks.ravel()
    parts = [
        jax.lax.dynamic_slice(flat, (start,), (size,))
        .reshape(np.shape(leaf))
        .astype(jnp.result_type(leaf))
        for start, size, leaf in zip(starts, sizes, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, parts)


def unknown_to_xla(numbers: list, x: jax.Array) -> list:
    """The same integers, as values that XLA does not know when it compiles. It then compiles one
    slice for each size and not one for each leaf: 0.9 s for 1,000 leaves, with constants 8 s.
    x: an array of the program, whichever"""

    @custom_vmap
    def choose(never):
        return jax.lax.cond(
            never,
            lambda: [jnp.int32(0) for _ in numbers],
            lambda: [jnp.int32(number) for number in numbers],
        )

    @choose.def_vmap  # without it they would be batched, and each slice a gather
    def _(axis_size, in_batched, never):
        del axis_size, in_batched
        return choose(never[0]), [False] * len(numbers)

    return choose(jax.lax.stop_gradient(x.ravel()[0]) > jnp.inf)


def check_params(params: Any) -> None:
    """Raises ValueError if an optimizer that reads the parameters is not given them."""
    if params is None:
        raise ValueError("this optimizer needs params: optimizer.update(grads, opt_state, params)")


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def over_blocks(rule: Callable, theta, g: jax.Array, state: Any) -> tuple:
    """rule(theta, g, state) of every block. g: [M, C]; state: [M, ...] -> steps [M, C], state"""

    def one(block):
        return rule(theta, *block)

    # A CPU core works block by block in its cache; an accelerator takes all blocks at once.
    return jax.lax.map(one, (g, state)) if on_cpu() else jax.vmap(one)((g, state))


def over_blocks_in_place(rule: Callable, theta, g: jax.Array, state: Any) -> tuple:
    """As over_blocks, on a CPU: the state is the loop's carry, so it is not copied."""

    def one(state, number_and_g):
        number, g = number_and_g
        block = jax.tree.map(lambda x: x[number], state)
        # A product with the identity: without it XLA reads the block again later and copies the
        # whole state for that.
        block = jax.tree.map(lambda x: jnp.eye(len(x), dtype=x.dtype) @ x, block)
        step, block = rule(theta, g, block)
        return jax.tree.map(lambda x, new: x.at[number].set(new), state, block), step

    state, steps = jax.lax.scan(one, state, (jnp.arange(len(g)), g))
    return steps, state


def map_blocks(rule: Callable) -> Callable:
    """f(theta, g, state), which is over_blocks of this rule, in place if it can be.

    Under `vmap` with one theta (over units or seeds), the new axis becomes more blocks. A plain
    `vmap` would move it behind the block axis and copy the whole state back and forth. Derivatives
    are those of over_blocks.
    """
    plain = partial(over_blocks, rule)

    @custom_vmap
    def mapped(theta, g, state):
        in_place = len(g) and on_cpu()
        return (over_blocks_in_place if in_place else over_blocks)(rule, theta, g, state)

    @mapped.def_vmap
    def _(axis_size, in_batched, theta, g, state):
        theta_batched, *rest = in_batched
        out_batched = jax.tree.map(lambda _: True, (g, state))
        if any(jax.tree.leaves(theta_batched)) or not all(jax.tree.leaves(rest)):
            in_axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
            out = jax.vmap(plain, tuple(in_axes), axis_size=axis_size)(theta, g, state)
            return out, out_batched
        merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (g, state))
        out = mapped(theta, *merged)
        return jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), out), out_batched

    differentiable = jax.custom_jvp(mapped)
    differentiable.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))

    @partial(jax.jit, inline=True)  # outside of jit, too, it is compiled once
    def checked(theta, g, state):
        for leaf in jax.tree.leaves(state):
            if len(leaf) != len(g):
                raise ValueError(
                    f"the optimizer's state is of other parameters ({len(leaf)} blocks of {BLOCK}; "
                    f"the gradients have {len(g)}): make it with init(params)"
                )
        return differentiable(theta, g, state)

    return checked


def init_blocks(params: Any, init_block: Callable) -> Any:
    """The zero state of a coordinate-wise optimizer, [M, ...]. init_block: () -> zero state of one
    block"""
    num_blocks = -(-sum(np.size(leaf) for leaf in jax.tree.leaves(params)) // BLOCK)
    return jax.tree.map(lambda x: jnp.zeros((num_blocks, *x.shape), x.dtype), init_block())


def coordinatewise(init_theta: Callable, init_block: Callable, rule: Callable) -> LearnedOptimizer:
    """A LearnedOptimizer that applies `rule` to every coordinate of a pytree. init_block: () ->
    zero state of one block"""
    apply = map_blocks(rule)

    def update(theta, grads, state, params, learning_rate, **extra_args):
        del params, extra_args
        steps, state = apply(theta, to_blocks(grads), state)
        return from_blocks(-learning_rate * steps, grads), state

    return LearnedOptimizer(init_theta, partial(init_blocks, init_block=init_block), update, rule)


def make_optim4rl(
    cell="lstm", inputs="raw", hidden_size=8, readout_layers=(), grad_clip: float | None = 1.0
):
    """Optim4RL as a LearnedOptimizer, for meta-training. grad_clip: bound on |g|, or None.

    The other arguments shape the initial theta; the rule sees in theta which cell and inputs it
    has."""

    def new_theta(key):
        return init_theta(key, cell, inputs, hidden_size, readout_layers)

    def init_block():
        return init_cell_state(cell, hidden_size), init_cell_state(cell, hidden_size)

    def rule(theta, g, state):
        return optim4rl_rule(theta, g, state, grad_clip)

    return coordinatewise(new_theta, init_block, rule)


def to_optax(
    learned: LearnedOptimizer, theta: Any, learning_rate: float | Callable
) -> optax.GradientTransformationExtraArgs:
    """A learned optimizer with its theta, as an optax optimizer. Some kinds read extra arguments
    (adam4rl.py, baselines/velo.py).

    learning_rate: a number, or an optax schedule. Raises ValueError for one that is negative or
    not finite, and for a theta of another kind.
    """
    if callable(learning_rate):
        return optax.inject_hyperparams(partial(to_optax, learned, theta))(learning_rate)
    if isinstance(learning_rate, int | float) and not 0 <= learning_rate < float("inf"):
        raise ValueError(f"the learning rate must be a number from 0 up, got {learning_rate}")
    expected = jax.eval_shape(learned.init_theta, jax.random.key(0))
    if jax.tree.map(jnp.shape, theta) != jax.tree.map(jnp.shape, expected):
        raise ValueError("theta is another optimizer's: header['optimizer'] in its file says whose")

    def update(grads, state, params=None, **extra_args):
        return learned.update(theta, grads, state, params, learning_rate, **extra_args)

    return optax.GradientTransformationExtraArgs(learned.init_state, update)


def optim4rl(
    theta: dict, learning_rate: float | Callable, grad_clip: float | None = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Optim4RL with these meta-parameters, for any pytree of parameters. theta's shapes imply the
    cell and the inputs, not grad_clip, the elementwise bound on gradients (None: no clipping): that
    of meta-training is header["config"]["grad_clip"]. Raises ValueError as to_optax does."""
    try:
        config = describe(theta)
    except (LookupError, TypeError, ValueError):
        config = {}  # to_optax says that it is another optimizer's
    return to_optax(make_optim4rl(**config, grad_clip=grad_clip), theta, learning_rate)


# --- Files of theta: one .npz, arrays and a JSON header (optimizers.save_theta writes them) ---


def load_theta(path: str | os.PathLike) -> tuple[dict, dict]:
    """-> theta, nested dicts of arrays in this machine's byte order; header. No code in the file is
    run.

    Raises a one-line ValueError for a file that is missing, damaged, from another program, or would
    unpack to over MAX_BYTES.
    """
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(member.file_size for member in file.infolist())
            if size > MAX_BYTES:
                raise ValueError(f"too large: it would unpack to {size:,} bytes")
            if damaged := file.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        # NumPy warns of what it finds odd in a file.
        with warnings.catch_warnings(action="ignore"), np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, this code reads format {FORMAT}")
        if not isinstance(header["optimizer"], str) or not isinstance(header["config"], dict):
            raise ValueError("its header does not say which optimizer it is")
        theta: dict = {}
        for name, array in arrays.items():
            *parents, last = name.split("/")
            node = theta
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = native_floats(name, array)
        return theta, header
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except KeyError as error:
        raise ValueError(
            f"{path}: not a theta file of this project: no {brief(error.args[0])!r} in it"
        ) from None
    except Exception as error:  # whatever a damaged file makes a reader raise
        reason = brief(error) or type(error).__name__
        raise ValueError(f"{path}: not a whole theta file ({reason})") from None


def native_floats(name: str, array: Any) -> np.ndarray:
    """In this machine's byte order. Raises ValueError unless of float16, float32 or float64."""
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"{brief(name)} in it is not an array of float16, float32 or float64")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def brief(text: Any, most: int = 120) -> str:
    """A text of anyone's on one line of at most `most` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
