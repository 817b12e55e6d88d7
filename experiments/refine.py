r"""Refine theta of adam4rl.py one number after the other, on the tasks of search_tasks.py:

    python experiments/refine.py --theta runs/adam4rl.npz --out runs/refined
    python experiments/refine.py --theta runs/adam4rl.npz --numbers rate.0 rate.1+shape.1

CMA-ES changes all numbers at once, so what one of them does is lost among the others. Here each is
tried at OFFSETS, in steps of --step times search.SCALES, in lifetimes of every task with the same
seeds for all, other seeds for each number. A parabola through their mean ranks, over the tasks
where they differ, gives the best value. The number moves there if the parabola gains --least or
more. Numbers that depend on each other are tried together, at all pairs of offsets.

Writes OUT.npz after each number, and OUT.jsonl: a line a number, with the mean ranks and every
score of every task. Numbers that OUT.jsonl has are not tried again, so the same command
continues.
"""

import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checks
import command_line
import optimizers
import runs
import search
from adam4rl import SIZES
from lifetimes import fitness, flat, start_workers, train
from search_tasks import TASKS, draw

OFFSETS = (-1.0, -0.5, 0.0, 0.5, 1.0)
NUMBERS = tuple(f"{name}.{i}" for name, size in SIZES.items() for i in range(size))


@dataclass(frozen=True)
class Args:
    theta: str = "pretrained/adam4rl.npz"
    """theta file (.npz) of adam4rl without a network"""
    numbers: tuple[str, ...] = NUMBERS
    """which, in this order: a name of theta and a place, from 0; rate.1+shape.1: both at
    once"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """tasks of search_tasks.py"""
    repeats: int = 1
    """lifetimes of each task"""
    step: float = 1.5
    """the largest offset, relative to search.SCALES"""
    least: float = 0.07
    """mean rank (-0.5 to 0.5) that a change must gain by the parabola"""
    seed: int = 1
    """seed of the seeds and of the numbers of updates"""
    out: str = "runs/refined"
    """files are written with this name and the endings .npz, .jsonl"""


def best_offsets(offsets: np.ndarray, ranks: np.ndarray, least: float) -> np.ndarray:
    """Where the quadratic function through the mean ranks is highest for offsets from -1 to 1; 0 if
    that gains less than `least`. offsets: [P, numbers], ranks: [P] -> [numbers]"""

    def features(x):
        x = np.column_stack([np.ones(len(x)), x])
        return np.column_stack([x[:, i] * x[:, j] for j in range(len(x.T)) for i in range(j + 1)])

    weights = np.linalg.lstsq(features(offsets), ranks, rcond=None)[0]
    numbers = offsets.shape[1]
    fine = np.array(list(itertools.product(np.linspace(-1, 1, 41), repeat=numbers)))
    fitted = features(fine) @ weights
    gain = fitted.max() - features(np.zeros((1, numbers)))[0] @ weights
    return fine[np.argmax(fitted)] if gain > 0 and gain >= least else np.zeros(numbers)


def begin(args: Args) -> tuple[dict, dict]:
    """-> theta; how it was trained. Raises a one-line ValueError for a name that is not one of
    theta's, or a file that is not adam4rl's without a network."""
    checks.not_empty(args, "numbers", "tasks")
    numbers = [number for group in args.numbers for number in group.split("+")]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"--numbers must name each once, got {' '.join(args.numbers)}")
    checks.known("numbers", numbers, NUMBERS)
    checks.known("tasks", args.tasks, TASKS)
    theta, size, trained = search.load(args.theta)
    if size:
        raise ValueError(f"{args.theta} has a network; refine.py is for a theta without")
    return {name: np.array(x, float) for name, x in theta.items()}, trained


def read_rows(log: Path, begun_with: dict, theta: dict) -> tuple[list[dict], dict]:
    """What was logged before, theta with these numbers. Raises a one-line ValueError for a file
    that was begun with other arguments or another theta, or that is not this script's."""
    try:
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        changed = {key for row in rows for key, x in begun_with.items() if row["given"][key] != x}
        for row in rows:
            theta = put(theta, row["numbers"], row["value"])
    except (AttributeError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{log}: not a log of refine.py ({error}); another --out") from None
    if changed:
        raise ValueError(
            f"{log} was begun with another --{min(changed)}; give that or another --out"
        )
    return rows, theta


def given(args: Args, theta: dict) -> dict:
    """The arguments that a log belongs to, as JSON has them. theta: what they start from"""
    names = ("tasks", "repeats", "step", "least", "seed")
    values = {name: getattr(args, name) for name in names} | {"theta": flat(theta).tolist()}
    return json.loads(json.dumps(values))


def places(theta: dict, group: str) -> list[tuple[np.ndarray, int]]:
    """-> for each number of the group the array of theta that holds it, and where"""
    return [(theta[name], int(i)) for name, i in (number.split(".") for number in group.split("+"))]


def put(theta: dict, group: str, values) -> dict:
    """A copy of theta with other numbers of a group."""
    theta = jax.tree.map(np.copy, theta)
    for (array, i), value in zip(places(theta, group), values, strict=True):
        array[i] = value
    return theta


def refine(args: Args, theta: dict, group: str, submit) -> tuple[dict, dict]:
    """Try numbers of a group. -> theta with the best ones, the row to log"""
    began = time.monotonic()
    rng = np.random.default_rng([args.seed, *group.encode()])
    drawn = [draw(rng, task) for task in args.tasks for _ in range(args.repeats)]
    middle, scale = (
        np.array([x[i] for x, i in places(tree, group)]) for tree in (theta, search.SCALES)
    )
    offsets = np.array(list(itertools.product(OFFSETS, repeat=len(middle))))
    values = middle + args.step * scale * offsets
    thetas = np.array([flat(put(theta, group, candidate)) for candidate in values])
    # One job of a task: the same program, so that scores without a difference are equal.
    scores = train(thetas, drawn, submit)
    differs = np.any(np.ptp(scores, axis=1) > 0, axis=-1)  # not so if the task has no such tensor
    ranks = fitness(scores[differs]) if differs.any() else np.zeros(len(values))
    best = middle + args.step * scale * best_offsets(offsets, ranks, args.least)
    row = {"numbers": group, "from": middle.tolist(), "value": best.tolist()}
    row |= {"ranks": ranks.tolist(), "seconds": time.monotonic() - began}
    lifetimes = zip(drawn, scores.tolist(), strict=True)
    row["tasks"] = [(task, num_updates, score) for (task, _, num_updates), score in lifetimes]
    return put(theta, group, best), row


def save(args: Args, theta: dict, trained: dict, done: list[str]) -> None:
    """Write OUT.npz. trained: of the theta to start from; done: groups of numbers"""
    trained = trained | {"refined": done, "refined_on": list(args.tasks)}
    theta = jax.tree.map(jnp.float32, theta)
    optimizers.save_theta(f"{args.out}.npz", theta, "adam4rl", {}, trained)


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        checks.positive(args, "repeats", "step")
        checks.between(args, 0, 1, "least")
        checks.seed(args)
        search.check_out(args)
        theta, trained = begin(args)
        begun_with, log = given(args, theta), Path(f"{args.out}.jsonl")
        rows, theta = read_rows(log, begun_with, theta)
        log.parent.mkdir(parents=True, exist_ok=True)
    done = [row["numbers"] for row in rows]
    if done:  # the last row may have been logged, and the program ended before it wrote theta
        save(args, theta, trained, done)
    with start_workers(0) as submit:
        for group in (group for group in args.numbers if group not in done):
            theta, row = refine(args, theta, group, submit)
            rows.append({"given": begun_with, **row})
            runs.write_text(log, "\n".join(map(json.dumps, rows)))
            shown = [" ".join(f"{x:.2f}" for x in row[key]) for key in ("from", "value", "ranks")]
            print("{}: {} -> {}; ranks {}".format(group, *shown), flush=True)
            done.append(group)
            save(args, theta, trained, done)
    print(f"written: {args.out}.npz, {log}")


if __name__ == "__main__":
    main()
