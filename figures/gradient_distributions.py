r"""Distributions of gradients and updates at the beginning, in the middle and at the end of
training:

    python figures/gradient_distributions.py --task a2c --env-name big_dense_long \
        --optimizer rmsprop --learning-rate 3e-3
    python figures/gradient_distributions.py --task mnist
    python figures/gradient_distributions.py --task digits

Draws histograms of log10(|g| + 1e-8) over all coordinates and for each layer (Figures 1 and 5 of
Lan et al. 2024), for the first, the middle and the last tenth of the updates. The optimizer's state
counts them inside the jitted update: no gradient is kept.

Legend: L layers, in L + 1 the last is all of them; P parameters of a layer.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import a2c
import checks
import command_line
import gridworld
import optimizers
import runs
import tasks
from figures import classifier, report

matplotlib.use("Agg")  # needs no screen
import matplotlib.pyplot as plt

STAGES = ("beginning", "middle", "end")
KINDS = ("gradient", "update")
# The bins, in log10; values outside are in the first or the last.
SMALLEST, LARGEST, PER_DECADE = -8, 4, 10
NUM_BINS = (LARGEST - SMALLEST) * PER_DECADE


@dataclass(frozen=True)
class Args:
    task: Literal["a2c", "mnist", "digits"] = "a2c"
    """reinforcement learning on a gridworld, or supervised learning on MNIST or scikit-learn's 8x8
    digits"""
    env_name: str = "big_dense_long"
    """a2c: one of the eight gridworlds, or catch"""
    optimizer: str = "rmsprop"
    """as in a2c.py: adam, rmsprop, sgd, sign_sgd, untrained, pretrained/NAME, or the path of a
    .npz"""
    learning_rate: float | None = None
    """learning rate (paper: a2c by environment, big_dense_long 3e-3; mnist 3e-4)"""
    total_steps: float | None = None
    """a2c: environment steps (gridworlds 3e7)"""
    num_epochs: int = 10
    """mnist, digits: passes over the images"""
    batch_size: int = 128
    """mnist, digits: images per minibatch"""
    data_dir: str = "~/.cache/mnist"
    """mnist: folder of the IDX files, which are downloaded there if missing"""
    seed: int = 0
    """the same seed gives the same counts"""
    runs_dir: str = "runs"
    """the run's folder is created in this folder"""


# --- Counting ---


class Counted(NamedTuple):
    state: Any  # the optimizer's
    number: jax.Array  # [] int32, updates so far
    counts: jax.Array  # [stages, kinds, L + 1, bins] int32


def histogram(x: jax.Array) -> jax.Array:
    """Counts of log10(|x| + 1e-8), without NaN; the first bin has zeros and |x| below 2.6e-9.
    x: [P] -> [bins] int32"""
    log = jnp.log10(jnp.abs(x) + 1e-8)
    place = jnp.clip(jnp.floor((log - SMALLEST) * PER_DECADE), 0, NUM_BINS - 1).astype(jnp.int32)
    return jnp.zeros(NUM_BINS, jnp.int32).at[place].add(~jnp.isnan(x))


def histograms(tree: dict) -> jax.Array:
    """Histograms of each layer and of all. tree: {layer: ...} -> [L + 1, bins]"""
    layers = jnp.stack(
        [sum(histogram(leaf.ravel()) for leaf in jax.tree.leaves(layer)) for layer in tree.values()]
    )
    return jnp.concatenate([layers, jnp.sum(layers, axis=0, keepdims=True)])


def counting(
    optimizer: optax.GradientTransformation, total: int
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, with counts of gradients and updates in its state. total: number of
    updates"""
    optimizer = optax.with_extra_args_support(optimizer)
    tenth = max(1, total // 10)
    starts = jnp.array([0, (total - tenth) // 2, total - tenth])

    def init(params):
        shape = (len(STAGES), len(KINDS), len(params) + 1, NUM_BINS)
        return Counted(optimizer.init(params), jnp.int32(0), jnp.zeros(shape, jnp.int32))

    def update(grads, state, params=None, **extra_args):
        updates, inner = optimizer.update(grads, state.state, params, **extra_args)
        now = (starts <= state.number) & (state.number < starts + tenth)
        seen = jnp.stack([histograms(grads), histograms(updates)])
        return updates, Counted(
            inner, state.number + 1, state.counts + now[:, None, None, None] * seen
        )

    return optax.GradientTransformationExtraArgs(init, update)


# --- The tasks ---


def count_a2c(
    args: Args, optimizer: optax.GradientTransformation, on_update: Callable
) -> tuple[list[str], np.ndarray]:
    """-> names of the layers, counts [stages, kinds, L + 1, bins]"""
    agent_args = a2c_args(args)
    last = []

    def keep(number, metrics, state):
        last[:] = [state.agents.opt_state.counts, list(state.agents.params)]
        return on_update(number, metrics["return"].mean())

    a2c.train(
        agent_args,
        gridworld.make(args.env_name),
        counting(optimizer, a2c.num_updates(agent_args)),
        keep,
    )
    return last[1], np.asarray(last[0][0])


def count_classifier(
    args: Args, data: tuple, optimizer: optax.GradientTransformation, on_update: Callable
):
    """-> names of the layers, counts [stages, kinds, L + 1, bins]"""
    total = classifier.num_updates(len(data[0]), args.batch_size, args.num_epochs)
    shared = (args.batch_size, args.num_epochs, on_update)
    params, opt_state = classifier.train(
        jax.random.key(args.seed), *data, counting(optimizer, total), *shared
    )
    return list(params), np.asarray(opt_state.counts)


def a2c_args(args: Args) -> a2c.Args:
    return tasks.agent_args(args.env_name, total_steps=args.total_steps, seed=args.seed)


# --- Output ---


def bin_edges() -> np.ndarray:
    return SMALLEST + np.arange(NUM_BINS + 1) / PER_DECADE


def csv_rows(layers: list[str], counts: np.ndarray) -> list[tuple]:
    """stage, kind, layer, lower edge of the bin, count; empty bins are left out"""
    names = [*layers, "all"]
    edges = bin_edges()
    return [
        (STAGES[s], KINDS[k], names[i], f"{edges[b]:.1f}", counts[s, k, i, b])
        for s, k, i, b in zip(*np.nonzero(counts), strict=True)
    ]


def draw(path: Path, layers: list[str], counts: np.ndarray, title: str) -> None:
    """Draw densities: rows are gradients and updates, columns all coordinates and each layer, lines
    stages. The titles give the share of zeros, the first bin, which is not drawn."""
    names = [*layers, "all"]
    order = [len(layers), *range(len(layers))]
    middles = bin_edges()[:-1] + 0.5 / PER_DECADE
    size = (2.4 * len(order), 4.2)
    figure, grid = plt.subplots(
        len(KINDS), len(order), figsize=size, layout="constrained", sharex="row", squeeze=False
    )
    for k, kind in enumerate(KINDS):
        for axes, i in zip(grid[k], order, strict=True):
            for stage, style, shade, count in zip(
                STAGES, ("-", "--", ":"), ("0.55", "0.3", "0.0"), counts[:, k, i], strict=True
            ):
                density = count / max(1, count.sum()) * PER_DECADE
                axes.plot(middles[1:], density[1:], style, color=shade, linewidth=1.4, label=stage)
            seen = middles[counts[:, k].sum(axis=(0, 1)) > 0]
            zeros = ", ".join(
                f"{100 * share:.0f} %"
                for share in counts[:, k, i, 0] / np.maximum(1, counts[:, k, i].sum(axis=1))
            )
            axes.set(
                xlim=(seen.min() - 0.3, seen.max() + 0.3),
                title=f"{kind}s, {names[i]}\n(zero: {zeros})",
            )
            axes.title.set_size("medium")
            axes.grid(alpha=0.3)
        grid[k, 0].set_ylabel("density")
        for axes in grid[k]:
            axes.set_xlabel("log10(|g| + 1e-8)" if kind == "gradient" else "log10(|update| + 1e-8)")
    figure.suptitle(title, fontsize="medium")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STAGES))
    report.save_figure(figure, path, dpi=120)


def usual_rate(args: Args) -> float:
    """The learning rate if none is given."""
    if args.task == "a2c":
        return tasks.default_rate(args.env_name, a2c, args.optimizer)
    return optimizers.own_rate(args.optimizer) or 3e-4


def checked_updates(args: Args, optimizer: optax.GradientTransformation) -> int:
    """The number of A2C's updates. Raises a one-line ValueError for arguments that do not fit."""
    learner = tasks.Learner(a2c, a2c_args(args), tasks.make_env(args.env_name, a2c))
    checks.total_steps(learner.args.total_steps, a2c.steps_per_update(learner.args), "update")
    tasks.check_memory(learner, optimizer, num_seeds=1)
    return a2c.num_updates(learner.args)


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        if args.learning_rate is None:
            args = dataclasses.replace(args, learning_rate=usual_rate(args))
        checks.positive(args, "learning_rate", "total_steps", "num_epochs", "batch_size")
        checks.seed(args)
        optimizer = optimizers.make_optimizer(args.optimizer, args.learning_rate)
        if args.task == "a2c":
            total, name, data = checked_updates(args, optimizer), args.env_name, None
        else:
            data = (
                classifier.load_mnist(Path(args.data_dir).expanduser())
                if args.task == "mnist"
                else classifier.load_digits()
            )
            name = args.task
            total = classifier.num_updates(len(data[0]), args.batch_size, args.num_epochs)
        if not total:
            raise ValueError(
                "there is not one update: more --total-steps, or a smaller --batch-size"
            )
        folder = runs.make_folder(args.runs_dir, name, "gradient_distributions", args.seed, args)

    with runs.interruptible() as interrupted:
        with runs.progress(total, name) as bar:

            def on_update(number, value):
                bar.update()
                if number % 20 == 0:
                    bar.set_postfix({"return" if args.task == "a2c" else "loss": f"{value:.3g}"})
                return interrupted()

            count = (
                count_a2c(args, optimizer, on_update)
                if data is None
                else count_classifier(args, data, optimizer, on_update)
            )
        title = (
            f"{name}, {args.optimizer} {args.learning_rate:g}: "
            f"first, middle and last tenth of {total} updates"
        )
        columns = ("stage", "of", "layer", "log10_from", "count")
        runs.write_csv(folder / "distributions.csv", columns, csv_rows(*count))
        draw(folder / "distributions.png", *count, title)
    print(f"written: {folder}/distributions.png, distributions.csv (counts by bin), config.json")
    sys.exit(interrupted())


if __name__ == "__main__":
    main()
