"""The scripts in benchmarks/: all can be imported; what the sweep runs, and what it does not."""

import csv
import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_script_can_be_imported(name):
    importlib.import_module(name)


def test_the_sweep_runs_each_setting_once_and_continues_an_interrupted_one(tmp_path, monkeypatch):
    sweep = importlib.import_module("sweep")
    commands = []

    def run(script, flags, folder):
        """Theta's return is higher at a larger meta-learning rate and a smaller learning rate."""
        commands.append((script, flags))
        made = folder / f"task__{script}__0__20260101-00000{len(commands)}"
        made.mkdir(parents=True)
        if script == "pipeline_train":
            (made / "theta.npz").touch()
        else:
            meta, rate = map(float, folder.name.split("_"))
            header = "env_name,optimizer,learning_rate,seed,env_steps,return\n"
            (made / "results.csv").write_text(f"{header}catch,theta,{rate},0,1,{meta / rate}\n")
            (made / "table.md").touch()
        return made

    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "OUT", tmp_path / "sweep")
    rates = "--meta-learning-rates 1e-4 1e-3 --learning-rates 1e-4"
    monkeypatch.setattr("sys.argv", ["sweep.py", "--env-name", "catch", *rates.split()])
    sweep.main()
    trained = [flags for script, flags in commands if script == "pipeline_train"]
    settings = [
        ("0.001", "0.0001"),
        ("0.001", "0.001"),
        ("0.0001", "0.001"),
    ]  # catch's rate is .001
    assert (
        trained
        == [
            f"--env-name catch --learning-rate {rate} --meta-learning-rate {meta}"
            for rate, meta in settings
        ]
        and len(commands) == 6
    )
    with open(tmp_path / "sweep" / "catch.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["meta_learning_rate"], row["learning_rate"]) for row in rows]
    assert found == [("0.001", "0.0001"), ("0.001", "0.001"), ("0.0001", "0.001")]
    assert all((tmp_path / row["theta"]).exists() for row in rows)

    commands.clear()
    sweep.main()
    assert not commands
    # One that was interrupted after its first checkpoint.
    setting = tmp_path / "sweep" / "catch" / "0.001_0.0001"
    (folder,) = setting.glob("*__pipeline_train__*")
    (setting / "theta.npz").rename(folder / "theta.npz")
    (folder / "checkpoint" / "12").mkdir(parents=True)
    sweep.main()
    assert commands == [("pipeline_train", f"--resume {folder}")]
