"""Every optimizer on every task, for results/compare:

    python experiments/table.py --env-name small_dense_long small_sparse_long
    python experiments/table.py --env-name ant --optimizers pretrained/adam4rl adam rmsprop

Evaluates each pair that scores.csv of --out lacks, classical optimizers at their best learning rate
of a sweep, and adds it there at once: the same command continues an interrupted one. With --again
what is there is replaced (new weights). Then draws all of scores.csv, as figures/compare.py does.

An accelerator trains all optimizers of a task in one program (lanes.py).
"""

import contextlib
import dataclasses
import fcntl
import math
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import jax

import lanes
from ablations import ROOT, run

sys.path.insert(0, str(ROOT))
import checks
import command_line
import evaluate
import gridworld
import optimizers
import runs
import settings
from environments import minatar
from figures import compare, report

BRAX = ("inverted_double_pendulum", "ant", "humanoid", "hopper", "walker2d", "halfcheetah")
BRAX_SIZES = dict(
    total_steps=6.6e5,
    num_envs=128,
    batch_size=64,
    value_layers=(64, 64, 64, 64, 64),
    # Not clipped, as in Brax itself: on ant Adam, RMSProp and adam4rl are better so.
    grad_clip=math.inf,
    num_evals=4,
)
GRID_RATES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
BIG_RATES = (3e-2, 1e-2, 3e-3)  # on big_dense_long 1e-1 and 1e-3 learn little in 4e6 steps
# task: arguments of evaluate.py, for sizes that two cores can run; learning rates of the sweep
TASKS = {
    "catch": ({}, GRID_RATES),
    **{
        name: ({"total_steps": steps}, BIG_RATES if name.startswith("big") else GRID_RATES)
        for name, steps in settings.SHORT.items()
    },
    **dict.fromkeys(minatar.NAMES, ({"total_steps": 1e6}, (1e-2, 3e-3, 1e-3, 3e-4))),
    **dict.fromkeys(BRAX, (BRAX_SIZES, (1e-2, 3e-3, 1e-3, 3e-4))),
}
LEARNED = (
    "pretrained/adam4rl",
    "untrained:pretrained/adam4rl",
    "pretrained/optim4rl_gridworlds",
    "untrained",
)
CLASSICAL = tuple(name for name in optimizers.CLASSICAL if name != "sgd")
NOT_FOR_A2C = ("adam_kl", "adam_rel")  # what they react to is PPO's
LARGER_RATES = {"muon_linear": 10}
TASKS_AT_ONCE = 3  # on an accelerator
# No number of adam4rl was set by what it does on these.
HELD_OUT = (
    "catch",
    "small_sparse_short",
    "big_sparse_short",
    "big_sparse_long",
    "big_dense_short",
    "walker2d",
    *minatar.NAMES,
)


@dataclass(frozen=True)
class Args:
    env_name: tuple[str, ...] = tuple(TASKS)
    """gridworlds, MinAtar's games, Brax's tasks"""
    optimizers: tuple[str, ...] = LEARNED + CLASSICAL
    """as in evaluate.py"""
    num_seeds: int = 10
    """agents of each pair"""
    total_steps: float | None = None
    """environment steps of each agent; needs an --out of its own. Default: as many as two cores
    can run (TASKS)"""
    learning_rates: tuple[float, ...] = ()
    """of the sweep; by default the task's. Muon has ten times these"""
    again: bool = False
    """evaluate what is in scores.csv, too"""
    of: str = compare.Args.of
    """the optimizer that is compared with the others, as its row in their tables is called"""
    out: str = "results/compare"
    """folder of scores.csv, table.md and compare.png"""


def pairs(args: Args) -> dict:
    """(task, label of the row) -> the arguments of evaluate.py. Raises a one-line ValueError for a
    task without a size here or an optimizer that cannot be made."""
    found = {}
    for env_name in dict.fromkeys(args.env_name):
        checks.known("env-name", [env_name], TASKS)
        sizes, rates = TASKS[env_name]
        sizes = sizes | ({"total_steps": args.total_steps} if args.total_steps else {})
        names = [
            n for n in args.optimizers if n not in NOT_FOR_A2C or env_name not in gridworld.NAMES
        ]
        for name in names:
            swept = [LARGER_RATES.get(name, 1) * rate for rate in args.learning_rates or rates]
            given = dict(env_name=(env_name,), optimizers=(name,), num_seeds=args.num_seeds)
            if evaluate.is_swept(name):
                given["learning_rates"] = tuple(swept)
            given = evaluate.Args(**given, **sizes)
            (row,) = evaluate.plan(given)
            if (env_name, row.label) in found:
                raise ValueError(f"{name}: two of the --optimizers are called {row.label!r}")
            found[env_name, row.label] = given
    return found


def one_by_one(todo: dict, add) -> None:
    """Evaluate each pair by itself. add(its folder)"""
    for number, (key, given) in enumerate(todo.items(), start=1):
        print(f"--- {number} of {len(todo)}: {', '.join(key)} ---", flush=True)
        # A folder of its own, as another table.py may be running.
        add(run("evaluate", flags_of(given), ROOT / "runs" / "table" / str(os.getpid())))


def flags_of(given: evaluate.Args) -> str:
    """The command line of these arguments, without what has its default value."""
    flags = []
    for name, value in vars(given).items():
        if name == "env_name" or value != getattr(evaluate.Args, name):
            values = value if isinstance(value, tuple) else (value,)
            words = (f"{v:.10g}" if isinstance(v, float) else str(v) for v in values)
            flags += [f"--{name.replace('_', '-')}", *words]
    return shlex.join(flags)


def in_one_program(todo: dict, add) -> None:
    """Evaluate all pairs of a task together. add(the task's folder)

    A few tasks at once, in threads: one compiles while another trains. (Processes would each keep
    their own part of the accelerator's memory, and take turns at a loss.)"""
    by_task: dict = {}
    for (env_name, _), given in todo.items():
        by_task.setdefault(env_name, []).append(given)
    with runs.bad_input():
        learners = {name: evaluate.make_learner(given[0], name) for name, given in by_task.items()}
    with runs.interruptible() as interrupted, ThreadPoolExecutor(TASKS_AT_ONCE) as pool:

        def evaluate_task(env_name, given):
            to_run = [evaluate.plan(args)[0] for args in given]
            results = lanes.evaluate_all(learners[env_name], to_run, given[0], interrupted)
            if not results:
                return None
            folder = ROOT / "runs" / "table"
            names = tuple(name for args in given for name in args.optimizers)
            shown = dataclasses.replace(given[0], optimizers=names)
            folder = runs.make_folder(str(folder), env_name, "evaluate", shown.seed, shown)
            report.write_results(folder / "results.csv", results)
            return folder

        started = [pool.submit(evaluate_task, *task) for task in by_task.items()]
        for done in as_completed(started):
            if not done.exception() and (folder := done.result()):
                add(folder)
        if interrupted():
            sys.exit(interrupted())
        for done in started:
            done.result()  # raises what a task raised, now that the others are kept


def stored(path: Path) -> dict:
    """(task, label of the row) -> its Scores. Raises a one-line ValueError for another file."""
    scores = compare.read_scores(path) if path.exists() else ()
    return {(s.env_name, s.label): s for s in scores}


@contextlib.contextmanager
def alone(folder: Path):
    """Other processes wait here until this one leaves."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        checks.positive(args, "num_seeds", "total_steps", "learning_rates")
        checks.not_empty(args, "env_name", "optimizers")
        if args.total_steps and Path(args.out).resolve() == Path(Args.out).resolve():
            raise ValueError(f"--total-steps needs an --out: {args.out} has other numbers of steps")
        path = Path(args.out) / "scores.csv"
        there = stored(path)
        todo = {key: given for key, given in pairs(args).items() if args.again or key not in there}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(folder):
        (found,) = compare.read((str(folder),)).values()
        with alone(path.parent):  # another table.py may add to it
            scores = stored(path) | {(s.env_name, s.label): s for s in found}
            compare.write_scores(path, [*scores.values()])

    evaluate_pairs = one_by_one if jax.default_backend() == "cpu" else in_one_program
    evaluate_pairs(todo, add)
    by_env: dict = {}
    for s in stored(path).values():
        by_env.setdefault(s.env_name, []).append(s)
    for name, found in [*by_env.items()]:
        if needs := compare.missing(found, args.of):
            print(f"not drawn yet: {name}, which needs {needs}")
            del by_env[name]
    if by_env:
        held_out = tuple(name for name in HELD_OUT if name in by_env)
        compare.write(path.parent, by_env, args.of, held_out)


if __name__ == "__main__":
    main()
