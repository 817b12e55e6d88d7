"""Is an optimizer better than another on the same seeds? A seed gives an agent the same parameters
and environments whatever its optimizer, so the difference is taken seed by seed:

    python figures/paired.py runs/FOLDER runs/ANOTHER --of "catch (trained)"

prints, for every optimizer that shares at least two seeds with the one named, the mean difference
of the final return, its 90 % interval (Student's t), and p of Wilcoxon's signed-rank test
(two-sided). A seed that ended early counts for neither.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import command_line
import runs
from figures import compare, report


@dataclass(frozen=True)
class Args:
    folders: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders of evaluate.py, or scores.csv files or their folders"""
    of: str = ""
    """the optimizer that is compared with the others, as its row in their tables is called"""


def final_returns(folders: tuple) -> dict:
    """(environment, optimizer, learning rate) -> seed -> final return, as in evaluate.py's table.
    Raises a one-line ValueError as compare.read_all does."""
    found: dict = {}
    for scores in compare.read_all(folders):
        finals = zip(scores.seeds.tolist(), scores.final.tolist(), strict=True)
        found[scores[:3]] = {seed: x for seed, x in finals if np.isfinite(x)}
    return found


def row(ours: dict, theirs: dict) -> tuple[str, str, str]:
    """Two optimizers, seed -> final return. -> shared seeds, mean difference and interval, p"""
    seeds = sorted(set(ours) & set(theirs))
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds])
    low, high = compare.paired_interval(differences)
    p = scipy.stats.wilcoxon(differences).pvalue if differences.any() else 1.0
    return str(len(seeds)), f"{differences.mean():.4g} ({low:.4g} to {high:.4g})", f"{p:.2g}"


def table(found: dict, of: str) -> str:
    """Raises a one-line ValueError if no row is called `of`, or none shares seeds with it."""
    rows = []
    for (env_name, label, own), ours in found.items():
        for (env, other, rate), theirs in found.items():
            if (label, env) == (of, env_name) and other != of and len(set(ours) & set(theirs)) > 1:
                rows.append((env_name, f"{own:g}", f"{other}, {rate:g}", *row(ours, theirs)))
    if not rows:
        labels = ", ".join(dict.fromkeys(label for _, label, _ in found))
        raise ValueError(f"--of {of!r}: no seeds in common with another; there are {labels}")
    head = ("task", f"{of} at", "minus", "seeds", "difference (90 % interval)", "p")
    return report.markdown(head, rows)


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        if not args.folders:
            raise ValueError("name run folders of evaluate.py, or scores.csv files")
        text = table(final_returns(args.folders), args.of)
    print(text)


if __name__ == "__main__":
    main()
