r"""Figure of pipeline training (Figure 2a of Lan et al. 2024): the age of every unit and the size
of its agent's gradients at every meta-iteration, with and without the pipeline:

    python figures/pipeline_figure.py --env-name small_dense_long --num-units 32 \
        --num-iterations 150 --reset-interval 48

Flags and runs are those of pipeline_train.py. Without the pipeline all units have the same age, and
the optimizer's training data drifts as they learn. With it all ages are present at once, from the
end of the first lifetime.

Legend: N units, T iterations.
"""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import command_line
import devices
import pipeline_train
import runs
import train_optimizer
from figures import report

matplotlib.use("Agg")  # needs no screen
import matplotlib.pyplot as plt

TITLES = {True: "with the pipeline", False: "without"}


class Seen(NamedTuple):
    """The ages and gradient sizes of a run."""

    ages: list  # T of [N], meta-iterations since the reset of the unit
    sizes: list  # T of [N], log10 of the mean |g| of the agent


def gradient_sizes(key: jax.Array, agents, agent) -> jax.Array:
    """log10(mean |g| + 1e-8) of each agent's loss on a fresh rollout. agents: states [N, ...]
    -> [N]"""

    def size(key, state):
        grads = jax.grad(lambda params: agent.loss(key, state._replace(params=params))[0])(
            state.params
        )
        leaves = jax.tree.leaves(grads)
        mean = sum(jnp.sum(jnp.abs(leaf)) for leaf in leaves) / sum(leaf.size for leaf in leaves)
        return jnp.log10(mean + 1e-8)

    return jax.vmap(size)(jax.random.split(key, jax.tree.leaves(agents)[0].shape[0]), agents)


def watch(args: pipeline_train.Args, all_tasks, learned, mesh, interrupted) -> Seen:
    """Meta-train, and record the units after every iteration."""
    seen, key = Seen([], []), jax.random.key(args.seed)
    measure = jax.jit(
        lambda number, agents: gradient_sizes(
            jax.random.fold_in(key, number), agents, all_tasks[0].agent
        )
    )
    with runs.progress(args.num_iterations, TITLES[args.pipeline]) as bar:

        def on_iteration(iteration, state, row):
            seen.ages.append(np.asarray(pipeline_train.schedule(key, iteration - 1, args).age))
            seen.sizes.append(np.asarray(measure(iteration, state.units[0])))
            bar.update()
            return interrupted()

        pipeline_train.meta_train(args, all_tasks, learned, mesh, on_iteration)
    return seen


def draw(path: Path, all_seen: dict, title: str) -> None:
    """Draw a row for each run: left units against iterations, coloured by age; right the gradient
    sizes of the units."""
    figure, grid = plt.subplots(
        len(all_seen),
        2,
        figsize=(8.4, 2.5 * len(all_seen) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    sizes = {pipeline: np.array(seen.sizes) for pipeline, seen in all_seen.items()}  # [T, N]
    oldest = max(np.max(seen.ages) for seen in all_seen.values())
    # A unit that is not finite has none, until its reset in the next iteration.
    finite = np.concatenate([x[np.isfinite(x)] for x in sizes.values()])
    limits = (finite.min() - 0.1, finite.max() + 0.1) if len(finite) else None
    for (left, right), (pipeline, seen) in zip(grid, all_seen.items(), strict=True):
        ages = np.array(seen.ages).T
        image = left.imshow(
            ages, aspect="auto", cmap="viridis", vmin=0, vmax=oldest, interpolation="nearest"
        )
        left.set(
            title=f"{TITLES[pipeline]}: age of each unit", xlabel="meta-iteration", ylabel="unit"
        )
        figure.colorbar(image, ax=left, label="iterations since its start")
        numbers = np.arange(len(sizes[pipeline]))
        for inner, shade in ((90, "0.85"), (50, "0.6")):
            edges = np.nanpercentile(sizes[pipeline], (50 - inner / 2, 50 + inner / 2), axis=1)
            right.fill_between(
                numbers, *edges, color=shade, linewidth=0, label=f"{inner} % of the units"
            )
        right.plot(
            numbers, np.nanmedian(sizes[pipeline], axis=1), color="0.0", linewidth=1, label="median"
        )
        right.set(
            title=f"{TITLES[pipeline]}: size of gradients",
            xlabel="meta-iteration",
            ylabel="log10 of mean |g|",
        )
        right.set(xlim=(0, max(1, len(numbers) - 1)), ylim=limits)
        right.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    handles, labels = grid[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=3, fontsize="small")
    report.save_figure(figure, path, dpi=110)


def csv_rows(all_seen: dict) -> list[tuple]:
    """pipeline, iteration, unit, age, size"""
    return [
        (int(pipeline), iteration, unit, age, f"{size:.3f}")
        for pipeline, seen in all_seen.items()
        for iteration, (ages, sizes) in enumerate(zip(seen.ages, seen.sizes, strict=True))
        for unit, (age, size) in enumerate(zip(ages, sizes, strict=True))
    ]


def main() -> None:
    args = command_line.parse(pipeline_train.Args, __doc__)
    with runs.bad_input():
        if args.resume or args.num_processes > 1 or len(args.env_name) > 1:
            raise ValueError(
                "this figure takes one environment and one process, and cannot be resumed: "
                "no --resume"
            )
        if not args.pipeline:
            raise ValueError("this figure shows both: leave out --no-pipeline")
        args = train_optimizer.fill_in(args)
        mesh = devices.choose_devices(args.num_units, args.num_devices, process_id=args.process_id)
        all_tasks, learned, _ = train_optimizer.set_up(args)
        folder = runs.make_folder(
            args.runs_dir, args.env_name[0], "pipeline_figure", args.seed, args
        )
    all_seen = {}
    with runs.interruptible() as interrupted:
        for pipeline in (True, False):
            if not interrupted():
                own_args = dataclasses.replace(args, pipeline=pipeline)
                all_seen[pipeline] = watch(own_args, all_tasks, learned, mesh, interrupted)
        title = (
            f"{args.env_name[0]}: {args.num_units} units, "
            f"a lifetime is {args.reset_interval} meta-iterations"
        )
        columns = ("pipeline", "iteration", "unit", "age", "log10_mean_gradient")
        runs.write_csv(folder / "pipeline.csv", columns, csv_rows(all_seen))
        draw(folder / "pipeline.png", all_seen, title)
    print(f"written: {folder}/pipeline.png, pipeline.csv, config.json")
    sys.exit(interrupted())


if __name__ == "__main__":
    main()
