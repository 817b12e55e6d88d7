"""The scripts as a user runs them: from the command line to the files, and bad input in one
line."""

import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

import a2c
import command_line
import devices
import evaluate
import optimizers
import pipeline_train
import ppo
import runs
from figures import report
from optim4rl import load_theta
from units import QUICK

ROOT = Path(__file__).parent.parent


def run_script(script, *flags, cwd, **environment):
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
    environment = os.environ | environment
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


REPORTED = "written: runs/report/table.md, curves.png, curves.csv"


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_meta_train_then_evaluate(call, tmp_path):
    flags = "--env-name catch --num-units 4 --num-iterations 3 --inner-updates 2 --cell gru".split()
    done = run_script("pipeline_train", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"--optimizers runs/{folder.name}/theta.npz" in done.stdout
    theta, header = load_theta(folder / "theta.npz")
    assert header["trained"]["iterations"] == 3 and header["config"]["cell"] == "gru"
    assert len(read_rows(folder / "metrics.csv")) == 3 and list(folder.glob("events*"))
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["num_units"] == 4 and "jax" in config["versions"]

    flags = [
        "--num-seeds",
        "2",
        "--total-steps",
        "6400",
        "--optimizers",
        str(folder / "theta.npz"),
        "adam",
    ]
    done = run_script("evaluate", *flags, "--learning-rates", "1e-2", "1e-3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("*evaluate*")
    rows = read_rows(folder / "results.csv")
    swept = {row["learning_rate"]: float(row["score"]) for row in read_rows(folder / "sweep.csv")}
    assert set(swept) == {"0.01", "0.001"}
    best = max(swept, key=swept.get)
    assert {(row["optimizer"], row["learning_rate"]) for row in rows} == {
        ("catch (trained)", "0.001"),
        ("adam", best),
    }
    assert {row["seed"] for row in rows} == {"1000", "1001"}
    assert len(rows) == 2 * 2 * 5 and (folder / "curves.png").read_bytes()[1:4] == b"PNG"
    table = (folder / "table.md").read_text()
    assert table in done.stdout
    assert call(report.main, folder)[:2] == (0, f"{table}{REPORTED}\n")


# VeLO reads most, and takes a minute to compile.
@pytest.mark.parametrize("kind", ["l2lgd2", pytest.param("velo", marks=pytest.mark.slow)])
def test_another_kind_then_evaluate(kind, call, tmp_path):
    """Checkpoints and all, to the end of the line. The meta-learning rate is too small for theta to
    change, so the untrained form is the same."""
    flags = "--env-name catch --num-units 2 --num-iterations 2 --inner-updates 2 --seed 3".split()
    flags += f"--optimizer {kind} --checkpoint-minutes 0.0001 --meta-learning-rate 1e-30".split()
    code, _, err = call(pipeline_train.main, *flags)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    header = load_theta(folder / "theta.npz")[1]
    assert header["optimizer"] == kind
    assert header["config"].get("num_bases") == {"velo": 64}.get(kind)
    # iterations, units, updates and the meta-loss's rollout, steps
    assert header["trained"]["env_steps"] == 2 * 2 * (2 + 1) * 20
    rows = read_rows(folder / "metrics.csv")
    assert [row["env_steps"] for row in rows] == ["120", "240"]
    assert (folder / "checkpoint" / "2").is_dir()
    theta = folder / "theta.npz"
    flags = "--num-seeds 2 --total-steps 6400 --optimizers".split()
    code, out, err = call(evaluate.main, *flags, theta, f"untrained:{theta}")
    assert code == 0, err
    assert f"{kind}, catch (trained)" in out and f"{kind}, catch (untrained)" in out
    chex.assert_trees_all_close(
        *(optimizers.find_learned(name)[1] for name in (f"untrained:{theta}", str(theta))),
        atol=1e-20,
    )


def test_training_goes_on_from_another_runs_theta(call, tmp_path):
    """The kind of optimizer and its settings come with the file."""
    flags = "--env-name catch --num-units 2 --num-iterations 1 --inner-updates 1".split()
    flags += "--meta-learning-rate 1e-9 --theta".split()
    theta = ROOT / "pretrained" / "adam4rl.npz"
    code, _, err = call(pipeline_train.main, *flags, theta)
    assert code == 0, err
    (path,) = tmp_path.glob("runs/*/theta.npz")
    (after, header), (before, header_before) = load_theta(path), load_theta(theta)
    assert (header["optimizer"], header["config"]) == ("adam4rl", header_before["config"])
    assert header["trained"]["theta"] == str(theta)
    jax.tree.map(lambda new, old: np.testing.assert_allclose(new, old, atol=1e-6), after, before)


def test_theta_is_saved_at_intervals_and_at_the_end(call, monkeypatch):
    saved = []
    monkeypatch.setattr(optimizers, "save_theta", lambda *args: saved.append(args[-1]))
    flags = "--env-name catch --num-units 2 --num-iterations 5 --inner-updates 1"
    code, _, err = call(pipeline_train.main, *flags.split(), "--save-theta-every", 2)
    assert code == 0, err
    assert [trained["iterations"] for trained in saved] == [2, 4, 5]


def test_sigterm_keeps_theta(tmp_path):
    """Sent as an impatient user does, also while theta is being saved. (Of Ctrl-C:
    test_checkpoints.py.)"""
    flags = "--env-name catch --num-units 4 --num-iterations 100000 --save-theta-every 100000"
    command = [sys.executable, str(ROOT / "pipeline_train.py"), *flags.split()]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.csv")):
            break
        time.sleep(0.1)
    while process.poll() is None and not list(tmp_path.glob("runs/*/theta.npz")):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    err = process.communicate(timeout=60)[1]
    assert "interrupted" in err and "Traceback" not in err
    assert process.returncode == 128 + signal.SIGTERM
    (path,) = tmp_path.glob("runs/*/theta.npz")
    assert 0 < load_theta(path)[1]["trained"]["iterations"] < 100000


def signal_at(monkeypatch, module, name, number, signal_number):
    """Before its call of this number, module.name sends this process the signal."""
    function, calls = getattr(module, name), []

    def with_signal(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            signal.raise_signal(signal_number)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, with_signal)


def test_an_interrupt_keeps_the_log_of_a2c(call, tmp_path, monkeypatch):
    signal_at(monkeypatch, runs.Log, "write", 3, signal.SIGTERM)
    flags = "--env-name catch --num-envs 4 --total-steps 1e9".split()
    code, out, err = call(a2c.main, *flags)
    assert "interrupted" in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert code == 143 and f"to go on: python a2c.py --resume runs/{folder.name}" in out
    assert [row["number"] for row in read_rows(folder / "metrics.csv")] == ["1", "2", "3"]


def test_the_remaining_time_of_a_resumed_run_is_that_of_its_own_iterations(tmp_path):
    """Of 1,000 iterations 899 were done before, the next two take 0.2 s each: 20 s remain."""
    with runs.Log(tmp_path, 1000, seconds=0) as log:
        for number in (900, 901):
            log.write(number, {"return": 0.0})
            time.sleep(0.2)
        minutes, seconds = re.search(r"<(\d+):(\d+)", str(log.bar)).groups()
    assert 60 * int(minutes) + int(seconds) >= 15


def test_an_interrupt_of_evaluate_keeps_the_optimizers_that_are_done(call, tmp_path, monkeypatch):
    """It comes in the second of ten."""
    updates = 3200 // (4 * 20)
    signal_at(monkeypatch, tqdm, "update", updates + 3, signal.SIGINT)
    flags = "--env-name catch small_dense_short --total-steps 3200 --num-seeds 1 --num-envs 4"
    flags += " --optimizers adam rmsprop sgd sign_sgd adam_linear"
    assert call(evaluate.main, *flags.split())[0] == 130
    (folder,) = (tmp_path / "runs").iterdir()
    made = {(row["env_name"], row["optimizer"]) for row in read_rows(folder / "results.csv")}
    assert made == {("catch", "adam")} and "adam" in (folder / "table.md").read_text()


def test_reports_of_several_evaluations_join(call, tmp_path):
    returns = {"catch": np.array([[1.0, 2.0], [3.0, 7.0]]), "ant": np.ones((2, 2))}
    for env_name, curves in returns.items():
        results = [
            report.Result(env_name, label, 0.1, np.array([3200, 6400]), x, np.arange(2))
            for label, x in (("adam", curves), ("sgd", curves - 1))
        ]
        (tmp_path / env_name).mkdir()
        report.write_results(tmp_path / env_name / "results.csv", results)
    code, out, err = call(report.main, *returns, "--out", "joined")
    assert code == 0, err
    assert (tmp_path / "joined" / "table.md").read_text() in out and "### catch, 2 seeds" in out
    assert "### ant, 2 seeds" in out
    assert (tmp_path / "joined" / "curves.png").read_bytes()[1:4] == b"PNG"
    rows = {
        (row["env_name"], row["optimizer"], row["env_steps"]): row
        for row in read_rows(tmp_path / "joined" / "curves.csv")
    }
    last = rows["catch", "adam", "6400"]
    assert len(rows) == 2 * 2 * 2 and float(last["mean"]) == 4.5 and last["seeds"] == "2"


def test_seeds_of_several_evaluations_join(tmp_path):
    """Four seeds in one file, or two in each of two: the same. A seed given twice, and curves that
    do not fit, are refused."""
    returns = np.random.default_rng(0).normal(size=(4, 5)).round(3)
    names = ("all", "first", "last", "shorter")
    paths = {name: tmp_path / f"{name}.csv" for name in names}
    for name, rows, seed in zip(
        names,
        (returns, returns[:2], returns[2:], returns[2:, :4]),
        (1000, 1000, 1002, 1002),
        strict=True,
    ):
        steps = 10 * np.arange(1, rows.shape[1] + 1)
        seeds = seed + np.arange(len(rows))
        parts = [
            report.Result("catch", label, 0.1, steps, rows, seeds) for label in ("adam", "rmsprop")
        ]
        report.write_results(paths[name], parts)
    joined = report.read_results(paths["first"], paths["last"])
    assert [(result.label, result.learning_rate) for result in joined] == [
        ("adam", 0.1),
        ("rmsprop", 0.1),
    ]
    for result, whole in zip(joined, report.read_results(paths["all"]), strict=True):
        np.testing.assert_array_equal(result.returns, returns)
        np.testing.assert_array_equal(result.env_steps, [10, 20, 30, 40, 50])
        np.testing.assert_array_equal(whole.returns, returns)
    with pytest.raises(
        ValueError, match=r"last\.csv: seed 1002 of adam in catch is in .*all\.csv too"
    ):
        report.read_results(paths["all"], paths["last"])
    with pytest.raises(ValueError, match="other environment steps"):
        report.read_results(paths["first"], paths["shorter"])
    twice = paths["first"].read_text().splitlines()
    paths["first"].write_text("\n".join([*twice, *twice[1:]]))
    with pytest.raises(ValueError, match=r"first\.csv: seed 1000 of adam in catch is there twice"):
        report.read_results(paths["first"])


def test_a_job_of_over_ten_minutes_is_announced_without_an_accelerator(monkeypatch, capsys):
    def said(backend, seconds):
        monkeypatch.setattr(runs.jax, "default_backend", lambda: backend)
        runs.warn_if_long(seconds, "try fewer seeds")
        return "".join(capsys.readouterr())

    assert said("cpu", 600) == said("gpu", 7200) == ""
    assert said("cpu", 7200).endswith("about 120 minutes; try fewer seeds\n")


def test_a_suite_takes_what_has_weights_and_says_what_it_leaves_out(monkeypatch):
    """On a CPU no ant and no humanoid; weights of one environment are shown there only, every
    learned one beside its untrained form."""
    shown = {}
    for run in evaluate.plan(evaluate.fill_in(evaluate.Args(suite="paper"))):
        shown.setdefault(run.env_name, {})[run.optimizer] = run.rates
    assert set(shown) == {"catch", "small_dense_long", "big_dense_long"}
    for env_name, planned in shown.items():
        trained = {name for name in planned if name.startswith("pretrained/optim4rl_")}
        assert trained == {"pretrained/optim4rl_gridworlds", f"pretrained/optim4rl_{env_name}"}
        everywhere = {"pretrained/adam4rl", "untrained:pretrained/adam4rl", "untrained"}
        everywhere |= {*evaluate.Args.optimizers}
        assert set(planned) == everywhere | trained
        assert planned["pretrained/adam4rl"] == (1.0,)
        assert len(planned["adam"]) > 1 and len(planned["untrained"]) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for suite, seen in (
        ("paper", {"pretrained/optim4rl_ant"}),
        ("transfer", set()),
    ):  # transfer: only what has not seen it
        planned = [
            run
            for run in evaluate.plan(evaluate.fill_in(evaluate.Args(suite=suite)))
            if run.env_name == "ant"
        ]
        assert {run.optimizer for run in planned} == everywhere | {
            "pretrained/optim4rl_gridworlds"
        } | seen


def test_meta_gradients_that_are_not_finite_are_skipped_and_ten_in_a_row_end_the_run(
    call, tmp_path, monkeypatch
):
    """Iterations 4 and 5, infinite and NaN, and from 8 on."""
    flags = "--env-name catch --num-units 4 --inner-updates 2 --meta-clip elementwise".split()
    mean_over_units = devices.mean_over_units

    def wrong(train, theta, plan, *rest):
        gradient, units, metrics = mean_over_units(train, theta, plan, *rest)
        age = plan.age.max()  # of the oldest unit: iterations before this one
        now, value = (age == 3) | (age == 4) | (age >= 7), jnp.where(age % 2, jnp.inf, jnp.nan)
        return jax.tree.map(lambda g: jnp.where(now, value, g), gradient), units, metrics

    monkeypatch.setattr(devices, "mean_over_units", wrong)

    def train(iterations):
        runs_dir = f"until_{iterations}"
        done = call(
            pipeline_train.main, *flags, "--num-iterations", iterations, "--runs-dir", runs_dir
        )
        (folder,) = (tmp_path / runs_dir).iterdir()
        theta = jax.tree.leaves(load_theta(folder / "theta.npz")[0])
        assert all(np.isfinite(x).all() for x in theta)
        return done, theta, [float(row["bad_updates"]) for row in read_rows(folder / "metrics.csv")]

    before, at_the_skips, later = train(3), train(5), train(7)
    jax.tree.map(np.testing.assert_array_equal, at_the_skips[1], before[1])
    (code, out, err), theta, bad = later
    assert code == 0 and bad == [0, 0, 0, 1, 2, 0, 0], err
    assert "iteration 4: the meta-gradient is not finite" in out + err
    assert any((a != b).any() for a, b in zip(theta, before[1], strict=True))
    (code, _, err), at_the_end, bad = train(30)
    assert code == 1 and bad == [0, 0, 0, 1, 2, 0, 0, *range(1, 11)]
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: 10 meta-gradients in a row were not finite")
    jax.tree.map(np.testing.assert_array_equal, at_the_end, theta)


def test_a2c(call, tmp_path):
    flags = "--env-name big_dense_short --num-envs 2 --total-steps 120 --num-seeds 2".split()
    code, _, err = call(a2c.main, *flags)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    rows = read_rows(folder / "metrics.csv")
    assert [row["env_steps"] for row in rows] == ["40", "80", "120"] and "return_seed_1" in rows[0]


SMALL_PPO = "--num-envs 4 --batch-size 4 --num-minibatches 2 --eval-envs 2"
SMALL_PPO += " --policy-layers 8 --value-layers 8 --rollout-steps 5 --episode-length 20"


def test_ppo(tmp_path):
    flags = f"--env-name inverted_pendulum --total-steps 120 --num-seeds 2 {SMALL_PPO}".split()
    flags += ["--num-evals", "1"]
    done = run_script("ppo", *flags, cwd=tmp_path, **QUICK)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    rows = read_rows(folder / "metrics.csv")
    assert [row["env_steps"] for row in rows] == ["40", "80", "120"]
    # The evaluation before training does not count.
    (said,) = re.findall(r"mean return of the last evaluation: (\S+) ", done.stdout)
    assert float(said) == pytest.approx(float(rows[-1]["eval_return"]), rel=1e-3)


def test_a_run_that_diverges_has_no_mean_return(call):
    flags = "--env-name catch --num-envs 8 --total-steps 16000 --num-seeds 2"
    flags += " --optimizer adam_linear --learning-rate 1e18"
    code, out, err = call(a2c.main, *flags.split())
    assert code == 0, err
    assert "mean return of the last 20 updates: nan (by seed: nan, nan)" in out


def test_a_seed_that_breaks_is_reported_with_its_step(call):
    flags = f"--env-name pendulum --total-steps 120 {SMALL_PPO}".split()
    flags += "--optimizer sgd --learning-rate 1e38 --grad-clip inf".split()
    code, out, err = call(ppo.main, *flags)
    assert code == 0, err
    assert "seed 0: numbers that are not finite by step 40" in out
    assert "entropy_weight     0.001" in out  # the task's setting, taken because the flag was unset


# Brax takes minutes to compile in here; its agents: test_ppo.
@pytest.mark.parametrize(
    "env_name, rate",
    [
        ("pendulum", "0.003"),
        pytest.param("inverted_pendulum", "0.0003", marks=pytest.mark.slow),
    ],
)
def test_meta_train_on_a_gridworld_and_another_task_then_transfer(env_name, rate, call, tmp_path):
    flags = f"--env-name {env_name} catch --num-units 2 --num-iterations 2"
    flags += " --inner-updates 1 --envs-per-unit 2 1"
    code, _, err = call(pipeline_train.main, *flags.split())
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    rows = read_rows(folder / "metrics.csv")
    norms = [float(rows[-1][f"meta_grad_norm_{name}"]) for name in (env_name, "catch")]
    assert np.isfinite(norms).all()
    flags = f"--env-name {env_name} --total-steps 10240 --num-envs 64 --batch-size 16"
    flags += " --value-layers 16 --num-evals 1"
    flags += f" --num-seeds 1 --optimizers {folder}/theta.npz"
    code, out, err = call(evaluate.main, *flags.split())
    assert code == 0, err
    (folder,) = (tmp_path / "runs").glob("*evaluate*")
    assert {row["env_steps"] for row in read_rows(folder / "results.csv")} == {"0", "10240"}
    assert f"| {env_name}+catch (trained) | {rate} |" in out


@pytest.mark.parametrize("script", ["a2c", "ppo", "pipeline_train", "evaluate"])
def test_help_teaches(script, call):
    code, out, _ = call(importlib.import_module(script).main, "--help")
    assert code == 0 and "--env-name" in out and f"python {script}.py" in out


# --- report.py's statistics ---


@dataclass(frozen=True)
class Copied:
    # --- One section ---
    first: int = 1
    second: str = "two"
    """a text"""
    last: float = 3.0


def test_a_field_without_a_docstring_is_a_flag_without_a_text():
    section = "One section"
    fields = {"first": (section, ""), "second": (section, "a text"), "last": (section, "")}
    assert command_line.documented_fields(Copied) == fields


def test_a_second_ctrl_c_stops_at_once():
    code = """if True:
        import os, signal, runs
        with runs.interruptible():
            for word in ("first", "second", "third"):
                print(word, flush=True)
                os.kill(os.getpid(), signal.SIGINT)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stdout == "first\nsecond\n"


@pytest.mark.parametrize(
    "failure, code, said",
    [
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "\ninterrupted\n"),
        ("raise OSError(28, 'No space left', 'a.csv')", 1, "error: [Errno 28] No space left: 'a"),
        ("{}['a defect']", 1, "Traceback (most recent call last):\n"),
    ],
)
def test_only_a_defect_ends_in_a_traceback(failure, code, said):
    # A shell's background jobs ignore SIGINT, and so would what they start.
    heeded = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    parse = "command_line.parse(a2c.Args, 'text')"
    script = f"import os, signal, command_line, a2c; {heeded}; {parse}; {failure}"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(said)
    assert done.stderr.count("\n") <= 2 or "a defect" in done.stderr


def test_the_name_of_a_run_of_many_environments_fits_a_file_system(tmp_path):
    names = "+".join(f"environment_number_{i}" for i in range(20))
    folder = runs.make_folder(str(tmp_path), names, "evaluate", 0, Copied())
    assert folder.name.startswith("environment_number_0+19_others__evaluate__0__")


def test_bootstrap_interval_is_near_the_normal_one():
    samples = np.random.default_rng(0).normal(3.0, 1.0, (400, 2))
    low, high = report.bootstrap_interval(samples)
    half_width = 1.645 * samples.std(axis=0) / 20
    # That of 95 % would be .016 wider on each side.
    np.testing.assert_allclose(low, samples.mean(axis=0) - half_width, atol=0.01)
    np.testing.assert_allclose(high, samples.mean(axis=0) + half_width, atol=0.01)


def test_bootstrap_interval_of_one_seed_is_the_seed_itself():
    curve = np.array([[1.0, -2.0, 3.5]])
    np.testing.assert_array_equal(report.bootstrap_interval(curve), [[1.0, -2.0, 3.5]] * 2)


def test_steps_to_reach():
    env_steps, curve = np.array([10, 20, 30, 40]), np.array([0.0, 5.0, 4.0, 6.0])
    assert report.steps_to_reach(5.0, curve, env_steps) == 20
    assert np.isnan(report.steps_to_reach(7.0, curve, env_steps))


def test_tables_show_scores_at_the_end_and_relative_to_adams():
    """Straight lines over 200 updates: 20 means an end, on average, of 20 * 190.5 / 200, and a
    quarter of 20 * 40.5 / 200."""
    steps = np.arange(1, 201)
    lines = {
        ("catch", "adam"): 10,
        ("catch", "x"): 20,
        ("ant", "adam"): 40,
        ("ant", "x"): 30,
        ("ant", "y"): np.nan,
    }
    results = []
    for (env_name, label), slope in lines.items():
        returns = np.broadcast_to(slope * steps / 200, (2, 200))
        results.append(report.Result(env_name, label, 0.1, steps, returns, np.arange(2)))
    assert results[1].score() == pytest.approx(20 * 190.5 / 200) and results[1].score(
        0.25
    ) == pytest.approx(20 * 40.5 / 200)
    assert "| x | 0.1 | 19.050 |" in report.table(results[:2])
    fewer = results[1]._replace(returns=results[1].returns[:1])
    assert "| x (seeds: 1) | 0.1 | 19.050 |" in report.table([results[0], fewer])
    assert report.relative_table(results[:4]).splitlines()[2:] == [
        "| adam | 1.00, 1.00 | 1.00, 1.00 |",
        "| x | 2.00, 2.00 | 0.75, 0.75 |",
    ]
    assert "| y | - | - |" in report.relative_table(results)
    slower = results[0]._replace(
        learning_rate=0.01, returns=results[0].returns / 2
    )  # Adam on catch, at two learning rates
    for two in ([slower, *results[:4]], [*results[:4], slower]):
        assert report.relative_table(two) == report.relative_table(results[:4])
        assert "| adam | 0.01 | 4.763 |" in report.tables(
            two
        ) and "| adam | 0.1 | 9.525 |" in report.tables(two)


def test_seeds_that_are_all_lost_are_reported_too(tmp_path, capsys):
    returns = np.array([[-0.5, np.nan], [np.nan, np.nan]])
    lost = report.Result("catch", "sgd", 1e9, np.array([1, 2]), returns, np.arange(2))
    report.write(tmp_path, [lost], [])
    assert (
        "| sgd (2 seeds ended early, not finite) | 1e+09 | - | none | - |"
        in capsys.readouterr().out
    )
    assert (tmp_path / "table.md").exists() and (tmp_path / "curves.png").exists()


def test_without_a_goal_no_optimizer_reaches_it_or_does_not():
    returns = np.array([[-9.0, -5.0]])
    negative = report.Result("catch", "adam", 0.1, np.array([1, 2]), returns, np.arange(1))
    assert report.table([negative]).splitlines()[2].endswith("| one seed | - |")


def test_a_quarter_is_a_step_with_an_evaluation_and_not_the_one_before_training():
    result = report.Result(
        "ant",
        "x",
        0.1,
        np.array([0, 10, 20, 30, 40]),
        np.array([[5.0, 7.0, 11.0, 13.0, 19.0]]),
        [0],
    )
    assert [result.score(until) for until in (0.25, 0.3, 0.5, 1.0)] == [7.0, 9.0, 9.0, 16.0]


# --- Tables and curves ---


def test_a_figure_has_the_mean_and_interval_of_the_best_rate_also_when_redrawn(tmp_path):
    steps, returns = np.array([1.0, 2.0, 3.0]), np.array([[0.0, 1.0, 2.0], [0.0, 3.0, 6.0]])
    results = [
        report.Result("pendulum", "adam", rate, steps, scale * returns, np.arange(2))
        for rate, scale in ((0.1, 0.5), (0.2, 1.0), (0.3, 0.7))
    ]
    report.write_summary(tmp_path / "curves.csv", results)
    for curves in (report.curves_of(results), report.read_summary(tmp_path / "curves.csv")):
        figure, axes = report.plt.subplots()
        report.draw_panel(axes, curves)
        report.plt.close(figure)
        (line,), (band,) = axes.lines, axes.collections
        assert line.get_label() == "adam, 0.2"
        np.testing.assert_array_equal(line.get_xydata(), [[1, 0], [2, 2], [3, 4]])
        corners = band.get_paths()[0].vertices
        last = corners[corners[:, 0] == 3, 1]
        assert (last.min(), last.max()) == (2, 6)  # the interval of two seeds: both
        assert all((curve.low[-1], curve.high[-1]) == (2, 6) for curve in curves)


def test_a_redrawn_figure_has_the_rate_that_loses_fewest_seeds(tmp_path):
    steps, lost = np.array([1.0, 2.0]), np.full(2, np.nan)
    good = report.Result("catch", "adam", 1e-3, steps, np.array([[0, 0.5]] * 3), np.arange(3))
    high = good._replace(learning_rate=1e-1, returns=np.array([[0, 0.9], [0, 0.9], lost]))
    report.write_summary(tmp_path / "curves.csv", [high, good])
    (curve,) = report.read_summary(tmp_path / "curves.csv")
    assert curve.learning_rate == good.learning_rate == report.at_best_rate([high, good])[0][2]


def test_a_redrawn_figure_has_the_best_rate_also_if_it_has_fewer_seeds(tmp_path):
    steps = np.array([1.0, 2.0])
    many = report.Result("catch", "adam", 1e-2, steps, np.full((10, 2), 0.5), np.arange(10))
    few = many._replace(learning_rate=1e-3, returns=np.full((5, 2), 0.9), seeds=np.arange(5))
    rmsprop = few._replace(label="rmsprop")
    report.write_summary(tmp_path / "curves.csv", [many, rmsprop, few])
    curves = report.read_summary(tmp_path / "curves.csv")
    assert [(c.label, c.learning_rate) for c in curves] == [("adam", 1e-3), ("rmsprop", 1e-3)]
    for mine, drawn in zip(curves, report.curves_of([many, rmsprop, few]), strict=True):
        np.testing.assert_allclose(mine.mean, drawn.mean)


def test_a_damaged_row_of_the_log_is_dropped_when_a_run_continues(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"update,loss\r\n1,0.5\r\n\xff,0.25\r\n3,0.1\r\n")
    assert runs.rows_before(path, 3) == "update,loss\r\n1,0.5\r\n"


def test_the_last_column_is_when_the_mean_reaches_nine_tenths_of_the_best():
    """The best score, the mean of the last two, is 10."""
    curves = {
        "best": [[0, 8, 10, 10], [0, 8, 10, 10]],
        "early": [[0, 18, 0, 0], [0, 0, 0, 0]],
        "one seed at a time": [[0, 9, 0, 7], [0, 7, 0, 9]],
    }
    steps = np.array([10.0, 20.0, 30.0, 40.0])
    results = [
        report.Result("pendulum", label, 0.1, steps, np.array(x, float), np.arange(2))
        for label, x in curves.items()
    ]
    head, _, *rows = report.table(results).splitlines()
    assert head.endswith("| steps to reach 9 |")
    assert [row.split(" | ")[-1] for row in rows] == ["30 |", "20 |", "never |"]


def test_two_files_of_one_name_are_two_rows(tmp_path):
    paths = [str(tmp_path / f"catch__{i}" / "theta.npz") for i in range(2)]
    for path in paths:
        Path(path).parent.mkdir()
        shutil.copy(optimizers.PRETRAINED / "optim4rl_catch.npz", path)
    found = evaluate.plan(evaluate.Args(optimizers=tuple(paths)))
    assert [run.label for run in found] == ["catch (trained)", paths[1]]
