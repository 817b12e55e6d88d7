"""Which step size does Optim4RL learn?

    python figures/learned_step.py --env-name catch --learning-rates 3e-4 1e-3 3e-3

Meta-trains with each learning rate of the agents, and draws the step that Optim4RL makes for a
gradient of 1e-3 that keeps its sign, over meta-training. Sign descent's is the learning rate, and
so is Optim4RL's before meta-training.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checks
import command_line
import devices
import pipeline_train
import runs
import tasks
import train_optimizer
from figures import report
from figures.inspection import steps_of
from optim4rl import to_optax

matplotlib.use("Agg")  # needs no screen
import matplotlib.pyplot as plt

GRADIENT = 1e-3
UPDATES = 20  # with this gradient, of which the last is measured
COLUMNS = ("inner_updates", "learning_rate", "iteration", "step")


@dataclass(frozen=True)
class Args:
    env_name: str = "catch"
    """where to meta-train"""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """the agents' learning rates, a run of meta-training each"""
    inner_updates: tuple[int, ...] = (4,)
    """agent updates per meta-iteration, a run each; units live for about as many updates in
    all of them"""
    meta_learning_rate: float = 3e-3
    """learning rate of Adam on theta"""
    num_iterations: int = 312
    """meta-iterations of a run"""
    num_units: int | None = None
    """agents trained in parallel (by default the paper's number)"""
    every: int = 13
    """meta-iterations between two measurements"""
    num_devices: int | None = None
    """devices that the agents are split over, as in pipeline_train.py"""
    seed: int = 0
    """seed of every run"""
    runs_dir: str = "runs"
    """the folder of the figure is created in this folder"""


def step_of(theta, learned) -> jax.Array:
    """The step, in learning rates. -> []"""
    return steps_of(to_optax(learned, theta, 1.0), jnp.full((UPDATES, 1), GRADIENT))[-1, 0]


def meta_training_args(args: Args, learning_rate: float, inner_updates: int) -> pipeline_train.Args:
    """Raises a one-line ValueError for values that do not fit."""
    usual = tasks.meta_settings((args.env_name,))["reset_interval"]
    lifetime = usual * pipeline_train.Args.inner_updates  # in agent updates
    return train_optimizer.fill_in(
        pipeline_train.Args(
            env_name=(args.env_name,),
            learning_rate=(learning_rate,),
            inner_updates=inner_updates,
            reset_interval=max(1, lifetime // inner_updates),
            meta_learning_rate=args.meta_learning_rate,
            num_iterations=args.num_iterations,
            num_units=args.num_units,
            num_devices=args.num_devices,
            seed=args.seed,
        )
    )


def watch(args: pipeline_train.Args, set_up: tuple, mesh, every: int, interrupted) -> list[tuple]:
    """Meta-train. set_up: what train_optimizer.set_up made of args -> rows of COLUMNS"""
    all_tasks, learned, _ = set_up
    measure = jax.jit(lambda theta: step_of(theta, learned))
    rate, rows = args.learning_rate[0], []
    title = f"learning rate {rate:g}, {args.inner_updates} inner updates"
    with runs.progress(args.num_iterations, title) as bar:

        def on_iteration(iteration, state, row):
            if iteration % every == 0:
                step = rate * float(measure(state.theta))
                rows.append((args.inner_updates, f"{rate:g}", iteration, f"{step:.4g}"))
            bar.update()
            return interrupted()

        pipeline_train.meta_train(args, all_tasks, learned, mesh, on_iteration)
    return rows


def draw(path: Path, rows: list[tuple], title: str) -> None:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    lines: dict = {}
    for inner_updates, rate, iteration, step in rows:
        line = lines.setdefault((inner_updates, rate), ([0], [float(rate)]))
        line[0].append(iteration)
        line[1].append(float(step))
    for (inner_updates, rate), line in lines.items():
        axis.plot(*line, ".-", label=f"learning rate {rate}, {inner_updates} inner updates")
    axis.set(yscale="log", xlabel="meta-iteration", ylabel="step", title=title)
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, fontsize="small")
    report.save_figure(figure, path, dpi=100)


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        checks.not_empty(args, "learning_rates", "inner_updates")
        checks.positive(args, "every", "learning_rates", "inner_updates")
        pairs = [(rate, k) for k in args.inner_updates for rate in args.learning_rates]
        all_args = [meta_training_args(args, *pair) for pair in pairs]
        if args.every > args.num_iterations:
            raise ValueError(f"--every must be at most --num-iterations {args.num_iterations}")
        mesh = devices.choose_devices(all_args[0].num_units, args.num_devices)
        set_ups = [train_optimizer.set_up(given) for given in all_args]
        folder = runs.make_folder(args.runs_dir, args.env_name, "learned_step", args.seed, args)
    rows = []
    with runs.interruptible() as interrupted:
        for given, set_up in zip(all_args, set_ups, strict=True):
            if not interrupted():
                rows += watch(given, set_up, mesh, args.every, interrupted)
                runs.write_csv(folder / "learned_step.csv", COLUMNS, rows)
        draw(folder / "learned_step.png", rows, f"{args.env_name}: the learned step")
    print(f"written: {folder}/learned_step.png, learned_step.csv, config.json")
    sys.exit(interrupted())


if __name__ == "__main__":
    main()
