"""Ages against a unit-by-unit simulation, sizes of gradients against each agent's own, the script
to its files."""

import csv

import jax
import numpy as np

import a2c
import gridworld
import optimizers
import pipeline_figure
from pipeline_train import reset_slots


def test_sizes_are_those_of_each_agents_own_gradient():
    args = a2c.Args(env_name="catch", num_envs=2)
    agent = a2c.make_agent(gridworld.make("catch"), args)
    optimizer = optimizers.make_optimizer("adam", 1e-2)
    init = jax.jit(lambda key: agent.init(key, optimizer))
    states = [init(jax.random.key(i)) for i in range(3)]
    stacked = jax.tree.map(lambda *xs: jax.numpy.stack(xs), *states)
    keys = jax.random.split(jax.random.key(9), 3)
    ours = pipeline_figure.gradient_sizes(jax.random.key(9), stacked, agent)
    gradient = jax.jit(
        lambda key, state: jax.grad(lambda p: agent.loss(key, state._replace(params=p))[0])(
            state.params
        )
    )
    for key, state, size in zip(keys, states, ours, strict=True):
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient(key, state))])
        np.testing.assert_allclose(size, np.log10(np.abs(flat).mean() + 1e-8), rtol=1e-4)


def test_a_unit_that_is_not_finite_once_does_not_lose_the_figure(tmp_path):
    sizes = [np.array([-3.0, -2.0]), np.array([np.nan, -2.5]), np.array([-3.0, -2.0])]
    seen = pipeline_figure.Seen([np.array([0, 1])] * 3, sizes)
    pipeline_figure.draw(tmp_path / "x.png", {True: seen}, "")
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


def test_the_figure_to_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # conftest.py has made four devices
    flags = "--env-name catch --num-units 4 --num-iterations 7 --inner-updates 2"
    flags += " --reset-interval 3 --num-devices 4"
    monkeypatch.setattr("sys.argv", ["pipeline_figure.py", *flags.split()])
    monkeypatch.setattr("sys.exit", lambda code: code)
    pipeline_figure.main()
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "pipeline.png").read_bytes()[1:4] == b"PNG"
    with open(folder / "pipeline.csv") as file:
        rows = {
            (row["pipeline"], int(row["iteration"]), int(row["unit"])): row
            for row in csv.DictReader(file)
        }
    assert len(rows) == 2 * 7 * 4
    for unit, slot in enumerate(reset_slots(4, 3)):
        age = -1
        for iteration in range(7):
            age = 0 if iteration % 3 == slot else age + 1
            assert int(rows["1", iteration, unit]["age"]) == age
            assert int(rows["0", iteration, unit]["age"]) == iteration
            assert -8 <= float(rows["1", iteration, unit]["log10_mean_gradient"]) < 2
