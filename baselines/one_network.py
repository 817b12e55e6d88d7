"""The paper's two baselines with a single recurrent network, coordinate-wise like Optim4RL:
LinearOptim and L2LGD2.

Legend: C coordinates in a block (optim4rl.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optim4rl import (
    CELLS,
    LearnedOptimizer,
    clip_and_stop_gradient,
    coordinatewise,
    init_cell_state,
    init_dense,
    init_rnn,
    readout,
)

PREPROCESSING_P = 10.0  # of L2LGD2's inputs


def one_network(
    rule: Callable,
    num_inputs: int,
    num_outputs: int,
    cell: str,
    hidden_size: int,
    readout_layers: tuple,
):
    """A coordinate-wise optimizer with theta = {"rnn", "readout"}."""

    def init_theta(key):
        key_rnn, key_readout = jax.random.split(key)
        sizes = (hidden_size, *readout_layers, num_outputs)
        return {
            "rnn": init_rnn(key_rnn, cell, num_inputs, hidden_size),
            "readout": init_dense(key_readout, sizes),
        }

    return coordinatewise(init_theta, lambda: init_cell_state(cell, hidden_size), rule)


def make_linear_optim(
    cell="lstm", hidden_size=8, readout_layers=(), grad_clip: float | None = 1.0
) -> LearnedOptimizer:
    """LinearOptim, the paper's ablation of Optim4RL's structure:
    update = -learning_rate (exp(o1) g + exp(o2) o3)."""

    def rule(theta, g, state):
        g = clip_and_stop_gradient(g, grad_clip)
        state = CELLS[cell](theta["rnn"], state, g[None])
        o1, o2, o3 = readout(theta["readout"], state[0])
        return jnp.exp(o1) * g + jnp.exp(o2) * o3, state

    return one_network(rule, 1, 3, cell, hidden_size, readout_layers)


def preprocess(g: jax.Array) -> jax.Array:
    """(log|g| / p, sign g) where |g| >= e^-p, else (-1, e^p g) (Andrychowicz et al. 2016,
    appendix A). g: [C] -> [2, C]"""
    large = jnp.abs(g) >= jnp.exp(-PREPROCESSING_P)
    log_g = jnp.log(jnp.where(large, jnp.abs(g), 1.0)) / PREPROCESSING_P
    return jnp.stack(
        [jnp.where(large, log_g, -1.0), jnp.where(large, jnp.sign(g), jnp.exp(PREPROCESSING_P) * g)]
    )


def make_l2lgd2(
    cell="lstm", hidden_size=8, readout_layers=(), grad_clip: float | None = 1.0
) -> LearnedOptimizer:
    """L2LGD2 (Andrychowicz et al. 2016, arXiv 1606.04474), in the paper's form:
    update = -learning_rate exp(o) g."""

    def rule(theta, g, state):
        g = clip_and_stop_gradient(g, grad_clip)
        state = CELLS[cell](theta["rnn"], state, preprocess(g))
        return jnp.exp(readout(theta["readout"], state[0])[0]) * g, state

    return one_network(rule, 2, 1, cell, hidden_size, readout_layers)
