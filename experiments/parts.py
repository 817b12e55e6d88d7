r"""What each part of adam4rl's theta is worth, on the tasks of search_tasks.py:

    python experiments/parts.py --theta runs/adam4rl.npz
    python experiments/parts.py --without whitening squares+momenta --others runs/another.npz

Trains with theta, with theta where a part is as in Adam, with the theta of other files, and with
Adam, on the same tasks, seeds and numbers of updates. Writes OUT.csv (every score) and OUT.md: for
each, the share of lifetimes in which theta does better, by the mean over training and by that of
the last tenth, and Wilcoxon's p of the differences in rank.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checks
import command_line
import runs
import search
from adam4rl import SIZES, make_adam4rl
from figures import report
from lifetimes import flat, ranks, start_workers, train
from search_tasks import TASKS, draw

COLUMNS = ("task", "seed", "updates", "candidate", "mean", "last_tenth")


@dataclass(frozen=True)
class Args:
    theta: str = "pretrained/adam4rl.npz"
    """theta file (.npz) of adam4rl"""
    without: tuple[str, ...] = tuple(SIZES)
    """parts, by their names in theta; squares+momenta: without both"""
    others: tuple[str, ...] = ()
    """theta files to compare with, of the same network size"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """tasks of search_tasks.py"""
    repeats: int = 2
    """lifetimes of each task"""
    seed: int = 1
    """seed of the seeds and of the numbers of updates"""
    out: str = "runs/parts"
    """files are written with this name and the endings .csv, .md"""


def candidates(args: Args) -> tuple[dict, int]:
    """-> name -> theta, the theta of the file first and Adam last; hidden units of its network.
    Raises a one-line ValueError for a file that is not adam4rl's, a part that it lacks, or another
    file with another network."""
    theta, size, _ = search.load(args.theta)
    adam = make_adam4rl(size).init_theta(jax.random.key(0))
    found = {"theta": theta}
    for group in args.without:
        parts = group.split("+")
        checks.known("without", parts, theta)
        found[f"without {group}"] = theta | {part: adam[part] for part in parts}
    for path in args.others:
        found[path], other_size, _ = search.load(path)
        if other_size != size:
            raise ValueError(f"{path}: {other_size} hidden units, {args.theta} has {size}")
    return found | {"Adam": adam}, size


def compare(scores: np.ndarray) -> list[tuple]:
    """scores: [lifetimes, candidates, 2] -> of every candidate its mean rank, the shares of
    lifetimes in which the first does better than it by either score, p"""
    places = np.array([[ranks(found[:, i]) for i in (0, 1)] for found in scores])
    rows = []
    for i in range(scores.shape[1]):
        better, worse = (s(scores[:, 0], scores[:, i]) for s in (np.greater, np.less))
        shares = np.mean(better + (~better & ~worse) / 2, axis=0)
        differences = np.mean(places[..., 0] - places[..., i], axis=1)
        p = scipy.stats.wilcoxon(differences).pvalue if differences.any() else 1.0
        rows.append((np.mean(places[..., i]), *shares, p))
    return rows


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        checks.positive(args, "repeats")
        checks.seed(args)
        checks.not_empty(args, "tasks")
        checks.known("tasks", args.tasks, TASKS)
        found, size = candidates(args)
        Path(f"{args.out}.csv").parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    drawn = [draw(rng, task) for _ in range(args.repeats) for task in args.tasks]
    with start_workers(size) as submit:
        scores = train(np.array([flat(theta) for theta in found.values()]), drawn, submit)
    rows = [
        (*lifetime, name, *score)
        for lifetime, some in zip(drawn, scores, strict=True)
        for name, score in zip(found, some, strict=True)
    ]
    runs.write_csv(Path(f"{args.out}.csv"), COLUMNS, rows)
    head = ("", "mean rank", "theta is better: mean", "last tenth", "p")
    formats = ("{}", "{:.3f}", "{:.0%}", "{:.0%}", "{:.2g}")
    rows = [(name, *row) for name, row in zip(found, compare(scores), strict=True)]
    table = report.markdown(
        head, [[f.format(x) for f, x in zip(formats, row, strict=True)] for row in rows]
    )
    runs.write_text(Path(f"{args.out}.md"), table)
    print(table)
    print(f"written: {args.out}.csv, {args.out}.md")


if __name__ == "__main__":
    main()
