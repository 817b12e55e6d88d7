"""Adam4RL: a learned optimizer without a learning rate to tune. Before meta-training it is Adam.

    u = w_0 g + w_1 m_.5 + w_2 m_.9 + w_3 m_.99
    log r = sum_c a_c log(sqrt(v_c) + 1e-8)
    d = exp(o_0) u / r + o_1 sign(u), with u / r clipped to -150 .. 150
    update = -lr exp(schedule(f)) k D(d)

    w = (0, 0, 1, 0) + momenta
    a = (squares_0, squares_1, 1 - squares_0 - squares_1), for v_.9, v_.99, v_.999
    lr = 9 / N exp(rate_0) (N / 1000)^-rate_1
    k = (widest / 64)^shape_0 (matrices / 6)^shape_1

with bias-corrected running means m_b of the gradient g and v_c of g^2, the number N of updates of
the whole training, the fraction f of it that is done, schedule(f) piecewise linear in f. k is the
network's: its largest fan-in, clipped to 64 .. 512, and the number of its matrices, 3 at least.
Weights must be [..., inputs, outputs], as in flax.
Of a matrix, D(d) is (1 - whitening) d + whitening s, scaled to the RMS of d, where s is G^-1/2 d
scaled to that RMS; of other tensors D(d) = d. G is a running mean of d d^T, over the smaller side
of the matrix: one side of Shampoo (Gupta et al. 2018) for Adam's step.
Without memory G^-1/2 d is the orthogonal step of Muon (Jordan et al. 2024).

o = (o_0, o_1) is the output, for each coordinate, of a small network that reads the quantities
above (`inputs`); without a network it is 0. theta is {rate, schedule, momenta, squares, whitening,
shape} and, if there is one, the network. With these six and the network's last layer zero, as
before training, this is Adam with the learning rate 9 / N.

It is not in the paper. Copy this file and optim4rl.py into your project, and use it with optax:

    theta, _ = load_theta("adam4rl.npz")
    optimizer = adam4rl(theta, num_steps=10_000)

Legend: C coordinates in a block, M blocks.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from optim4rl import (
    BLOCK,
    LearnedOptimizer,
    from_blocks,
    init_blocks,
    init_dense,
    map_blocks,
    readout,
    to_blocks,
    to_optax,
    unknown_to_xla,
)

M_DECAYS = (0.5, 0.9, 0.99)
V_DECAYS = (0.9, 0.99, 0.999)
EPS = 1e-8
MOST_GRADIENT = 1e18  # the square of a larger one may not be finite
LARGEST = 150.0  # step of a coordinate, in root mean squares of its gradient
KNOTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the schedule, in fractions of training
RATE = 9.0  # the untrained learning rate times N
USUAL_STEPS = 1000.0  # N where rate_1 has no effect
LEAST_FAN, MOST_FAN = 64, 512  # what the network's largest fan-in is clipped to
USUAL_MATRICES, LEAST_MATRICES = 6, 3
PRECISE_PRODUCT = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Muon
ITERATIONS = 5
MEMORY = 0.8  # decay of G
DAMPING = 1e-4  # of G, relative to the mean of its eigenvalues
NUM_INPUTS = 9  # of the network
SIZES = {
    "rate": 2,
    "schedule": len(KNOTS),
    "momenta": 1 + len(M_DECAYS),
    "squares": 2,
    "whitening": 1,
    "shape": 2,  # exponents of the largest fan-in and of the number of matrices
}


def update_moments(g: jax.Array, moments: jax.Array) -> tuple:
    """moments: [7, C], the means so far and the number of updates.

    -> m [3, C] and v [3, C], bias-corrected, moments
    """
    decays = jnp.array([*M_DECAYS, *V_DECAYS])[:, None]
    new = jnp.stack([g] * len(M_DECAYS) + [jnp.square(g)] * len(V_DECAYS))
    means = decays * moments[:-1] + (1 - decays) * new
    count = moments[-1:] + 1
    corrected = means / (1 - decays**count)
    m, v = jnp.split(corrected, [len(M_DECAYS)])
    return m, v, jnp.concatenate([means, count])


def inputs(relative: list, log_ratios: list, training: list) -> jax.Array:
    """What the network reads, all of the order of 1. relative: the gradient and its means as
    multiples of sqrt(v_.99), positive where they agree with the update; log_ratios: of the update's
    size, of its signal to noise, of the change of v; training: log(N / 1000), f
    -> [NUM_INPUTS, C]"""
    training = [jnp.full_like(log_ratios[0], x) for x in training]
    relative = jnp.clip(jnp.stack(relative), -3, 3)
    log_ratios = jnp.clip(jnp.stack(log_ratios), -5, 5)
    return jnp.concatenate([relative, log_ratios / 2, jnp.stack(training)])


def direction(shared: tuple, g: jax.Array, moments: jax.Array) -> tuple:
    """d of a block. shared: what all blocks share, theta, log(N / 1000) and f; g: [C]
    -> d [C], moments"""
    theta, log_n, fraction = shared
    g = jnp.clip(jax.lax.stop_gradient(g), -MOST_GRADIENT, MOST_GRADIENT)
    m, v, moments = update_moments(g, moments)
    w = jnp.array([0.0, 0.0, 1.0, 0.0]) + theta["momenta"]
    u = w[0] * g + jnp.sum(w[1:, None] * m, axis=0)
    logs = jnp.log(jnp.sqrt(v) + EPS)
    a = jnp.append(theta["squares"], 1 - jnp.sum(theta["squares"]))
    d = jnp.clip(u * jnp.exp(-jnp.sum(a[:, None] * logs, axis=0)), -LARGEST, LARGEST)
    if "network" not in theta:
        return d, moments
    relative = [jnp.sign(u) * x * jnp.exp(-logs[1]) for x in (g, *m)]
    log_signal = jnp.log(jnp.abs(m[1]) + EPS) - logs[0]
    log_ratios = [jnp.log(jnp.abs(d) + EPS), log_signal, logs[0] - logs[2]]
    o_0, o_1 = readout(theta["network"], inputs(relative, log_ratios, [log_n, fraction]))
    return d * jnp.exp(o_0) + jnp.sign(u) * o_1, moments


def scaled_to(size: jax.Array, x: jax.Array) -> jax.Array:
    """x with this RMS, over its last two axes; 0 stays. size: [B, 1, 1], x: [B, rows, columns]"""
    return x * size / rms(x)


def rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=(-2, -1), keepdims=True) + 1e-24)


def inverse_root(gram: jax.Array) -> jax.Array:
    """About gram^-1/2, up to a factor: Muon's iterations, coupled (Higham 2008, chapter 6), so that
    they need the Gram matrix only. gram: [B, n, n], positive semidefinite"""
    one = jnp.eye(gram.shape[-1])
    a, b, c = NEWTON_SCHULZ

    def iterate(_, roots):
        root, inverse = roots
        w = PRECISE_PRODUCT(inverse, root)
        w = a * one + b * w + c * PRECISE_PRODUCT(w, w)
        return PRECISE_PRODUCT(root, w), PRECISE_PRODUCT(w, inverse)

    # With this trace no eigenvalue is above 1. The smallest ones are rounding errors.
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None]
    start = gram / (trace + 1e-30) + DAMPING / len(one) * one
    roots = start, jnp.broadcast_to(one, start.shape)
    return jax.lax.fori_loop(0, ITERATIONS, iterate, roots)[1]


def by_shape(leaves: list) -> dict:
    """(rows, columns) -> the numbers of the leaves that are such matrices, with their last axes as
    columns"""
    found: dict = {}
    for number, leaf in enumerate(leaves):
        if len(shape := jnp.shape(leaf)) > 1 and math.prod(shape):
            found.setdefault((math.prod(shape[:-1]), shape[-1]), []).append(number)
    return found


def init_grams(params) -> tuple:
    """G of all matrices: those of one shape together."""
    shapes = by_shape(jax.tree.leaves(params)).items()
    return tuple(jnp.zeros((len(numbers), min(shape), min(shape))) for shape, numbers in shapes)


@partial(jax.jit, inline=True)  # outside of jit, too, it is compiled once
def whiten(whitening: jax.Array, d, grams: tuple) -> tuple:
    """-> D(d) for all tensors of the tree d, grams. whitening: theta's, []; grams: as of
    init_grams"""
    leaves, treedef = jax.tree.flatten(d)
    new = []
    for (shape, numbers), gram in zip(by_shape(leaves).items(), grams, strict=True):
        tall = shape[0] > shape[1]
        x = jnp.stack([leaves[number].reshape(shape) for number in numbers])
        x = x.mT if tall else x
        gram = MEMORY * gram + PRECISE_PRODUCT((1 - MEMORY) * x, x.mT)
        new.append(gram)
        size = rms(x)
        white = PRECISE_PRODUCT(inverse_root(gram), x)
        x = scaled_to(size, (1 - whitening) * x + whitening * scaled_to(size, white))
        x = x.mT if tall else x
        for number, place in zip(numbers, unknown_to_xla([*range(len(numbers))], x), strict=True):
            leaves[number] = x[place].reshape(leaves[number].shape)
    return jax.tree.unflatten(treedef, leaves), tuple(new)


def log_shape_factor(theta: dict, like) -> jax.Array:
    """log k, the same for all tensors of the network. -> []

    A layer sums the changes of all that it reads, and a deep network those of all its layers: the
    wider and deeper it is, the more does every step count."""
    shapes = [shape for p in jax.tree.leaves(like) if len(shape := jnp.shape(p)) > 1]
    widest = max([LEAST_FAN, *(math.prod(shape[:-1]) for shape in shapes)])
    logs = (
        math.log(min(widest, MOST_FAN) / LEAST_FAN),
        math.log(max(LEAST_MATRICES, len(shapes)) / USUAL_MATRICES),
    )
    return jnp.dot(theta["shape"], jnp.array(logs))


def make_adam4rl(network_size: int = 0) -> LearnedOptimizer:
    """The optimizer above, for meta-training. `update` takes two extra arguments: the fraction of
    training that is done, and num_steps, N. Its learning_rate is a multiplier.

    network_size: hidden units of the network; 0 is none.
    """

    def init_theta(key):
        theta = {name: jnp.zeros(size) for name, size in SIZES.items()}
        if network_size:
            theta["network"] = init_dense(key, (NUM_INPUTS, network_size, 2))
            theta["network"]["1"] = jax.tree.map(jnp.zeros_like, theta["network"]["1"])
        return theta

    def init_block():
        return jnp.zeros((len(M_DECAYS) + len(V_DECAYS) + 1, BLOCK))

    def init_state(params):
        return init_blocks(params, init_block), init_grams(params)

    apply = map_blocks(direction)

    def update(theta, grads, state, params, learning_rate, *, fraction, num_steps, **extra_args):
        del params, extra_args
        state, grams = state
        g = to_blocks(grads)
        log_n = jnp.log(num_steps / USUAL_STEPS)
        d, state = apply((theta, log_n, jnp.asarray(fraction, float)), g, state)
        alpha = 1 + theta["rate"][1]
        log_rate = math.log(RATE / USUAL_STEPS) + theta["rate"][0] - alpha * log_n
        log_rate += jnp.interp(fraction, jnp.array(KNOTS), theta["schedule"])
        log_rate += log_shape_factor(theta, grads)
        factor = -learning_rate * jnp.exp(log_rate)
        # In float32, also for gradients of bfloat16.
        d = from_blocks(d, jax.tree.map(lambda g: jnp.zeros(jnp.shape(g)), grads))
        d, grams = whiten(theta["whitening"][0], d, grams)
        return jax.tree.map(lambda d, g: (factor * d).astype(g.dtype), d, grads), (state, grams)

    return LearnedOptimizer(init_theta, init_state, update, own_rate=1.0)


def network_size(theta: dict) -> int:
    """Hidden units of the network in theta; 0 if there is none."""
    try:
        return len(theta["network"]["0"]["b"])
    except (LookupError, TypeError):
        return 0


def adam4rl(theta: dict, num_steps: int, learning_rate: float | Callable = 1.0):
    """The optimizer with these meta-parameters, for any pytree of parameters, as optax's.

    It counts its updates, of which there are to be num_steps; for later ones the schedule is at its
    end. learning_rate: a multiplier, 1 as meta-trained, or an optax schedule of it. Raises
    ValueError for num_steps that is not a number from 1 up, and as optim4rl.to_optax does.
    """
    if not 1 <= num_steps < math.inf:
        raise ValueError(f"num_steps must be the updates of the whole training, got {num_steps}")
    learned = to_optax(make_adam4rl(network_size(theta)), theta, learning_rate)

    def init(params):
        return learned.init(params), jnp.zeros((), jnp.int32)

    def update(grads, state, params=None, **extra_args):
        del extra_args
        state, count = state
        total = float(num_steps)
        given = {"fraction": jnp.minimum(count / total, 1.0), "num_steps": total}
        updates, state = learned.update(grads, state, params, **given)
        return updates, (state, count + 1)

    return optax.GradientTransformationExtraArgs(init, update)
