"""This project's A2C beside the authors' code at the same settings: writes results/authors.md.

    python benchmarks/authors.py                     # everything; 20 to 40 minutes of one core
    python benchmarks/authors.py --env-name catch    # only these environments; the other rows of the table stay

The authors' figures are the returns of their released code (jax 0.4.19, one CPU core). A return is the mean of the 20 updates
before, as in the paper. The returns of every seed are kept in results/authors.json.

The authors' network of the big gridworlds reads an observation of planes x height x width as height x width x planes. The
rows "planes_first" do the same.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import a2c  # noqa: E402, once the project is on the path
import gridworld  # noqa: E402
import optimizers  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402

FIRST_SEED = 1000
# On Catch seeds differ by as much as the two codes do.
NUM_SEEDS = {"catch": 60, "small_dense_long": 10, "big_dense_long": 10, "big_dense_long_planes_first": 10}
MARK = "<!-- benchmarks/authors.py writes the table below this line, and nothing above it. -->"
TABLE, DATA = ROOT / "results" / "authors.md", ROOT / "results" / "authors.json"

BIG_ADAM = {3e6: (3.55,)}
BIG_RMSPROP = {1e6: (0.79,), 2e6: (1.57,), 3e6: (2.65,), 4e6: (3.99,)}
# environment, optimizer, learning rate: {environment steps: the authors' returns, one for each seed}
AUTHORS = {
    ("catch", "adam", 1e-3): {5e5: (0.972, 0.984, 0.984)},
    ("catch", "rmsprop", 1e-3): {5e5: (0.977, 0.984, 0.981)},
    ("catch", "untrained", 1e-3): {5e5: (0.942, 0.948, 0.953)},
    ("small_dense_long", "adam", 3e-2): {3e6: (23.5,)},
    ("small_dense_long", "adam", 3e-3): {3e6: (14.2,)},
    ("small_dense_long", "rmsprop", 3e-2): {3e6: (24.6,)},
    ("small_dense_long", "rmsprop", 3e-3): {3e6: (11.6,)},
    ("big_dense_long", "adam", 3e-3): BIG_ADAM,
    ("big_dense_long", "rmsprop", 3e-3): BIG_RMSPROP,
    ("big_dense_long_planes_first", "adam", 3e-3): BIG_ADAM,
    ("big_dense_long_planes_first", "rmsprop", 3e-3): BIG_RMSPROP,
}


@dataclass(frozen=True)
class Args:
    env_name: tuple[str, ...] = tuple(NUM_SEEDS)
    """environments to run"""


def planes_first(env: gridworld.Env) -> gridworld.Env:
    """The same environment with observations [planes, height, width]."""

    def reset(key):
        state, obs = env.reset(key)
        return state, jnp.moveaxis(obs, -1, 0)

    def step(key, state, action):
        state, obs, reward, done = env.step(key, state, action)
        return state, jnp.moveaxis(obs, -1, 0), reward, done

    height, width, planes = env.obs_shape
    return env._replace(reset=reset, step=step, obs_shape=(planes, height, width))


def returns_at(env_name: str, optimizer: str, learning_rate: float, steps: list[float]) -> dict:
    """-> {environment steps: returns [seeds], each the mean of the 20 updates before}"""
    size = {"num_envs": 64 if env_name == "catch" else 512, "num_seeds": NUM_SEEDS[env_name]}
    args = a2c.Args(env_name=env_name, total_steps=max(steps), seed=FIRST_SEED, **size)
    env = gridworld.make(env_name.removesuffix("_planes_first"))
    env = planes_first(env) if env_name.endswith("_planes_first") else env
    with runs.progress(a2c.num_updates(args), f"{env_name}, {optimizer} {learning_rate:g}") as bar:

        def on_update(number, metrics, state):
            jax.block_until_ready(metrics)
            bar.update()

        history = a2c.train(args, env, optimizers.make_optimizer(optimizer, learning_rate), on_update)
    returns = np.asarray(history["return"])
    updates = {at: int(at) // a2c.steps_per_update(args) for at in steps}
    return {f"{at:g}": [round(float(x), 4) for x in returns[:, n - 20 : n].mean(axis=1)] for at, n in updates.items()}


def table(ours: dict) -> str:
    """A markdown table. ours: {"environment optimizer learning rate": {environment steps: returns [seeds]}}"""
    rows = [
        "| environment | optimizer | learning rate | steps | authors' code (seeds) | here (seeds) | 90 % interval "
        "| lowest, highest seed | here / authors' |",
        "|---" * 9 + "|",
    ]
    for (env_name, optimizer, rate), authors in AUTHORS.items():
        for steps, theirs in authors.items():
            here = np.array(ours.get(f"{env_name} {optimizer} {rate:g}", {}).get(f"{steps:g}", []))
            if not len(here):
                continue
            cells = [
                env_name,
                optimizer,
                f"{rate:g}",
                f"{steps:.0e}".replace("+0", ""),
                f"{np.mean(theirs):.3g} ({len(theirs)})",
            ]
            cells += [f"{here.mean():.3g} ({len(here)})"]
            cells += ["{:.3g} to {:.3g}".format(*report.bootstrap_interval(here)), f"{here.min():.3g}, {here.max():.3g}"]
            cells += [f"{here.mean() / np.mean(theirs):.2f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    ours = json.loads(DATA.read_text()) if DATA.exists() else {}
    for (env_name, optimizer, rate), authors in AUTHORS.items():
        if env_name in args.env_name:
            ours[f"{env_name} {optimizer} {rate:g}"] = returns_at(env_name, optimizer, rate, list(authors))
            report.write_text(DATA, json.dumps(ours, indent=1))
    text = TABLE.read_text().split(MARK)[0] if TABLE.exists() else ""
    report.write_text(TABLE, f"{text}{MARK}\n\n{table(ours)}")
    print(table(ours))


if __name__ == "__main__":
    main()
