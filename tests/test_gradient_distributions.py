"""Counts against numpy's histogram of gradients that are kept; IDX files; the script from the
command line to its files."""

import csv
import gzip
import importlib.util
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import classifier
import gradient_distributions
from gradient_distributions import KINDS, STAGES, bin_edges, counting, histogram


def numpy_histogram(x):
    log = np.log10(np.abs(np.asarray(x, np.float64)) + 1e-8)
    return np.histogram(np.clip(log, bin_edges()[0], bin_edges()[-1] - 1e-6), bin_edges())[0]


def test_histogram_is_numpys():
    x = jax.random.normal(jax.random.key(0), (5000,)) * jnp.exp(
        4 * jax.random.normal(jax.random.key(1), (5000,))
    )
    x = x.at[:7].set(jnp.array([0.0, 1e-12, 1e9, -1e9, jnp.inf, 1.05, -1.05e-3]))
    ours, theirs = np.asarray(histogram(x)), numpy_histogram(x)
    assert ours.sum() == 5000 and np.abs(ours - theirs).sum() <= 4  # float32 at an edge
    assert histogram(jnp.array([jnp.nan, 0.0, jnp.nan, 1.05])).sum() == 2


def test_the_learning_rate_is_the_one_that_a2c_takes():
    name = "pretrained/optim4rl_small_dense_short"  # meta-trained at 3e-2, not at the paper's 3e-3
    for optimizer, expected in (("adam", 3e-3), (name, 3e-2), ("pretrained/adam4rl", 1.0)):
        args = gradient_distributions.Args(env_name="small_dense_short", optimizer=optimizer)
        assert gradient_distributions.usual_rate(args) == expected


def test_counting_sees_the_first_the_middle_and_the_last_tenth():
    """40 updates: 4 of each stage, from the 1st, the 19th and the 37th. The updates are the
    optimizer's own."""
    params = {"one": {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}, "two": {"w": jnp.ones(5)}}
    optimizer, counted = optax.adam(0.1), counting(optax.adam(0.1), 40)
    state, counted_state = optimizer.init(params), counted.init(params)
    expected = np.zeros((len(STAGES), len(KINDS), 3, len(bin_edges()) - 1), int)
    update = jax.jit(counted.update)
    for number in range(40):
        keys = iter(jax.random.split(jax.random.key(number), 3))
        grads = jax.tree.map(
            lambda x, keys=keys: 0.01 * jax.random.normal(next(keys), x.shape), params
        )
        updates, state = optimizer.update(grads, state)
        ours, counted_state = update(grads, counted_state)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, updates
        )
        stages = [s for s, start in enumerate((0, 18, 36)) if start <= number < start + 4]
        for k, tree in enumerate((grads, ours)):
            layers = [
                numpy_histogram(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree[name])]))
                for name in tree
            ]
            for s in stages:
                expected[s, k] += np.array([*layers, sum(layers)])
    counts = np.asarray(counted_state.counts)
    np.testing.assert_array_equal(counts.sum(axis=-1), expected.sum(axis=-1))
    assert np.abs(counts - expected).sum() <= 8


def write_idx(path, array):
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def mnist(tmp_path):
    """Two hundred small images of ten classes that a classifier can tell apart."""
    labels = np.arange(200, dtype=np.uint8) % 10
    images = np.random.default_rng(0).integers(0, 60, (200, 6, 5), dtype=np.uint8)
    images.reshape(200, -1)[np.arange(200), 3 * labels] = 255
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    return tmp_path, images, labels


def test_idx_files_are_read_whole(mnist):
    folder, images, labels = mnist
    read_images, read_labels = classifier.load_mnist(folder)
    np.testing.assert_allclose(read_images[..., 0] * 255, images, rtol=1e-6)
    np.testing.assert_array_equal(read_labels, labels)


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\10\3\0\0", b"\0\0\15\1\0\0\0\1a", b"\0\0\10\1\0\0\0\7abc", b"<html>"]
)
def test_what_is_no_idx_file_is_one_line(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="not an IDX file") as error:
        classifier.read_idx(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_a_gzip_file_with_a_flipped_bit_is_one_line(tmp_path):
    data = bytearray(gzip.compress(bytes(range(256)) * 40))
    for place in range(20, 60):
        data[place] ^= 255
    (tmp_path / "x.gz").write_bytes(data)
    with pytest.raises(ValueError, match="not an IDX file"):
        classifier.read_idx(tmp_path / "x.gz")


def test_a_download_must_have_its_checksum(tmp_path, monkeypatch):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "train-labels-idx1-ubyte.gz").write_bytes(b"something else")
    monkeypatch.setattr(
        classifier, "MIRRORS", (f"file://{tmp_path}/nosuch/", f"file://{tmp_path}/mirror/")
    )
    with pytest.raises(ValueError, match="another checksum"):
        classifier.download("train-labels-idx1-ubyte", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def check_files(cwd, num_coordinates, tenth):
    (folder,) = (cwd / "runs").iterdir()
    with open(folder / "distributions.csv") as file:
        rows = list(csv.DictReader(file))
    for stage in STAGES:
        for kind in KINDS:
            counts = [
                int(row["count"])
                for row in rows
                if (row["stage"], row["of"], row["layer"]) == (stage, kind, "all")
            ]
            assert sum(counts) == tenth * num_coordinates
    assert (folder / "distributions.png").read_bytes()[1:4] == b"PNG"


def test_mnist_to_its_files_with_an_optimizer_that_has_no_learning_rate(mnist, call):
    """It gets its own rate, 1, and the number of updates."""
    flags = "--task mnist --batch-size 20 --num-epochs 3 --optimizer pretrained/adam4rl --data-dir"
    code, _, err = call(gradient_distributions.main, *flags.split(), mnist[0])
    assert code == 0, err
    check_files(mnist[0], 4 * 16 + 16 + 30 * 16 * 32 + 32 + 320 + 10, 3)
    config = json.loads(next(mnist[0].glob("runs/*/config.json")).read_text())
    assert config["args"]["learning_rate"] == 1.0


def test_a2c_to_its_files(call, tmp_path):
    flags = "--task a2c --env-name small_dense_short --total-steps 204800"
    flags += " --optimizer adam --learning-rate 1e-2"
    code, _, err = call(gradient_distributions.main, *flags.split())
    assert code == 0, err
    check_files(tmp_path, 6 * 8 * 3 * 32 + 32 + 32 * 9 + 9 + 32 + 1, 2)


@pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is not None, reason="scikit-learn is installed"
)
def test_digits_without_scikit_learn_is_one_line(call):
    code, _, err = call(gradient_distributions.main, "--task", "digits")
    assert code == 2 and err.count("\n") == 1 and "pip install scikit-learn" in err


def test_the_classifier_learns(mnist):
    images, labels = classifier.load_mnist(mnist[0])
    params, _ = classifier.train(
        jax.random.key(0), images, labels, optax.adam(3e-3), 20, 30, lambda *_: False
    )
    assert (
        np.mean(np.argmax(classifier.logits(params, jnp.asarray(images)), axis=1) == labels) > 0.95
    )
