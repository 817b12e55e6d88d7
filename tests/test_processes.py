"""Two processes train like one; resumed, they end where they would have ended."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from optim4rl import load_theta
from units import QUICK

ROOT = Path(__file__).parent.parent
FLAGS = "--env-name catch --num-units 4 --num-iterations 3 --inner-updates 2 --num-devices 1"
TOGETHER = "--num-processes 2 --checkpoint-minutes 1e-4"
ENVIRONMENT = os.environ | QUICK


def start_two(cwd, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(ROOT / "pipeline_train.py"), *flags, "--coordinator", address]
    options = {"cwd": cwd, "env": ENVIRONMENT, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen([*command, "--process-id", str(i)], **options) for i in range(2)]


def finish(processes):
    """-> stdout of each"""
    outs = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        outs.append(out)
    return outs


def theta_of(folder):
    return load_theta(folder / "theta.npz")[0]


def test_two_processes_give_the_theta_of_one_also_when_resumed(tmp_path):
    both = start_two(tmp_path, *f"{FLAGS} {TOGETHER} --runs-dir two".split())
    alone = [sys.executable, str(ROOT / "pipeline_train.py"), *f"{FLAGS} --runs-dir one".split()]
    subprocess.run(alone, cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True)
    finish(both)
    (one,), (two,) = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        theta_of(one),
        theta_of(two),
    )

    killed = tmp_path / "killed"  # as if between its second checkpoint and the end
    shutil.copytree(two, killed)
    (killed / "theta.npz").unlink()
    (killed / "checkpoint" / "3" / "digest").unlink()
    for out in finish(start_two(tmp_path, "--resume", str(killed))):
        assert "the checkpoint at 3 is damaged" in out and "resumed at 2" in out
    jax.tree.map(np.testing.assert_array_equal, theta_of(killed), theta_of(two))
    assert (killed / "metrics.csv").read_text() == (two / "metrics.csv").read_text()
