"""A run that is killed and resumed ends where it would have ended; damage and other arguments are
seen."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimizers
from checkpoints import Checkpoints
from pipeline_train import Args
from runs import rows_before

ROOT = Path(__file__).parent.parent
RUN = (
    "--env-name catch --num-units 4 --inner-updates 2 --num-iterations 400"
    " --checkpoint-minutes 0.005 --save-theta-every 7"
)


def start(cwd, *flags, script="pipeline_train"):
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(cwd, *flags, script="pipeline_train"):
    process = start(cwd, *flags, script=script)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


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
    code, _, err = finish(cwd, *RUN.split())
    assert code == 0, err
    return only_folder(cwd / "runs")


def assert_same_run(folder, uninterrupted):
    for name, array in theta_of(uninterrupted).items():
        np.testing.assert_array_equal(theta_of(folder)[name], array)
    assert (folder / "metrics.csv").read_text() == (uninterrupted / "metrics.csv").read_text()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_ends_the_same_bit_for_bit(
    tmp_path, uninterrupted, kills
):
    """Some kills fall before the first checkpoint: then it starts again. The last start is left
    alone."""
    moments, out = random.Random(kills), ""
    for number in range(kills + 1):
        folders = [path for path in tmp_path.glob("runs/*") if whole_checkpoints(path)]
        if not folders:
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        process = start(tmp_path, *(["--resume", str(folders[0])] if folders else RUN.split()))
        if number < kills:
            time.sleep(moments.uniform(2, 9))
            process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        assert number < kills or process.returncode == 0, err
    assert_same_run(only_folder(tmp_path / "runs"), uninterrupted)


@pytest.mark.parametrize("kind", optimizers.LEARNED)
def test_the_state_of_every_learned_optimizer_is_saved_and_restored(kind, tmp_path):
    learned, params = optimizers.LEARNED[kind](), {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    state = {"opt_state": jax.tree.map(lambda x: x + 2, learned.init_state(params))}
    checkpoints = Checkpoints(tmp_path, Args())
    checkpoints.save(5, state)
    restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


AGENTS = {
    "a2c": "--env-name catch --num-envs 4 --num-seeds 2 --total-steps 80000 --optimizer rmsprop",
    "ppo": "--env-name inverted_pendulum --num-envs 4 --batch-size 4 --num-minibatches 2"
    " --policy-layers 8 --value-layers 8 --eval-envs 2 --episode-length 20 --num-evals 3"
    " --num-epochs 1 --total-steps 12000 --num-seeds 2",
}


@pytest.mark.parametrize("script", AGENTS)
def test_an_agents_run_goes_on_with_its_optimizers_state_bit_for_bit(tmp_path, script):
    flags = [*AGENTS[script].split(), "--checkpoint-minutes", "0.001"]
    code, expected, err = finish(tmp_path, *flags, script=script)
    assert code == 0, err
    whole = only_folder(tmp_path / "runs")
    process = start(tmp_path, *flags, "--runs-dir", "killed", script=script)
    deadline = time.monotonic() + 120
    while (
        not any(whole_checkpoints(path) for path in tmp_path.glob("killed/*"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.communicate(timeout=60) and process.returncode == -signal.SIGKILL
    killed = only_folder(tmp_path / "killed")
    code, out, err = finish(tmp_path, "--resume", str(killed), script=script)
    assert code == 0 and "resumed at" in out, err
    assert (killed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert [line for line in out.splitlines() if line.startswith("return")] == [
        line for line in expected.splitlines() if line.startswith("return")
    ]


@pytest.fixture
def stopped(tmp_path):
    """A run that Ctrl-C ended after its second checkpoint."""
    process = start(tmp_path, *RUN.split())
    deadline = time.monotonic() + 120
    while (
        sum(len(whole_checkpoints(path)) for path in tmp_path.glob("runs/*")) < 2
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    folder = only_folder(tmp_path / "runs")
    assert (
        process.returncode == 130
        and f"to go on: python pipeline_train.py --resume runs/{folder.name}" in out
    )
    assert len(whole_checkpoints(folder)) == 2
    return folder


def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped, uninterrupted):
    newest = max(whole_checkpoints(stopped), key=lambda path: int(path.name))
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, out, err = finish(stopped.parent.parent, "--resume", str(stopped))
    assert code == 0 and f"the checkpoint at {newest.name} is damaged" in out, (out, err)
    assert_same_run(stopped, uninterrupted)


def test_what_cannot_be_resumed_is_one_line(stopped, tmp_path):
    for flags, hint in (
        (["--resume", str(stopped), "--num-units", "8"], "--num-units is 8 here, and 4 in the run"),
        (["--resume", str(tmp_path / "nosuch")], "not a run's folder"),
        (["--resume", str(tmp_path)], "not a run's folder"),
    ):
        code, _, err = finish(tmp_path, *flags)
        assert code == 2 and hint in err and len(err.strip().splitlines()) == 1, err
    for path in whole_checkpoints(stopped):
        shutil.rmtree(path)
    code, _, err = finish(tmp_path, "--resume", str(stopped))
    assert code == 2 and "no checkpoint yet" in err
    config = stopped / "config.json"
    config.write_text(json.dumps({"args": {"env_name": 3}}))
    assert finish(tmp_path, "--resume", str(stopped))[0] == 2


def test_rows_that_will_be_made_again_are_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    assert rows_before(path, 3) == ""
    path.write_text("number,x\n1,a\n2,b\n3,c\n4,d")
    assert rows_before(path, 3) == "number,x\n1,a\n2,b\n"
    assert rows_before(path, 9) == "number,x\n1,a\n2,b\n3,c\n"
    assert rows_before(path, 1) == ""


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
    with open(
        tmp_path / "log", "wb"
    ) as log:  # a pipe that nobody reads would fill up, and stop the run
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
