"""Ablations, one flag at a time: meta-train each variant on Catch and small_dense_long, test it,
write results/ablations.md:

    python benchmarks/ablations.py

This takes about an hour and a quarter on two cores. Rows that are in runs/ablations are not run
again.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "ablations"
MARK = (
    "<!-- The table is written by benchmarks/ablations.py; what stands above this line is not. -->"
)

# The paper has 512 units and 585 iterations on small_dense_long.
TRAIN = {
    "catch": "--env-name catch",
    "small_dense_long": "--env-name small_dense_long --num-units 32 --num-iterations 200",
}
TEST = "--num-seeds 10"
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
    # Updates in proportion to the gradient need a learning rate like SGD's. VeLO's published one is
    # 0.001 everywhere.
    "LinearOptim, SGD's step": ("--optimizer linear_optim --learning-rate {sgd}", True),
    "L2LGD2, SGD's step": ("--optimizer l2lgd2 --learning-rate {sgd}", True),
    "VeLO, its own step": ("--optimizer velo --learning-rate 1e-3", True),
    "1 inner update": ("--inner-updates 1", False),
    "10 inner updates": ("--inner-updates 10", False),
    "20 inner updates": ("--inner-updates 20", False),
    "16 environments a unit": ("--envs-per-unit 16", False),
    "64 environments a unit": ("--envs-per-unit 64", False),
}
SGD_STEP = {"catch": "1", "small_dense_long": "3"}
CLASSICAL = {
    "classical": "--optimizers sign_sgd adam rmsprop "
    "--learning-rates 3e-2 1e-2 3e-3 1e-3 3e-4 1e-4",
    "sgd": "--optimizers sgd --learning-rates 10 3 1 0.3 0.1",
}


def run(script: str, flags: str, folder: Path) -> Path:
    """Run a script of the project, with `folder` as --runs-dir. -> the run's own folder

    Exits as the script does if that fails or is interrupted; it has said why.
    """
    command = [
        sys.executable,
        str(ROOT / f"{script}.py"),
        *flags.split(),
        "--runs-dir",
        str(folder),
    ]
    if code := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(code)
    return max(folder.glob(f"*__{script}__*"), key=lambda path: path.stat().st_mtime)


def table_rows(folder: Path) -> list[list[str]]:
    """The rows of an evaluation's table: optimizer, learning rate, return, interval, steps."""
    lines = (folder / "table.md").read_text().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def variant(env_name: str, name: str) -> list[list[str]]:
    """Meta-train and test one variant, unless that was done before.

    -> [row, command, learning rate, return, interval] of each optimizer
    """
    flags, with_untrained = VARIANTS[name]
    folder = RUNS / env_name / re.sub(r"\W+", "_", name)
    train = f"{TRAIN[env_name]} {flags.format(sgd=SGD_STEP[env_name])}".strip()
    if not (folder / "tested").exists():
        shutil.rmtree(folder, ignore_errors=True)
        theta = run("pipeline_train", train, folder) / "theta.npz"
        untrained = f" untrained:{theta}" if with_untrained else ""
        run(
            "evaluate", f"--env-name {env_name} --optimizers {theta}{untrained} {TEST}", folder
        ).rename(folder / "tested")
    rows = table_rows(folder / "tested")
    names = (name, f"{name}, untrained")
    return [
        [row, f"`{train}`" if row == name else "", *cells[1:4]]
        for row, cells in zip(names, rows, strict=False)
    ]


def classical(env_name: str) -> list[list[str]]:
    """The classical optimizers, each at its best learning rate."""
    rows = []
    for name, flags in CLASSICAL.items():
        folder = RUNS / env_name / name
        if not (folder / "tested").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run("evaluate", f"--env-name {env_name} {flags} {TEST}", folder).rename(
                folder / "tested"
            )
        rows += table_rows(folder / "tested")
    names = {
        "sign_sgd": "sign descent, swept",
        "adam": "Adam, swept",
        "rmsprop": "RMSProp, swept",
        "sgd": "SGD, swept",
    }
    return [[names[cells[0]], "", *cells[1:4]] for cells in rows]


def write(rows: dict[str, list[list[str]]]) -> None:
    """Write the tables below the mark in results/ablations.md; the text above it stays."""
    path = ROOT / "results" / "ablations.md"
    said = path.read_text().split(MARK)[0] if path.exists() else "# Ablations\n\n"
    text = said + MARK + "\n"
    head = (
        "| variant | learning rate | return | 90 % interval | `python pipeline_train.py` with |\n"
        "|---|---|---|---|---|\n"
    )
    for env_name, env_rows in rows.items():
        lines = [
            f"| {name} | {rate} | {score} | {interval} | {train} |"
            for name, train, rate, score, interval in env_rows
        ]
        text += f"\n## {env_name}\n\n{head}" + "\n".join(lines) + "\n"
    path.write_text(text)


def main() -> None:
    rows: dict[str, list[list[str]]] = {}
    for env_name in TRAIN:
        rows[env_name] = classical(env_name)
        for name in VARIANTS:
            rows[env_name] += variant(env_name, name)
            write(rows)


if __name__ == "__main__":
    main()
