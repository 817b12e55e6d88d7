"""Theta files that are whole zip files with something wrong inside: load_learned refuses each in
one short line, or the optimizer that it returns works."""

import io
import json
import random
import re
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimizers
import tasks
from optim4rl import load_theta

SMALLEST = {
    "optim4rl": {"hidden_size": 1, "grad_clip": 1.0},
    "adam4rl": {"network_size": 1},
    "linear_optim": {"hidden_size": 1, "cell": "gru"},
    "l2lgd2": {"hidden_size": 1},
    "star": {"mlp_size": 1},
    "velo": {"lstm_size": 1, "num_bases": 1, "step_size": 1e-3},
}
ODD = (
    *(None, True, "", "x", "1", "1.0", "lstm", "x" * 5000, "a\nb", [], [1], [1.0], ["lstm"], [[1]]),
    *([1] * 5000, [-1], {}, {"a": {"b": [1]}}, 0, -1, 3, 2.5, 1e300, -(2**63), 2**63, 2**31),
    *(10**400, -1.0, 1e-300, 1e39, float("nan"), float("inf"), -float("inf")),
)
DTYPES = "f2 f4 f8 >f2 >f4 >f8 f16 i1 i4 >i8 u1 ? c8 S3 U3 V2 m8[s] M8[s] f4,i4 O".split()
NUMBERS = (1e300, -1e300, 1e39, float("nan"), float("inf"), -float("inf"))


def member(array):
    """The bytes of a .npy file. Python objects are pickled, as from a program with bad intent."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), allow_pickle=True)
    return buffer.getvalue()


def change_dtype(rng, header, arrays, name):
    arrays[name] = arrays[name].astype(rng.choice(DTYPES))


def change_number(rng, header, arrays, name):
    arrays[name] = arrays[name].astype(np.float64)
    arrays[name].flat[0] = rng.choice(NUMBERS)


def change_shape(rng, header, arrays, name):
    array = arrays[name]
    shapes = (array.T, array[None], array[:0], array.ravel(), array.sum(), np.repeat(array, 2, 0))
    arrays[name] = rng.choice(shapes)


def change_bytes(rng, header, arrays, name):
    """Of numpy's magic, its version, the length of its header, the header, or everything."""
    data = member(arrays[name])
    start, end = rng.choice(((0, 1), (0, 6), (6, 8), (8, 10), (10, 40), (0, len(data)), (50, 400)))
    new = rng.choice((b"", bytes(end - start), rng.randbytes(end - start), b"PK\3\4", b"9" * 9))
    arrays[name] = data[:start] + new + data[end:]


def change_names(rng, header, arrays, name):
    array = arrays.pop(name)
    names = ("", "/", f"{name}/x", f"/{name}", name.split("/")[0], "header/x", "n" * 9999, "a\nb")
    if new := rng.choice((*names, None)):
        arrays[new] = array


def change_header(rng, header, arrays, name):
    key = rng.choice(("format", "optimizer", "config", "trained"))
    header.pop(key) if rng.random() < 0.1 else header.update({key: rng.choice(ODD)})


def change_config(rng, header, arrays, name):
    config = header["config"]
    key = rng.choice((*optimizers.kind_settings(header["optimizer"]), "nosuch"))
    config.pop(key, None) if rng.random() < 0.1 else config.update({key: rng.choice(ODD)})


def change_trained(rng, header, arrays, name):
    key, value = rng.choice(("env_name", "learning_rate")), rng.choice(ODD)
    header["trained"][key] = [value] if rng.random() < 0.5 else value


CHANGES = (
    *(change_dtype, change_number, change_shape, change_bytes, change_names, change_header),
    *(change_config, change_trained),
)


def mutate(rng, path, header, arrays):
    """Write a file with one change, or two."""
    header, arrays = json.loads(json.dumps(header)), dict(arrays)
    changes = rng.choices(CHANGES, k=rng.choice((1, 1, 1, 2)))
    for change in changes:
        try:
            change(rng, header, arrays, rng.choice([*arrays] or ["none"]))
        except (LookupError, AttributeError, TypeError, ValueError):
            continue  # what the second would change is gone with the first
    text = json.dumps(header)
    if rng.random() < 0.05:
        text = rng.choice((text[:-1], "[]", "1", "null", '"x"', "[" * 10**5, "9" * 5000, ""))
    whole = {"header": np.array(text), **arrays}
    with zipfile.ZipFile(path, "w") as file:
        for name, array in whole.items():
            data = array if isinstance(array, bytes) else member(array)
            file.writestr(f"{name}.npy", data)
    return [change.__name__ for change in changes]


def one_update(learned, theta, compiled, config):
    """-> the updates of a tiny network. compiled: by config, filled here"""
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    key = json.dumps([config, [str(x.dtype) for x in jax.tree.leaves(theta)]])
    if key not in compiled:
        compiled[key] = jax.jit(
            lambda theta, grads: learned.update(
                *(theta, grads, learned.init_state(params), params, 1e-3),
                value=jnp.float32(1),
                fraction=jnp.float32(0.1),
                num_steps=jnp.float32(10),
            )[0]
        )
    return compiled[key](theta, jax.tree.map(lambda x: 0.01 * (x + 1), params))


def check_file(path, compiled):
    """Whether it is refused, which must be in one short line. What is not refused must work."""
    try:
        learned, theta, header = optimizers.load_learned(str(path))
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        assert len(str(error)) - len(str(path)) <= 250
        return True
    for leaf in jax.tree.leaves(theta):
        assert np.isfinite(leaf).all() and leaf.dtype in (np.float16, np.float32)
    updates = one_update(learned, theta, compiled, [header["optimizer"], header["config"]])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    rate = tasks.trained_rate(header.get("trained"), "catch")
    assert rate is None or 0 < rate < float("inf")
    return False


def whole_theta(path, kind):
    """Write the smallest whole file of this kind. -> header, arrays"""
    config = SMALLEST[kind]
    theta = optimizers.LEARNED[kind](**config).init_theta(jax.random.key(0))
    trained = {"env_name": ["catch"], "learning_rate": [1e-3]}
    optimizers.save_theta(path, theta, kind, config, trained)
    with np.load(path) as file:
        return load_theta(path)[1], {name: file[name] for name in file.files if name != "header"}


@pytest.mark.parametrize("kind", SMALLEST)
def test_a_changed_theta_file_is_refused_in_one_line_or_works(kind, tmp_path):
    warnings.simplefilter("ignore")  # numpy's, about what it sees in there
    whole, rng, compiled = whole_theta(tmp_path / "whole.npz", kind), random.Random(0), {}
    assert not check_file(tmp_path / "whole.npz", compiled)
    refused = []
    for _ in range(40):
        mutate(rng, tmp_path / "mutated.npz", *whole)
        refused.append(check_file(tmp_path / "mutated.npz", compiled))
    assert 20 < sum(refused) < 40


# changed settings in the header of an Optim4RL's file, what the line must hold
HEADERS = [
    ({"grad_clip": [1.0]}, "grad_clip of optim4rl must be a number above 0, or null, got [1.0]"),
    ({"grad_clip": "1"}, "grad_clip"),
    ({"grad_clip": -(2**63)}, "grad_clip"),
    ({"grad_clip": 2**63}, "grad_clip"),
    ({"grad_clip": float("nan")}, "grad_clip"),
    ({"grad_clip": True}, "grad_clip"),
    ({"hidden_size": 1.0}, "hidden_size of optim4rl must be a whole number from 1 to 65536"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"hidden_size": 2}, "its arrays are not those"),
    ({"readout_layers": 3}, "readout_layers"),
    ({"readout_layers": [1] * 10**5}, "readout_layers"),
    ({"cell": ["lstm"]}, "cell of optim4rl must be lstm or gru"),
    ({"inputs": {}}, "inputs of optim4rl must be raw or log"),
    ({"nosuch" * 1000: 1}, "is not a setting of optim4rl"),
]


@pytest.mark.parametrize("changed, hint", HEADERS)
def test_a_setting_in_a_header_that_does_not_fit_is_named(changed, hint, tmp_path):
    path = tmp_path / "changed.npz"
    header, arrays = whole_theta(path, "optim4rl")
    header["config"] |= changed
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    with pytest.raises(ValueError, match=re.escape(hint)):
        optimizers.load_learned(str(path))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
def test_floats_of_another_machine_are_the_same_numbers(dtype, tmp_path):
    path = tmp_path / "theta.npz"
    header, arrays = whole_theta(path, "optim4rl")
    expected = optimizers.load_learned(str(path))[1]
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    jax.tree.map(np.testing.assert_array_equal, optimizers.load_learned(str(path))[1], expected)


def test_a_theta_of_half_precision_is_float32_in_use(tmp_path):
    path = tmp_path / "theta.npz"
    header, arrays = whole_theta(path, "optim4rl")
    arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    _, theta, _ = optimizers.load_learned(str(path))
    for leaf, array in zip(jax.tree.leaves(theta), arrays.values(), strict=True):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, array)
