"""Optim4RL with momentum: what two cells of optim4rl.py can learn when they see more than a gradient.

Optim4RL's update is sign(g) times a positive number, so it cannot average noise away, and raw gradients are too small for
its cells to see. Here both cells read, of every coordinate,

    x = sign g, m_.5 / sqrt(v), m_.9 / sqrt(v), m_.99 / sqrt(v), log|g|, log sqrt(v), log t

with bias-corrected running means m_b of g and v of g^2 (decay .999) and the number of steps t, and

    h1 <- RNN1(h1, x)      o1 = readout1(h1)
    h2 <- RNN2(h2, x)      o2 = readout2(h2)
    update = -learning_rate * (m_.9 / sqrt(v) exp(o1) + sign(g) exp(o2 - 1.5))

The read-outs start near zero, so before meta-training this is Adam with a little sign descent. It is not in the paper.

Legend: C coordinates in a block, H hidden units.
"""

import jax
import jax.numpy as jnp

from optim4rl import BLOCK, CELLS, LearnedOptimizer, constant, coordinatewise, init_cell_state, init_dense, init_rnn, readout

MOMENTUM_DECAYS = (0.5, 0.9, 0.99)
SECOND_MOMENT_DECAY = 0.999
EPS = 1e-8
LOG_SCALE = 0.1  # logarithms are from -18 to 12
READOUT_SCALE = 0.1  # of the read-outs' initial weights
SIGN_BIAS = -1.5


def update_moments(g: jax.Array, moments: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """moments: [5, C], the means of g and g^2 so far and the number of steps -> m [3, C] and v [C], bias-corrected, moments"""
    decays = jnp.array([*MOMENTUM_DECAYS, SECOND_MOMENT_DECAY])[:, None]
    new = jnp.concatenate([jnp.broadcast_to(g, (len(MOMENTUM_DECAYS), *g.shape)), jnp.square(g)[None]])
    means, count = decays * moments[:-1] + (1 - decays) * new, moments[-1:] + 1
    corrected = means / (1 - decays**count)
    return corrected[:-1], corrected[-1], jnp.concatenate([means, count])


def momentum4rl_rule(theta: dict, g: jax.Array, state: tuple, cell: str, grad_clip: float | None) -> tuple:
    """One step for a block of coordinates. g: [C]; state: (rnn1's, rnn2's, moments) -> step [C], state"""
    g = constant(g, grad_clip)
    m, v, moments = update_moments(g, state[2])
    root = jnp.sqrt(v) + EPS
    logs = LOG_SCALE * jnp.log(jnp.stack([jnp.abs(g) + EPS, root, moments[-1]]))
    x = jnp.concatenate([jnp.sign(g)[None], m / root, logs])
    state1, state2 = CELLS[cell](theta["rnn1"], state[0], x), CELLS[cell](theta["rnn2"], state[1], x)
    o1, o2 = readout(theta["readout1"], state1[0])[0], readout(theta["readout2"], state2[0])[0]
    step = m[1] / root * jnp.exp(o1) + jnp.sign(g) * jnp.exp(o2 + SIGN_BIAS)
    return step, (state1, state2, moments)


def make_momentum4rl(cell="lstm", hidden_size=8, readout_layers=(), grad_clip: float | None = 1.0) -> LearnedOptimizer:
    """The optimizer above, for meta-training; `optim4rl.to_optax` makes it optax's."""

    def init_theta(key):
        keys = jax.random.split(key, 4)
        rnns = {f"rnn{i + 1}": init_rnn(keys[i], cell, len(MOMENTUM_DECAYS) + 4, hidden_size) for i in range(2)}
        sizes = (hidden_size, *readout_layers, 1)
        readouts = {f"readout{i + 1}": init_dense(keys[2 + i], sizes) for i in range(2)}
        return rnns | jax.tree.map(lambda w: READOUT_SCALE * w, readouts)

    def init_block():
        moments = jnp.zeros((len(MOMENTUM_DECAYS) + 2, BLOCK))
        return init_cell_state(cell, hidden_size), init_cell_state(cell, hidden_size), moments

    def rule(theta, g, state):
        return momentum4rl_rule(theta, g, state, cell, grad_clip)

    return coordinatewise(init_theta, init_block, rule)
