"""The scripts in benchmarks/: all can be imported; bench.py measures PPO."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optim4rl

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_script_can_be_imported(name):
    importlib.import_module(name)


def test_the_baseline_makes_the_updates_of_optim4rl():
    """Else the ratio of the meta-gradients' times would be of two optimizers."""
    baseline = importlib.import_module("baseline_meta_gradient")
    theta = optim4rl.make_optim4rl().init_theta(jax.random.key(0))
    g = jnp.array([0.3, -2.0, 1e-4, 0.0])
    updates = []
    for optimizer in (baseline.optim4rl(theta, 0.01), optim4rl.optim4rl(theta, 0.01)):
        state, update = optimizer.init(g), jax.jit(optimizer.update)
        for scale in (1.0, -1.0, 0.1):
            u, state = update(scale * g, state)
            updates.append(u)
    np.testing.assert_allclose(updates[:3], updates[3:], rtol=1e-5, atol=1e-9)


def test_bench_measures_ppo(monkeypatch):
    bench = importlib.import_module("bench")
    sizes = dict(num_envs=4, batch_size=4, num_minibatches=1, num_epochs=1)
    monkeypatch.setattr(bench, "PPO", {"pendulum": sizes})
    assert bench.measure_ppo("pendulum")["steps_per_s"] > 0
