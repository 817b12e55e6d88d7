"""The paper's sweep of meta-training on small tasks, in its setting (512 units; Catch 64):

    python experiments/sweep.py --env-name small_dense_long

Meta-trains Optim4RL at every meta-learning rate, with the task's learning rate of agents; then at
the best meta-learning rate with every other learning rate of agents. Each theta is tested with
seeds of its own. Writes runs/sweep/ENV.csv, the highest mean return first (with --num-units:
ENV_UNITS.csv); a setting whose meta-training or agents diverge has -inf. What was run is not run
again and what was interrupted continues, so the same command continues a sweep.
"""

import csv
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ablations import ROOT, meta_train, run, test_flags

sys.path.insert(0, str(ROOT))
import checks
import command_line
import runs
import tasks
import train_optimizer
from figures.compare import scores_of
from figures.report import read_results

OUT = ROOT / "runs" / "sweep"
COLUMNS = ("meta_learning_rate", "learning_rate", "mean_return", "final_return", "theta")
SEEDS = "--num-seeds 4 --seed 5000"


@dataclass(frozen=True)
class Args:
    env_name: str = "small_dense_long"
    """the task, as in pipeline_train.py"""
    meta_learning_rates: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3)
    """Adam's learning rates for theta (paper: 1e-5 to 1e-3; Catch 1e-4 to 1e-2)"""
    learning_rates: tuple[float, ...] = (1e-2, 3e-3)
    """learning rates of agents, beside the task's own"""
    num_units: int | None = None
    """agents in meta-training (paper: 512; Catch 64)"""
    num_devices: int | None = None
    """devices, as in pipeline_train.py; 1 leaves a core free for another sweep"""


def trained(flags: str, folder: Path) -> Path | None:
    """Meta-train in this folder, or continue there. -> theta.npz; None if it diverges"""
    theta = folder / "theta.npz"  # a run that is interrupted writes its own theta, too
    if theta.exists():
        return theta
    if diverged(folder):
        return None
    try:
        (meta_train(flags, folder) / "theta.npz").rename(theta)
    except SystemExit:
        if not diverged(folder):
            raise
        return None
    return theta


def diverged(folder: Path) -> bool:
    """Whether the meta-training there ended because its meta-gradients were not finite."""
    for log in folder.glob("*__pipeline_train__*/metrics.csv"):
        with open(log, newline="") as file:
            bad_updates = [row["bad_updates"] for row in csv.DictReader(file)]
        if bad_updates and float(bad_updates[-1]) >= train_optimizer.MOST_BAD_UPDATES:
            return True
    return False


def test(theta: Path | None, args: Args, learning_rate: float, folder: Path) -> list[float]:
    """-> the return over all of training, and at the end: the means of SEEDS, -inf if one is
    lost"""
    if theta is None:
        return [-np.inf, -np.inf]
    if not (found := sorted(folder.glob("*__evaluate__*/table.md"))):
        flags = f"{test_flags(args.env_name, SEEDS)} --optimizers {shlex.quote(str(theta))}"
        found = [run("evaluate", f"{flags} --learning-rate {learning_rate:g}", folder) / "table.md"]
    (result,) = read_results(found[-1].parent / "results.csv")
    scores = scores_of(result)
    return [scores.mean.mean(), scores.final.mean()]


def suffix(args: Args) -> str:
    """Of names, if the number of units is not the paper's."""
    return f"_{args.num_units}" if args.num_units else ""


def row(args: Args, meta_learning_rate: float, learning_rate: float) -> tuple:
    """One setting, meta-trained and tested."""
    folder = OUT / args.env_name / f"{meta_learning_rate:g}_{learning_rate:g}{suffix(args)}"
    flags = f"--env-name {args.env_name} --learning-rate {learning_rate:g}"
    flags += f" --meta-learning-rate {meta_learning_rate:g}"
    for name in ("num_units", "num_devices"):
        if getattr(args, name):
            flags += f" --{name.replace('_', '-')} {getattr(args, name)}"
    theta = trained(flags, folder)
    scores = test(theta, args, learning_rate, folder)
    return meta_learning_rate, learning_rate, *scores, theta.relative_to(ROOT) if theta else "-"


def write(path: Path, rows: list) -> None:
    best_first = sorted(rows, key=lambda row: -row[2])
    runs.write_csv(
        path,
        COLUMNS,
        [(*(f"{x:.5g}" for x in numbers), str(theta)) for *numbers, theta in best_first],
    )


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        checks.not_empty(args, "meta_learning_rates")
        checks.positive(args, "meta_learning_rates", "learning_rates", "num_units", "num_devices")
        usual = tasks.agent_settings(args.env_name)["learning_rate"]
    OUT.mkdir(parents=True, exist_ok=True)
    path, rows = OUT / f"{args.env_name}{suffix(args)}.csv", []
    for meta_learning_rate in args.meta_learning_rates:
        rows.append(row(args, meta_learning_rate, usual))
        write(path, rows)
    best = max(rows, key=lambda row: row[2])[0]
    for learning_rate in sorted({*args.learning_rates} - {usual}):
        rows.append(row(args, best, learning_rate))
        write(path, rows)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
