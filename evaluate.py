r"""Meta-test: train agents with each optimizer, over many seeds, and compare:

    python evaluate.py --env-name catch --num-seeds 10 \
        --optimizers THETA.npz untrained sign_sgd adam rmsprop
    python evaluate.py --env-name ant --num-seeds 4 \
        --optimizers THETA.npz untrained sign_sgd adam rmsprop
    python evaluate.py --suite paper     # Figure 3: headline tasks, all optimizers with weights
    python evaluate.py --suite transfer  # Figure 4: Brax, optimizers meta-trained on several tasks

Agents learn gridworlds with A2C and Brax's tasks with PPO, whatever theta was trained on.

The default list has two controls, Optim4RL before meta-training and plain sign descent: a learned
optimizer that does not beat them has learned nothing. With --learning-rates each classical
optimizer is shown at its best learning rate, which --sweep-seeds agents choose; their seeds are
not among those shown. report.py makes the tables and figures.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np

import checks
import command_line
import optimizers
import runs
import settings
import tasks
from figures import report

SHORTER = "fewer --num-seeds or --total-steps shorten it; Ctrl-C keeps the optimizers that are done"


@dataclass(frozen=True)
class Args:
    # --- What to compare ---
    env_name: tuple[str, ...] = ("catch",)
    """one or more of the eight gridworlds, catch, control tasks, MinAtar's games, and Brax's
    tasks"""
    optimizers: tuple[str, ...] = ("untrained", "sign_sgd", "adam", "rmsprop")
    """names (adam, rmsprop, sgd, sign_sgd, and others in optimizers.CLASSICAL; untrained,
    untrained:star, pretrained/NAME, untrained:pretrained/NAME) and paths of theta files (.npz)"""
    suite: Literal["paper", "transfer"] | None = None
    """instead of --env-name and --optimizers: the environments of one of the paper's figures that
    this machine can run. In each: the weights in pretrained/ that were trained on several
    environments or (paper only) on this one, the controls and the classical optimizers"""
    # --- Seeds and learning rates ---
    num_seeds: int = 10
    """agents trained with each optimizer"""
    seed: int = 1000
    """seed of the first agent, far from meta-training's seeds, which start at 0"""
    learning_rate: float | None = None
    """learning rate of those that do not find their own, as adam4rl does. Default: of a theta file
    the one it was trained with, if it was trained with one only, on this environment or, after
    several, on any gridworld, and with this agent; otherwise the paper's for the environment.
    a2c.py and ppo.py can multiply adam4rl's"""
    learning_rates: tuple[float, ...] = ()
    """sweep the classical optimizers over these learning rates, e.g. 3e-2 1e-2 3e-3 1e-3 3e-4
    1e-4"""
    sweep_seeds: int = 2
    """agents at each learning rate of the sweep"""
    # --- Agents ---
    agent: Literal["a2c", "ppo"] | None = None
    """a2c or ppo; by default A2C on gridworlds and Catch, PPO elsewhere"""
    total_steps: float | None = None
    """environment steps of each agent (A2C: catch 5e5, gridworlds 3e7; PPO: Brax 2e6 to 1e8,
    MinAtar 1e7, others 1e6)"""
    num_envs: int | None = None
    """environments of each agent (A2C: catch 64, gridworlds 512; PPO: Brax 2048 or 4096, MinAtar
    64, others 256)"""
    batch_size: int | None = None
    """PPO: rollouts per minibatch (paper: 512 to 2048); with fewer, a short run has more
    updates"""
    value_layers: tuple[int, ...] | None = None
    """PPO: hidden layers of the critic (paper: 5 of 256; in meta-training 5 of 64, which is faster
    on a CPU)"""
    grad_clip: float | None = None
    """PPO: elementwise bound on gradients (paper: 1); inf: no clipping, Brax's default"""
    num_evals: int | None = None
    """PPO: evaluations of each agent; they take most of the time of a short run"""
    backend: settings.Backend = "spring"
    """physics of Brax's tasks: spring, generalized, positional or mjx"""
    # --- Run ---
    runs_dir: str = "runs"
    """the run's folder is created in this folder"""


# --- The command line ---


class Run(NamedTuple):
    """One optimizer in one environment."""

    env_name: str
    label: str
    optimizer: str  # its name or path
    rates: tuple  # one learning rate, or several to sweep


def fill_in(args: Args) -> Args:
    """The arguments, with a suite's environments and learning rates. Raises a one-line ValueError
    if --suite comes with --env-name or --optimizers."""
    if args.suite is None:
        return args
    if any(command_line.is_given(args, name) for name in ("env_name", "optimizers")):
        raise ValueError(
            f"--suite {args.suite} sets the environments and optimizers; "
            "leave out --env-name and --optimizers"
        )
    left_out = settings.WANT_ACCELERATOR if jax.default_backend() == "cpu" else ()
    env_names = tuple(name for name in settings.SUITES[args.suite] if name not in left_out)
    return dataclasses.replace(
        args,
        env_name=env_names,
        learning_rates=args.learning_rates or settings.SUITE_RATES[args.suite],
    )


def suite_optimizers(suite: str, env_name: str) -> list[str]:
    """Every optimizer with weights for this environment: trained on several environments or (not
    for transfer) on this one. Then the controls and the classical optimizers."""
    shipped = []
    for name in optimizers.pretrained_names():
        header = optimizers.header_in(name)
        trained_on = optimizers.trained_with(header).get("env_name", ())  # others' have none
        if len(trained_on) > 1 or (suite == "paper" and env_name in trained_on):
            shipped += [name] if header["optimizer"] == "optim4rl" else [name, f"untrained:{name}"]
    return [*shipped, *Args.optimizers]


def plan(args: Args) -> list[Run]:
    """The runs to make. Raises a one-line ValueError for an invalid optimizer."""
    to_run, checked = [], set()
    for env_name in args.env_name:
        names = suite_optimizers(args.suite, env_name) if args.suite else args.optimizers
        labels: set = set()
        for name in dict.fromkeys(names):
            if name not in checked:  # a quick check that it can be made
                optimizers.make_optimizer(name, 1e-3)
                checked.add(name)
            header = optimizers.theta_header(name)
            label = label_of(name, header)
            label = name if label in labels else label
            labels.add(label)
            to_run.append(Run(env_name, label, name, rates_of(name, env_name, args)))
    if args.learning_rates and not any(is_swept(run.optimizer) for run in to_run):
        raise ValueError(
            "--learning-rates is the sweep of classical optimizers, and none here has one"
        )
    return to_run


def label_of(name: str, header: dict | None) -> str:
    """What an optimizer is called in tables. header: of its theta file"""
    if header is None:
        return name
    path = name.removeprefix("untrained:")
    return f"{optimizers.title(path, header)} ({'trained' if path == name else 'untrained'})"


def is_swept(name: str) -> bool:
    """Whether --learning-rates are for this optimizer: a classical one without one of its own."""
    return name in optimizers.CLASSICAL and not optimizers.own_rate(name)


def rates_of(name: str, env_name: str, args: Args) -> tuple:
    """The learning rates of a classical optimizer's sweep, if there is one. Else one: the
    optimizer's own, --learning-rate, or the default."""
    if args.learning_rates and is_swept(name):
        return args.learning_rates
    own, agent = optimizers.own_rate(name), tasks.AGENTS[args.agent] if args.agent else None
    return (own or args.learning_rate or tasks.default_rate(env_name, agent, name),)


POSITIVE = (
    "num_seeds sweep_seeds learning_rate learning_rates total_steps num_envs batch_size "
    "value_layers num_evals"
).split()
AGENT_ARGS = (
    "num_seeds seed total_steps num_envs batch_size value_layers grad_clip num_evals"
).split()


def check_used(args: Args, learners: dict) -> None:
    """Raises a one-line ValueError for a flag that has no effect here."""
    if command_line.is_given(args, "sweep_seeds") and not args.learning_rates:
        raise ValueError("--sweep-seeds needs --learning-rates, which they choose from")
    agents_args = [learner.args for learner in learners.values()]
    for name in AGENT_ARGS:
        if getattr(args, name) is not None and not any(hasattr(x, name) for x in agents_args):
            raise ValueError(f"--{name.replace('_', '-')} is PPO's, and no agent here is")


def make_learner(args: Args, env_name: str) -> tasks.Learner:
    """Raises a one-line ValueError for arguments that do not fit the environment or this machine's
    memory."""
    given = {name: getattr(args, name) for name in AGENT_ARGS}
    learner = tasks.make_learner(env_name, args.agent, args.backend, **given)
    steps = learner.agent.steps_per_update(learner.args)
    checks.total_steps(learner.args.total_steps, steps, "update")
    most = max(args.num_seeds, args.sweep_seeds if args.learning_rates else 0)
    # SGD has no state: a lower bound for all optimizers.
    tasks.check_memory(learner, optimizers.make_optimizer("sgd", 1.0), most)
    return learner


def train_with_progress(
    learner: tasks.Learner, optimizer, title: str, interrupted, *restore
) -> dict:
    """agent.train with a progress bar. -> its history"""
    agent, args, env = learner
    with runs.progress(agent.num_updates(args), title) as bar:

        def on_update(number, metrics, state):
            # The bar and Ctrl-C follow finished updates, not queued ones.
            jax.block_until_ready(metrics)
            bar.update()
            return interrupted()

        return agent.train(args, env, optimizer, on_update, *restore)


def train(learner: tasks.Learner, run: Run, rate: float, title: str, interrupted) -> report.Result:
    """All seeds at one learning rate."""
    optimizer = optimizers.make_optimizer(run.optimizer, rate)
    history = train_with_progress(learner, optimizer, title, interrupted)
    seeds = learner.args.seed + np.arange(learner.args.num_seeds)
    return result(learner, run, rate, *curves(learner, history), seeds)


def curves(learner: tasks.Learner, history: dict) -> tuple:
    """-> environment steps [evaluations or updates], returns [seeds, evaluations or updates]"""
    returns = np.asarray(history[learner.agent.SCORE[0]])
    steps = learner.agent.steps_per_update(learner.args)
    updates = steps * np.arange(1, returns.shape[1] + 1)
    return np.asarray(history.get("eval_steps", updates)), returns


def result(learner: tasks.Learner, run: Run, rate: float, env_steps, returns, seeds):
    """The report.Result of agents that learned with one optimizer, from their curves."""
    agent = learner.agent
    is_default = agent is tasks.agent_of(run.env_name)
    env_name = run.env_name if is_default else f"{run.env_name} by {agent.__name__}"
    return report.Result(env_name, run.label, rate, env_steps, returns, seeds)


def sweep(learner: tasks.Learner, run: Run, args: Args, title: str, interrupted) -> list:
    """Results of --sweep-seeds agents at each learning rate; their seeds are not among those
    shown."""
    seeds = {"num_seeds": args.sweep_seeds, "seed": args.seed + args.num_seeds}
    learner = learner._replace(args=dataclasses.replace(learner.args, **seeds))
    results = []
    for rate in run.rates:
        trained = train(learner, run, rate, f"{title}, learning rate {rate:g}", interrupted)
        if interrupted():
            break
        results.append(trained)
    return results


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        checks.positive(args, *POSITIVE)
        if args.grad_clip is not None:
            checks.grad_clip(args.grad_clip)
        checks.seed(args)
        checks.not_empty(args, "optimizers", "env_name")
        if len(set(args.env_name)) < len(args.env_name):
            raise ValueError("--env-name must name each environment once")
        args = fill_in(args)
        learners = {name: make_learner(args, name) for name in args.env_name}
        check_used(args, learners)
        to_run = plan(args)
        folder = runs.make_folder(args.runs_dir, "+".join(learners), "evaluate", args.seed, args)

    if left_out := [name for name in settings.SUITES.get(args.suite, ()) if name not in learners]:
        print(
            f"left out, as there is no accelerator: {', '.join(left_out)} "
            "(--env-name runs them anyway)"
        )
    results, swept, began = [], [], time.perf_counter()
    with runs.interruptible() as interrupted:
        for number, run in enumerate(to_run, start=1):
            learner, rate = learners[run.env_name], run.rates[0]
            title = f"{run.env_name}, {run.label}, {number} of {len(to_run)}"
            if len(run.rates) > 1:
                tried = sweep(learner, run, args, title, interrupted)
                if interrupted():
                    break
                swept += tried
                rate = max(tried, key=report.Result.rank).learning_rate
            trained = train(learner, run, rate, title, interrupted)
            if interrupted():  # this one is incomplete
                break
            results.append(trained)
            # Written after each optimizer: a kill loses one at most.
            report.write_results(folder / "results.csv", results)
            if len(results) == 1:
                runs.warn_if_long((time.perf_counter() - began) * len(to_run), SHORTER)
        if results:
            report.write(folder, results, swept)
    sys.exit(interrupted())


if __name__ == "__main__":
    main()
