"""Ablations, one flag at a time: meta-train each variant on Catch and small_dense_long, test it,
write results/ablations.md:

    python experiments/ablations.py                         # hours
    python experiments/ablations.py --tables catch          # 20 minutes

A table that is not named stays as it is. Rows that are in runs/ablations are not run again, and
what was interrupted continues.
"""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checks
import command_line
import runs
import settings
from figures import report

RUNS = ROOT / "runs" / "ablations"
MARK = "<!-- experiments/ablations.py writes the tables below this line, and nothing above it. -->"
# row: flags of pipeline_train.py; whether there is a row for the untrained form
VARIANTS = {
    "Optim4RL": ("", True),
    "no pipeline": ("--no-pipeline", False),
    "GRU": ("--cell gru", True),
    "log inputs": ("--inputs log", True),
    "LinearOptim": ("--optimizer linear_optim", True),
    "L2LGD2": ("--optimizer l2lgd2", True),
    "STAR": ("--optimizer star", True),
    "VeLO": ("--optimizer velo", True),
    # Updates in proportion to the gradient need a learning rate like SGD's.
    "LinearOptim, SGD's step": ("--optimizer linear_optim --learning-rate {sgd}", True),
    "L2LGD2, SGD's step": ("--optimizer l2lgd2 --learning-rate {sgd}", True),
    "1 inner update": ("--inner-updates 1", False),
    "10 inner updates": ("--inner-updates 10", False),
    "20 inner updates": ("--inner-updates 20", False),
    "16 environments a unit": ("--envs-per-unit 16", False),
    "64 environments a unit": ("--envs-per-unit 64", False),
}


class Table(NamedTuple):
    env_name: str
    train: str  # flags of pipeline_train.py, beside --env-name
    sgd_step: str  # SGD's learning rate
    variants: tuple[str, ...] = tuple(VARIANTS)
    with_classical: bool = True


TABLES = {
    "catch": Table("catch", "--meta-learning-rate 1e-3", "1"),
    "small_dense_long": Table("small_dense_long", "--num-units 32 --num-iterations 200", "3"),
    # 512 units, 585 iterations, the best meta-learning rate of a sweep.
    "small_dense_long in the paper's setting": Table(
        "small_dense_long",
        "--meta-learning-rate 1e-4",
        "3",
        ("Optim4RL", "no pipeline", "GRU", "log inputs", "LinearOptim"),
        with_classical=False,  # as in the table above
    ),
}
CLASSICAL = {
    "classical": "--optimizers sign_sgd adam rmsprop "
    "--learning-rates 3e-2 1e-2 3e-3 1e-3 3e-4 1e-4",
    "sgd": "--optimizers sgd --learning-rates 10 3 1 0.3 0.1",
}


def run(script: str, flags: str, folder: Path) -> Path:
    """Run a script of the project, with `folder` as --runs-dir. -> the run's own folder

    Exits as the script does if that fails or is interrupted; it has said why.
    """
    command = [sys.executable, str(ROOT / f"{script}.py"), *shlex.split(flags)]
    process, code = subprocess.Popen([*command, "--runs-dir", str(folder)]), None
    while code is None:
        with contextlib.suppress(KeyboardInterrupt):  # the script stops when its files are whole
            code = process.wait()
    if code:
        sys.exit(code if code > 0 else 128 - code)
    return max(folder.glob(f"*__{script}__*"), key=lambda path: path.stat().st_mtime)


def meta_train(flags: str, folder: Path) -> Path:
    """Run pipeline_train.py in this folder, or continue what was begun there, which exits if it was
    with other flags. -> the run's own folder"""
    for begun in sorted(folder.glob("*__pipeline_train__*"))[-1:]:
        if any(path.name.isdigit() for path in (begun / "checkpoint").glob("*")):
            flags += f" --resume {shlex.quote(str(begun))}"
    return run("pipeline_train", flags, folder)


def cells(result: report.Result) -> list[str]:
    """learning rate, return, interval"""
    score, interval = report.score_cells(result)
    return [f"{result.learning_rate:g}", score + report.lost_note(result), interval]


def test_flags(env_name: str, seeds: str = "--num-seeds 10") -> str:
    """Of evaluate.py, to test an optimizer."""
    steps = settings.SHORT.get(env_name)
    return f"--env-name {env_name} {seeds}" + (f" --total-steps {steps:g}" if steps else "")


def name_of_folder(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def variant(title: str, name: str) -> list[list[str]]:
    """Meta-train and test one variant of a table, unless that was done before.

    -> [row, command, learning rate, return, interval] of each optimizer
    """
    table, (flags, with_untrained) = TABLES[title], VARIANTS[name]
    folder = RUNS / name_of_folder(title) / name_of_folder(name)
    flags = f"{table.train} {flags.format(sgd=table.sgd_step)}"
    train = " ".join(f"--env-name {table.env_name} {flags}".split())
    if not (folder / "tested").exists():
        theta = meta_train(train, folder) / "theta.npz"
        tested = [str(theta), f"untrained:{theta}"] if with_untrained else [str(theta)]
        flags = f"{test_flags(table.env_name)} --optimizers {shlex.join(tested)}"
        run("evaluate", flags, folder).rename(folder / "tested")
    results = report.read_results(folder / "tested" / "results.csv")
    names = (name, f"{name}, untrained")
    return [
        [row, f"`{train}`" if row == name else "", *cells(result)]
        for row, result in zip(names, results, strict=False)
    ]


def classical(env_name: str) -> list[list[str]]:
    """The classical optimizers, each at its best learning rate."""
    results = []
    for name, flags in CLASSICAL.items():
        folder = RUNS / env_name / name
        if not (folder / "tested").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run("evaluate", f"{test_flags(env_name)} {flags}", folder).rename(folder / "tested")
        results += report.read_results(folder / "tested" / "results.csv")
    names = {
        "sign_sgd": "sign descent, swept",
        "adam": "Adam, swept",
        "rmsprop": "RMSProp, swept",
        "sgd": "SGD, swept",
    }
    return [[names[result.label], "", *cells(result)] for result in results]


def write(title: str, rows: list[list[str]]) -> None:
    """Write a table in results/ablations.md, in the place of the one of this title; what stands
    above the mark and the other tables stay."""
    path = ROOT / "results" / "ablations.md"
    said, _, written = path.read_text().partition(MARK)
    tables = {text.split("\n")[0]: text.strip() for text in written.split("\n## ")[1:]}
    head = ("variant", "learning rate", "return", "90 % interval")
    table = report.markdown(
        (*head, "`python pipeline_train.py` with"),
        [(name, *row, train) for name, train, *row in rows],
    )
    tables[title] = f"{title}\n\n{table}"
    runs.write_text(path, said + MARK + "\n" + "".join(f"\n## {t}\n" for t in tables.values()))


@dataclass(frozen=True)
class Args:
    tables: tuple[str, ...] = tuple(TABLES)
    """tables to make"""


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        checks.not_empty(args, "tables")
        checks.known("tables", args.tables, TABLES)
    for title in args.tables:
        table = TABLES[title]
        rows = classical(table.env_name) if table.with_classical else []
        for name in table.variants:
            rows += variant(title, name)
            write(title, rows)


if __name__ == "__main__":
    main()
