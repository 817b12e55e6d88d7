"""The step of the untrained optimizer, and the script to its files."""

import csv

import jax
import numpy as np

import learned_step
import optimizers
from learned_step import step_of


def test_the_step_is_the_last_of_updates_one_by_one():
    """Before meta-training it is a learning rate, as sign descent's."""
    learned, theta, _ = optimizers.load_learned("pretrained/optim4rl_catch")
    untrained = learned.init_theta(jax.random.key(0))
    np.testing.assert_allclose(step_of(untrained, learned), 1, atol=0.02)
    params, gradient = np.zeros(1, np.float32), np.full(1, 1e-3, np.float32)
    state, update = learned.init_state(params), jax.jit(learned.update)
    for _ in range(20):
        moved, state = update(theta, gradient, state, params, 1.0)
    step = step_of(theta, learned)
    np.testing.assert_allclose(step, -moved[0], rtol=1e-5)
    assert step > 1.3  # what was learned on Catch


def test_the_figure_to_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # conftest.py has made four devices
    flags = "--num-units 4 --num-devices 4 --num-iterations 4 --every 2 --learning-rates 1e-2"
    flags += " --inner-updates 1 2"
    monkeypatch.setattr("sys.argv", ["learned_step.py", *flags.split()])
    monkeypatch.setattr("sys.exit", lambda code: code)
    learned_step.main()
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "learned_step.png").read_bytes()[1:4] == b"PNG"
    with open(folder / "learned_step.csv") as file:
        rows = list(csv.DictReader(file))
    wanted = [(k, "0.01", i) for k in "12" for i in "24"]
    assert [tuple(row.values())[:3] for row in rows] == wanted
    # Four iterations move theta by little: the step is still about the learning rate.
    steps = [float(row["step"]) / float(row["learning_rate"]) for row in rows]
    np.testing.assert_allclose(steps, 1, atol=0.2)


def test_units_live_for_as_many_updates_with_other_inner_updates():
    args = learned_step.Args()
    lives = [learned_step.meta_training_args(args, 1e-3, k).reset_interval * k for k in (1, 4, 16)]
    assert lives == [128, 128, 128]
