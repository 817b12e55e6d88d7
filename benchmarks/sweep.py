"""Sweep of meta-training: train with the settings and meta-seeds below, test on the training tasks,
and rank the settings:

    python benchmarks/sweep.py

The tests use the training tasks with seeds that meta-training has not seen, never the tasks that
are reported as transfer. A setting's score is the mean, over its meta-seeds and tasks, of two
numbers relative to Adam at its best learning rate: the return over all of training, and at the end.
Finished runs are not run again. Writes runs/sweep/ranking.csv.
"""

import csv
import itertools
import sys
from pathlib import Path

import numpy as np
from ablations import ROOT, run

sys.path.insert(0, str(ROOT))
from report import read_results  # noqa: E402, once the project is on the path

OUT = ROOT / "runs" / "sweep"
BASE = (
    "--env-name small_dense_short small_dense_long small_sparse_short small_sparse_long "
    "--optimizer momentum4rl"
)
BASE += (
    " --meta-estimator pes --num-units 8 --envs-per-unit 512 --inner-updates 20 "
    "--reset-interval 15 --reward-scale 1"
)
BASE += " --learning-rate 6e-2"
SETTINGS = (
    "--sigma 0.01 --meta-learning-rate 0.001 --anneal-meta-lr --num-iterations 300",
    "--sigma 0.005 --meta-learning-rate 0.0005 --num-iterations 200",
)
META_SEEDS = (0, 1)
TEST = "--num-seeds 4 --seed 5000"  # other seeds than those in results/
ADAM = "--optimizers adam --learning-rates 1e-1 3e-2 1e-2 3e-3 1e-3 3e-4"


def environments(base: str) -> list[str]:
    """The environments that --env-name names in these flags."""
    words = base.split()
    return list(
        itertools.takewhile(
            lambda word: not word.startswith("--"), words[words.index("--env-name") + 1 :]
        )
    )


def tested(folder: Path, env_name: str, flags: str) -> np.ndarray:
    """Evaluate one optimizer, into folder/<env_name>, unless that was done before.
    -> returns [seeds, updates]"""
    if not (folder / env_name).exists():
        run("evaluate", f"--env-name {env_name} {flags}", folder).rename(folder / env_name)
    (result,) = read_results(folder / env_name / "results.csv")
    return result.returns


def scores(returns: np.ndarray) -> np.ndarray:
    """The mean return over all of training, and over its last 20 updates."""
    return np.array([np.nanmean(returns), returns[:, -20:].mean()])


def main() -> None:
    best, env_names = {}, environments(BASE)
    for env_name in env_names:
        best[env_name] = scores(tested(OUT / "adam", env_name, f"{ADAM} {TEST}"))

    ranking = []
    for setting in SETTINGS:
        relative = []
        for seed in META_SEEDS:
            folder = OUT / setting.replace("--", "").replace(" ", "_") / str(seed)
            if not (folder / "theta.npz").exists():
                made = run("pipeline_train", f"{BASE} {setting} --seed {seed}", folder)
                (made / "theta.npz").rename(folder / "theta.npz")
            for env_name in env_names:
                flags = f"--optimizers {folder / 'theta.npz'} {TEST}"
                relative.append(scores(tested(folder, env_name, flags)) / best[env_name])
        ranking.append((np.mean(relative), *np.mean(relative, axis=0), setting))
        with open(OUT / "ranking.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["score", "all_of_training", "end", "flags"])
            writer.writerows(
                [*(f"{x:.4f}" for x in row[:3]), row[3]] for row in sorted(ranking, reverse=True)
            )
    print(f"written: {OUT}/ranking.csv; the best: {max(ranking)[3]}")


if __name__ == "__main__":
    main()
