"""What happens to checkpoints when bits flip, disks are full, and files are exchanged: a restored
state is one that was saved, and nothing is lost."""

import dataclasses
import errno
import json
import os
import random
import resource
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

import a2c
import checkpoints
import optimizers
import runs
import train_agents
from checkpoints import Checkpoints
from optim4rl import load_theta

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Args:
    optimizer: str = "adam"
    checkpoint_minutes: float = 5.0
    resume: str | None = None


def state_of(seed, size=40):
    """Like an agent's: parameters, an optimizer's state with moments, a number."""
    arrays = np.random.default_rng(seed)
    params = {"w": jnp.array(arrays.normal(size=(size, 9)), jnp.float32), "b": jnp.zeros(9)}
    moments = jax.tree.map(lambda x: x**2 + seed, params)
    alive = jnp.array([True, False])
    return {"number": seed, "params": params, "opt_state": (moments, ()), "alive": alive}


@pytest.fixture
def saved(tmp_path):
    """A run's folder with checkpoints at 10 and 20."""
    for number in (10, 20):
        Checkpoints(tmp_path, Args()).save(number, state_of(number))
    return tmp_path


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def test_a_flipped_bit_anywhere_gives_the_checkpoint_before(saved, capsys):
    moments, whole = random.Random(0), contents(saved / "checkpoint" / "20")
    for _ in range(20):
        path = moments.choice(sorted(whole))
        data = bytearray(whole[path])
        data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
        path.write_bytes(data)
        restored = Checkpoints(saved, Args()).restore(state_of(0))
        out = capsys.readouterr().out.splitlines()
        assert_same(restored, state_of(10))
        assert len(out) == 2 and out[0].startswith("the checkpoint at 20 is damaged"), path
        assert out[1] == "resumed at 10" and names(saved) == ["10", "20.damaged"]
        aside = saved / "checkpoint" / "20.damaged"
        assert (aside / path.relative_to(saved / "checkpoint" / "20")).read_bytes() == data
        os.replace(aside, saved / "checkpoint" / "20")
        path.write_bytes(whole[path])
    assert_same(Checkpoints(saved, Args()).restore(state_of(0)), state_of(20))


def test_a_damaged_checkpoint_is_out_of_the_way_of_the_same_number(saved):
    (saved / "checkpoint" / "20" / "digest").write_text("")
    manager = Checkpoints(saved, Args())
    manager.restore(state_of(0))
    manager.save(20, state_of(21))
    assert_same(manager.restore(state_of(0)), state_of(21))
    manager.save(30, state_of(30))
    assert names(saved) == ["20", "20.damaged", "30"]


@pytest.mark.parametrize("lost", ["digest", "run.json", "state/_METADATA", "state/d", "state"])
def test_a_checkpoint_with_a_part_missing_is_damaged(saved, lost, capsys):
    path = saved / "checkpoint" / "20" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_same(Checkpoints(saved, Args()).restore(state_of(0)), state_of(10))
    assert "the checkpoint at 20 is damaged" in capsys.readouterr().out


def test_a_checkpoint_with_a_file_under_another_name_is_damaged(saved):
    (saved / "checkpoint" / "20" / "run.json").rename(saved / "checkpoint" / "20" / "run.jso")
    assert_same(Checkpoints(saved, Args()).restore(state_of(0)), state_of(10))


def test_with_no_intact_checkpoint_all_stay(saved, capsys):
    for number in ("10", "20"):
        (saved / "checkpoint" / number / "digest").unlink()
    before = contents(saved)
    with pytest.raises(SystemExit) as end:
        Checkpoints(saved, Args()).restore(state_of(0))
    assert end.value.code == 2 and contents(saved) == before
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "no intact checkpoint" in err and out.count("no digest") == 2


@pytest.mark.parametrize(
    "like, hint",
    [
        (state_of(0, size=41), "['opt_state'][0]['w'] is float32[41, 9], and was float32[40, 9]"),
        (state_of(0) | {"alive": jnp.zeros(2)}, "['alive'] is float32[2], and was bool[2]"),
        (state_of(0) | {"opt_state": ()}, "['opt_state'][0]['b'] is missing, and was float32[9]"),
        (state_of(0) | {"new": jnp.zeros(2)}, "['new'] is float32[2], and was missing"),
    ],
)
def test_a_state_of_another_structure_is_one_line_and_touches_nothing(saved, like, hint, capsys):
    before = contents(saved)
    with pytest.raises(SystemExit) as end:
        Checkpoints(saved, Args()).restore(like)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1) and hint in err, err
    assert contents(saved) == before


def test_an_optimizers_file_of_another_kind_is_named_and_touches_nothing(
    tmp_path, monkeypatch, capsys
):
    file, runs_dir = tmp_path / "x.npz", tmp_path / "runs"
    shutil.copy(ROOT / "pretrained" / "optim4rl_catch.npz", file)
    flags = f"--env-name catch --num-envs 4 --num-seeds 1 --total-steps 1000 --optimizer {file}"
    flags += f" --checkpoint-minutes 1e-4 --runs-dir {runs_dir}"
    monkeypatch.setattr(sys, "argv", ["a2c.py", *flags.split()])
    with pytest.raises(SystemExit):
        train_agents.main(a2c)
    shutil.copy(ROOT / "pretrained" / "adam4rl.npz", file)
    (folder,) = runs_dir.iterdir()
    before = contents(folder)
    assert len(names(folder)) == 2 and capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["a2c.py", "--resume", str(folder)])
    with pytest.raises(SystemExit) as end:
        train_agents.main(a2c)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and contents(folder) == before
    assert f"--optimizer is {file} with digest" in err and "agents.opt_state" in err


def test_a_changed_file_or_argument_is_told(tmp_path, capsys):
    file = tmp_path / "x.npz"
    file.write_text("one")
    Checkpoints(tmp_path, Args(str(file))).save(1, state_of(1))
    Checkpoints(tmp_path, Args(str(file), resume="elsewhere")).restore(state_of(0))
    assert capsys.readouterr().out == "resumed at 1\n"
    file.write_text("another")
    Checkpoints(tmp_path, Args(str(file))).restore(state_of(0))
    assert f"changed since the checkpoint: --optimizer is {file}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pretrained/one", "untrained:pretrained/one"])
def test_changed_weights_that_are_named_without_their_path_are_told(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(optimizers, "PRETRAINED", tmp_path)
    for text in ("one", "another"):
        (tmp_path / "one.npz").write_text(text)
        if text == "one":
            Checkpoints(tmp_path, Args(name)).save(1, state_of(1))
    Checkpoints(tmp_path, Args(name)).restore(state_of(0))
    assert f"changed since the checkpoint: --optimizer is {name}" in capsys.readouterr().out


def out_of(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "part, error, hint",
    [
        ("file_digest", OSError(errno.EIO, "Input/output error"), "Input/output error"),
        ("restore", OSError(errno.ENOSPC, "No space"), "No space left on device"),
        ("restore", MemoryError(), "MemoryError"),
        ("restore", ValueError("RESOURCE_EXHAUSTED: x\n[os_error_code='12']"), "allocate memory"),
        ("restore", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nx"), "memory"),
    ],
)
def test_a_disk_or_memory_that_fails_is_one_line_and_touches_nothing(
    saved, part, error, hint, monkeypatch, capsys
):
    before, manager = contents(saved), Checkpoints(saved, Args())
    monkeypatch.setattr(
        checkpoints if part == "file_digest" else manager.orbax, part, out_of(error)
    )
    with pytest.raises(SystemExit) as end, runs.interruptible():
        manager.restore(state_of(0))
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (1, "", 1) and hint in err, err
    assert contents(saved) == before


@pytest.fixture
def small_files():
    """No file may grow above 100 kB: writing fails as on a full disk, here in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(saved, small_files, capfd):
    before, manager = contents(saved), Checkpoints(saved, Args())
    with runs.Log(saved, 9) as log, pytest.raises(OSError, match="checkpoint/30 .*File too large"):
        manager.save_if_due(30, state_of(30, size=50_000), log, now=True)
    time.sleep(0.2)  # for orbax's threads
    assert capfd.readouterr().err == "" and contents(saved) == before
    assert_same(manager.restore(state_of(0)), state_of(20))


def test_a_run_whose_checkpoint_cannot_be_written_saves_theta_and_says_so_in_one_line(
    tmp_path, small_files
):
    flags = "--env-name catch --num-units 4 --inner-updates 2 --num-iterations 9"
    flags += " --checkpoint-minutes 1e-4 --save-theta-every 1000"
    environment = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # to compile in less time
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # its files are large
    done = subprocess.run(
        [sys.executable, str(ROOT / "pipeline_train.py"), *flags.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    (folder,) = (tmp_path / "runs").iterdir()
    lines = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error:") and lines[0].endswith("File too large")
    assert load_theta(folder / "theta.npz")[1]["trained"]["iterations"] == 1
    assert names(folder) == []


def test_unfinished_checkpoints_are_removed_once_a_restore_has_succeeded(saved, capsys):
    unfinished = [saved / "checkpoint" / name for name in ("30.tmp", "5.orbax-checkpoint-tmp")]
    for path in (*unfinished, saved / "other.tmp"):
        shutil.copytree(saved / "checkpoint" / "20", path)
    with pytest.raises(SystemExit):
        Checkpoints(saved, Args()).restore({})
    assert len(names(saved)) == 4
    Checkpoints(saved, Args()).restore(state_of(0))
    assert names(saved) == ["10", "20"] and (saved / "other.tmp" / "digest").exists()


@pytest.mark.parametrize(
    "minutes, expected", [(5, [60, 360, 660]), (1, [60, 120, 180]), (0.5, [30, 60, 90])]
)
def test_the_first_checkpoint_comes_after_a_minute_at_most(
    tmp_path, minutes, expected, monkeypatch
):
    clock, written = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    manager = Checkpoints(tmp_path, Args(checkpoint_minutes=minutes))
    monkeypatch.setattr(manager, "save", lambda number, _: written.append(number))
    log = runs.Log(tmp_path, 1)
    for second in range(0, expected[-1] + 1):
        clock[0] = float(second)
        manager.save_if_due(second, {}, log)
    assert written == expected
    manager.save_if_due(expected[-1] + 1, {}, log, now=True)
    assert written[-1] == expected[-1] + 1


def test_a_description_of_the_run_is_readable_json(saved):
    description = json.loads((saved / "checkpoint" / "20" / "run.json").read_text())
    assert description["arguments"]["--optimizer"] == "adam"
    assert description["arrays"]["['params']['b']"] == "float32[9]"
