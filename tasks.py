"""An environment's name -> the agent that learns there, the environment, and the agent's arguments.

To add an environment of a known kind, add a row to settings.py. To add a kind, write its file and add a Kind below. To add
an agent, write a file with what a2c.py and ppo.py have (Args, make_agent, train, steps_per_update, num_updates) and name
it in a Kind.
"""

import dataclasses
import difflib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import a2c
import brax_env
import gridworld
import ppo
import settings


class Kind(NamedTuple):
    """Environments of one kind."""

    agent: ModuleType  # a2c or ppo
    names: Callable  # () -> their names
    make: Callable  # name, backend -> environment


KINDS = (
    Kind(a2c, lambda: gridworld.NAMES, lambda name, backend: gridworld.make(name)),
    Kind(ppo, brax_env.names, brax_env.make),  # the last one: asking for names imports Brax
)


class Learner(NamedTuple):
    """What an environment is learned with."""

    agent: ModuleType  # a2c or ppo
    args: Any  # the agent's Args
    env: Any


def kind_of(name: str) -> Kind:
    """Raises ValueError, in one line, for an unknown name."""
    for kind in KINDS:
        if name in kind.names():
            return kind
    known = [name for kind in KINDS for name in kind.names()]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
    raise ValueError(f"unknown environment {name!r}; {hint}")


def agent_settings(name: str) -> dict:
    """The row of settings.AGENT: the agent's arguments, and its learning rate. Raises ValueError for an unknown name."""
    kind_of(name)
    return settings.AGENT.get(name, settings.OTHER)


def agent_args(name: str, **given: Any) -> Any:
    """The agent's Args in this environment; Raises ValueError.

    given: values that replace the settings'; a None does not, nor what is not an argument of this agent.
    """
    agent = kind_of(name).agent
    fields = {field.name for field in dataclasses.fields(agent.Args)}
    given = {key: value for key, value in given.items() if value is not None and key in fields}
    known = {key: value for key, value in agent_settings(name).items() if key in fields}
    args = agent.Args(**(known | {"env_name": name} | given))
    agent.check(args)
    return args


def make_env(name: str, agent: ModuleType, backend: str | None = None) -> Any:
    """The environment. backend: physics, for Brax's tasks. Raises ValueError, in one line, if this agent does not learn there."""
    kind = kind_of(name)
    if kind.agent is not agent:
        raise ValueError(f"--env-name {name}: {kind.agent.__name__}.py learns there, not {agent.__name__}.py")
    return kind.make(name, backend)


def make_learner(name: str, backend: str | None = None, **given: Any) -> Learner:
    """The agent, its arguments (given: as above) and the environment. Raises ValueError, in one line."""
    args = agent_args(name, **given)
    agent = kind_of(name).agent
    return Learner(agent, args, make_env(name, agent, backend))


# --- Meta-training ---


def meta_settings(names: tuple[str, ...]) -> dict:
    """The settings of meta-training on these environments: values for fields of pipeline_train.Args.

    What is one number for all is the first environment's. Raises ValueError for an unknown name.
    """
    rows = [settings.META.get(name, settings.META_OTHER) for name in names]
    agents = [agent_settings(name) for name in names]
    alone = [(agent["learning_rate"], agent.get("reward_scale", 1.0)) for agent in agents]
    if len(names) > 1:
        alone = [row.get("multitask", pair) for row, pair in zip(rows, alone, strict=True)]
    learning_rate, reward_scale = zip(*alone, strict=True)
    first = ("num_units", "reset_interval", "meta_learning_rate", "total_steps")
    return {name: rows[0][name] for name in first} | {
        "learning_rate": learning_rate,
        "reward_scale": reward_scale,
        "envs_per_unit": tuple(row["envs_per_unit"] for row in rows),
        "grad_clip": rows[0].get("grad_clip", 1.0) if len(names) == 1 else 1.0,
    }


def unit_args(name: str, num_envs: int, reward_scale: float) -> Any:
    """The agent's Args of a unit of meta-training. Raises ValueError, in one line. No environment is made."""
    given = {"num_envs": num_envs, "reward_scale": reward_scale}
    if kind_of(name).agent is ppo:
        if num_envs % 2:
            raise ValueError(
                f"--envs-per-unit must be even for {name} (a minibatch is half of them), got {num_envs}"
            )
        given |= settings.META_PPO | {"batch_size": num_envs // 2}
    return agent_args(name, **given)
