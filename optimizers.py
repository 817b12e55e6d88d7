"""Optimizers by name, `make_optimizer("adam", 1e-3)`, or by the path of pipeline_train.py's .npz.

This file also has the paper's two baselines with a single recurrent network, coordinate-wise like
Optim4RL. LEARNED lists the kinds that pipeline_train.py can train; an entry there makes a new kind
known to every script.

Legend: C coordinates in a block (optim4rl.py).
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from baselines.star import make_star
from baselines.velo import make_velo
from momentum4rl import make_momentum4rl
from optim4rl import (
    CELLS,
    INPUTS,
    LearnedOptimizer,
    brief,
    clip_and_stop_gradient,
    coordinatewise,
    init_cell_state,
    init_dense,
    init_rnn,
    load_theta,
    make_optim4rl,
    readout,
    to_optax,
)

PRETRAINED = Path(__file__).parent / "pretrained"
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
    """L2LGD2, learning to learn by gradient descent by gradient descent (Andrychowicz et al. 2016),
    in the paper's form: update = -learning_rate exp(o) g."""

    def rule(theta, g, state):
        g = clip_and_stop_gradient(g, grad_clip)
        state = CELLS[cell](theta["rnn"], state, preprocess(g))
        return jnp.exp(readout(theta["readout"], state[0])[0]) * g, state

    return one_network(rule, 2, 1, cell, hidden_size, readout_layers)


CLASSICAL: dict[str, Callable] = {
    "adam": optax.adam,
    "adam_linear": lambda learning_rate: optax.chain(
        optax.adam(learning_rate), scale_by_remaining_training()
    ),
    "rmsprop": optax.rmsprop,
    "sgd": optax.sgd,
    "sign_sgd": optax.sign_sgd,
}

# kind: factory of the LearnedOptimizer; its arguments are the config in a theta file's header
LEARNED: dict[str, Callable] = {
    "optim4rl": make_optim4rl,
    "momentum4rl": make_momentum4rl,
    "linear_optim": make_linear_optim,
    "l2lgd2": make_l2lgd2,
    "star": make_star,
    "velo": make_velo,
}


def scale_by_remaining_training() -> optax.GradientTransformationExtraArgs:
    """Scales updates by one minus the fraction of training done, optax's extra argument
    `fraction`."""

    def update(updates, state, params=None, *, fraction=0.0, **extra_args):
        del params, extra_args
        return optax.tree.scale(1.0 - fraction, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def pretrained_names() -> list[str]:
    return [f"pretrained/{path.stem}" for path in sorted(PRETRAINED.glob("*.npz"))]


def theta_path(name_or_path: str) -> str:
    """The path of a theta file. pretrained/NAME is found from any working directory."""
    if not name_or_path.startswith("pretrained/") or os.path.exists(name_or_path):
        return name_or_path
    name = name_or_path.removesuffix(".npz")
    if name not in pretrained_names():
        raise ValueError(f"no optimizer {name!r}; there are {', '.join(pretrained_names())}")
    return str(PRETRAINED / f"{Path(name).name}.npz")


def is_theta(name_or_path: str) -> bool:
    return (
        name_or_path.endswith(".npz")
        or name_or_path.startswith("pretrained/")
        or os.path.isfile(name_or_path)
    )


def title(path: str, header: dict) -> str:
    """A short name for tables: the kind, unless it is Optim4RL, and the name of the file or the
    run."""
    path = path.removesuffix(".npz")
    name = (
        path if path.startswith("pretrained/") else "/".join(Path(path).parts[-2:]).split("__")[0]
    )
    return (
        name
        if header["optimizer"] == "optim4rl" or path.startswith("pretrained/")
        else f"{header['optimizer']}, {name}"
    )


def check_theta(path: str, learned: LearnedOptimizer, theta: Any) -> None:
    """Raises a one-line ValueError unless theta has this optimizer's arrays, all finite in
    float32."""
    expected = jax.eval_shape(learned.init_theta, jax.random.key(0))
    same_tree = jax.tree.structure(theta) == jax.tree.structure(expected)

    def unlike(array, other):
        return array.shape != other.shape or not np.issubdtype(array.dtype, np.floating)

    if not same_tree or any(jax.tree.leaves(jax.tree.map(unlike, theta, expected))):
        raise ValueError(f"{path}: its arrays are not those of the optimizer that it says it is")
    with np.errstate(over="ignore"):
        as_used = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(theta)]
    if not all(np.isfinite(leaf).all() for leaf in as_used):
        raise ValueError(f"{path}: some of its numbers are not finite in float32")


MOST_UNITS, MOST_LAYERS = 2**16, 16


def is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_UNITS


def is_bound(value: Any) -> bool:
    most = {int: 2**31 - 1, float: np.finfo(np.float32).max}
    return value is None or (type(value) in most and 0 < value <= most[type(value)])


def are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) <= MOST_LAYERS and all(map(is_size, value))
    )


SIZE = (is_size, f"a whole number from 1 to {MOST_UNITS}")
BOUND = (is_bound, "a number above 0, or null")
# argument of a factory in LEARNED: whether a value fits, what would
FITTING: dict[str, tuple[Callable, str]] = {
    "cell": (lambda value: value in [*CELLS], " or ".join(CELLS)),
    "inputs": (lambda value: value in [*INPUTS], " or ".join(INPUTS)),
    "readout_layers": (are_sizes, f"a list of at most {MOST_LAYERS} sizes up to {MOST_UNITS}"),
    **dict.fromkeys(("hidden_size", "mlp_size", "lstm_size", "num_bases"), SIZE),
    **dict.fromkeys(("grad_clip", "step_size"), BOUND),
}


def check_config(kind: str, config: dict) -> None:
    """Raises a one-line ValueError unless these arguments fit the factory of this kind."""
    known = kind_settings(kind)
    for name, value in config.items():
        if name not in known:
            raise ValueError(f"{brief(name, 40)!r} is not a setting of {kind}")
        fits, wanted = FITTING.get(name, (lambda value: True, ""))
        if not fits(value):
            raise ValueError(f"{name} of {kind} must be {wanted}, got {brief(repr(value), 40)}")


def load_learned(path: str) -> tuple[LearnedOptimizer, Any, dict]:
    """A meta-trained optimizer from its .npz -> optimizer, theta, header. Raises a one-line
    ValueError for an invalid file."""
    path = theta_path(path)
    theta, header = load_theta(path)
    kind, config = header["optimizer"], header["config"]
    try:
        check_config(kind, config)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be made from its header: {error}") from None
    learned = LEARNED[kind](**config)
    check_theta(path, learned, theta)
    return learned, jax.tree.map(jnp.asarray, theta), header


SETTINGS = ("cell", "inputs", "hidden_size", "readout_layers", "grad_clip")  # not of every kind


def kind_settings(kind: str) -> dict:
    """The settings of a learned kind and their defaults. Raises ValueError for an unknown kind."""
    if kind not in LEARNED:
        known = ", ".join(LEARNED)
        raise ValueError(f"unknown learned optimizer {brief(kind, 40)!r}; choose from {known}")
    parameters = inspect.signature(LEARNED[kind]).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def kind_in(theta: str) -> str:
    """The kind of optimizer in a theta file, from its header. Puts nothing on a device."""
    return load_theta(theta_path(theta))[1]["optimizer"]


def check_settings(kind: str, changed: set, theta: str | None) -> None:
    """Raises ValueError for a changed setting that the kind lacks or that the theta file sets."""
    known = kind_settings(kind)
    for name in sorted(changed):
        flag = name.replace("_", "-")
        if name not in known:
            raise ValueError(f"--{flag} is not a setting of {kind}")
        if theta:
            raise ValueError(f"--{flag} is set by {theta}; leave it out")


def make_optimizer(name_or_path: str, learning_rate: float) -> optax.GradientTransformation:
    """adam, adam_linear (falling to 0), rmsprop, sgd, sign_sgd; pretrained/NAME or the path of a
    .npz; untrained (Optim4RL with an initial theta), untrained:star (another kind) or
    untrained:PATH.npz (the kind and settings in that file).

    Raises a one-line ValueError for anything else.
    """
    if name_or_path in CLASSICAL:
        return CLASSICAL[name_or_path](learning_rate)
    untrained, _, kind_or_path = name_or_path.partition(":")
    if untrained == "untrained":
        kind = kind_or_path or "optim4rl"
        learned = LEARNED[kind]() if kind in LEARNED else load_learned(kind)[0]
        return to_optax(learned, learned.init_theta(jax.random.key(0)), learning_rate)
    if is_theta(name_or_path):
        learned, theta, _ = load_learned(name_or_path)
        return to_optax(learned, theta, learning_rate)
    raise ValueError(
        f"unknown optimizer {name_or_path!r}; choose from {', '.join(CLASSICAL)}, untrained, "
        "pretrained/NAME, the path of a .npz"
    )
