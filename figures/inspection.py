"""Inspection: has an optimizer learned more than a learning rate?

    python figures/inspection.py pretrained/adam4rl

Draws the size of its updates, in learning rates, with those of Adam, RMSProp and sign descent:
against the gradient's magnitude, and over time. The gradients are constant, alternating in sign, or
a tenth signal and the rest noise. Each magnitude is a coordinate of one vector of parameters.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import command_line
import optimizers
import runs
from figures import report

matplotlib.use("Agg")  # needs no screen
import matplotlib.pyplot as plt

MAGNITUDES = np.logspace(-7, 1, 33, dtype=np.float32)
SHOWN = 16  # the magnitude 1e-3, whose updates are shown over time
NUM_STEPS = 200
WINDOW = 10  # updates
STEP_SIZE = 1e-3
TRAINING = 9000.0  # updates of the whole training, where untrained adam4rl has that step size
CLASSICAL = ("adam", "rmsprop", "sign_sgd")
LOOKS = {"adam": ("0.0", "--"), "rmsprop": ("0.45", "-."), "sign_sgd": ("0.7", ":")}


@dataclass(frozen=True)
class Args:
    optimizer: tyro.conf.Positional[str]
    """pretrained/NAME or the path of a .npz"""
    runs_dir: str = "runs"
    """the run's folder is created in this folder"""


def sequences() -> dict[str, np.ndarray]:
    """name: gradients [NUM_STEPS, magnitudes]"""
    signs = np.where(np.arange(NUM_STEPS) % 2, -1.0, 1.0)[:, None]
    noise = np.random.default_rng(0).normal(size=(NUM_STEPS, 1))
    steady = np.ones((NUM_STEPS, 1))
    wholes = {
        "always the same": steady,
        "alternating": signs,
        "a tenth signal, the rest noise": 0.1 * steady + 0.9 * noise,
    }
    return {name: (whole * MAGNITUDES).astype(np.float32) for name, whole in wholes.items()}


def steps_of(optimizer: optax.GradientTransformation, grads: jax.Array) -> jax.Array:
    """The optimizer's movement against the gradient's usual sign. grads: [steps, parameters] -> the
    same shape"""
    optimizer = optax.with_extra_args_support(optimizer)
    params = jnp.zeros(grads.shape[1])
    extra_args = {"value": jnp.float32(0), "fraction": jnp.float32(0), "num_steps": TRAINING}

    def step(state, g):
        updates, state = optimizer.update(g, state, params, **extra_args)
        return state, -updates

    return jax.lax.scan(step, optimizer.init(params), grads)[1]


def steps_made(name: str, grads: np.ndarray) -> np.ndarray:
    """The steps of an optimizer by name, in learning rates. grads: [steps, magnitudes] -> the same
    shape"""
    optimizer = optimizers.make_optimizer(name, optimizers.own_rate(name) or STEP_SIZE)
    return np.asarray(jax.jit(partial(steps_of, optimizer))(grads)) / STEP_SIZE


def inspect(path: str, out: Path) -> list[tuple]:
    """Draw <out>/inspection.png. -> rows (optimizer, gradients, magnitude, update) of the
    figure"""
    untrained = f"untrained:{path}"
    looks = {path: ("C0", "-"), untrained: ("C1", "-")} | LOOKS
    labels = {path: "trained", untrained: "untrained"} | {name: name for name in CLASSICAL}
    made = sequences()
    figure, grid = plt.subplots(
        2, len(made), figsize=(9.6, 5.4), layout="constrained", sharey="row"
    )
    rows = []
    for column, (title, grads) in enumerate(made.items()):
        for name, (color, style) in looks.items():
            steps = steps_made(name, grads)
            size = np.abs(steps[-50:]).mean(axis=0)
            grid[0, column].plot(MAGNITUDES, size, style, color=color, label=labels[name])
            over_time = np.convolve(np.abs(steps[:, SHOWN]), np.full(WINDOW, 1 / WINDOW), "valid")
            grid[1, column].plot(np.arange(WINDOW, NUM_STEPS + 1), over_time, style, color=color)
            rows += [
                (labels[name], title, f"{m:.3g}", f"{x:.4g}")
                for m, x in zip(MAGNITUDES, size, strict=True)
            ]
        grid[0, column].set(xscale="log", yscale="log", title=title, xlabel="gradient's magnitude")
        grid[1, column].set(xlabel=f"updates (at magnitude 1e-3, mean of {WINDOW})", yscale="log")
        for axes in grid[:, column]:
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("size of an update / learning rate")
    grid[1, 0].set_ylabel("size of an update / learning rate")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(looks)
    )
    report.save_figure(figure, out / "inspection.png", dpi=120)
    return rows


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        optimizers.load_learned(args.optimizer)
        folder = runs.make_folder(args.runs_dir, Path(args.optimizer).stem, "inspection", 0, args)
    columns = ("optimizer", "gradients", "magnitude", "update_over_learning_rate")
    with runs.interruptible() as interrupted:
        runs.write_csv(folder / "inspection.csv", columns, inspect(args.optimizer, folder))
    print(f"written: {folder}/inspection.png, inspection.csv")
    sys.exit(interrupted())


if __name__ == "__main__":
    main()
