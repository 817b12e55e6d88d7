"""This project's A2C and the authors' code at the same settings; writes results/authors.md:

    python experiments/authors.py                   # all environments; an hour of one core
    python experiments/authors.py --env-name catch  # only these; the other rows of the table stay

The authors' numbers are the returns of their released code (jax 0.4.19, one CPU core). Returns are
measured as theirs: the mean over the episodes that ended in an update, averaged over the last 20
updates. (a2c.py reports the mean over the last finished episode of each environment, which lags by
up to an episode.) Every seed is in results/authors.json.

The authors' network for the big gridworlds reads an observation [planes, height, width], the
agent's plane last, as if it were [height, width, planes]. The environment "big_dense_long_authors"
has such observations.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import a2c
import checks
import command_line
import gridworld
import optimizers
import runs
import tasks
from figures import report

FIRST_SEED = 1000
# On Catch the seeds differ as much as the two codes.
NUM_SEEDS = {
    "catch": 60,
    "small_dense_long": 10,
    "big_dense_long_authors": 10,
    "big_dense_long": 10,
}
MARK = "<!-- experiments/authors.py writes the table below this line, and nothing above it. -->"
TABLE, DATA = ROOT / "results" / "authors.md", ROOT / "results" / "authors.json"

BIG_RMSPROP = {1e6: (0.79,), 2e6: (1.57,), 3e6: (2.65,), 4e6: (3.99,)}
# environment, optimizer, learning rate: {environment steps: the authors' returns, one per seed}
AUTHORS = {
    ("catch", "adam", 1e-3): {5e5: (0.972, 0.984, 0.984)},
    ("catch", "rmsprop", 1e-3): {5e5: (0.977, 0.984, 0.981)},
    ("catch", "untrained", 1e-3): {5e5: (0.942, 0.948, 0.953)},
    ("small_dense_long", "adam", 3e-2): {3e6: (23.5,)},
    ("small_dense_long", "adam", 3e-3): {3e6: (14.2,)},
    ("small_dense_long", "rmsprop", 3e-2): {3e6: (24.6,)},
    ("small_dense_long", "rmsprop", 3e-3): {3e6: (11.6,)},
    ("big_dense_long_authors", "rmsprop", 3e-3): BIG_RMSPROP,
    ("big_dense_long_authors", "adam", 3e-3): {3e6: (3.55,)},
    ("big_dense_long", "rmsprop", 3e-3): BIG_RMSPROP,
}


@dataclass(frozen=True)
class Args:
    env_name: tuple[str, ...] = tuple(NUM_SEEDS)
    """environments to run"""


class Counted(NamedTuple):
    """An environment's state, with the sum and the number of its episodes' returns so far."""

    env_state: Any
    episode_return: jax.Array
    total: jax.Array
    episodes: jax.Array


def counted(env: gridworld.Env, authors_layout: bool) -> gridworld.Env:
    """The environment with its returns counted. With authors_layout observations are
    [planes, height, width], agent last."""

    def layout(obs):
        return jnp.moveaxis(jnp.roll(obs, -1, axis=-1), -1, 0) if authors_layout else obs

    def reset(key):
        state, obs = env.reset(key)
        return Counted(state, *jnp.zeros(3)), layout(obs)

    def step(key, state, action):
        env_state, obs, reward, done = env.step(key, state.env_state, action)
        so_far = state.episode_return + reward
        state = Counted(
            env_state,
            jnp.where(done, 0, so_far),
            state.total + done * so_far,
            state.episodes + done,
        )
        return state, layout(obs), reward, done

    height, width, planes = env.obs_shape
    return env._replace(
        reset=reset,
        step=step,
        obs_shape=(planes, height, width) if authors_layout else env.obs_shape,
    )


def returns_at(env_name: str, optimizer: str, learning_rate: float, steps: list[float]) -> dict:
    """-> {environment steps: returns [seeds], each the mean of the last 20 updates}"""
    args = tasks.agent_args(
        env_name.removesuffix("_authors"),
        total_steps=max(steps),
        seed=FIRST_SEED,
        num_seeds=NUM_SEEDS[env_name],
    )
    env = counted(gridworld.make(env_name.removesuffix("_authors")), env_name.endswith("_authors"))
    totals = [np.zeros((2, args.num_seeds))]  # sum and number of returns, after each update
    with runs.progress(a2c.num_updates(args), f"{env_name}, {optimizer} {learning_rate:g}") as bar:

        def on_update(number, metrics, state):
            counters = state.agents.streams.env_state
            totals.append(np.array([counters.total, counters.episodes]).sum(axis=2))
            bar.update()

        a2c.train(args, env, optimizers.make_optimizer(optimizer, learning_rate), on_update)
    sums, counts = np.moveaxis(np.diff(totals, axis=0), 1, 0)  # [updates, seeds]
    returns = sums / np.where(counts, counts, np.nan)  # NaN if no episode ended in the update
    ends = {at: int(at) // a2c.steps_per_update(args) for at in steps}
    return {
        f"{at:g}": [round(float(x), 4) for x in np.nanmean(returns[n - 20 : n], axis=0)]
        for at, n in ends.items()
    }


def table(ours: dict) -> str:
    """A markdown table. ours: {"environment optimizer learning rate":
    {environment steps: returns [seeds]}}"""
    head = ("environment", "optimizer", "learning rate", "steps", "authors' code (seeds)")
    head += ("here (seeds)", "90 % interval", "lowest, highest seed", "here / authors'")
    rows = []
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
                f"{here.mean():.3g} ({len(here)})",
                "{:.3g} to {:.3g}".format(*report.bootstrap_interval(here)),
                f"{here.min():.3g}, {here.max():.3g}",
                f"{here.mean() / np.mean(theirs):.2f}",
            ]
            rows.append(cells)
    return report.markdown(head, rows)


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        checks.not_empty(args, "env_name")
        checks.known("env-name", args.env_name, NUM_SEEDS)
    ours = json.loads(DATA.read_text()) if DATA.exists() else {}
    for (env_name, optimizer, rate), authors in AUTHORS.items():
        if env_name in args.env_name:
            ours[f"{env_name} {optimizer} {rate:g}"] = returns_at(
                env_name, optimizer, rate, list(authors)
            )
            runs.write_text(DATA, json.dumps(ours, indent=1))
    text = TABLE.read_text().split(MARK)[0] if TABLE.exists() else ""
    runs.write_text(TABLE, f"{text}{MARK}\n\n{table(ours)}")
    print(table(ours))


if __name__ == "__main__":
    main()
