"""The command line of a2c.py and ppo.py: train agents with one optimizer, log, keep checkpoints."""

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import jax.numpy as jnp
import numpy as np

import a2c
import checks
import command_line
import optimizers
import ppo
import runs
import settings
import tasks
from checkpoints import Checkpoints, resumed_args


@dataclass(frozen=True)
class RunArgs:
    # --- Optimizer ---
    optimizer: str = "adam"
    """adam, rmsprop, sgd, sign_sgd, and others in optimizers.CLASSICAL (adam_linear: falling to 0),
    untrained (Optim4RL before meta-training; untrained:star), pretrained/NAME, or the path of a
    .npz"""
    learning_rate: float | None = None
    """learning rate (default: 1 for adam4rl, OPEN and rmsprop_auto, whose own it multiplies; of a
    theta file the one it was meta-trained with, if it was on this environment or, with one rate
    for several, on any gridworld; otherwise the paper's for the environment; on gridworlds try
    3e-2 to 1e-4 in half decades)"""
    # --- Run ---
    checkpoint_minutes: float = 5.0
    """minutes between two checkpoints of the whole state; the first comes after one at most"""
    resume: str | None = None
    """continue the run in this folder, with its arguments"""
    runs_dir: str = "runs"
    """the run's folder is created in this folder"""


@dataclass(frozen=True)
class A2CArgs(RunArgs, a2c.Args):
    pass


@dataclass(frozen=True)
class PPOArgs(RunArgs, ppo.Args):
    # --- Physics ---
    backend: settings.Backend = "spring"
    """physics of Brax's tasks: spring (the paper's), generalized, positional or mjx"""


ARGS = {a2c: A2CArgs, ppo: PPOArgs}
POSITIVE = (
    "learning_rate total_steps num_envs num_seeds rollout_steps reward_scale checkpoint_minutes "
    "episode_length batch_size num_minibatches num_epochs clip_range num_evals eval_envs "
    "hidden_size policy_layers value_layers"
).split()
NOT_NEGATIVE = ("critic_weight", "entropy_weight", "conv_filters")
FRACTIONS = ("discount", "td_lambda", "gae_lambda")


def check(agent: ModuleType, args) -> None:
    """Raises a one-line ValueError for an invalid argument."""
    names = {field.name for field in dataclasses.fields(args)}
    checks.positive(args, *(name for name in POSITIVE if name in names))
    if "grad_clip" in names:
        checks.grad_clip(args.grad_clip)
    checks.between(args, 0, 1e6, *(name for name in NOT_NEGATIVE if name in names))
    checks.between(args, 0, 1, *(name for name in FRACTIONS if name in names))
    checks.seed(args)
    if agent is ppo:
        checks.between(args, 1, 10_000, "num_epochs")
    agent.check(args)
    checks.total_steps(args.total_steps, agent.steps_per_update(args), "update")


def fill_in(agent: ModuleType, args):
    """The arguments, with the default learning rate, as in evaluate.py, if none is given. Raises a
    one-line ValueError for an invalid one."""
    if args.learning_rate is None:
        rate = tasks.default_rate(args.env_name, agent, args.optimizer)
        args = dataclasses.replace(args, learning_rate=rate)
    check(agent, args)
    return args


def flag_defaults(env_name: str, agent: ModuleType) -> dict:
    """The environment's settings, without the learning rate, which may be the optimizer's."""
    return tasks.agent_settings(env_name, agent) | {"learning_rate": None}


def ended_seeds(state) -> set[int]:
    """The seeds that ended early, from PPO's state. A2C's does not have them, so its device is
    not kept waiting."""
    if not hasattr(state, "alive"):
        return set()
    return set(np.flatnonzero(~np.asarray(state.alive)).tolist())


def last_returns(agent: ModuleType, args, history: dict) -> str:
    """The line that a run ends with: the mean of each seed's last returns, as in evaluate.py; NaN
    for a seed whose last one is not finite. history: of agent.train"""
    metric, last = agent.SCORE
    unit, done = "update", history["return"].shape[1]
    made = range(done)
    if agent is ppo:  # one evaluation is before training, and after an interrupt some were not made
        unit, steps = "evaluation", history["eval_steps"]
        made = [i for i, at in enumerate(steps) if 0 < at <= done * agent.steps_per_update(args)]
    if not made:
        return f"no {unit} yet"
    made = made[-last:]
    returns = np.asarray(history[metric])[:, made]
    final = np.array([np.nanmean(x) if np.isfinite(x[-1]) else np.nan for x in returns])
    what = f"last {len(made)} {unit}s" if len(made) > 1 else f"last {unit}"
    by_seed = ", ".join(f"{x:.5g}" for x in final)
    return f"mean return of the {what}: {jnp.nanmean(final):.5g} (by seed: {by_seed})"


def main(agent: ModuleType) -> None:
    """Train args.num_seeds agents. agent: the module a2c or ppo."""
    args = command_line.parse(ARGS[agent], agent.__doc__, partial(flag_defaults, agent=agent))
    with runs.bad_input():
        if args.resume:
            args = resumed_args(args.resume, args, agent.__name__)
        args = fill_in(agent, args)
        optimizer = optimizers.make_optimizer(args.optimizer, args.learning_rate)
        env = tasks.make_env(args.env_name, agent, getattr(args, "backend", None))
        tasks.check_memory(tasks.Learner(agent, args, env), optimizer, args.num_seeds)
        folder = runs.run_folder(args, args.env_name, agent.__name__)
        checkpoints = Checkpoints(folder, args)
    print("\n".join(f"{name:18} {value}" for name, value in dataclasses.asdict(args).items()))
    metric, _ = agent.SCORE
    mean = jnp.nanmean if agent is ppo else jnp.mean  # a seed of PPO's that ended is NaN
    lost: set[int] = set()

    with runs.interruptible() as interrupted, runs.Log(folder, agent.num_updates(args)) as log:

        def on_update(number, metrics, state):
            env_steps = number * agent.steps_per_update(args)
            means = {name: mean(x) for name, x in metrics.items()}
            by_seed = {f"{metric}_seed_{args.seed + i}": x for i, x in enumerate(metrics[metric])}
            log.write(number, {"env_steps": env_steps, **means, **by_seed})
            for i in ended_seeds(state) - lost:
                lost.add(i)
                log.say(
                    f"seed {args.seed + i}: numbers that are not finite by step {env_steps:,}; "
                    "this seed ends"
                )
            stop = interrupted()
            checkpoints.save_if_due(number, state, log, stop)
            return stop

        history = agent.train(args, env, optimizer, on_update, checkpoints.restore_if_resumed)
    print(last_returns(agent, args, history))
    print(
        f"written: {folder}/config.json, metrics.csv, TensorBoard events "
        f"(tensorboard --logdir {args.runs_dir})"
    )
    if interrupted():
        print(f"to go on: python {agent.__name__}.py --resume {shlex.quote(str(folder))}")
    sys.exit(interrupted())
