"""What a user may get wrong, by hand or in a file: one line that says what and what would be right,
exit code 2, and nothing written."""

import importlib
import io
import json
import os
import pickle
import random
import resource
import shlex
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

import optimizers
from environments import brax_env
from optim4rl import load_theta

ROOT = Path(__file__).parent.parent

DEVICES = "jax_num_cpu_devices"

# script, flags, what the line must hold (-1, NaN and too large a number for every flag that takes
# one: test_command_lines.py)
BAD = [
    ("a2c", "--env-name big_dense", "big_dense_long"),
    ("a2c", "--optimizer adamw", "rmsprop"),
    ("a2c", "--optimizer missing.npz", "no such file"),
    ("a2c", "--optimizer broken.npz", "broken.npz"),
    ("a2c", "--optimizer other.npz", "nosuch"),
    ("a2c", "--num-seeds 0", "--num-seeds"),
    ("a2c", "--total-steps 5", "--total-steps"),
    ("a2c", "--num-envs many", "num-envs"),
    ("a2c", "--runs-dir a_file", "a_file"),
    ("a2c", "--runs-dir a_file/below", "a_file is not a folder"),
    ("a2c", f"--runs-dir {'x' * 300}", "File name too long"),
    ("ppo", "--env-name inverted_pendulm", "did you mean inverted_pendulum?"),
    ("ppo", "--env-name nosuch", "humanoid"),
    ("ppo", "--env-name swimmer --backend spring", "swimmer cannot be made with backend spring"),
    ("ppo", "--backend nosuch", "positional"),
    ("ppo", "--batch-size 10", "--num-envs 2048"),
    ("ppo", "--num-envs 3", "multiple of --num-envs 3"),
    ("ppo", "--rollout-steps 9 --episode-length 5", "--episode-length"),
    ("ppo", "--discount 1.5", "--discount"),
    ("ppo", "--num-epochs 0", "--num-epochs"),
    ("ppo", "--total-steps 100", "--total-steps"),
    ("ppo", "--optimizer adamw", "rmsprop"),
    ("pipeline_train", "--env-name inverted_pendulum --envs-per-unit 3", "even"),
    ("pipeline_train", "--env-name big_dens_long", "did you mean big_dense_long?"),
    ("evaluate", "--env-name inverted_pendulum --num-envs 3", "--num-envs 3"),
    ("pipeline_train", "--env-name catch nosuch", "nosuch"),
    ("pipeline_train", "--env-name catch catch", "once"),
    ("pipeline_train", "--optimizer adam", "optim4rl"),
    ("pipeline_train", "--cell rnn", "lstm"),
    ("pipeline_train", "--optimizer star --cell gru", "--cell is not a setting of star"),
    ("pipeline_train", "--optimizer star --cell lstm", "--cell is not a setting of star"),
    ("pipeline_train", "--optimizer velo --hidden-size 4", "--hidden-size"),
    ("pipeline_train", "--optimizer linear_optim --inputs log", "--inputs"),
    ("evaluate", "--optimizers untrained:nosuch", "nosuch"),
    ("convert_velo", "nosuch", "no such file"),
    ("pipeline_train", "--reset-interval 0", "--reset-interval"),
    ("pipeline_train", "--inner-updates 0", "--inner-updates"),
    ("pipeline_train", "--readout-layers 4 -1", "--readout-layers"),
    ("pipeline_train", "--total-steps 1e6 --num-iterations 3", "not both"),
    ("pipeline_train", "--env-name catch --learning-rate 1e-3 1e-3", "--learning-rate"),
    ("pipeline_train", "--grad-clip 0", "--grad-clip"),
    ("pipeline_train", "--total-steps 100", "--total-steps"),
    ("evaluate", "--env-name nosuch", "catch"),
    ("evaluate", "--optimizers adam broken.npz", "broken.npz"),
    ("evaluate", "--optimizers missing.npz", "no such file"),
    ("evaluate", "--learning-rates 1e-3 -1", "--learning-rates"),
    ("evaluate", "--num-seeds 0", "--num-seeds"),
    ("a2c", "--discount 1.5", "--discount"),
    ("a2c", "--rollout-steps 0", "--rollout-steps"),
    ("a2c", "--total-steps inf", "--total-steps"),
    ("a2c", "--learning-rate 0", "--learning-rate"),
    ("a2c", "--learning-rate", "--learning-rate"),
    ("a2c", "--num-envs 2.5", "num-envs"),
    ("a2c", "--seed one", "seed"),
    ("a2c", "--reward-scale 0", "--reward-scale"),
    ("a2c", "--checkpoint-minutes 0", "--checkpoint-minutes"),
    ("a2c", "--resume nosuch", "not a run's folder"),
    ("a2c", "--resume a_file", "not a run's folder"),
    ("a2c", "--resume a_folder", "not a run's folder"),
    ("a2c", "--env-name ant", "ppo.py learns there"),
    ("a2c", "--optimizer untrained:nosuch", "nosuch"),
    ("a2c", "--optimizer pretrained/nosuch", "nosuch"),
    ("a2c", "--optimizer ", "optimizer"),
    ("a2c", "--optimizer a_folder", "a_folder"),
    ("ppo", "--seed 1.5", "seed"),
    ("ppo", "--gae-lambda 2", "--gae-lambda"),
    ("ppo", "--clip-range 0", "--clip-range"),
    ("ppo", "--grad-clip 0", "--grad-clip"),
    ("ppo", "--reward-scale inf", "--reward-scale"),
    ("ppo", "--policy-layers 32 0", "--policy-layers"),
    ("ppo", "--value-layers 1 x", "value-layers"),
    ("ppo", "--num-evals 0", "--num-evals"),
    ("ppo", "--num-minibatches 0", "--num-minibatches"),
    ("a2c", "--env-name", "env-name"),
    ("ppo", "--episode-length 0", "--episode-length"),
    ("ppo", "--runs-dir a_file", "a_file"),
    ("ppo", "--resume a_folder", "not a run's folder"),
    ("ppo", "--optimizer truncated.npz", "truncated.npz"),
    ("pipeline_train", "--seed x", "seed"),
    ("pipeline_train", "--env-name", "env-name"),
    ("pipeline_train", "--env-name ant --backend nosuch", "positional"),
    ("pipeline_train", "--env-name catch --meta-clip big", "elementwise"),
    ("pipeline_train", "--env-name catch --inputs sqrt", "log"),
    ("pipeline_train", "--hidden-size 0", "--hidden-size"),
    ("pipeline_train", "--num-iterations 0", "--num-iterations"),
    ("pipeline_train", "--meta-learning-rate 0", "--meta-learning-rate"),
    ("pipeline_train", "--reward-scale 0", "--reward-scale"),
    ("pipeline_train", "--save-theta-every 0", "--save-theta-every"),
    ("pipeline_train", "--envs-per-unit 1 2", "--envs-per-unit"),
    ("pipeline_train", "--envs-per-unit 0", "--envs-per-unit"),
    ("pipeline_train", "--total-steps inf", "--total-steps"),
    (
        "pipeline_train",
        "--optimizer adam4rl --inputs log",
        "--inputs is not a setting of adam4rl",
    ),
    ("pipeline_train", "--theta pretrained/nosuch", "nosuch"),
    ("pipeline_train", "--theta truncated.npz", "truncated.npz"),
    ("pipeline_train", "--theta pretrained/optim4rl_catch --hidden-size 4", "leave it out"),
    ("pipeline_train", "--theta pretrained/adam4rl --optimizer optim4rl", "to adam4rl; leave it"),
    ("pipeline_train", "--theta pretrained/optim4rl_catch --cell lstm", "leave it out"),
    ("pipeline_train", "--num-processes 0", "--num-processes"),
    ("pipeline_train", "--num-processes 2 --process-id 2", "--process-id"),
    ("pipeline_train", "--resume nosuch", "not a run's folder"),
    ("evaluate", "--sweep-seeds 0", "--sweep-seeds"),
    ("evaluate", "--total-steps 5", "--total-steps"),
    ("evaluate", "--num-envs 0", "--num-envs"),
    ("evaluate", "--learning-rate 0", "--learning-rate"),
    ("evaluate", "--env-name catch cath", "catch"),
    ("evaluate", "--env-name catch catch", "once"),
    ("evaluate", "--env-name ant --backend nosuch", "positional"),
    ("evaluate", "--optimizers", "optimizers"),
    ("evaluate", "--runs-dir a_file", "a_file"),
    ("evaluate", "--optimizers pretrained/nosuch", "nosuch"),
    ("evaluate", "--env-name inverted_pendulum --value-layers 64 0", "--value-layers"),
    ("evaluate", "--grad-clip 0", "--grad-clip"),
    ("evaluate", "--num-evals 0", "--num-evals"),
    ("evaluate", "--env-name ant --batch-size 0", "--batch-size"),
    ("evaluate", "--env-name ant --batch-size 100", "--num-envs"),
    ("evaluate", "--suite nosuch", "transfer"),
    ("evaluate", "--suite paper --env-name small_dense_long", "--env-name"),
    ("evaluate", "--suite paper --env-name catch", "--env-name"),  # the default, but given
    ("evaluate", "--suite transfer --optimizers adam sgd", "--optimizers"),
    ("evaluate", "--optimizers untrained --learning-rates 1e-2", "none here has one"),
    ("evaluate", "--sweep-seeds 3", "--sweep-seeds needs --learning-rates"),
    ("evaluate", "--suite paper --runs-dir a_file", "a_file"),
    ("pipeline_figure", "--env-name catch small_dense_long", "one environment"),
    ("pipeline_figure", "--env-name catch --resume a_folder", "no --resume"),
    ("pipeline_figure", "--env-name catch --num-units 0", "--num-units"),
    ("pipeline_figure", "--env-name catch --no-pipeline", "leave out --no-pipeline"),
    ("report", "nosuch", "no such file"),
    ("report", "a_folder", "no such file"),
    ("report", "--out x", "at least one run folder"),
    ("report", "other_csv", "not the results of evaluate.py"),
    ("convert_velo", "a_folder", "a_folder"),
    ("convert_velo", "broken.npz", "broken.npz"),
    ("convert_velo", "", "published weights"),
    ("a2c", "--bogus", "error: Unrecognized options: --bogus\n"),
    ("a2c", "--num-env 3", "--num-envs"),
    ("a2c", "--env-name nope", "choose from small_sparse_short"),
    ("ppo", "--env-name nope", "choose from small_sparse_short"),
    ("evaluate", "--env-name nope", "choose from small_sparse_short"),
    ("pipeline_train", "--env-name nope", "choose from small_sparse_short"),
    ("pipeline_figure", "--env-name nope", "choose from small_sparse_short"),
    ("learned_step", "--learning-rates", "--learning-rates must name at least one"),
    ("sweep", "--meta-learning-rates", "--meta-learning-rates must name at least one"),
    ("sweep", "--num-units 0", "--num-units must be above 0"),
    ("table", "--env-name", "--env-name must name at least one"),
    ("ablations", "--tables", "--tables must name at least one"),
    ("authors", "--env-name", "--env-name must name at least one"),
    (
        "authors",
        "--env-name big_dense_short",
        "'big_dense_short' is none of catch, small_dense_long",
    ),
    ("gradient_distributions", "--env-name nope", "choose from small_sparse_short"),
    ("gradient_distributions", "--env-name ant", "ppo.py learns there"),
    # empty values
    ("a2c", "--resume ''", "resume must not be empty"),
    ("a2c", "--resume=", "resume must not be empty"),
    ("a2c", "--optimizer ''", "optimizer must not be empty"),
    ("pipeline_train", "--resume ''", "resume must not be empty"),
    ("pipeline_train", "--theta ''", "theta must not be empty"),
    ("pipeline_train", "--env-name ''", "env-name must not be empty"),
    ("evaluate", "--runs-dir ''", "runs-dir must not be empty"),
    ("evaluate", "--optimizers adam ''", "optimizers must not be empty"),
    ("inspection", "''", "optimizer must not be empty"),
    ("inspection", "nosuch", "no such file"),
    ("report", "''", "folders must not be empty"),
    ("convert_velo", "''", "published must not be empty"),
    # numbers that do not fit int32 or float32
    ("a2c", "--total-steps 1e30", "--total-steps 1e+30 is more than 2147483647 updates"),
    ("ppo", "--total-steps 1e30", "more than 2147483647 updates"),
    ("evaluate", "--total-steps 1e30", "more than 2147483647 updates"),
    ("pipeline_train", "--total-steps 1e30", "more than 2147483647 iterations"),
    ("gradient_distributions", "--total-steps 1e30", "more than 2147483647 updates"),
    ("a2c", "--seed 2147483648", "--seed must be from 0 to 2147483647, got 2147483648"),
    ("ppo", "--seed 2147483647 --num-seeds 2", "--seed must be from 0 to 2147483646"),
    ("evaluate", "--seed 2147483640", "--seed must be from 0 to 2147483636"),
    ("pipeline_figure", "--seed 99999999999999999999", "--seed must be from 0"),
    ("gradient_distributions", "--learning-rate 0", "--learning-rate must be above 0"),
    ("ppo", "--num-epochs 1000000000", "--num-epochs"),
    ("pipeline_train", "--reset-interval 1000000000", "--reset-interval"),
    ("pipeline_train", "--no-pipeline --num-iterations 1000000000", "--num-iterations"),
    ("pipeline_train", "--num-iterations 1 --inner-updates 1000000000", "--inner-updates"),
    # processes and devices
    ("pipeline_train", "--coordinator nonsense", "--coordinator must be HOST:PORT"),
    ("pipeline_train", "--coordinator localhost:99999", "--coordinator must be HOST:PORT"),
    ("pipeline_train", "--num-processes 2 --coordinator a..b:99", "--coordinator a..b:99: "),
    ("pipeline_train", "--num-processes 1000000007", "multiple"),
    ("pipeline_train", "--num-units 7 --num-devices 2", "multiple"),
    ("pipeline_train", "--optimizer star --theta pretrained/adam4rl", "to adam4rl; leave it out"),
    ("pipeline_train", "--process-id 1", "--process-id must be from 0 to 0"),
    ("a2c", "--optimizer star", "star needs a theta"),
    ("evaluate", "--grad-clip 0.1", "--grad-clip is PPO's"),
    ("pipeline_train", "--num-units 8 --num-devices 8", "--num-devices 8: there are 4"),
    ("pipeline_train", "--num-devices 1000000000", "--num-devices must be from 1 to 1024"),
    # more than any machine's memory
    ("a2c", "--num-seeds 1000000000", "lower --num-seeds"),
    ("a2c", "--hidden-size 2147483647 --conv-filters 1000000", "this machine has"),
    ("ppo", "--env-name pendulum --num-seeds 1000000000", "this machine has"),
    ("ppo", "--env-name pendulum --policy-layers 1000000 1000000", "this machine has"),
    ("evaluate", "--num-seeds 1000000000", "this machine has"),
    ("evaluate", "--learning-rates 1 --sweep-seeds 1000000000", "this machine has"),
    ("pipeline_train", "--num-iterations 1 --num-units 1000000000", "this machine has"),
    ("pipeline_train", "--hidden-size 1000000", "hidden_size of optim4rl must be a whole number"),
    ("pipeline_train", "--hidden-size 60000", "theta would take"),
    ("pipeline_train", "--num-iterations 1 --inner-updates 10000000", "this machine has"),
]


# file name, what the line must hold: each is given to evaluate.py and to a2c.py as an optimizer
FILES = {
    "broken.npz": "not a whole theta file",
    "truncated.npz": "not a whole theta file",
    "flipped.npz": "not a whole theta file",
    "empty.npz": "not a whole theta file",
    "text.npz": "not a whole theta file",
    "bomb.npz": "too large",
    "pickled.npz": "not a whole theta file",
    "foreign.npz": "no 'header' in it",
    "other.npz": "choose from optim4rl",
    "newer.npz": "reads format",
    "shapes.npz": "its arrays are not those",
    "fewer.npz": "its arrays are not those",
    "strings.npz": "rnn1/w_x in it is not an array of float16, float32 or float64",
    "nan.npz": "not finite",
    "config.npz": "cannot be made from its header",
    "list.npz": "does not say which optimizer",
    "nested.npz": "its arrays are not those",
    "a_folder.npz": "a_folder.npz",
    "missing.npz": "no such file",
}


def with_header(path, header, **arrays):
    np.savez(path, header=np.array(json.dumps(header)), **arrays)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A whole theta file of the smallest Optim4RL."""
    config = {"hidden_size": 1, "grad_clip": 1.0}
    path = tmp_path_factory.mktemp("good") / "good.npz"
    learned = optimizers.LEARNED["optim4rl"](**config)
    optimizers.save_theta(path, learned.init_theta(jax.random.key(0)), "optim4rl", config, {})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, good):
    """A folder with every kind of bad file. What is imported late is imported here, Brax and what
    it compiles for its first environment: that does not count as time to refuse."""
    brax_env.make("inverted_pendulum", "spring")
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_files(good)
    return folder


def make_files(good):
    whole, header = good.read_bytes(), load_theta(good)[1]
    with np.load(good) as file:
        arrays = {name: file[name] for name in file.files if name != "header"}
    optimizers.save_theta("other.npz", {"w": np.zeros(3)}, "nosuch", {}, {})
    Path("broken.npz").write_bytes(Path("other.npz").read_bytes()[:100])
    Path("truncated.npz").write_bytes(whole[: len(whole) // 2])
    middle = whole.index(arrays["rnn1/w_x"].tobytes()) + 1
    Path("flipped.npz").write_bytes(
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    )
    Path("empty.npz").write_bytes(b"")
    Path("text.npz").write_text("a theta, but in words")
    with (
        zipfile.ZipFile("bomb.npz", "w", zipfile.ZIP_DEFLATED) as bomb,
        bomb.open("w.npy", "w", force_zip64=True) as member,
    ):
        member.write(b"0" * 2**29)
    np.savez("pickled.npz", header=np.array([{"a": print}], dtype=object))
    np.savez("foreign.npz", w=np.zeros(3))
    with_header("newer.npz", header | {"format": 99}, **arrays)
    with_header("shapes.npz", header, **arrays | {"rnn1/w_x": np.zeros((4, 2), np.float32)})
    with_header(
        "fewer.npz", header, **{name: array for name, array in arrays.items() if "rnn2" not in name}
    )
    with_header("strings.npz", header, **arrays | {"rnn1/w_x": np.full((4, 1), "x")})
    with_header("nan.npz", header, **arrays | {"rnn1/w_x": np.full((4, 1), np.nan, np.float32)})
    with_header("config.npz", header | {"config": {"cell": "nosuch"}}, **arrays)
    with_header("list.npz", header | {"config": [1]}, **arrays)
    with_header("nested.npz", header, **arrays | {"rnn1": np.zeros(1)})
    Path("a_file").write_text("")
    for folder in ("a_folder", "a_folder.npz", "other_csv"):
        Path(folder).mkdir()
    Path("other_csv/results.csv").write_text("a,b\n1,2\n")


def run_in_vain(script, flags, hint, folder, monkeypatch, capsys):
    before, module = sorted(os.listdir(folder)), importlib.import_module(script)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    change = jax.config.update  # but not the number of devices, which are there already
    unless_devices = lambda key, value: key == DEVICES or change(key, value)
    monkeypatch.setattr(jax.config, "update", unless_devices)
    with pytest.raises(SystemExit) as end:
        module.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert err.count("\n") == 1 and hint in err and err.startswith("error: "), err
    assert out == "" and sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("script, flags, hint", BAD)
def test_bad_input_is_one_line_and_exit_2(script, flags, hint, files, monkeypatch, capsys):
    run_in_vain(script, shlex.split(flags), hint, files, monkeypatch, capsys)


def test_bad_input_is_refused_before_any_long_work(files, monkeypatch, capsys):
    flags, began = ["--optimizer", "other.npz"], time.process_time()
    run_in_vain("a2c", flags, FILES["other.npz"], files, monkeypatch, capsys)
    assert time.process_time() - began < 1  # second, after the imports


@pytest.mark.parametrize("name", FILES)
def test_a_bad_theta_file_is_one_line_and_exit_2(name, files, monkeypatch, capsys):
    run_in_vain("a2c", ["--optimizer", name], FILES[name], files, monkeypatch, capsys)
    run_in_vain(
        "evaluate",
        ["--optimizers", "adam", f"untrained:{name}"],
        FILES[name],
        files,
        monkeypatch,
        capsys,
    )


def test_a_thousand_mutated_files_are_refused_in_one_line_or_hold_what_was_saved(good, tmp_path):
    """Bytes changed, cut out, doubled, swapped. No other error, and never other numbers."""
    whole, (theta, header), rng = good.read_bytes(), load_theta(good), random.Random(0)
    learned = optimizers.LEARNED["optim4rl"](**header["config"])
    refused, path = 0, tmp_path / "mutated.npz"
    warnings.simplefilter("ignore")  # numpy's and zipfile's, about what they see in there
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at, length = rng.randrange(len(data)), rng.choice((1, 1, 1, 4, 64))
            kind = rng.choice(("flip", "random", "cut", "double", "zero"))
            piece = bytes(data[at : at + length])
            new = {
                "flip": bytes(b ^ (1 << rng.randrange(8)) for b in piece),
                "random": rng.randbytes(len(piece)),
                "cut": b"",
                "double": piece * 2,
                "zero": bytes(len(piece)),
            }[kind]
            data[at : at + length] = new
        path.write_bytes(data)
        try:
            loaded, loaded_header = load_theta(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
            continue
        assert loaded_header == header
        if jax.tree.structure(loaded) != jax.tree.structure(theta):  # an array is gone, or its name
            with pytest.raises(ValueError, match="its arrays are not those"):
                optimizers.check_theta(str(path), learned, loaded)
            continue
        jax.tree.map(np.testing.assert_array_equal, loaded, theta)
    assert refused > 500


def test_loading_runs_nothing_from_the_file(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "sprung").unlink(missing_ok=True)
    with zipfile.ZipFile(tmp_path / "trap.npz", "w") as file:
        file.writestr("header.npy", buffer.getvalue())
        file.writestr("w.npy", buffer.getvalue())
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.npz", "pickle.npz"):
        with pytest.raises(ValueError, match="not a whole theta file"):
            load_theta(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_a_disk_that_is_full_is_one_line_and_no_half_file(tmp_path):
    """config.json cannot be written. (A checkpoint that cannot: test_damage.py.)"""
    flags = "--env-name catch --num-units 2 --num-iterations 2 --inner-updates 1".split()
    command = [sys.executable, str(ROOT / "pipeline_train.py"), *flags]
    limits = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    # Not on a GPU: its compiler writes files of its own.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limits, env=environment
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error: " in done.stderr.strip().splitlines()[-1] and "File too large" in done.stderr
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
