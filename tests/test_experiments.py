"""The scripts of experiments/ that make tables: what the sweep runs, and what it does not; what a
table lacks; agents side by side."""

import csv
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import a2c
import ablations
import authors
import evaluate
import gridworld
import lanes
import optimizers
import ppo
import sweep
import table
from figures import report


def test_the_sweep_runs_each_setting_once_and_continues_an_interrupted_one(tmp_path, monkeypatch):
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

    for module in (ablations, sweep):
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "OUT", tmp_path / "a sweep")
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
    with open(tmp_path / "a sweep" / "catch.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["meta_learning_rate"], row["learning_rate"]) for row in rows]
    assert found == [("0.001", "0.0001"), ("0.001", "0.001"), ("0.0001", "0.001")]
    assert all((tmp_path / row["theta"]).exists() for row in rows)

    commands.clear()
    sweep.main()
    assert not commands
    # One that was interrupted after its first checkpoint.
    setting = tmp_path / "a sweep" / "catch" / "0.001_0.0001"
    (folder,) = setting.glob("*__pipeline_train__*")
    (setting / "theta.npz").rename(folder / "theta.npz")
    (folder / "checkpoint" / "12").mkdir(parents=True)
    sweep.main()
    ((script, flags),) = commands
    assert script == "pipeline_train" and shlex.split(flags)[-2:] == ["--resume", str(folder)]


def test_a_script_runs_in_a_folder_with_a_space(tmp_path, monkeypatch):
    root = tmp_path / "a b"
    folder = root / "runs"
    made = folder / "task__show__0"
    made.mkdir(parents=True)
    (root / "show.py").write_text("import sys; open('argv', 'w').write('|'.join(sys.argv[1:]))")
    monkeypatch.setattr(ablations, "ROOT", root)
    flags = table.flags_of(evaluate.Args(env_name=("catch",), optimizers=(f"{root}/theta.npz",)))
    monkeypatch.chdir(root)
    assert ablations.run("show", flags, folder) == made
    words = ["--env-name", "catch", "--optimizers", f"{root}/theta.npz", "--runs-dir", str(folder)]
    assert (root / "argv").read_text().split("|") == words


STOPS_LATE = """
import pathlib, signal, sys, time

def stop(*_):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(130)

signal.signal(signal.SIGINT, stop)
pathlib.Path("begun").touch()
time.sleep(60)
"""


def test_an_interrupt_waits_until_the_script_has_saved(tmp_path):
    (tmp_path / "slow.py").write_text(STOPS_LATE)
    (tmp_path / "call.py").write_text(
        f"import sys; sys.path.insert(0, {str(ablations.ROOT / 'experiments')!r})\n"
        "import ablations, pathlib\n"
        "ablations.ROOT = pathlib.Path.cwd()\n"
        "ablations.run('slow', '', pathlib.Path('runs'))\n"
    )
    command = [sys.executable, "call.py"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    for _ in range(300):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(30) == 130 and (tmp_path / "saved").exists()


def test_a_setting_that_diverges_is_last_and_not_run_again(tmp_path, monkeypatch):
    commands = []

    def run(script, flags, folder):
        commands.append(script)
        made = folder / f"task__{script}__0__20260101-000000"
        made.mkdir(parents=True)
        if script == "pipeline_train":
            (made / "theta.npz").touch()
            bad = 10 if folder.name.startswith("0.01") else 0
            (made / "metrics.csv").write_text(f"number,bad_updates\n9,0\n10,{bad}\n")
            if bad:
                sys.exit(1)
        else:
            lost = "nan" if folder.name.startswith("0.003") else 1
            header = "env_name,optimizer,learning_rate,seed,env_steps,return\n"
            rows = f"catch,theta,1,0,1,5\ncatch,theta,1,0,2,{lost}\n"
            (made / "results.csv").write_text(header + rows)
            (made / "table.md").touch()
        return made

    for module in (ablations, sweep):
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "OUT", tmp_path / "sweep")
    rates = ["--meta-learning-rates", "1e-2", "3e-3", "1e-3", "--learning-rates", "1e-3"]
    monkeypatch.setattr("sys.argv", ["sweep.py", "--env-name", "catch", *rates])
    sweep.main()
    with open(tmp_path / "sweep" / "catch.csv", newline="") as file:
        found = [(row["meta_learning_rate"], row["mean_return"]) for row in csv.DictReader(file)]
    assert found == [("0.001", "3"), ("0.01", "-inf"), ("0.003", "-inf")]
    commands.clear()
    sweep.main()
    assert not commands


def test_an_ablation_continues_its_meta_training(tmp_path, monkeypatch):
    commands = []

    def run(script, flags, folder):
        commands.append((script, flags))
        made = folder / f"catch__{script}__0__{len(commands)}"
        (made / "checkpoint" / "20").mkdir(parents=True)
        if script == "evaluate":
            header = "env_name,optimizer,learning_rate,seed,env_steps,return\n"
            (made / "results.csv").write_text(f"{header}catch,theta,1,0,1,5\n")
        elif len(commands) == 1:
            sys.exit(130)
        return made

    monkeypatch.setattr(ablations, "run", run)
    monkeypatch.setattr(ablations, "RUNS", tmp_path)
    with pytest.raises(SystemExit):
        ablations.variant("catch", "GRU")
    ((name, flags, *_),) = ablations.variant("catch", "GRU")
    begun = tmp_path / "catch" / "GRU" / "catch__pipeline_train__0__1"
    assert name == "GRU" and "--cell gru" in flags and flags.strip("`") == commands[0][1]
    assert [script for script, _ in commands] == ["pipeline_train", "pipeline_train", "evaluate"]
    assert commands[1][1] == f"{commands[0][1]} --resume {begun}"  # so other flags are refused
    ablations.variant("catch", "GRU")
    assert len(commands) == 3


def test_a_table_of_ablations_leaves_the_others_and_the_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "ablations.md"
    said = f"# Ablations\n\n## What they show\n\n- x\n\n{ablations.MARK}\n"
    path.write_text(f"{said}\n## catch\n\n| old |\n\n## ant\n\n| kept |\n")
    ablations.write("catch", [["GRU", "`--cell gru`", "0.1", "2", "1 to 3"]])
    ablations.write("new", [])
    text = path.read_text()
    assert text.startswith(f"{said}\n## catch\n") and "old" not in text
    assert (
        text.count("| GRU | 0.1 | 2 | 1 to 3 | `--cell gru` |\n\n## ant\n\n| kept |\n\n## new") == 1
    )
    monkeypatch.setattr("sys.argv", ["ablations.py", "--tables", "ant"])
    with pytest.raises(SystemExit) as end:
        ablations.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and "--tables: 'ant' is none of catch, small" in err


def test_the_table_runs_what_it_lacks_and_replaces_it_only_if_told(tmp_path, monkeypatch, capsys):
    commands, level, numbers = [], 1.0, itertools.count()

    def run(script, flags, folder):
        """Two seeds at the first learning rate that is named."""
        commands.append(flags)
        words = flags.split()
        name, env_name = (words[words.index(f"--{x}") + 1] for x in ("optimizers", "env-name"))
        label = f"{name} (trained)" if "/" in name else name
        made = tmp_path / str(next(numbers))
        made.mkdir()
        rows = [f"{env_name},{label},1,{seed},{t},{level * t}\n" for seed in (0, 1) for t in (1, 2)]
        header = "env_name,optimizer,learning_rate,seed,env_steps,return\n"
        (made / "results.csv").write_text(header + "".join(rows))
        return made

    def main(*flags):
        commands.clear()
        monkeypatch.setattr("sys.argv", ["table.py", *flags, "--out", str(tmp_path / "out")])
        table.main()
        with open(tmp_path / "out" / "scores.csv", newline="") as file:
            return {(row["env_name"], row["optimizer"]): row for row in csv.DictReader(file)}

    monkeypatch.setattr(table, "run", run)
    which = ["--env-name", "catch", "ant", "--optimizers", "adam", "adam_kl", "muon_linear"]
    found = main(*which, "--num-seeds", "2")
    assert len(found) == len(commands) == 5 and ("catch", "adam_kl") not in found  # A2C has no kl
    assert commands[0].startswith("--env-name catch --optimizers adam --num-seeds 2")
    assert commands[1].endswith("--learning-rates 1 0.3 0.1 0.03 0.01")  # muon's are larger
    assert "--total-steps 660000" in commands[2] and "--total-steps" not in commands[0]
    assert "ant, which needs pretrained/adam4rl (trained)" in capsys.readouterr().out

    level = 3.0
    found = main("--env-name", "catch", "--optimizers", "pretrained/adam4rl", "adam")
    assert len(commands) == 1 and len(found) == 6 and found["catch", "adam"]["final"] == "1.5"
    written = (tmp_path / "out" / "table.md").read_text()
    assert "### catch" in written and "| catch* |" in written  # it is one of HELD_OUT
    found = main("--env-name", "catch", "--optimizers", "adam", "--again")
    assert len(commands) == 1 and len(found) == 6 and found["catch", "adam"]["final"] == "4.5"
    main("--env-name", "ant", "--optimizers", "adam", "--again", "--total-steps", "5e5")
    assert "--total-steps 500000" in commands[0]
    main("--env-name", "catch", "--optimizers", "sign_sgd", "--learning-rates", "1", "2")
    assert commands[0].endswith("--learning-rates 1 2")
    for out in ([], ["--out", "results/compare/"], ["--out", "./results/../results/compare"]):
        monkeypatch.setattr("sys.argv", ["table.py", "--total-steps", "5e5", *out])
        with pytest.raises(SystemExit):
            table.main()
        assert "--total-steps needs an --out" in capsys.readouterr().err
    pair = ["pretrained/adam4rl", "pretrained/adam4rl.npz"]
    with pytest.raises(SystemExit):
        main("--env-name", "catch", "--optimizers", *pair)
    assert "two of the --optimizers are called" in capsys.readouterr().err


@pytest.mark.parametrize(
    "env_name, names",
    [
        ("catch", ("pretrained/adam4rl", "muon_linear")),
        pytest.param("pendulum", ("adam_kl", "sign_linear"), marks=pytest.mark.slow),
    ],
)
def test_lanes_of_several_optimizers_learn_as_each_does_alone(monkeypatch, env_name, names):
    for agent in (a2c, ppo):  # as on an accelerator
        monkeypatch.setattr(agent, "over_seeds", lambda f, seeds: jax.vmap(f)(seeds))
    monkeypatch.setattr(lanes, "MOST_ENVS", 5 * 4)  # five lanes at once
    sizes = dict(total_steps=600, num_envs=4, batch_size=4, value_layers=(8,), num_evals=1)
    args = evaluate.Args(
        (env_name,), names, num_seeds=2, learning_rates=(1e-3, 2e-3), sweep_seeds=1, **sizes
    )
    learner = evaluate.make_learner(args, env_name)
    results = lanes.evaluate_all(learner, evaluate.plan(args), args, lambda: 0)
    assert sorted(r.label for r in results) == sorted(run.label for run in evaluate.plan(args))
    for run, result in itertools.product(evaluate.plan(args), results):
        if result.label == run.label:
            alone = evaluate.train(learner, run, result.learning_rate, "", lambda: 0)
            assert result.returns.shape == alone.returns.shape == (2, len(alone.env_steps))
            np.testing.assert_allclose(result.returns, alone.returns, rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(result.env_steps, alone.env_steps)
            assert result.learning_rate in run.rates


def test_a_sweep_has_seeds_of_its_own_and_takes_the_best_rate(monkeypatch):
    """In evaluate.py, and in lanes.py."""
    seen = []
    run = evaluate.Run("catch", "adam", "adam", (0.1, 0.2, 0.3))
    args = evaluate.Args(("catch",), seed=7, num_seeds=3, sweep_seeds=2)
    monkeypatch.setattr(
        evaluate,
        "train",
        lambda learner, *_: seen.append((learner.args.seed, learner.args.num_seeds)),
    )
    learner = evaluate.make_learner(args, "catch")
    evaluate.sweep(learner, run, args, "", lambda: 0)
    assert seen == [(10, 2)] * 3

    def train(learner, some, title, interrupted):
        by_rate = {}
        for lane in some:
            by_rate.setdefault(lane.learning_rate, []).append(lane.seed)
        seen.append(by_rate)
        returns = {0.1: 1.0, 0.2: 3.0, 0.3: 2.0}
        steps = np.array([1, 2])
        return [
            report.Result("catch", "adam", rate, steps, np.full((len(x), 2), returns[rate]), x)
            for rate, x in by_rate.items()
        ]

    seen.clear()
    monkeypatch.setattr(lanes, "train", train)
    lanes.evaluate_all(learner, [run], args, lambda: 0)
    assert seen == [dict.fromkeys((0.1, 0.2, 0.3), [10, 11]), {0.2: [7, 8, 9]}]


def test_returns_are_counted_as_the_authors_code_does():
    """Episodes of three steps whose rewards are the actions; the agent's plane comes last."""

    def step(key, state, action):
        state = (state + 1) % 3
        return state, jax.numpy.arange(4).reshape(1, 2, 2), jax.numpy.float32(action), state == 0

    reset = lambda key: (jax.numpy.int32(0), jax.numpy.arange(4).reshape(1, 2, 2))
    env = authors.counted(gridworld.Env(reset, step, (1, 2, 2), 9), True)
    state, obs = env.reset(jax.random.key(0))
    for action in (1, 2, 3, 4, 5, 6, 7):
        state, obs, _, _ = env.step(jax.random.key(0), state, action)
    assert (state.total, state.episodes, state.episode_return) == (21, 2, 7)
    # planes (agent, object) of the cells: (0, 1), (2, 3)
    np.testing.assert_array_equal(obs, [[[1, 3]], [[0, 2]]])
    assert env.obs_shape == obs.shape == (2, 1, 2)


def test_the_authors_return_is_the_mean_of_the_last_20_updates(monkeypatch):
    """In update n an episode of return n and one of 3 n end: the mean is 2 n."""

    def train(args, env, optimizer, on_update):
        for n in range(1, 31):
            total, episodes = np.zeros((2, args.num_seeds, args.num_envs))
            total[:, 0], total[:, 1] = n * (n + 1) / 2, 3 * n * (n + 1) / 2
            episodes[:, :2] = n
            streams = SimpleNamespace(env_state=authors.Counted(None, None, total, episodes))
            on_update(n, {}, SimpleNamespace(agents=SimpleNamespace(streams=streams)))

    monkeypatch.setattr(a2c, "train", train)
    found = authors.returns_at("catch", "adam", 1e-3, [25 * 1280, 30 * 1280])
    assert {at: set(x) for at, x in found.items()} == {"32000": {31.0}, "38400": {41.0}}


def test_lanes_without_vmap_are_not_a_number():
    """A CPU takes seeds one after the other: an agent would learn by its bare gradient."""
    lane = lanes.Lane(evaluate.Run("catch", "adam", "adam", (1.0,)), 1.0, 0)
    optimizer = lanes.optimizer_of_lanes([lane])
    params = {"w": jax.numpy.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert np.isnan(updates["w"]).all()


def test_an_accelerator_makes_a_table_task_by_task(tmp_path, monkeypatch):
    made = []

    def evaluate_all(learner, to_run, args, interrupted):
        made.append((learner.args.env_name, [run.rates for run in to_run]))
        steps, returns = np.array([1.0, 2.0]), np.array([[1.0, 2.0], [3.0, 4.0]])
        return [
            report.Result(run.env_name, run.label, run.rates[-1], steps, returns, np.arange(2))
            for run in to_run
        ]

    monkeypatch.setattr(lanes, "evaluate_all", evaluate_all)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table.jax, "default_backend", lambda: "gpu")
    flags = "--env-name catch ant --optimizers adam muon_linear pretrained/adam4rl --num-seeds 2"
    monkeypatch.setattr("sys.argv", ["table.py", *flags.split(), "--out", str(tmp_path / "out")])
    table.main()
    rates = (1e-2, 3e-3, 1e-3, 3e-4)
    assert sorted(made)[0] == ("ant", [rates, tuple(10 * rate for rate in rates), (1.0,)])
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        found = {(row["env_name"], row["optimizer"]): row for row in csv.DictReader(file)}
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("runs/table/*/config.json")]
    assert [config["args"]["optimizers"] for config in configs] == 2 * [flags.split()[4:7]]
    assert len(found) == 6 and found["ant", "adam"]["learning_rate"] == "0.0003"
    assert found["catch", "adam"]["final"] == "3.5"  # of the second seed
    made.clear()
    table.main()
    assert not made


def test_of_the_tables_optimizers_those_with_a_learning_rate_to_choose_are_swept():
    found = table.pairs(table.Args(env_name=("catch", "ant")))
    swept = {label for (_, label), given in found.items() if given.learning_rates}
    everything = {label for _, label in found}
    assert swept == {*optimizers.CLASSICAL} - {"rmsprop_auto", "sgd"}
    assert {"rmsprop_auto", "untrained", "pretrained/adam4rl (trained)"} <= everything - swept
    assert found["ant", "muon_linear"].learning_rates == pytest.approx((1e-1, 3e-2, 1e-2, 3e-3))
