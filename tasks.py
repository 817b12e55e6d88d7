"""From an environment's name to its agent, the environment, and the agent's arguments.

To add an environment of a known kind, add a row to settings.py. To add a kind, write its file and
add a Kind below. To add an agent, write a file with the names that a2c.py and ppo.py share (Args,
SCORE, make_agent, train, steps_per_update, num_updates, check), add it to AGENTS here, to
train_agents.ARGS and to evaluate.py's --agent, and use it in a Kind. What only one of the two has
is where the other files say `is ppo` or `is a2c`.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import a2c
import checks
import gridworld
import optimizers
import ppo
import settings
from environments import brax_env, control, minatar, swimmer
from networks import CATEGORICAL


def flat_gridworld(env: gridworld.Env) -> ppo.Env:
    """A gridworld or Catch as PPO takes it, with flat observations."""

    def flat(obs):
        return obs.reshape(-1).astype(jnp.float32)

    def reset(key):
        state, obs = env.reset(key)
        return state, flat(obs)

    def step(key, state, action):
        state, obs, reward, done = env.step(key, state, action)
        return state, flat(obs), reward, done

    size = math.prod(env.obs_shape)
    return ppo.Env(reset, step, size, env.num_actions, CATEGORICAL, resets_itself=True)


class Kind(NamedTuple):
    """Environments of one kind."""

    names: Callable  # () -> their names
    make: dict  # agent (a2c or ppo): function of name and backend -> environment; the default first


KINDS = (
    Kind(
        lambda: gridworld.NAMES,
        {
            a2c: lambda name, backend: gridworld.make(name),
            ppo: lambda name, backend: flat_gridworld(gridworld.make(name)),
        },
    ),
    Kind(lambda: control.NAMES, {ppo: lambda name, backend: ppo.Env(*control.make(name))}),
    Kind(lambda: swimmer.NAMES, {ppo: lambda name, backend: ppo.Env(*swimmer.make(name))}),
    Kind(lambda: minatar.NAMES, {ppo: lambda name, backend: minatar.make(name)}),
    Kind(brax_env.names, {ppo: brax_env.make}),  # last, because names() imports Brax
)
AGENTS = {"a2c": a2c, "ppo": ppo}


class Learner(NamedTuple):
    """An agent, its arguments and its environment."""

    agent: ModuleType  # a2c or ppo
    args: Any  # the agent's Args
    env: Any


def kind_of(name: str) -> Kind:
    """The kind of this environment. Raises a one-line ValueError for an unknown name."""
    for kind in KINDS:
        if name in kind.names():
            return kind
    known = [name for kind in KINDS for name in kind.names()]
    close = difflib.get_close_matches(name, known, 1, cutoff=0.7)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
    raise ValueError(f"unknown environment {name!r:.60}; {hint}")


def agent_of(name: str) -> ModuleType:
    """The agent that learns in this environment by default. Raises ValueError as kind_of does."""
    return next(iter(kind_of(name).make))


def agent_settings(name: str, agent: ModuleType | None = None) -> dict:
    """The agent's arguments and its learning rate, from settings.py.

    agent: None is the default one. Raises a one-line ValueError for an unknown name, or an agent
    that does not learn there.
    """
    agents = kind_of(name).make
    default = next(iter(agents))
    if agent not in (None, *agents):
        raise ValueError(
            f"--env-name {name}: {default.__name__}.py learns there, not {agent.__name__}.py"
        )
    if agent in (None, default):
        return settings.AGENT.get(name, settings.OTHER)
    return settings.PPO_ON_GRIDWORLDS


def agent_args(name: str, agent: ModuleType | None = None, **given: Any) -> Any:
    """The agent's Args in this environment. Raises a one-line ValueError if they do not fit.

    agent: None is the default one. given: values that replace the settings. None, and names that
    are not in the agent's Args, are ignored.
    """
    agent = agent or agent_of(name)
    fields = {field.name for field in dataclasses.fields(agent.Args)}
    given = {key: value for key, value in given.items() if value is not None and key in fields}
    known = {key: value for key, value in agent_settings(name, agent).items() if key in fields}
    args = agent.Args(**(known | {"env_name": name} | given))
    agent.check(args)
    return args


def default_rate(name: str, agent: ModuleType | None, optimizer: str) -> float:
    """The learning rate of an optimizer in this environment if none is given: its own, if it has
    the same in all; with the default agent, which meta-training has, that of its theta file; or the
    environment's. optimizer: its name or path, agent: None is the default one"""
    if own := optimizers.own_rate(optimizer):
        return own
    header = optimizers.theta_header(optimizer) if agent in (None, agent_of(name)) else None
    trained = trained_rate(header.get("trained"), name) if header else None
    return trained or agent_settings(name, agent)["learning_rate"]


def trained_rate(trained: Any, env_name: str) -> float | None:
    """The learning rate of meta-training, from the "trained" of a theta file's header, on the
    environments of meta-training and, after several, on other gridworlds. None if it is not there,
    or if they had different ones, which go with their reward scales."""
    try:
        pairs = zip(trained["env_name"], trained["learning_rate"], strict=False)
        rates = {str(name): float(rate) for name, rate in pairs}
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    gridworlds = len(rates) > 1 and all(name in gridworld.NAMES for name in (*rates, env_name))
    applies = env_name in rates or gridworlds
    rate = rates.popitem()[1] if applies and len(set(rates.values())) == 1 else None
    return rate if rate and 0 < rate <= checks.LARGEST else None


def make_env(name: str, agent: ModuleType, backend: str = "spring") -> Any:
    """The environment, as this agent takes it. backend: physics of Brax's tasks. Raises a one-line
    ValueError if the agent does not learn there, or the task cannot be made."""
    agent_settings(name, agent)
    return kind_of(name).make[agent](name, backend)


def make_learner(name: str, agent: str | None = None, backend="spring", **given: Any) -> Learner:
    """The agent, its arguments (given: as in agent_args) and the environment. agent: its name, or
    None for the default one. Raises a one-line ValueError if they do not fit."""
    module = AGENTS[agent] if agent else agent_of(name)
    args = agent_args(name, module, **given)
    return Learner(module, args, make_env(name, module, backend))


def without_steps(env: Any) -> Any:
    """An environment of the same arrays whose step is a reset, which is quick to trace."""

    def step(*_):
        return *env.reset(jax.random.key(0)), jnp.zeros(()), jnp.array(False)

    return env._replace(step=step)


def check_memory(learner: Learner, optimizer: Any, num_seeds: int) -> None:
    """Raises a one-line ValueError if the agents surely do not fit into this machine's memory."""
    module, args, env = learner

    def agent_and_metrics():
        key, agent = jax.random.key(0), module.make_agent(without_steps(env), args)
        return agent.init(key, optimizer), jnp.zeros((3, module.num_updates(args)))

    def evaluated():
        return jax.vmap(env.reset)(jax.random.split(jax.random.key(0), args.eval_envs))

    needed = num_seeds * checks.size_of(agent_and_metrics)
    if module is ppo:
        needed += checks.size_of(evaluated)
    flags = "--num-seeds, --num-envs, the networks' sizes or --total-steps"
    checks.memory("the agents", needed, flags)


def score_window(env_name: str) -> int:
    """How many of the last returns a score is the mean of; env_name: as in report.Result."""
    name, _, agent = env_name.partition(" by ")
    checks.known("agent", [agent] if agent else [], AGENTS)
    return (AGENTS[agent] if agent else agent_of(name)).SCORE[1]


# --- Meta-training ---


def meta_settings(names: tuple[str, ...]) -> dict:
    """The settings of meta-training on these environments, for fields of pipeline_train.Args.

    Settings that all environments share are those of the first. Raises ValueError for an unknown
    name.
    """
    rows = [settings.META.get(name, settings.META_OTHER) for name in names]
    agents = [agent_settings(name) for name in names]
    pairs = [(agent["learning_rate"], agent.get("reward_scale", 1.0)) for agent in agents]
    if len(names) > 1:
        pairs = [row.get("multitask", alone) for row, alone in zip(rows, pairs, strict=True)]
    learning_rate, reward_scale = zip(*pairs, strict=True)
    first = ("num_units", "reset_interval", "meta_learning_rate", "total_steps")
    return {name: rows[0][name] for name in first} | {
        "learning_rate": learning_rate,
        "reward_scale": reward_scale,
        "envs_per_unit": tuple(row["envs_per_unit"] for row in rows),
        "grad_clip": rows[0].get("grad_clip", 1.0) if len(names) == 1 else 1.0,
    }


def unit_args(name: str, num_envs: int, reward_scale: float, grad_clip: float) -> Any:
    """The agent's Args of a unit of meta-training. Raises a one-line ValueError if they do not fit.
    Makes no environment. grad_clip: PPO's; A2C does not clip."""
    given = {"num_envs": num_envs, "reward_scale": reward_scale, "grad_clip": grad_clip}
    if agent_of(name) is ppo:
        if num_envs % 2:
            wanted = f"even for {name} (a minibatch is half of them)"
            raise ValueError(f"--envs-per-unit must be {wanted}, got {num_envs}")
        given |= settings.META_PPO | {"batch_size": num_envs // 2}
    return agent_args(name, **given)


def all_unit_args(args: Any) -> list:
    """The agent's Args of the units of each environment. args: pipeline_train.Args"""
    sizes = zip(args.env_name, args.envs_per_unit, args.reward_scale, strict=True)
    return [unit_args(*size, args.grad_clip) for size in sizes]


def steps_per_iteration(args: Any) -> int:
    """Environment steps of a meta-iteration in the first environment, over all its units.

    Each unit makes K updates and a rollout for the meta-loss. The latter counts with A2C and not
    with PPO, as in the authors' code.
    """
    agent = agent_of(args.env_name[0])
    counted = args.inner_updates + (1 if agent is a2c else 0)
    return args.num_units * counted * agent.steps_per_update(all_unit_args(args)[0])
