"""The optimizers by name: `make_optimizer("adam", 1e-3)`, or the path of a .npz that pipeline_train.py wrote.

The learned ones that pipeline_train.py can train are in LEARNED; a new one is an entry there, and then every script has it.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from optim4rl import LearnedOptimizer, load_theta, make_optim4rl, to_optax

CLASSICAL: dict[str, Callable] = {
    "adam": optax.adam,
    "rmsprop": optax.rmsprop,
    "sgd": optax.sgd,
    "sign_sgd": optax.sign_sgd,
}

# kind: function that makes the LearnedOptimizer from the arguments kept in a theta file's header
LEARNED: dict[str, Callable] = {
    "optim4rl": make_optim4rl,
}


def load_learned(path: str) -> tuple[LearnedOptimizer, Any, dict]:
    """A meta-trained optimizer from its .npz -> optimizer, theta, header. Raises ValueError, in one line, if unfit."""
    theta, header = load_theta(path)
    kind = header["optimizer"]
    if kind not in LEARNED:
        raise ValueError(f"{path}: holds the optimizer {kind!r}; known are {', '.join(LEARNED)}")
    try:
        learned = LEARNED[kind](**header["config"])
        expected = jax.eval_shape(learned.init_theta, jax.random.key(0))
    except Exception as error:  # whatever a foreign header makes the factory raise
        raise ValueError(f"{path}: {kind} cannot be made from its header {header['config']} ({error})") from None
    same_tree = jax.tree.structure(theta) == jax.tree.structure(expected)
    if not same_tree or any(jax.tree.leaves(jax.tree.map(lambda a, b: a.shape != b.shape, theta, expected))):
        raise ValueError(f"{path}: its arrays are not those of {kind} with {header['config']}")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(theta)):
        raise ValueError(f"{path}: some of its numbers are not finite")
    return learned, theta, header


def make_optimizer(name_or_path: str, learning_rate: float) -> optax.GradientTransformation:
    """adam, rmsprop, sgd, sign_sgd, untrained (Optim4RL at its initial theta), or the path of a .npz.

    Raises ValueError, in one line, for anything else.
    """
    if name_or_path in CLASSICAL:
        return CLASSICAL[name_or_path](learning_rate)
    if name_or_path == "untrained":
        learned = make_optim4rl()
        return to_optax(learned, learned.init_theta(jax.random.key(0)), learning_rate)
    if name_or_path.endswith(".npz") or os.path.exists(name_or_path):
        learned, theta, _ = load_learned(name_or_path)
        return to_optax(learned, theta, learning_rate)
    raise ValueError(f"unknown optimizer {name_or_path!r}; choose from {', '.join(CLASSICAL)}, untrained, or a path to a .npz")
