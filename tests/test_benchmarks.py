"""The scripts in benchmarks/: all can be imported; bench.py measures PPO."""

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


def test_bench_measures_ppo(monkeypatch):
    bench = importlib.import_module("bench")
    sizes = dict(num_envs=4, batch_size=4, num_minibatches=1, num_epochs=1)
    monkeypatch.setattr(bench, "PPO", {"pendulum": sizes})
    assert bench.measure_ppo("pendulum")["steps_per_s"] > 0
