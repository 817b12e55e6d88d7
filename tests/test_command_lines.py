"""Odd numbers for every flag that takes one, and damaged runs to resume: refused in one line before
any folder is made, with exit code 2."""

import dataclasses
import importlib
import json
import os
import random
import sys
import typing

import jax
import numpy as np
import optax
import pytest

import a2c
import checkpoints
import evaluate
import gradient_distributions
import pipeline_train
import runs
import tasks
import train_agents
import train_optimizer

# script: its arguments, and flags for a start that is quick
SCRIPTS = {
    "a2c": (train_agents.A2CArgs, "--env-name catch"),
    "ppo": (train_agents.PPOArgs, "--env-name pendulum"),
    "evaluate": (evaluate.Args, "--env-name pendulum --optimizers adam"),
    "pipeline_train": (pipeline_train.Args, "--env-name catch"),
    "pipeline_figure": (pipeline_train.Args, "--env-name catch"),
    "gradient_distributions": (gradient_distributions.Args, "--env-name catch"),
}
NEVER = {int: ("-1", "nan", "2147483648"), float: ("-1", "nan", "1e300")}


make_folder = runs.make_folder  # the fixture `run` replaces it


class Began(BaseException):
    """The work would begin here."""


def begin(*_):
    raise Began


def numeric_flags(script):
    """-> (name, int or float)"""
    for name, hint in typing.get_type_hints(SCRIPTS[script][0]).items():
        inner = [hint, *typing.get_args(hint)]
        if typing.get_origin(hint) is not typing.Literal:
            inner += [x for option in inner for x in typing.get_args(option)]
            for number in {int, float} & set(inner):
                yield name, number


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(script, flags) -> its error message, or None if the work would have begun."""
    change = jax.config.update
    unless_devices = lambda key, value: "cpu_devices" in key or change(key, value)
    monkeypatch.setattr(jax.config, "update", unless_devices)  # they are there already
    monkeypatch.setattr(runs, "make_folder", begin)
    monkeypatch.setattr(train_agents, "Checkpoints", begin)
    monkeypatch.setattr(train_optimizer, "Checkpoints", begin)
    monkeypatch.chdir(tmp_path)

    def run(script, flags):
        before = sorted(os.listdir())
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        try:
            importlib.import_module(script).main()
        except Began:
            return None
        except SystemExit as end:
            out, err = capsys.readouterr()
            assert (end.code, out, sorted(os.listdir())) == (2, "", before)
            assert err.startswith("error: ") and err.count("\n") == 1, err
            return err
        raise AssertionError("it ended without an error")

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_takes_what_cannot_be_its_number(script, run):
    assert run(script, SCRIPTS[script][1].split()) is None
    for name, number in numeric_flags(script):
        for value in NEVER[number]:
            flag = "--" + name.replace("_", "-")
            err = run(script, [*SCRIPTS[script][1].split(), flag, value])
            assert err, f"{script} began with {flag} {value}"


def test_agents_are_refused_from_the_size_of_their_arrays_on(monkeypatch):
    learner, optimizer = tasks.make_learner("catch"), optax.adam(1e-3)
    agent = a2c.make_agent(learner.env, learner.args)
    state = jax.jit(lambda key: agent.init(key, optimizer))(jax.random.key(0))
    metrics = np.zeros((3, a2c.num_updates(learner.args)), np.float32)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state, metrics)))
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 5 * size}
    monkeypatch.setattr(os, "sysconf", pages.get)
    tasks.check_memory(learner, optimizer, num_seeds=5)
    with pytest.raises(ValueError, match="lower --num-seeds"):
        tasks.check_memory(learner, optimizer, num_seeds=6)
    pages["SC_PHYS_PAGES"] -= 1
    with pytest.raises(ValueError, match="lower --num-seeds"):
        tasks.check_memory(learner, optimizer, num_seeds=5)


# --- Runs to resume ---


def make_run(script):
    """A folder as of a run that was stopped at update 3. -> its path, its config.json"""
    args = SCRIPTS[script][0]()
    env_name = "pendulum" if script == "ppo" else "catch"
    if script == "pipeline_train":
        args = train_optimizer.fill_in(dataclasses.replace(args, env_name=(env_name,)))
    else:
        args = dataclasses.replace(args, env_name=env_name, num_seeds=2)
    folder = make_folder(".", env_name, script, 0, args)
    (folder / "checkpoint" / "3").mkdir(parents=True)
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("script", ["a2c", "ppo", "pipeline_train"])
def test_only_a_run_of_the_same_script_is_resumed(script, run):
    for other in ("a2c", "ppo", "pipeline_train"):
        err = run(script, ["--resume", str(make_run(other)[0])])
        if other == script:
            assert err is None
        else:
            assert f"a run of {other}.py, not of {script}.py" in err


def test_a_run_of_before_config_had_the_scripts_name_is_resumed_or_its_other_type_is_named(run):
    for script, hint in (("a2c", None), ("pipeline_train", "the env_name in its config.json is [")):
        folder, config = make_run(script)
        del config["script"]
        (folder / "config.json").write_text(json.dumps(config))
        err = run("a2c", ["--resume", str(folder)])
        assert (err is None) if hint is None else (hint in err)


def test_other_arguments_and_a_run_without_a_checkpoint_are_refused(run):
    folder, config = make_run("pipeline_train")
    units = config["args"]["num_units"]
    flags = ["--resume", str(folder), "--num-units", str(2 * units)]
    hint = f"--num-units is {2 * units} here, and {units} in the run to resume"
    assert hint in run("pipeline_train", flags)
    given = pipeline_train.Args(num_devices=1, save_theta_every=7)
    run_args = checkpoints.resumed_args(str(folder), given, "pipeline_train")
    assert (run_args.num_devices, run_args.save_theta_every, run_args.num_units) == (1, 7, units)
    config["args"]["pipeline"] = False
    (folder / "config.json").write_text(json.dumps(config))
    longer = [*flags[:2], "--num-iterations", "1000000"]
    assert "--no-pipeline keeps its" in run("pipeline_train", longer)
    (folder / "checkpoint" / "3").rmdir()
    (folder / "checkpoint" / "6.tmp").mkdir()  # not written to its end
    assert "no checkpoint yet" in run("pipeline_train", flags[:2])


def test_a_flag_at_its_default_counts_as_given_if_it_is_on_the_command_line(run, monkeypatch):
    folder, config = make_run("a2c")
    config["args"] |= {"optimizer": "rmsprop", "checkpoint_minutes": 1.0}
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--resume", str(folder)]
    hint = "--optimizer is adam here, and rmsprop in the run to resume"
    assert hint in run("a2c", [*flags, "--optimizer", "adam"])
    given = train_agents.A2CArgs(resume=str(folder))
    assert given.optimizer == "adam" and given.checkpoint_minutes == 5.0  # the defaults
    for more, minutes in (([], 1.0), (["--checkpoint-minutes=5"], 5.0)):
        monkeypatch.setattr(sys, "argv", ["a2c.py", *flags, *more])
        resumed = checkpoints.resumed_args(str(folder), given, "a2c")
        assert (resumed.optimizer, resumed.checkpoint_minutes) == ("rmsprop", minutes)


def test_an_infinite_bound_is_strict_json_and_comes_back(tmp_path):
    args = train_agents.PPOArgs(env_name="pendulum", grad_clip=float("inf"))
    folder = make_folder(str(tmp_path), "pendulum", "ppo", 0, args)
    text = (folder / "config.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["args"]["grad_clip"] == "inf"
    (folder / "checkpoint" / "1").mkdir(parents=True)
    given = train_agents.PPOArgs(env_name="pendulum")
    assert checkpoints.resumed_args(str(folder), given, "ppo").grad_clip == float("inf")


# script, what changed in the arguments of its run, what the line must hold
CHANGED = [
    ("a2c", {"num_envs": "64"}, "the num_envs in its config.json is '64'"),
    ("a2c", {"num_envs": 64.5}, "num_envs"),
    ("a2c", {"num_envs": True}, "num_envs"),
    ("a2c", {"num_envs": None}, "num_envs"),
    ("a2c", {"num_envs": 0}, "--num-envs"),
    ("a2c", {"num_envs": 10**400}, "--num-envs"),
    ("a2c", {"num_seeds": 10**9}, "this machine has"),
    ("a2c", {"discount": [0.9]}, "discount"),
    ("a2c", {"total_steps": float("nan")}, "--total-steps"),
    ("a2c", {"env_name": {}}, "env_name"),
    ("a2c", {"env_name": "x\n" * 999}, "unknown environment"),
    ("ppo", {"policy_layers": [32, "x"]}, "the policy_layers in its config.json is [32, 'x']"),
    ("ppo", {"policy_layers": 32}, "policy_layers"),
    ("ppo", {"backend": "nosuch"}, "backend"),
    ("pipeline_train", {"num_units": "4"}, "num_units"),
    ("pipeline_train", {"num_units": None}, "num_units is not set"),
    ("pipeline_train", {"pipeline": 1}, "pipeline"),
    ("pipeline_train", {"learning_rate": [1e-3, 1e-3]}, "--learning-rate"),
]


@pytest.mark.parametrize("script, changed, hint", CHANGED)
def test_a_changed_config_is_refused_and_what_is_wrong_in_it_is_named(script, changed, hint, run):
    folder, config = make_run(script)
    config["args"] |= changed
    (folder / "config.json").write_text(json.dumps(config))
    assert hint in run(script, ["--resume", str(folder)])


ODD = (None, True, "", "x", "1", [], [1], ["x"], {}, 0, -1, 2.5, 1e300, 2**63, 10**400)
ODD += (float("nan"), float("inf"), [[1]], {"a": {"b": 1}}, "a\nb", [float("nan")], [0], 1e-300)
TEXTS = ("", "[]", "null", "1", '"x"', "{", '{"args": 1}', '{"args": {}}', "[" * 10**5, "\0")


def damage(rng, config):
    """-> the text of a config.json with one thing changed"""
    if rng.random() < 0.1:
        return rng.choice(TEXTS)
    changed = rng.choice((config, config["args"], config["args"], config["args"]))
    name = rng.choice(sorted(changed))
    changed.pop(name) if rng.random() < 0.1 else changed.update({name: rng.choice(ODD)})
    return json.dumps(config)


@pytest.mark.parametrize("script", ["a2c", "ppo", "pipeline_train"])
def test_a_damaged_config_is_refused_in_one_line_or_makes_no_difference(script, run):
    folder, config = make_run(script)
    rng, refused = random.Random(0), 0
    for _ in range(40):
        (folder / "config.json").write_text(damage(rng, json.loads(json.dumps(config))))
        refused += run(script, ["--resume", str(folder)]) is not None
    assert 20 < refused < 40
