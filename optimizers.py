"""Optimizers by name, `make_optimizer("adam", 1e-3)`, or by the path of pipeline_train.py's .npz.

LEARNED lists the kinds that pipeline_train.py can train; an entry there makes a new kind known to
every script.
"""

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import runs
from adam4rl import make_adam4rl
from baselines.classical import CLASSICAL, OWN_RATE
from baselines.one_network import make_l2lgd2, make_linear_optim
from baselines.open import make_open
from baselines.star import make_star
from baselines.velo import make_velo
from optim4rl import (
    CELLS,
    FORMAT,
    INPUTS,
    LearnedOptimizer,
    brief,
    load_theta,
    make_optim4rl,
    to_optax,
)

PRETRAINED = Path(__file__).parent / "pretrained"

# kind: factory of the LearnedOptimizer; its arguments are the config in a theta file's header
LEARNED: dict[str, Callable] = {
    "optim4rl": make_optim4rl,
    "adam4rl": make_adam4rl,
    "linear_optim": make_linear_optim,
    "l2lgd2": make_l2lgd2,
    "open": make_open,
    "star": make_star,
    "velo": make_velo,
}


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
    if name_or_path in CLASSICAL or name_or_path in LEARNED:  # also if a file is called so
        return False
    return (
        name_or_path.endswith(".npz")
        or name_or_path.startswith("pretrained/")
        or os.path.isfile(name_or_path)
    )


def title(path: str, header: dict) -> str:
    """A short name for tables: pretrained/NAME as it is, else the run or file, after the kind
    unless it is Optim4RL."""
    path = path.removesuffix(".npz")
    if path.startswith("pretrained/"):
        return path
    name = "/".join(Path(path).parts[-2:]).split("__")[0]
    return name if header["optimizer"] == "optim4rl" else f"{header['optimizer']}, {name}"


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
    **dict.fromkeys(("hidden_size", "mlp_size", "lstm_size", "num_bases", "width"), SIZE),
    "network_size": (lambda n: n == 0 or is_size(n), f"a whole number up to {MOST_UNITS}"),
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


def save_theta(
    path: str | os.PathLike, theta: Any, optimizer: str, config: dict, trained: dict
) -> None:
    """Write theta (nested dicts of arrays) and a header, for load_theta.

    optimizer: the kind ("optim4rl"). config: the arguments of its factory. trained: how it was
    trained, names with JSON values; an infinite one becomes "inf".
    """
    trained = runs.without_infinity(trained)
    header = {"format": FORMAT, "optimizer": optimizer, "config": config, "trained": trained}
    paths_and_leaves = jax.tree_util.tree_flatten_with_path(theta)[0]
    arrays = {
        "/".join(key.key for key in path): np.asarray(leaf) for path, leaf in paths_and_leaves
    }
    header = np.array(json.dumps(header))
    runs.write_whole(path, lambda file: np.savez(file, header=header, **arrays))


def made_from(path: str, header: dict) -> LearnedOptimizer:
    """The optimizer of a theta file, from its header. Raises a one-line ValueError if its config
    does not fit."""
    kind, config = header["optimizer"], header["config"]
    try:
        check_config(kind, config)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be made from its header: {error}") from None
    return LEARNED[kind](**config)


def load_learned(path: str) -> tuple[LearnedOptimizer, Any, dict]:
    """A meta-trained optimizer from its .npz -> optimizer, theta, header. Raises a one-line
    ValueError for an invalid file."""
    path = theta_path(path)
    theta, header = load_theta(path)
    learned = made_from(path, header)
    check_theta(path, learned, theta)
    return learned, jax.tree.map(jnp.float32, theta), header


SETTINGS = ("cell", "inputs", "hidden_size", "readout_layers", "grad_clip")  # not of every kind


def kind_settings(kind: str) -> dict:
    """The settings of a learned kind and their defaults. Raises ValueError for an unknown kind."""
    if kind not in LEARNED:
        known = ", ".join(LEARNED)
        raise ValueError(f"unknown learned optimizer {brief(kind, 40)!r}; choose from {known}")
    parameters = inspect.signature(LEARNED[kind]).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def header_in(theta: str) -> dict:
    """The header of a theta file. Puts nothing on a device."""
    return load_theta(theta_path(theta))[1]


def theta_file(name: str) -> str | None:
    """The path of the theta file in an optimizer's name; None if there is none."""
    path = name.removeprefix("untrained:")
    return theta_path(path) if is_theta(path) else None


def theta_header(name: str) -> dict | None:
    """The header of the theta file in an optimizer's name; None if there is none."""
    path = theta_file(name)
    return header_in(path) if path else None


def check_settings(kind: str, changed: set, theta: str | None) -> None:
    """Raises ValueError for a changed setting that the kind lacks or that the theta file sets."""
    known = kind_settings(kind)
    for name in sorted(changed):
        flag = name.replace("_", "-")
        if name not in known:
            raise ValueError(f"--{flag} is not a setting of {kind}")
        if theta:
            raise ValueError(f"--{flag} is set by {theta}; leave it out")


def find_learned(name_or_path: str) -> tuple[LearnedOptimizer, Any] | None:
    """The learned optimizer with this name, as in make_optimizer, and its theta. None for another
    name. Raises a one-line ValueError for an invalid file."""
    untrained, _, kind_or_path = name_or_path.partition(":")
    if untrained == "untrained":
        kind = kind_or_path or "optim4rl"
        if kind in LEARNED:
            learned, header = LEARNED[kind](), {}
        else:
            learned, _, header = load_learned(kind)
        return learned, initial_theta(learned, seed_of(header))
    return load_learned(name_or_path)[:2] if is_theta(name_or_path) else None


def initial_theta(learned: LearnedOptimizer, seed: int) -> Any:
    """The theta with which pipeline_train.py begins with this seed (its init_meta_state)."""
    key = jax.random.split(jax.random.key(seed))[0]
    return learned.init_theta(jax.random.split(key)[0])


def trained_with(header: dict) -> dict:
    """The arguments of meta-training, from a theta file's header; empty if it has none."""
    trained = header.get("trained")
    return trained if isinstance(trained, dict) else {}


def seed_of(header: dict) -> int:
    """The seed of meta-training, from a theta file's header; 0 if it has none."""
    seed = trained_with(header).get("seed")
    return seed if type(seed) is int and abs(seed) < 2**31 else 0


def own_rate(name_or_path: str) -> float | None:
    """The learning rate of an optimizer that is to have the same in all environments, or None.
    Raises a one-line ValueError for an invalid theta file."""
    if path := theta_file(name_or_path):
        return made_from(path, header_in(path)).own_rate
    kind = name_or_path.removeprefix("untrained:")
    return LEARNED[kind]().own_rate if kind in LEARNED else OWN_RATE.get(name_or_path)


def make_optimizer(name_or_path: str, learning_rate: float) -> optax.GradientTransformation:
    """A name in CLASSICAL (_linear: falling to 0); pretrained/NAME or the path of a .npz; untrained
    (Optim4RL with the theta that meta-training begins with, seed 0), untrained:star (another kind)
    or untrained:PATH.npz (of the run that made this file, as if it had no --theta).

    Raises a one-line ValueError for anything else.
    """
    if name_or_path in CLASSICAL:
        return CLASSICAL[name_or_path](learning_rate)
    if found := find_learned(name_or_path):
        return to_optax(*found, learning_rate)
    if name_or_path in LEARNED:
        raise ValueError(
            f"{name_or_path} needs a theta: pretrained/NAME, the path of a .npz, or "
            f"untrained:{name_or_path}"
        )
    raise ValueError(
        f"unknown optimizer {name_or_path!r}; choose from {', '.join(CLASSICAL)}, untrained, "
        "pretrained/NAME, the path of a .npz"
    )
