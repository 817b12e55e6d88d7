r"""Refine theta of adam4rl.py one number after the other, on the tasks of search.py:

    python experiments/refine.py --theta runs/adam4rl.npz --out runs/refined
    python experiments/refine.py --theta runs/adam4rl.npz --numbers rate.0 shape.3

CMA-ES changes all numbers at once, so what one of them does is lost among the others. Here each is
tried at OFFSETS, in steps of --step times search.SCALES, in lifetimes of every task with the same
seeds for all, other seeds for each number. A parabola through their mean ranks, over the tasks
where they differ, gives the best value; it is taken if it ranks higher by --least than where it
was.

Writes OUT.npz after each number, and OUT.jsonl: a line a number, with the mean ranks over all tasks
and every score of every task. Numbers that OUT.jsonl has are not tried again, so the same command
continues.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import checks  # noqa: E402, once the project is on the path
import optimizers  # noqa: E402
import runs  # noqa: E402
import search  # noqa: E402
from adam4rl import SIZES  # noqa: E402

OFFSETS = (-1.0, -0.5, 0.0, 0.5, 1.0)
NUMBERS = tuple(f"{name}.{i}" for name, size in SIZES.items() for i in range(size))


@dataclass(frozen=True)
class Args:
    theta: str = "pretrained/adam4rl.npz"
    """theta file (.npz) of adam4rl without a network"""
    numbers: tuple[str, ...] = NUMBERS
    """which, in this order: a name of theta and a place, from 0"""
    tasks: tuple[str, ...] = tuple(search.TASKS)
    """tasks of search.py"""
    repeats: int = 1
    """lifetimes of each task"""
    step: float = 1.5
    """the largest offset, relative to search.SCALES"""
    least: float = 0.1
    """mean rank (-0.5 to 0.5) that a change must gain by the parabola"""
    seed: int = 1
    """seed of the seeds and of the numbers of updates"""
    out: str = "runs/refined"
    """files are written with this name and the endings .npz, .jsonl"""


def best_offset(ranks: np.ndarray, least: float) -> float:
    """Where the parabola through the mean ranks at OFFSETS is highest, within their range; 0 if
    that gains less than `least`. ranks: [len(OFFSETS)]"""
    parabola = np.polynomial.Polynomial.fit(OFFSETS, ranks, 2).convert()
    _, slope, curvature = np.pad(parabola.coef, (0, 3 - len(parabola.coef)))
    ends = [OFFSETS[0], OFFSETS[-1]]
    vertex = [np.clip(-slope / (2 * curvature), *ends)] if curvature < 0 else []
    best = max([*ends, *vertex], key=parabola)
    return float(best) if parabola(best) - parabola(0.0) >= least else 0.0


def begin(args: Args) -> dict:
    """-> theta. Raises a one-line ValueError for a name that is not one of theta's, or
    a file that is not adam4rl's without a network."""
    for what, known in ((args.numbers, NUMBERS), (args.tasks, search.TASKS)):
        for name in what:
            if name not in known:
                raise ValueError(f"{name!r} is none of {', '.join(known)}")
    _, theta, header = optimizers.load_learned(args.theta)
    if header["optimizer"] != "adam4rl" or "network" in theta:
        raise ValueError(f"{args.theta}: not a theta of adam4rl without a network")
    return {name: np.array(x, float) for name, x in theta.items()}


def place(theta: dict, number: str) -> tuple[np.ndarray, int]:
    """-> the array of theta that holds this number, where"""
    name, i = number.split(".")
    return theta[name], int(i)


def flat(theta: dict) -> np.ndarray:
    return np.asarray(ravel_pytree(jax.tree.map(jnp.float32, theta))[0])


def refine(args: Args, theta: dict, number: str, jobs, results) -> dict:
    """Try one number of theta and change it there. -> the row to log"""
    began, (array, i) = time.monotonic(), place(theta, number)
    rng = np.random.default_rng([args.seed, NUMBERS.index(number)])
    drawn = [search.draw(rng, task) for task in args.tasks for _ in range(args.repeats)]
    step, at = place(search.SCALES, number)
    values = array[i] + args.step * step[at] * np.array(OFFSETS)
    thetas = []
    for array[i] in values:
        thetas.append(flat(theta))
    scores = search.train(np.array(thetas), drawn, jobs, results)
    differs = np.any(np.ptp(scores, axis=1) > 0, axis=-1)  # not so if the task has no such tensor
    ranks = search.fitness(scores[differs])
    array[i] = np.interp(best_offset(ranks, args.least), OFFSETS, values)
    row = {"number": number, "from": values[OFFSETS.index(0.0)], "value": array[i]}
    row |= {"ranks": ranks.tolist(), "seconds": time.monotonic() - began}
    lifetimes = zip(drawn, scores.tolist(), strict=True)
    row["tasks"] = [(task, num_updates, score) for (task, _, num_updates), score in lifetimes]
    return row


def main() -> None:
    args = runs.parse(Args, __doc__)
    with runs.bad_input():
        checks.positive(args, "repeats", "step")
        checks.seed(args)
        theta = begin(args)
    out, log = Path(args.out).with_suffix(".npz"), Path(args.out).with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for row in rows:
        array, i = place(theta, row["number"])
        array[i] = row["value"]
    done = {row["number"] for row in rows}
    jobs, results = search.start_workers(0)
    for number in (number for number in args.numbers if number not in done):
        row = refine(args, theta, number, jobs, results)
        with open(log, "a") as file:
            file.write(json.dumps(row) + "\n")
        shown = " ".join(f"{x:.2f}" for x in row["ranks"])
        print(f"{number}: {row['from']:.3f} -> {row['value']:.3f}; ranks {shown}", flush=True)
        trained = {"env_name": list(args.tasks), "seed": args.seed, "start": args.theta}
        optimizers.save_theta(out, jax.tree.map(jnp.float32, theta), "adam4rl", {}, trained)
    print(f"written: {out}, {log}")


if __name__ == "__main__":
    main()
