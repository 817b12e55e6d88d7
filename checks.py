"""Checks of arguments, before any long work. Each raises a one-line ValueError, which a script
shows in `with runs.bad_input()`."""

import math
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args, get_origin

import jax

MOST, LARGEST = 2**31 - 1, 3.4e38  # in int32 and float32


def positive(args: Any, *names: str) -> None:
    """Raises ValueError unless each of these arguments is None, or above 0 and fits int32 or
    float32."""
    for name in names:
        value, flag = getattr(args, name), name.replace("_", "-")
        for number in value if isinstance(value, tuple | list) else (value,):
            most = MOST if isinstance(number, int) else LARGEST
            if number is not None and not number > 0:
                raise ValueError(f"--{flag} must be above 0, got {shown(number)}")
            if number is not None and number > most:
                raise ValueError(f"--{flag} must be at most {shown(most)}, got {shown(number)}")


def not_empty(args: Any, *names: str) -> None:
    """Raises ValueError if one of these arguments is an empty list."""
    for name in names:
        if not getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} must name at least one")


def known(flag: str, names: Iterable[str], there: Iterable[str]) -> None:
    """Raises ValueError if one of these names, given to a flag, is not there."""
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"--{flag}: {unknown[0]!r} is none of {', '.join(there)}")


def between(args: Any, low: float, high: float, *names: str) -> None:
    """Raises ValueError unless each of these arguments is None or from low to high."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(
                f"--{name.replace('_', '-')} must be from {low:g} to {high:g}, got {shown(value)}"
            )


def grad_clip(value: float) -> None:
    """Raises ValueError unless it is above 0 and fits float32, or infinite."""
    if not 0 < value <= LARGEST and value != float("inf"):
        raise ValueError(f"--grad-clip must be above 0, or inf for no clipping, got {value:g}")


def seed(args: Any) -> None:
    """Raises ValueError unless the seeds of all agents, from --seed on, fit int32."""
    most = MOST + 1 - getattr(args, "num_seeds", 1) - getattr(args, "sweep_seeds", 0)
    if not 0 <= args.seed <= most:
        raise ValueError(f"--seed must be from 0 to {most}, got {args.seed}")


def total_steps(total_steps: float, steps: int, unit: str) -> None:
    """Raises ValueError unless this is from one unit, an update or iteration of so many steps, to
    as many units as fit int32."""
    if total_steps < steps:
        raise ValueError(f"--total-steps {total_steps:g} is less than one {unit} ({steps} steps)")
    if steps > MOST:
        raise ValueError(f"one {unit} would be {steps} steps, and can be {MOST} at most")
    if total_steps // steps > MOST:
        raise ValueError(f"--total-steps {total_steps:g} is more than {MOST} {unit}s")


def shown(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


def size_of(make: Callable) -> float:
    """Bytes of the arrays that make() returns, without making them; infinite if a size does not fit
    int32."""
    try:
        leaves = jax.tree.leaves(jax.eval_shape(make))
    except OverflowError:
        return float("inf")
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def memory(what: str, needed: float, flags: str) -> None:
    """Raises ValueError if so many bytes surely do not fit into this machine's memory. flags: those
    that make it less."""
    on_devices = sum((d.memory_stats() or {}).get("bytes_limit", 0) for d in jax.local_devices())
    there = max(on_devices, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if needed > there:
        sizes = f"{needed / 1e9:,.0f} GB, and this machine has {there / 1e9:,.0f}"
        raise ValueError(f"{what} would take {sizes}; lower {flags}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from a JSON file is of an argument's type."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return value in inner
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            return False
        each = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(value) == len(each) and all(map(fits, value, each))
    if inner:  # a union
        return any(fits(value, option) for option in inner)
    return type(value) in ((int, float) if hint is float else (hint,))
