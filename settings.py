"""The paper's settings of meta-training, by environment, and which environments there are."""

import difflib
from typing import NamedTuple

import gridworld
import ppo


class Setting(NamedTuple):
    """A task's setting in the paper; where the paper swept, a value from inside the sweep."""

    num_units: int
    total_steps: float
    reset_interval: int
    meta_learning_rate: float
    learning_rate: float  # trained on alone
    multitask_learning_rate: float  # trained on together with others
    multitask_reward_scale: float
    reward_scale: float = 1.0
    envs_per_unit: int = 1


SETTINGS = {
    "catch": Setting(64, 5e5, 32, 1e-3, 1e-3, 1e-3, 1.0),
    "small_sparse_short": Setting(512, 3e7, 144, 3e-4, 3e-3, 3e-3, 1e2),  # not in the paper: as its other small ones
    "small_sparse_long": Setting(512, 3e7, 144, 3e-4, 3e-3, 3e-3, 1e2),  # likewise
    "small_dense_short": Setting(512, 3e7, 144, 3e-4, 3e-3, 3e-3, 1e2),
    "small_dense_long": Setting(512, 3e7, 144, 3e-4, 3e-2, 1e-3, 1e3),
    "big_sparse_short": Setting(512, 3e7, 144, 3e-4, 3e-3, 3e-3, 1e2),
    "big_sparse_long": Setting(512, 3e7, 144, 3e-4, 1e-3, 1e-3, 1e1),
    "big_dense_short": Setting(512, 3e7, 144, 3e-4, 3e-3, 3e-3, 1e1),
    "big_dense_long": Setting(512, 3e7, 144, 3e-4, 3e-3, 3e-3, 1.0),
}


def check_environment(name: str) -> None:
    """Raises ValueError, in one line, unless it is a gridworld, catch, or a task of Brax's."""
    if name in gridworld.NAMES or name in ppo.task_names():
        return
    known = (*gridworld.NAMES, *ppo.task_names())
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
    raise ValueError(f"unknown environment {name!r}; {hint}")


def setting_of(name: str) -> Setting:
    if name in SETTINGS:
        return SETTINGS[name]
    # The paper's 2048 environments in all, spread over 16 units where it had as many units as devices.
    brax = ppo.SETTINGS.get(name, ppo.OTHER)
    return Setting(
        16, 1e8, 64, 3e-4, brax.learning_rate, brax.learning_rate, brax.reward_scale, brax.reward_scale, envs_per_unit=128
    )
