"""Meta-test: train agents with each optimizer, over many seeds, and compare:

    python evaluate.py --env-name catch --optimizers THETA.npz untrained sign_sgd adam rmsprop --num-seeds 10

Two controls are in the default list, because a learned optimizer that does not beat them has learned nothing: Optim4RL
before meta-training, and plain sign descent. With --learning-rates the classical optimizers are swept and each is shown
at its best, picked on the very seeds that are shown, so the comparison favours them.
"""

import csv
import dataclasses
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import scipy.stats

import a2c
import gridworld
import optim4rl
import optimizers
import pipeline_train
import runs

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, after the choice of a backend that needs no screen

LAST = 20  # a run's score is the mean of its last 20 logged returns


@dataclass(frozen=True)
class Args:
    env_name: str = "catch"
    """one of the eight gridworlds, or catch"""
    optimizers: tuple[str, ...] = ("untrained", "sign_sgd", "adam", "rmsprop")
    """names (adam, rmsprop, sgd, sign_sgd, untrained) and paths of .npz files that pipeline_train.py wrote"""
    num_seeds: int = 10
    """agents trained with each optimizer"""
    seed: int = 1000
    """the first agent's seed; away from 0, where meta-training's seeds start"""
    learning_rate: float | None = None
    """step size (the paper's for the environment; a theta file's own if it was trained on this environment)"""
    learning_rates: tuple[float, ...] = ()
    """sweep the classical optimizers over these step sizes, e.g. 3e-2 1e-2 3e-3 1e-3 3e-4 1e-4"""
    total_steps: float | None = None
    """environment steps of each agent (catch 5e5, small gridworlds 3e6, big ones 4e6)"""
    num_envs: int | None = None
    """environments of each agent (catch 64, gridworlds 512)"""
    runs_dir: str = "runs"
    """the run's folder is made in here"""


class Result(NamedTuple):
    """One optimizer at one step size."""

    label: str
    learning_rate: float
    returns: np.ndarray  # [seeds, updates]

    @property
    def scores(self) -> np.ndarray:  # [seeds]
        return self.returns[:, -LAST:].mean(axis=1)


# --- Statistics ---


def bootstrap_interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """90 % percentile bootstrap interval of the mean over the first axis. samples: [seeds, ...] -> low [...], high [...]"""
    if len(samples) < 2:
        return samples[0], samples[0]
    options = {"confidence_level": 0.9, "method": "percentile", "n_resamples": 1000, "rng": 0, "batch": 50}
    interval = scipy.stats.bootstrap((samples,), np.mean, axis=0, **options).confidence_interval
    return interval.low, interval.high


def steps_to_reach(target: float, curve: np.ndarray, env_steps: np.ndarray) -> float:
    """Environment steps at which a curve first is at `target` or above; NaN if it never is."""
    reached = np.flatnonzero(curve >= target)
    return env_steps[reached[0]] if len(reached) else np.nan


def best_of_each(results: list[Result]) -> list[Result]:
    """Of each optimizer the step size with the highest mean score, in the order given."""
    best: dict[str, Result] = {}
    for result in results:
        if result.label not in best or result.scores.mean() > best[result.label].scores.mean():
            best[result.label] = result
    return list(best.values())


# --- What comes out ---


def table(results: list[Result], env_steps: np.ndarray) -> str:
    """A markdown table of the best step size of each optimizer."""
    best = best_of_each(results)
    goal = 0.9 * max(result.scores.mean() for result in best)
    rows = [
        f"| optimizer | step size | return (last {LAST} updates) | 90 % interval | steps to reach {goal:.3g} |",
        "|---" * 5 + "|",
    ]
    for result in best:
        low, high = bootstrap_interval(result.scores)
        steps = steps_to_reach(goal, result.returns.mean(axis=0), env_steps)
        reached = f"{steps:.3g}" if np.isfinite(steps) else "never"
        interval = f"{low:.3f} to {high:.3f}" if len(result.scores) > 1 else "one seed"
        rows.append(f"| {result.label} | {result.learning_rate:g} | {result.scores.mean():.3f} | {interval} | {reached} |")
    return "\n".join(rows)


def write_csv(path: Path, results: list[Result], env_steps: np.ndarray, first_seed: int) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["optimizer", "learning_rate", "seed", "env_steps", "return"])
    for result in results:
        for seed, returns in enumerate(result.returns, start=first_seed):
            rows = zip(env_steps, returns, strict=True)
            writer.writerows([result.label, f"{result.learning_rate:g}", seed, steps, f"{value:.5g}"] for steps, value in rows)
    optim4rl.write_whole(path, lambda file: file.write(text.getvalue().encode()))


def draw(path: Path, results: list[Result], env_steps: np.ndarray, title: str) -> None:
    """Learning curves: mean over seeds, 90 % interval shaded."""
    styles = ["-", "--", "-.", ":"]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, result in enumerate(best_of_each(results)):
        low, high = bootstrap_interval(result.returns)
        label = f"{result.label} ({result.learning_rate:g})"
        (line,) = axes.plot(env_steps, result.returns.mean(axis=0), label=label, linestyle=styles[i % 4])
        axes.fill_between(env_steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="environment steps", ylabel="return of the last episodes", title=title)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes.grid(alpha=0.3)
    axes.legend(title="optimizer (step size)", fontsize="small", title_fontsize="small")
    optim4rl.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)


# --- The command line ---


def plan(args: Args) -> list[tuple[str, str, float]]:
    """The runs to make: (label, name or path, step size). Raises ValueError, in one line, for an unfit optimizer."""
    default = args.learning_rate or pipeline_train.SETTINGS[args.env_name].learning_rate
    runs_to_make = []
    for name in dict.fromkeys(args.optimizers):
        optimizers.make_optimizer(name, default)
        rates = [default]
        if name in optimizers.CLASSICAL and args.learning_rates:
            rates = args.learning_rates
        elif name not in optimizers.CLASSICAL and name != "untrained" and not args.learning_rate:
            trained = optim4rl.load_theta(name)[1]["trained"]
            known = dict(zip(trained.get("env_name", ()), trained.get("learning_rate", ()), strict=False))
            rates = [known.get(args.env_name, default)]
        is_file = name.endswith(".npz")
        label = "/".join(Path(name).with_suffix("").parts[-2:]).split("__")[0] + " (trained)" if is_file else name
        label = label if label not in {made[0] for made in runs_to_make} else name
        runs_to_make += [(label, name, rate) for rate in rates]
    return runs_to_make


def fill_in(args: Args) -> Args:
    """The arguments with their defaults for the environment. Raises ValueError, in one line, for what cannot be."""
    gridworld.make(args.env_name)
    catch = args.env_name == "catch"
    steps = args.total_steps or (5e5 if catch else 3e6 if args.env_name.startswith("small") else 4e6)
    args = dataclasses.replace(args, total_steps=steps, num_envs=args.num_envs or (64 if catch else 512))
    runs.check_positive(args, "num_seeds", "learning_rate", "learning_rates", "total_steps", "num_envs")
    if not args.optimizers:
        raise ValueError("--optimizers must name at least one optimizer")
    return args


def main() -> None:
    args = runs.parse(Args, __doc__)
    with runs.bad_input():
        args = fill_in(args)
        to_run = plan(args)
        agent_args = a2c.Args(env_name=args.env_name, num_seeds=args.num_seeds, seed=args.seed, total_steps=args.total_steps)
        agent_args = dataclasses.replace(agent_args, num_envs=args.num_envs)
        updates = a2c.num_updates(agent_args)
        if not updates:
            raise ValueError(f"--total-steps {args.total_steps:g} is less than one rollout of all environments")
        folder = runs.make_folder(args.runs_dir, args.env_name, "evaluate", args.seed, args)

    env = gridworld.make(args.env_name)
    env_steps = np.arange(1, updates + 1) * agent_args.rollout_steps * agent_args.num_envs
    results, began = [], time.perf_counter()
    for label, name, rate in to_run:
        title = f"{label} ({rate:g}), {len(results) + 1} of {len(to_run)}"
        with runs.progress(updates, title) as bar:
            history = a2c.train(agent_args, env, optimizers.make_optimizer(name, rate), lambda number, _: bar.update())
            results.append(Result(label, rate, np.asarray(history["return"])))
        if len(results) == 1:
            runs.warn_if_long((time.perf_counter() - began) * len(to_run), "fewer --num-seeds or --total-steps make it short")

    write_csv(folder / "results.csv", results, env_steps, args.seed)
    draw(folder / "curves.png", results, env_steps, f"{args.env_name}, {args.num_seeds} seeds")
    summary = table(results, env_steps)
    optim4rl.write_whole(folder / "table.md", lambda file: file.write(f"{summary}\n".encode()))
    print(summary)
    print(f"written: {folder}/table.md, results.csv (every curve), curves.png, config.json")


if __name__ == "__main__":
    main()
