"""Momentum4RL: Optim4RL's cell in an update that uses the gradient's size, running means, and the
fraction of training done.

Optim4RL's update is sign(g) times a positive number: it cannot average noise away, and raw
gradients are too small for its cells to see. Here one cell reads, for each coordinate,

    x = |g| / sqrt(v), sign(g) m_.5 / sqrt(v), sign(g) m_.9 / sqrt(v), sign(g) m_.99 / sqrt(v),
        log|g|, log sqrt(v), log t, log n, log max(1, w / 128), f

with bias-corrected running means m_b of g (decay b) and v of g^2 (decay .99), the number of steps
t, the fan-in n of the coordinate's layer (the inputs it sums; 1 for biases), the largest fan-in w
in the network, and the fraction f of training done (0 if it is not given). Then

    h <- RNN(h, x)      o1, o2 = readout(h, x)
    update = -learning_rate (1 - f) min(1, sqrt(128 / w))
             (g / sqrt(v) exp(o1) + m_.9 / sqrt(v) exp(o2 - 1.5))

A wide network takes smaller steps in all layers. The layers above a weight sum its changes, so a
convolution of fan-in 20 below a layer of fan-in 2,688 needs steps as small as that layer's.

If every gradient changes sign, x stays the same and every update changes sign; this symmetry need
not be learned. The read-out starts near zero: before meta-training this is RMSProp with a little
momentum and a learning rate that falls to zero. It is not in the paper.

To use it with optax, copy this file and optim4rl.py into your project:

    theta, header = load_theta("momentum4rl.npz")
    optimizer = momentum4rl(theta, learning_rate=6e-2, num_steps=10_000, **header["config"])

Legend: C coordinates in a block, M blocks, H hidden units.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from optim4rl import (
    BLOCK,
    CELLS,
    LearnedOptimizer,
    clip_and_stop_gradient,
    from_blocks,
    init_blocks,
    init_cell_state,
    init_dense,
    init_rnn,
    map_blocks,
    readout,
    to_blocks,
    to_optax,
)

DECAYS = (0.5, 0.9, 0.99)  # of the means of g
SQUARE_DECAY = 0.99  # of the mean of g^2
NUM_INPUTS = 10
EPS = 1e-8
LOG_SCALE = 0.1  # logarithms range from -18 to 12
READOUT_GAIN = 10.0  # factor on the read-out's outputs, so that it learns faster than the cell
READOUT_SCALE = 0.01  # factor on its initial weights
MOMENTUM_BIAS = -1.5
WIDE = 128.0  # a network with a larger fan-in takes smaller steps


def update_moments(g: jax.Array, moments: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """moments: [5, C], the means of g and g^2 and the number of steps -> bias-corrected m [3, C]
    and v [C], moments"""
    decays = jnp.array([*DECAYS, SQUARE_DECAY])[:, None]
    new = jnp.concatenate([jnp.broadcast_to(g, (len(DECAYS), *g.shape)), jnp.square(g)[None]])
    means, count = decays * moments[:-1] + (1 - decays) * new, moments[-1:] + 1
    corrected = means / (1 - decays**count)
    return corrected[:-1], corrected[-1], jnp.concatenate([means, count])


def momentum4rl_rule(
    theta: dict, given: jax.Array, state: tuple, cell: str, grad_clip: float | None
) -> tuple:
    """One step for a block of coordinates. given: [4, C], g, n, max(1, w / 128), f; state:
    (cell, moments) -> step [C], state"""
    g, n, width, fraction = clip_and_stop_gradient(given[0], grad_clip), *given[1:]
    m, v, moments = update_moments(g, state[1])
    root = jnp.sqrt(v) + EPS
    logs = LOG_SCALE * jnp.log(jnp.stack([jnp.abs(g) + EPS, root, moments[-1], n, width]))
    x = jnp.concatenate([jnp.abs(g)[None] / root, jnp.sign(g) * m / root, logs, fraction[None]])
    cell_state = CELLS[cell](theta["rnn"], state[0], x)
    o1, o2 = READOUT_GAIN * readout(theta["readout"], jnp.concatenate([cell_state[0], x]))
    return g / root * jnp.exp(o1) + m[1] / root * jnp.exp(o2 + MOMENTUM_BIAS), (cell_state, moments)


def fan_in(w: jax.Array) -> int:
    """The number of inputs a layer sums, from its weights, whose last axis is the output; 1 for
    biases."""
    return max(1, math.prod(jnp.shape(w)[:-1]))


def make_momentum4rl(
    cell="lstm", hidden_size=8, readout_layers=(), grad_clip: float | None = 1.0
) -> LearnedOptimizer:
    """The optimizer above, for meta-training; `optim4rl.to_optax` makes it an optax optimizer."""

    def init_theta(key):
        key_rnn, key_readout = jax.random.split(key)
        layers = init_dense(key_readout, (hidden_size + NUM_INPUTS, *readout_layers, 2))
        rnn = init_rnn(key_rnn, cell, NUM_INPUTS, hidden_size)
        return {"rnn": rnn, "readout": jax.tree.map(lambda w: READOUT_SCALE * w, layers)}

    def init_block():
        return init_cell_state(cell, hidden_size), jnp.zeros((len(DECAYS) + 2, BLOCK))

    apply = map_blocks(partial(momentum4rl_rule, cell=cell, grad_clip=grad_clip))

    def update(theta, grads, state, params, learning_rate, *, fraction=0.0, **extra_args):
        del params, extra_args
        g = to_blocks(grads)
        n = to_blocks(jax.tree.map(lambda g: jnp.full(jnp.shape(g), fan_in(g), float), grads))
        width = max(1.0, max(map(fan_in, jax.tree.leaves(grads)), default=1) / WIDE)
        shared = jnp.full_like(g, width), jnp.full_like(g, fraction)
        # n is 0 in the padding; 1 keeps its logarithm finite.
        steps, state = apply(theta, jnp.stack([g, jnp.maximum(n, 1), *shared], axis=1), state)
        rate = learning_rate * (1 - fraction) / math.sqrt(width)
        return from_blocks(-rate * steps, grads), state

    return LearnedOptimizer(
        init_theta, partial(init_blocks, init_block=init_block), update, rule=None
    )


def momentum4rl(
    theta: dict, learning_rate: float | Callable, num_steps: int, **config
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with these meta-parameters, for any pytree of parameters.

    num_steps: updates in total; later ones are 0. config: the theta file's (header["config"]).
    Raises ValueError for num_steps that is not a number from 1 up, and as optim4rl.to_optax does.
    """
    if not 1 <= num_steps < math.inf:
        raise ValueError(f"num_steps must be the updates of the whole training, got {num_steps}")
    learned = to_optax(make_momentum4rl(**config), theta, learning_rate)

    def init(params):
        return learned.init(params), jnp.zeros((), jnp.int32)

    def update(grads, state, params=None, **extra_args):
        del extra_args
        state, done = state
        fraction = jnp.minimum(done / num_steps, 1.0)
        updates, state = learned.update(grads, state, params, fraction=fraction)
        return updates, (state, done + 1)

    return optax.GradientTransformationExtraArgs(init, update)
