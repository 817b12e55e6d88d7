"""Meta-test: train agents with each optimizer, over many seeds, and compare:

    python evaluate.py --env-name catch --optimizers THETA.npz untrained sign_sgd adam rmsprop --num-seeds 10
    python evaluate.py --env-name ant --optimizers THETA.npz untrained sign_sgd adam rmsprop --num-seeds 4

A gridworld is learned with A2C, a task of Brax's with PPO, whatever theta was trained on.

Two controls are in the default list, because a learned optimizer that does not beat them has learned nothing: Optim4RL
before meta-training, and plain sign descent. With --learning-rates the classical optimizers are swept and each is shown
at its best, picked on the very seeds that are shown, so the comparison favours them.
"""

import csv
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import matplotlib
import numpy as np
import scipy.stats

import a2c
import gridworld
import optim4rl
import optimizers
import ppo
import runs
import settings

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, after the choice of a backend that needs no screen

SHORTER = "fewer --num-seeds or --total-steps make it short; Ctrl-C keeps the optimizers that are done"
LAST = {a2c: 20, ppo: 2}  # a run's score is the mean of its last 20 returns, or of its last 2 evaluations


@dataclass(frozen=True)
class Args:
    env_name: str = "catch"
    """one of the eight gridworlds, catch, or a task of Brax's"""
    optimizers: tuple[str, ...] = ("untrained", "sign_sgd", "adam", "rmsprop")
    """names (adam, rmsprop, sgd, sign_sgd, untrained, untrained:star, untrained:PATH.npz) and paths of meta-trained .npz"""
    num_seeds: int = 10
    """agents trained with each optimizer"""
    seed: int = 1000
    """the first agent's seed; away from 0, where meta-training's seeds start"""
    learning_rate: float | None = None
    """step size (the paper's for the environment; a theta file's own if it was trained on this environment)"""
    learning_rates: tuple[float, ...] = ()
    """sweep the classical optimizers over these step sizes, e.g. 3e-2 1e-2 3e-3 1e-3 3e-4 1e-4"""
    total_steps: float | None = None
    """environment steps of each agent (catch 5e5, small gridworlds 3e6, big ones 4e6, Brax 2e6 to 1e8)"""
    num_envs: int | None = None
    """environments of each agent (catch 64, gridworlds 512, Brax 2048 or 4096)"""
    backend: str = "spring"
    """physics of Brax's tasks: spring, generalized, positional or mjx"""
    runs_dir: str = "runs"
    """the run's folder is made in here"""


class Result(NamedTuple):
    """One optimizer at one step size."""

    label: str
    learning_rate: float
    returns: np.ndarray  # [seeds, updates or evaluations], without the seeds that ended early
    last: int  # how many of them make a score
    ended: int = 0  # seeds that ended early because something was not finite

    @property
    def scores(self) -> np.ndarray:  # [seeds]
        return self.returns[:, -self.last :].mean(axis=1)

    @property
    def score(self) -> float:
        return float(self.scores.mean()) if len(self.scores) else -np.inf


# --- Statistics ---


def bootstrap_interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """90 % percentile bootstrap interval of the mean over the first axis. samples: [seeds, ...] -> low [...], high [...]"""
    if len(samples) == 1:
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
        if result.label not in best or result.score > best[result.label].score:
            best[result.label] = result
    return list(best.values())


# --- What comes out ---


def table(results: list[Result], env_steps: np.ndarray) -> str:
    """A markdown table of the best step size of each optimizer."""
    best = best_of_each(results)
    goal = 0.9 * max(result.score for result in best)
    rows = [
        f"| optimizer | step size | return (mean of last {best[0].last}) | 90 % interval | steps to reach {goal:.3g} |",
        "|---" * 5 + "|",
    ]
    for result in best:
        ended = f" ({result.ended} seeds ended early, not finite)" if result.ended else ""
        interval, reached = "one seed" if len(result.scores) else "none", "never"
        if len(result.scores) > 1:
            interval = "{:.3f} to {:.3f}".format(*bootstrap_interval(result.scores))
        if len(result.scores) and np.isfinite(steps := steps_to_reach(goal, result.returns.mean(axis=0), env_steps)):
            reached = f"{steps:.3g}"
        rows.append(f"| {result.label}{ended} | {result.learning_rate:g} | {result.score:.3f} | {interval} | {reached} |")
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
        if not len(result.returns):
            continue
        low, high = bootstrap_interval(result.returns)
        label = f"{result.label} ({result.learning_rate:g})"
        (line,) = axes.plot(env_steps, result.returns.mean(axis=0), label=label, linestyle=styles[i % 4])
        axes.fill_between(env_steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="environment steps", ylabel="return", title=title)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes.grid(alpha=0.3)
    axes.legend(title="optimizer (step size)", fontsize="small", title_fontsize="small")
    optim4rl.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)


def write(folder: Path, results: list[Result], env_steps: np.ndarray, args: Args) -> None:
    """results.csv, curves.png and table.md, and the table on the screen."""
    write_csv(folder / "results.csv", results, env_steps, args.seed)
    draw(folder / "curves.png", results, env_steps, f"{args.env_name}, {args.num_seeds} seeds")
    summary = table(results, env_steps)
    optim4rl.write_whole(folder / "table.md", lambda file: file.write(f"{summary}\n".encode()))
    print(summary)
    print(f"written: {folder}/table.md, results.csv (every curve), curves.png, config.json")


# --- The command line ---


def plan(args: Args) -> list[tuple[str, str, float]]:
    """The runs to make: (label, name or path, step size). Raises ValueError, in one line, for an unfit optimizer."""
    default = args.learning_rate or settings.setting_of(args.env_name).learning_rate
    runs_to_make = []
    for name in dict.fromkeys(args.optimizers):
        optimizers.make_optimizer(name, default)
        rates, label = [default], name
        if name in optimizers.CLASSICAL and args.learning_rates:
            rates = args.learning_rates
        elif name.endswith(".npz"):
            path = name.removeprefix("untrained:")
            header = optim4rl.load_theta(path)[1]
            known = dict(zip(header["trained"].get("env_name", ()), header["trained"].get("learning_rate", ()), strict=False))
            rates = [args.learning_rate or known.get(args.env_name, default)]
            kind = "" if header["optimizer"] == "optim4rl" else f"{header['optimizer']}, "
            label = kind + "/".join(Path(path).with_suffix("").parts[-2:]).split("__")[0]
            label += " (trained)" if path == name else " (untrained)"
        label = label if label not in {made[0] for made in runs_to_make} else name
        runs_to_make += [(label, name, rate) for rate in rates]
    return runs_to_make


def make_agent_args(args: Args) -> a2c.Args | ppo.Args:
    """What the agents are trained with. Raises ValueError, in one line, for what cannot be."""
    settings.check_environment(args.env_name)
    runs.check_positive(args, "num_seeds", "learning_rate", "learning_rates", "total_steps", "num_envs")
    if not args.optimizers:
        raise ValueError("--optimizers must name at least one optimizer")
    shared = {"env_name": args.env_name, "num_seeds": args.num_seeds, "seed": args.seed}
    if args.env_name not in gridworld.NAMES:
        return ppo.fill_in(ppo.Args(**shared, total_steps=args.total_steps, num_envs=args.num_envs, backend=args.backend))
    catch = args.env_name == "catch"
    steps = args.total_steps or (5e5 if catch else 3e6 if args.env_name.startswith("small") else 4e6)
    return a2c.Args(**shared, total_steps=steps, num_envs=args.num_envs or (64 if catch else 512))


def train(agent: ModuleType, agent_args, env, label: str, name: str, rate: float, on_update) -> tuple[Result, np.ndarray]:
    """All seeds of one optimizer at one step size. agent: the module, a2c or ppo. -> Result, the env_steps of its returns"""
    history = agent.train(agent_args, env, optimizers.make_optimizer(name, rate), on_update)
    if agent is ppo:
        returns, env_steps = np.asarray(history["eval_return"]), np.asarray(history["eval_steps"])
    else:
        returns = np.asarray(history["return"])
        env_steps = np.arange(1, returns.shape[1] + 1) * agent.steps_per_update(agent_args)
    finite = np.isfinite(returns[:, -1])
    return Result(label, rate, returns[finite], LAST[agent], int(np.sum(~finite))), env_steps


def main() -> None:
    args = runs.parse(Args, __doc__)
    with runs.bad_input():
        agent_args = make_agent_args(args)
        agent = ppo if isinstance(agent_args, ppo.Args) else a2c
        env = ppo.make_env(args.env_name, args.backend) if agent is ppo else gridworld.make(args.env_name)
        to_run = plan(args)
        updates = agent.num_updates(agent_args)
        if not updates:
            raise ValueError(f"--total-steps {agent_args.total_steps:g} is less than one update's rollouts")
        folder = runs.make_folder(args.runs_dir, args.env_name, "evaluate", args.seed, args)

    results, began = [], time.perf_counter()
    with runs.interruptible() as interrupted:
        for label, name, rate in to_run:
            with runs.progress(updates, f"{label} ({rate:g}), {len(results) + 1} of {len(to_run)}") as bar:

                def on_update(number, _, bar=bar):
                    bar.update()
                    return interrupted()

                result, steps = train(agent, agent_args, env, label, name, rate, on_update)
            if interrupted():  # this one is not whole
                break
            results.append(result)
            env_steps = steps
            if len(results) == 1:
                runs.warn_if_long((time.perf_counter() - began) * len(to_run), SHORTER)
        if results:
            write(folder, results, env_steps, args)
    sys.exit(interrupted())


if __name__ == "__main__":
    main()
