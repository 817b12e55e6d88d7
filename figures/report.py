"""Tables and figures of evaluations: scores with intervals, learning curves. evaluate.py makes them
for its results; to join several evaluations:

    python figures/report.py runs/FOLDER runs/ANOTHER --out results/gridworlds

This writes a table for each environment, a table of scores relative to Adam's, and a figure with a
panel for each environment. Seeds of the same optimizer at the same learning rate are merged, so ten
seeds can be run five at a time. Tables have a row for each learning rate; the relative table and
the figure show the best one.
"""

import csv
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import scipy.stats
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import command_line
import runs
import tasks

matplotlib.use("Agg")  # needs no screen
import matplotlib.pyplot as plt

COLUMNS = ("env_name", "optimizer", "learning_rate", "seed", "env_steps", "return")
REFERENCE = "adam"  # the others are compared with it
# Color, line, marker: the same in every figure, and distinct in grey.
LOOKS = {
    "pretrained/adam4rl (trained)": ("C3", "-", None),
    "pretrained/adam4rl (untrained)": ("C3", "--", None),
    "rmsprop_auto": ("0.4", ":", "D"),
    "pretrained/optim4rl_gridworlds (trained)": ("C0", "-", "o"),
    "untrained": ("C9", "--", "^"),
    "adam": ("0.0", "--", None),
    "adam_linear": ("0.0", ":", "x"),
    "rmsprop": ("0.4", "-.", None),
    "sign_sgd": ("0.6", ":", None),
}
ON_ITSELF = ("C2", "-", "s")  # pretrained/optim4rl_TASK, in its task
STYLES, MARKERS = ("-", "--", "-.", ":"), "DvP*X"  # for other optimizers


@dataclass(frozen=True)
class Args:
    folders: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders of evaluate.py"""
    out: str = "runs/report"
    """folder for table.md, curves.png and curves.csv"""
    redraw: tuple[str, ...] = ()
    """instead: redraw curves.png from curves.csv in these folders"""


class Result(NamedTuple):
    """One optimizer at one learning rate in one environment."""

    env_name: str
    label: str
    learning_rate: float
    env_steps: np.ndarray  # [updates or evaluations]
    returns: np.ndarray  # [seeds, updates or evaluations]
    seeds: np.ndarray  # [seeds], their numbers

    @property
    def last(self) -> int:
        """The number of last returns that a score averages: 20 updates (A2C), 2 evaluations
        (PPO)."""
        return tasks.score_window(self.env_name)

    @property
    def lost(self) -> np.ndarray:
        """The seeds whose last return is not finite: they ended early, or no episode of A2C ended.
        -> [seeds] bool"""
        return ~np.isfinite(self.returns[:, -1])

    @property
    def kept(self) -> np.ndarray:
        """The returns of the seeds that are not lost."""
        return self.returns[~self.lost]

    def scores(self, until: float = 1.0) -> np.ndarray:
        """The score of each seed that is not lost, at the first return after this fraction of
        training. An evaluation before training does not count."""
        end = 1 + np.searchsorted(self.env_steps, until * self.env_steps[-1])
        trained = int(self.env_steps[0] == 0)
        return np.nanmean(self.kept[:, max(trained, end - self.last) : end], axis=1)

    def score(self, until: float = 1.0) -> float:
        return float(self.scores(until).mean()) if len(self.kept) else -np.inf

    def rank(self) -> tuple:
        """The best of several learning rates has the largest: few lost seeds, then the score."""
        return -np.sum(self.lost), self.score()


# --- Statistics ---


def bootstrap_interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """90 % percentile bootstrap interval of the mean over the first axis. samples: [seeds, ...]
    -> low [...], high [...]"""
    if len(samples) == 1:
        return samples[0], samples[0]
    options = {
        "confidence_level": 0.9,
        "method": "percentile",
        "n_resamples": 1000,
        "rng": 0,
        "batch": 50,
    }
    interval = scipy.stats.bootstrap((samples,), np.mean, axis=0, **options).confidence_interval
    return interval.low, interval.high


def steps_to_reach(target: float, curve: np.ndarray, env_steps: np.ndarray) -> float:
    """Environment steps at which a curve first reaches `target`; NaN if it never does."""
    reached = np.flatnonzero(curve >= target)
    return env_steps[reached[0]] if len(reached) else np.nan


def names_of(results: list, field: str) -> list[str]:
    return list(dict.fromkeys(getattr(result, field) for result in results))


# --- Tables ---


def markdown(head: tuple, rows: list) -> str:
    """A markdown table."""
    first, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *lines])


def score_cells(result: Result) -> tuple[str, str]:
    """The score of the seeds that are not lost, and its interval."""
    if not len(result.kept):
        return "-", "none"
    if len(result.kept) == 1:
        return f"{result.score():.3f}", "one seed"
    return f"{result.score():.3f}", "{:.3f} to {:.3f}".format(*bootstrap_interval(result.scores()))


def lost_note(result: Result) -> str:
    """After a row's name, if seeds are lost."""
    lost = np.sum(result.lost)
    return f" ({lost} seeds ended early, not finite)" if lost else ""


def table(results: list[Result]) -> str:
    """A markdown table of the optimizers in one environment."""
    best = max(result.score() for result in results)
    goal = 0.9 * best if best > 0 else np.nan  # a share of a negative return says nothing
    most = max(len(result.returns) for result in results)
    head = ("optimizer", "learning rate", f"return (mean of last {results[0].last})")
    head += ("90 % interval", f"steps to reach {f'{goal:.3g}' if best > 0 else '-'}")
    rows = []
    for result in results:
        kept, name = result.kept, result.label + lost_note(result)
        if len(result.returns) < most:  # another row has more seeds
            name += f" (seeds: {len(result.returns)})"
        reached = "never" if best > 0 else "-"
        if len(kept) and np.isfinite(
            steps := steps_to_reach(goal, kept.mean(axis=0), result.env_steps)
        ):
            reached = f"{steps:.3g}"
        rows.append((name, f"{result.learning_rate:g}", *score_cells(result), reached))
    return markdown(head, rows)


def at_best_rate(results: list[Result]) -> list[Result]:
    """In each environment, each optimizer at the learning rate with the best final score."""
    best: dict = {}
    for result in results:
        key = (result.env_name, result.label)
        best[key] = max(best.get(key, result), result, key=Result.rank)
    return list(best.values())


def relative_table(results: list[Result]) -> str:
    """In each environment, each optimizer's score at a quarter of the steps and at the end, divided
    by Adam's. Of several learning rates the best is shown."""
    by_name = {(result.env_name, result.label): result for result in at_best_rate(results)}
    env_names, labels = names_of(results, "env_name"), names_of(results, "label")

    def cell(env_name, label):
        result, adam = by_name.get((env_name, label)), by_name.get((env_name, REFERENCE))
        if not (result and adam and len(result.kept) and len(adam.kept)):
            return "-"
        pairs = [(result.score(until), adam.score(until)) for until in (0.25, 1.0)]
        return ", ".join(f"{x / y:.2f}" if y > 0 and np.isfinite(x) else "-" for x, y in pairs)

    head = (f"relative to {REFERENCE}: at a quarter, at the end", *env_names)
    return markdown(head, [(x, *(cell(name, x) for name in env_names)) for x in labels])


def tables(results: list[Result]) -> str:
    """The tables of all environments, with headings if there are several."""
    env_names = names_of(results, "env_name")
    if len(env_names) == 1:
        return table(results)
    parts = [relative_table(results)]
    for name in env_names:
        here = [result for result in results if result.env_name == name]
        parts += [f"### {name}, {max(len(result.returns) for result in here)} seeds", table(here)]
    return "\n\n".join(parts)


# --- Figures and files ---


def looks(labels: list[str]) -> list[dict]:
    """The line styles of one panel: an optimizer's own in LOOKS, or another if it has none or its
    own is taken."""
    free = [
        (f"C{4 + i % 5}", STYLES[i % len(STYLES)], MARKERS[i % len(MARKERS)])
        for i in range(len(labels))
    ]
    chosen: list[tuple] = []
    for label in labels:
        own = LOOKS.get(label, ON_ITSELF if label.startswith("pretrained/optim4rl_") else None)
        chosen.append(own if own and own not in chosen else free.pop(0))
    names = ("color", "linestyle", "marker")
    return [
        dict(zip(names, own, strict=True)) | {"markevery": 0.1, "markersize": 4} for own in chosen
    ]


def short(label: str) -> str:
    """An optimizer's name in a legend."""
    if label == "untrained":
        return "optim4rl untrained"
    label = re.sub(r"open, .*open_(\w+)", r"OPEN \1", label.removeprefix("pretrained/"))
    return label.replace(" (trained)", "").replace(" (untrained)", " untrained")


class Curve(NamedTuple):
    """A Result in a figure: the mean over seeds and its interval."""

    env_name: str
    label: str
    learning_rate: float
    env_steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curves_of(results: list[Result]) -> list[Curve]:
    """The curve of each optimizer at its best learning rate."""
    best = [result for result in at_best_rate(results) if len(result.kept)]
    return [Curve(*r[:4], r.kept.mean(axis=0), *bootstrap_interval(r.kept)) for r in best]


def draw_panel(axes, curves: list[Curve]) -> None:
    """The learning curves of one environment; the legend names learning rates."""
    for curve, style in zip(curves, looks([curve.label for curve in curves]), strict=True):
        label = f"{short(curve.label)}, {curve.learning_rate:g}"
        axes.plot(curve.env_steps, curve.mean, label=label, linewidth=1.3, **style)
        axes.fill_between(
            curve.env_steps, curve.low, curve.high, color=style["color"], alpha=0.2, linewidth=0
        )
    axes.set(xlabel="environment steps", ylabel="return", title=curves[0].env_name)
    if curves[0].env_name == "catch":  # most curves end near 1, some early
        lowest = min(curve.mean[-1] for curve in curves)
        axes.set(ylim=(min(0.6, lowest - 0.05), 1.01), xscale="log")
    else:
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes.grid(alpha=0.3)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=2,
        fontsize="x-small",
        frameon=False,
        title="optimizer, learning rate",
        title_fontsize="x-small",
    )


def draw(path: Path, curves: list[Curve]) -> None:
    """Learning curves, one panel per environment: mean over seeds, 90 % interval shaded."""
    env_names = names_of(curves, "env_name")
    columns = min(3, max(1, len(env_names)))
    rows = max(1, -(-len(env_names) // columns))  # of no panel, if all seeds are lost
    size = (6, 5) if len(env_names) == 1 else (4.6 * columns, 4.4 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, name in zip(grid.flat, env_names, strict=False):
        draw_panel(axes, [curve for curve in curves if curve.env_name == name])
    for axes in list(grid.flat)[len(env_names) :]:
        axes.remove()
    save_figure(figure, path, dpi=90 if len(env_names) > 1 else 150)


def save_figure(figure, path: Path, dpi: int) -> None:
    """Write the .png, and close the figure."""
    runs.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=dpi))
    plt.close(figure)


def write_results(path: Path, results: list[Result]) -> None:
    """Write every curve of every seed, for read_results."""
    rows = []
    for result in results:
        for seed, returns in zip(result.seeds, result.returns, strict=True):
            for steps, value in zip(result.env_steps, returns, strict=True):
                rows.append(
                    (
                        result.env_name,
                        result.label,
                        f"{result.learning_rate:g}",
                        seed,
                        steps,
                        f"{value:.5g}",
                    )
                )
    runs.write_csv(path, COLUMNS, rows)


def read_results(*paths: Path) -> list[Result]:
    """One Result for each environment, optimizer and learning rate, with the seeds of all files.

    Raises a one-line ValueError for a file in another format, a repeated seed, or curves at
    different environment steps.
    """
    curves: dict = {}  # environment, optimizer, learning rate -> seed -> path, [updates, 2]
    for path in paths:
        for (*key, seed), curve in read_curves(path).items():
            seeds = curves.setdefault(tuple(key), {})
            if seed in seeds:
                raise ValueError(
                    f"{path}: seed {seed} of {key[1]} in {key[0]} is in {seeds[seed][0]} too; "
                    "give each seed once"
                )
            seeds[seed] = path, curve
            other, first = next(iter(seeds.values()))
            if not np.array_equal(curve[:, 0], first[:, 0]):
                raise ValueError(
                    f"{path}: {key[1]} in {key[0]} has other environment steps than in {other}; "
                    "they cannot be joined"
                )
    results = []
    for key, seeds in curves.items():
        curve = np.stack([curve for _, curve in seeds.values()])
        results.append(Result(*key, curve[0, :, 0], curve[:, :, 1], np.array([*seeds])))
    return results


def read_curves(path: Path) -> dict:
    """(environment, optimizer, learning rate, seed) -> [updates, 2], steps and return; a return of
    a lost seed is NaN. Raises a one-line ValueError for a file in another format, and for a seed
    whose steps do not grow."""
    rows: dict = {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                env_name, label, rate, seed, steps, value = (row[name] for name in COLUMNS)
                rows.setdefault((env_name, label, float(rate), int(seed)), []).append(
                    (float(steps), float(value))
                )
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a run folder of evaluate.py has one") from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: not the results of evaluate.py ({error})") from None
    curves = {key: np.array(curve) for key, curve in rows.items()}
    for (env_name, label, _, seed), curve in curves.items():
        if (np.diff(curve[:, 0]) <= 0).any():
            raise ValueError(f"{path}: seed {seed} of {label} in {env_name} is there twice")
    return curves


def summary_rows(result: Result, points: int = 40) -> list[tuple]:
    """The mean curve and its interval, at `points` points at most, as kept in results/."""
    at = np.unique(np.linspace(0, len(result.env_steps) - 1, points).round().astype(int))
    kept = result.kept[:, at]
    if not len(kept):
        return []
    numbers = zip(result.env_steps[at], kept.mean(axis=0), *bootstrap_interval(kept), strict=True)
    name = (result.env_name, result.label, f"{result.learning_rate:g}", len(kept))
    return [(*name, f"{steps:g}", *(f"{x:.5g}" for x in values)) for steps, *values in numbers]


SUMMARY_COLUMNS = (
    "env_name",
    "optimizer",
    "learning_rate",
    "seeds",
    "env_steps",
    "mean",
    "low",
    "high",
)


def write_summary(path: Path, results: list[Result]) -> None:
    """Write curves.csv, first each optimizer at its best learning rate, then the others."""
    best = at_best_rate(results)
    others = [result for result in results if all(result is not x for x in best)]
    rows = [row for result in (*best, *others) for row in summary_rows(result)]
    runs.write_csv(path, SUMMARY_COLUMNS, rows)


def read_summary(path: Path) -> list[Curve]:
    """The curves in a curves.csv, each optimizer's at the first learning rate, which is the best.
    Raises a one-line ValueError for another file."""
    rows: dict = {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                env_name, label, rate, *numbers = (row[name] for name in SUMMARY_COLUMNS)
                rows.setdefault((env_name, label), {}).setdefault(float(rate), []).append(
                    [float(x) for x in numbers]
                )
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: not a curves.csv of report.py ({error})") from None
    best = {name: next(iter(rates.items())) for name, rates in rows.items()}
    # [points; seeds, env_steps, mean, low, high]
    return [Curve(*name, rate, *np.array(points).T[1:]) for name, (rate, points) in best.items()]


def write(folder: Path, results: list[Result], swept: list[Result]) -> None:
    """Write an evaluation's curves.png, table.md, and sweep.csv if learning rates were swept; print
    the table."""
    if swept:
        rows = [
            (*result[:2], f"{result.learning_rate:g}", f"{result.score():.5g}") for result in swept
        ]
        runs.write_csv(folder / "sweep.csv", (*COLUMNS[:3], "score"), rows)
    draw(folder / "curves.png", curves_of(results))
    summary = tables(results)
    runs.write_text(folder / "table.md", summary)
    print(summary)
    print(
        f"written: {folder}/table.md, results.csv (every curve), "
        f"{'sweep.csv, ' if swept else ''}curves.png, config.json"
    )


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        for folder in map(Path, args.redraw):
            draw(folder / "curves.png", read_summary(folder / "curves.csv"))
            print(f"written: {folder}/curves.png")
        if args.redraw:
            return
        results = read_results(*(Path(folder) / "results.csv" for folder in args.folders))
        if not results:
            raise ValueError("name at least one run folder of evaluate.py")
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        summary = tables(results)
        draw(out / "curves.png", curves_of(results))
        write_summary(out / "curves.csv", results)
        runs.write_text(out / "table.md", summary)
    print(summary)
    print(f"written: {out}/table.md, curves.png, curves.csv")


if __name__ == "__main__":
    main()
