"""Compare one optimizer with others over many environments, from evaluations of evaluate.py:

    python figures/compare.py runs/FOLDER runs/ANOTHER --out results/all_tasks

Each seed has two scores: the return at the end (the mean of the last 20 updates of A2C, of the last
two evaluations of PPO), and the mean return over all of training (the area under its curve). Those
of a lost seed, which ended early, are -inf: below all others. Of an optimizer's learning rates the
one that loses the fewest seeds is taken, and of these the one with the best mean final return.

Writes scores.csv (both scores of every seed), table.md (means with 90 % bootstrap intervals), and
compare.png: the probability that the optimizer is better than each other one, the mean over tasks,
and performance profiles (Agarwal et al. 2021, arXiv 2108.13264). A scores.csv, or a folder with
one, may stand for the evaluations it was made of.
"""

import csv
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
from baselines.classical import CLASSICAL, OWN_RATE
from figures import report

matplotlib.use("Agg")  # needs no screen
import matplotlib.pyplot as plt

COLUMNS = ("env_name", "optimizer", "learning_rate", "seed", "first", "final", "mean")
KINDS = ("final", "mean")
NAMES = {"final": "return at the end", "mean": "return averaged over training"}
RESAMPLES = 2000
FEWEST = 3  # tasks of an optimizer in compare.png; those meta-trained on one task have one


@dataclass(frozen=True)
class Args:
    folders: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders of evaluate.py, or scores.csv files or their folders"""
    of: str = "pretrained/adam4rl (trained)"
    """the optimizer that is compared with the others, as its row in their tables is called"""
    held_out: tuple[str, ...] = ()
    """environments that had no part in making it: marked *, and counted by themselves too"""
    out: str = "runs/compare"
    """folder for scores.csv, table.md and compare.png"""


class Scores(NamedTuple):
    """One optimizer at one learning rate in one environment."""

    env_name: str
    label: str
    learning_rate: float
    seeds: np.ndarray  # [seeds], their numbers
    first: np.ndarray  # [seeds], the first return; NaN of a lost seed
    final: np.ndarray  # [seeds], -inf of a lost one
    mean: np.ndarray  # [seeds], -inf of a lost one


# --- Statistics ---


def scores_of(result: report.Result) -> Scores:
    kept, lost = result.kept, result.lost
    first, final, mean = (np.full(len(lost), value) for value in (np.nan, -np.inf, -np.inf))
    first[~lost] = kept[:, np.isfinite(kept).all(axis=0).argmax()]
    final[~lost], mean[~lost] = result.scores(), np.nanmean(kept, axis=1)
    return Scores(*result[:3], result.seeds, first, final, mean)


def better(x: np.ndarray, y: np.ndarray) -> float:
    """The probability that a seed of x is above one of y; equal ones count half (Mann-Whitney's U).
    x, y: [seeds]"""
    return float(np.mean(x[:, None] > y) + np.mean(x[:, None] == y) / 2)


def paired_interval(differences: np.ndarray) -> tuple[float, float]:
    """The 90 % interval of the mean difference of paired seeds, by Student's t. differences:
    [seeds], at least two"""
    half = scipy.stats.t.ppf(0.95, len(differences) - 1) * scipy.stats.sem(differences)
    return differences.mean() - half, differences.mean() + half


def probability_of_improvement(pairs: list[tuple]) -> tuple[float, float, float]:
    """The mean of `better` over tasks, and its 90 % interval from resampled seeds within each task.
    pairs: x, y of each task"""
    rng = np.random.default_rng(0)
    drawn = [
        np.mean([better(rng.choice(x, len(x)), rng.choice(y, len(y))) for x, y in pairs])
        for _ in range(RESAMPLES)
    ]
    return np.mean([better(*pair) for pair in pairs]), *np.quantile(drawn, [0.05, 0.95])


def mean_of_kept(values: np.ndarray) -> float:
    """The mean of the seeds that are not lost; -inf if all are."""
    kept = values[np.isfinite(values)]
    return kept.mean() if len(kept) else -np.inf


def rank(values: np.ndarray) -> tuple:
    """The best optimizer or learning rate has the largest: few lost seeds, then the mean."""
    return -np.sum(~np.isfinite(values)), mean_of_kept(values)


def best_classical(scores: list[Scores], kind: str) -> Scores:
    """The best classical optimizer of one environment by these scores."""
    classical = [s for s in scores if s.label in CLASSICAL]
    return max(classical, key=lambda s: rank(getattr(s, kind)))


def normalised(scores: list[Scores], kind: str) -> dict:
    """label -> [seeds], 0 at the first return of training and 1 at the mean of the best classical
    optimizer; empty if that is not above 0. scores: of one environment"""
    low = np.nanmean(np.concatenate([s.first for s in scores]))
    high = mean_of_kept(getattr(best_classical(scores, kind), kind))
    return {s.label: (getattr(s, kind) - low) / (high - low) for s in scores if high > low}


# --- Table and figure ---


def cell(values: np.ndarray, digits: int = 4, with_interval: bool = True) -> str:
    """The mean of the seeds that are not lost, and its interval."""
    kept = values[np.isfinite(values)]
    lost = f", {len(values) - len(kept)} lost" if len(kept) < len(values) else ""
    if not len(kept):
        return f"-{lost}"

    def text(x):  # a number of 1000 or more is whole
        short = f"{x:.{digits}g}"
        return short if abs(float(short)) < 1000 else f"{x:.0f}"

    low, high = map(text, report.bootstrap_interval(kept))
    return text(kept.mean()) + (f" ({low} to {high})" if with_interval else "") + lost


def verdict(scores: list[Scores], of: str, kind: str) -> str:
    """Whether `of` is above, level with, or below the best classical optimizer. Above is the one
    that loses fewer seeds; else level if the 90 % interval of their difference, seed by seed, has 0
    in it, or fewer than two seeds are left."""
    ours, theirs = next(s for s in scores if s.label == of), best_classical(scores, kind)
    _, i, j = np.intersect1d(ours.seeds, theirs.seeds, return_indices=True)
    x, y = getattr(ours, kind)[i], getattr(theirs, kind)[j]
    if more := np.sum(np.isinf(x)) - np.sum(np.isinf(y)):
        return "below" if more > 0 else "above"
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 2:
        return "level"
    low, high = paired_interval(x[both] - y[both])
    return "above" if low > 0 else "below" if high < 0 else "level"


def verdicts(by_env: dict, of: str, held_out: tuple = ()) -> list[str]:
    """For each kind of score, the tasks of each verdict; then of those held out."""
    lines = []
    parts = {"each task": by_env, "each task held out": {n: by_env[n] for n in held_out}}
    for which, some in parts.items():
        for kind in KINDS if some else ():
            places: dict = {"above": [], "level": [], "below": []}
            for name, scores in some.items():
                places[verdict(scores, of, kind)].append(name)
            counts = "; ".join(
                f"{place} on {len(names)}{': ' if names else ''}{', '.join(names)}"
                for place, names in places.items()
            )
            lines.append(
                f"- {kind} return, against the best classical optimizer of {which}: {counts}"
            )
    return lines


def summary(by_env: dict, of: str, held_out: tuple = ()) -> str:
    """A row for each environment, marked * if held out: the final returns of `of`, of its untrained
    form, of Adam and of the best classical optimizer, where they are there."""
    short, rows = report.short(of), []
    for name, scores in by_env.items():
        best, by_label = best_classical(scores, "final"), {s.label: s for s in scores}
        untrained = of.replace("(trained)", "(untrained)")
        cells = [cell(by_label[of].final, 3)]
        for label in (untrained, "adam"):
            cells.append(cell(by_label[label].final, 3, False) if label in by_label else "-")
        cells += [f"{cell(best.final, 3)} `{best.label}`", verdict(scores, of, "final")]
        rows.append((f"{name}*" if name in held_out else name, *cells))
    head = ("task", f"`{short}`", f"`{short}` untrained", "Adam", "best classical")
    return report.markdown((*head, f"`{short}` is"), rows)


def rates(by_env: dict) -> str:
    """The learning rates of the classical optimizers that have one to choose; - if they were not
    run."""
    chosen = {name: {s.label: f"{s.learning_rate:g}" for s in by_env[name]} for name in by_env}
    anywhere = set().union(*chosen.values())
    labels = [x for x in CLASSICAL if x in anywhere and x not in OWN_RATE]
    rows = [(name, *(found.get(x, "-") for x in labels)) for name, found in chosen.items()]
    return report.markdown(("task", *labels), rows)


def table(by_env: dict, of: str, held_out: tuple = ()) -> str:
    parts = ["\n".join(verdicts(by_env, of, held_out)), summary(by_env, of, held_out)]
    for name, scores in by_env.items():
        rows = [
            (
                f"**{s.label}**" if s.label == of else s.label,
                f"{s.learning_rate:g}",
                cell(s.final),
                cell(s.mean),
            )
            for s in sorted(scores, key=lambda s: -s.final.mean())
        ]
        head = ("optimizer", "learning rate", "final return", "mean return")
        title = f"### {name}, {max(len(s.final) for s in scores)} seeds"
        parts += [title, report.markdown(head, rows)]
    return "\n\n".join([*parts, "### Learning rates", rates(by_env)])


def draw(path: Path, by_env: dict, of: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    draw_probabilities(axes[0], by_env, of)
    draw_profiles(axes[1], by_env, of)
    report.save_figure(figure, path, dpi=100)


def draw_probabilities(axis, by_env: dict, of: str) -> None:
    """That `of` is better than each other optimizer, the hardest to beat at the top. The mean is
    over the tasks that both have."""
    found: dict = {}  # (label, kind) -> the probability and its interval
    number: dict = {}  # label -> of tasks
    by_label = [{s.label: s for s in scores} for scores in by_env.values()]
    for label in set().union(*by_label) - {of}:
        both = [(scores[of], scores[label]) for scores in by_label if label in scores]
        if len(both) < min(FEWEST, len(by_env)):
            continue
        number[label] = len(both)
        for kind in KINDS:
            pairs = [(getattr(ours, kind), getattr(theirs, kind)) for ours, theirs in both]
            found[label, kind] = probability_of_improvement(pairs)
    axis.set(title=f"{report.short(of)} is better than ... (number of tasks)")
    if not number:
        return
    others = sorted(number, key=lambda label: (-found[label, "final"][0], label))
    for kind, color, shift in zip(KINDS, ("C0", "C1"), (0.15, -0.15), strict=True):
        middle, low, high = np.transpose([found[label, kind] for label in others])
        rows = np.arange(len(others)) + shift
        axis.hlines(rows, low, high, color=color, linewidth=4, alpha=0.4)
        axis.plot(middle, rows, "o", color=color, markersize=5, label=NAMES[kind])
    names = [f"{report.short(label)} ({number[label]})" for label in others]
    axis.set(yticks=range(len(others)), yticklabels=names, xlim=(0, 1.02))
    axis.axvline(0.5, color="0.5", linewidth=0.8)
    axis.set(xlabel="probability that a seed has the higher return, mean over tasks")
    axis.legend(frameon=False, loc="lower left")


def draw_profiles(axis, by_env: dict, of: str) -> None:
    """Of all optimizers that are in every environment where a classical one learns."""
    values: dict = {}
    learned = [found for s in by_env.values() if (found := normalised(s, "final"))]
    for found in learned:
        for label, x in found.items():
            values.setdefault(label, []).append(x)
    at = np.linspace(0, 1.5, 200)
    labels = [label for label, tasks in values.items() if len(tasks) == len(learned)]
    for label, look in zip(labels, report.looks(labels), strict=True):
        share = np.mean([[np.mean(x > y) for y in at] for x in values[label]], axis=0)
        axis.plot(at, share, label=report.short(label), **look, linewidth=2 if label == of else 1)
    which = "all" if len(learned) == len(by_env) else f"{len(learned)} of {len(by_env)}"
    axis.set(title=f"optimizers that are on {which} tasks", ylabel="share of seeds above")
    axis.set(xlabel="final return (0: start of training, 1: best classical mean)")
    if labels:
        axis.legend(frameon=False)
    axis.grid(alpha=0.3)


# --- Files ---


def read_scores(path: Path) -> list[Scores]:
    """Raises a one-line ValueError for a file in another format."""
    rows: dict = {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                env_name, label, rate, *values = (row[name] for name in COLUMNS)
                rows.setdefault((env_name, label, float(rate)), []).append(list(map(float, values)))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: not a scores.csv of compare.py ({error})") from None
    return [Scores(*key, *np.array(values).T) for key, values in rows.items()]


def read_all(folders: tuple[str, ...]) -> list[Scores]:
    """Of run folders of evaluate.py, scores.csv files, and folders that have one; seeds of the same
    optimizer, learning rate and environment are merged. Raises a one-line ValueError for a file in
    another format, and for a seed that is there twice."""
    all_scores, results = [], []
    for folder in map(Path, folders):
        scores = folder if folder.suffix == ".csv" else folder / "scores.csv"
        if scores.exists():
            all_scores += read_scores(scores)
        else:
            results.append(folder / "results.csv")
    all_scores += [scores_of(result) for result in report.read_results(*results)]
    by_key: dict = {}
    for s in all_scores:
        by_key.setdefault(s[:3], []).append(s)
    return [merged(parts) for parts in by_key.values()]


def merged(parts: list[Scores]) -> Scores:
    """Scores of the same optimizer, learning rate and environment as one."""
    columns = [np.concatenate(column) for column in zip(*(s[3:] for s in parts), strict=True)]
    seeds, count = np.unique(columns[0], return_counts=True)
    if (count > 1).any():
        name = "{1} at {2:g} on {0}".format(*parts[0][:3])
        seed = f"{seeds[count > 1][0]:.0f}"
        raise ValueError(f"{name}: seed {seed} is there twice; leave out a folder")
    return Scores(*parts[0][:3], *columns)


def read(folders: tuple[str, ...]) -> dict:
    """-> environment: its Scores, each optimizer at its best learning rate"""
    best: dict = {}
    for s in read_all(folders):
        here = best.setdefault(s.env_name, {})
        if s.label not in here or rank(s.final) > rank(here[s.label].final):
            here[s.label] = s
    return {name: list(here.values()) for name, here in best.items()}


def write_scores(path: Path, scores: list[Scores]) -> None:
    rows = [
        (s.env_name, s.label, f"{s.learning_rate:g}", f"{seed:.0f}", *(f"{x:.5g}" for x in values))
        for s in scores
        for seed, *values in zip(s.seeds, s.first, s.final, s.mean, strict=True)
    ]
    runs.write_csv(path, COLUMNS, rows)


def missing(scores: list[Scores], of: str) -> str:
    """What a comparison in one environment still needs; empty if nothing."""
    labels = {s.label for s in scores}
    needs = [] if of in labels else [of]
    needs += ["a classical optimizer"] if labels.isdisjoint(CLASSICAL) else []
    if not needs:
        ours = next(s for s in scores if s.label == of).seeds
        for best in (best_classical(scores, kind) for kind in KINDS):
            if len(np.intersect1d(ours, best.seeds)) < 2:
                needs = [f"two seeds that {of} and {best.label} both have"]
    return " and ".join(needs)


def write(out: Path, by_env: dict, of: str, held_out: tuple = ()) -> None:
    """table.md and compare.png. by_env: environment: its Scores"""
    runs.write_text(out / "table.md", table(by_env, of, held_out))
    draw(out / "compare.png", by_env, of)
    print("\n".join(verdicts(by_env, of, held_out)))
    print(f"written: {out}/table.md, compare.png")


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        by_env = read(args.folders)
        if not by_env:
            raise ValueError("give at least one folder of evaluate.py")
        if unknown := {*args.held_out} - {*by_env}:
            raise ValueError(
                f"--held-out {min(unknown)}: not compared; there are {', '.join(by_env)}"
            )
        for name, scores in by_env.items():
            if needs := missing(scores, args.of):
                raise ValueError(f"{name}: needs {needs}; has {', '.join(s.label for s in scores)}")
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
    with runs.interruptible() as interrupted:
        write_scores(out / "scores.csv", [s for scores in by_env.values() for s in scores])
        write(out, by_env, args.of, args.held_out)
    sys.exit(interrupted())


if __name__ == "__main__":
    main()
