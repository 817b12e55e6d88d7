"""A run that is killed and resumed ends where it would have ended; damage and other arguments are
seen."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import a2c
import optimizers
import ppo
import runs
from checkpoints import Checkpoints
from pipeline_train import Args
from runs import rows_before
from units import QUICK

ROOT = Path(__file__).parent.parent
RUN = (
    "--env-name catch --num-units 4 --inner-updates 2 --num-iterations 80"
    " --checkpoint-minutes 0.005 --save-theta-every 7"
)


def start(cwd, *flags):
    command = [sys.executable, str(ROOT / "pipeline_train.py"), *flags]
    pipes, environment = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}, os.environ | QUICK
    return subprocess.Popen(command, cwd=cwd, text=True, env=environment, **pipes)


def theta_of(folder):
    with np.load(folder / "theta.npz") as file:
        return {name: file[name] for name in file.files if name != "header"}


def whole_checkpoints(folder):
    """Those that were not cut off in writing, under a temporary name."""
    return [path for path in folder.glob("checkpoint/*") if path.name.isdigit()]


def only_folder(runs_dir):
    (folder,) = runs_dir.iterdir()
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("uninterrupted")
    process = start(cwd, *RUN.split())
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return only_folder(cwd / "runs")


def assert_same_run(folder, uninterrupted):
    for name, array in theta_of(uninterrupted).items():
        np.testing.assert_array_equal(theta_of(folder)[name], array)
    assert (folder / "metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()


def wait_for_a_checkpoint(process, runs_dir):
    """One that the process has written."""
    before = {path for folder in runs_dir.glob("*") for path in whole_checkpoints(folder)}
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if any(set(whole_checkpoints(folder)) - before for folder in runs_dir.glob("*")):
            return
        time.sleep(0.02)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_stopped_at_random_moments_and_resumed_it_ends_the_same_bit_for_bit(
    tmp_path, uninterrupted, kills
):
    """First by Ctrl-C, then killed, soon after a checkpoint or while another is written. The last
    start is left alone."""
    moments, runs_dir = random.Random(kills), tmp_path / "runs"
    for number in range(kills + 1):
        flags = ["--resume", str(only_folder(runs_dir))] if number else RUN.split()
        process = start(tmp_path, *flags)
        if number < kills:
            wait_for_a_checkpoint(process, runs_dir)
            time.sleep(moments.uniform(0, 0.5 if number else 0.2))
            process.send_signal(signal.SIGKILL if number else signal.SIGINT)
        out, err = process.communicate(timeout=600)
        folder = only_folder(runs_dir)
        if not number:
            assert process.returncode == 130, err
            assert f"to go on: python pipeline_train.py --resume runs/{folder.name}" in out
            assert len(whole_checkpoints(folder)) == 2
    assert process.returncode == 0, err
    assert_same_run(folder, uninterrupted)


def test_a_finished_run_made_longer_ends_as_if_it_had_always_been(tmp_path, uninterrupted):
    process = start(tmp_path, *RUN.replace("iterations 80", "iterations 50").split())
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    folder = only_folder(tmp_path / "runs")
    process = start(tmp_path, "--resume", str(folder), "--num-iterations", "49")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2 and "must be at least the run's 50" in err, err
    process = start(tmp_path, "--resume", str(folder), "--num-iterations", "80")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert_same_run(folder, uninterrupted)
    lengths = ("num_iterations", "total_steps")
    configs = [json.loads((x / "config.json").read_text())["args"] for x in (folder, uninterrupted)]
    assert all(configs[0][name] == configs[1][name] for name in lengths)


@pytest.mark.parametrize("kind", optimizers.LEARNED)
def test_the_state_of_every_learned_optimizer_is_saved_and_restored(kind, tmp_path):
    learned, params = optimizers.LEARNED[kind](), {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    state = {"opt_state": jax.tree.map(lambda x: x + 2, learned.init_state(params))}
    checkpoints = Checkpoints(tmp_path, Args())
    checkpoints.save(5, state)
    restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


class Killed(BaseException):
    """Nothing is saved after it."""


AGENTS = {
    a2c: "--env-name catch --num-envs 4 --num-seeds 2 --total-steps 1600 --optimizer rmsprop",
    ppo: "--env-name pendulum --num-envs 4 --batch-size 4 --num-minibatches 2 --rollout-steps 5"
    " --policy-layers 8 --value-layers 8 --eval-envs 2 --episode-length 20 --num-evals 3"
    " --num-epochs 1 --total-steps 800 --num-seeds 2",
}


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
def test_an_agents_run_goes_on_with_its_optimizers_state_bit_for_bit(
    agent, call, tmp_path, monkeypatch
):
    flags, updates = AGENTS[agent].split(), 20
    code, expected, err = call(agent.main, *flags)
    assert code == 0, err
    whole, write = only_folder(tmp_path / "runs"), runs.Log.write

    def killed_on_the_way(log, number, metrics):
        write(log, number, metrics)
        if number == updates // 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs.Log, "write", killed_on_the_way)
        call(agent.main, *flags, "--runs-dir", "killed", "--checkpoint-minutes", "1e-5")
    killed = only_folder(tmp_path / "killed")
    assert 0 < max(int(path.name) for path in whole_checkpoints(killed)) < updates // 2
    code, out, err = call(agent.main, "--resume", killed, "--checkpoint-minutes", "3")
    assert code == 0 and "resumed at" in out, err
    assert json.loads((killed / "config.json").read_text())["args"]["checkpoint_minutes"] == 3
    rows = (killed / "metrics.csv").read_bytes()
    assert rows == (whole / "metrics.csv").read_bytes() and rows.count(b"\n") == updates + 1
    assert [line for line in out.splitlines() if line.startswith("mean return")] == [
        line for line in expected.splitlines() if line.startswith("mean return")
    ]


def test_rows_that_will_be_made_again_are_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    assert rows_before(path, 3) == ""
    for end in ("\n", "\r\n"):  # csv's rows end in the second
        path.write_bytes(f"number,x{end}1,a{end}2,b{end}3,c{end}4,d".encode())
        assert rows_before(path, 3) == f"number,x{end}1,a{end}2,b{end}"
        assert rows_before(path, 9) == f"number,x{end}1,a{end}2,b{end}3,c{end}"
        assert rows_before(path, 1) == ""


def test_whole_numbers_are_logged_with_all_their_digits(tmp_path):
    with runs.Log(tmp_path, 2) as log:
        log.write(1, {"env_steps": 10_485_780, "return": 10_485_780.0})
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "1,10485780,1.04858e+07"


def resident_megabytes(process):
    text = (Path("/proc") / str(process.pid) / "status").read_text()
    return next(
        int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmRSS")
    )


@pytest.mark.slow
def test_two_thousand_iterations_take_no_more_memory_and_no_more_files(tmp_path):
    """After warm-up memory is flat within 2 %, and only the log grows."""
    flags = "--env-name catch --num-units 8 --inner-updates 2 --num-iterations 2000"
    flags += " --checkpoint-minutes 60"
    command = [
        sys.executable,
        str(ROOT / "pipeline_train.py"),
        *flags.split(),
        "--save-theta-every",
        "50",
    ]
    # A pipe that nobody reads would fill up, and stop the run.
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    seen, sizes = [], []
    while process.poll() is None:
        time.sleep(0.5)
        rows = [path.read_text().count("\n") for path in tmp_path.glob("runs/*/metrics.csv")]
        if rows and rows[0] > 400 and process.poll() is None:
            seen.append(resident_megabytes(process))
            top = [path for path in only_folder(tmp_path / "runs").iterdir() if path.is_file()]
            sizes.append({path.name: path.stat().st_size for path in top if "tmp" not in path.name})
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert len(seen) > 10 and max(seen) < 1.02 * min(seen)
    grown = {name for name, size in sizes[-1].items() if size != sizes[0].get(name)}
    assert all(
        name in ("metrics.csv", "theta.npz") or name.startswith("events") for name in grown
    ), grown
    assert abs(sizes[-1]["theta.npz"] - sizes[0]["theta.npz"]) < 20  # a digit more in its header
