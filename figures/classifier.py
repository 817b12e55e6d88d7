"""Supervised learning, for comparison: a small convolutional classifier of digits, with any
optimizer.

The network is that of the big gridworlds (a convolution of 16 2x2 filters, 32 hidden units). The
data is MNIST from the usual IDX files, or the 8x8 digits of scikit-learn. gradient_distributions.py
uses it.

Legend: B images of a minibatch.
"""

import gzip
import hashlib
import http.client
import struct
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from a2c import conv2x2
from runs import write_whole

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FILES = {  # name: MD5 of the .gz
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
}
NUM_CLASSES = 10


# --- Data ---


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in an IDX file, gzipped or not. Raises a one-line ValueError for anything
    else."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, dimensions = struct.unpack(">HBB", data[:4])
        if zeros or kind != 8:
            raise ValueError("it does not begin as a file of bytes does")
        shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{path}: not an IDX file ({error})") from None


def download(name: str, folder: Path) -> Path:
    """Fetch a file of MNIST from the first mirror that has it intact. Raises a one-line ValueError
    if none has."""
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=10) as response:
                data = response.read()
        except (OSError, http.client.HTTPException) as error:  # also one cut off
            reasons.append(f"{mirror}: {error}")
            continue
        if hashlib.md5(data, usedforsecurity=False).hexdigest() == FILES[name]:
            write_whole(folder / f"{name}.gz", lambda file, data=data: file.write(data))
            return folder / f"{name}.gz"
        reasons.append(f"{mirror}: another checksum")
    raise ValueError(
        f"{name} is not in {folder} and cannot be downloaded ({'; '.join(reasons)}); "
        "put it there, or use --task digits"
    )


def load_mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> images [N, 28, 28, 1] from 0 to 1, labels [N]. Files that are not in `folder` are
    downloaded."""
    arrays = []
    for name in FILES:
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
        arrays.append(read_idx(found[0] if found else download(name, folder)))
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: images of shape {images.shape} and labels of shape {labels.shape} "
            "do not go together"
        )
    return images[..., None] / np.float32(255), labels.astype(np.int32)


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """-> images [1797, 8, 8, 1] from 0 to 1, labels [1797], from scikit-learn. Raises ValueError if
    it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("--task digits needs scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    return (data.images[..., None] / 16).astype(np.float32), data.target.astype(np.int32)


# --- Network and training ---


def init_network(key: jax.Array, image_shape: tuple, filters: int = 16, hidden: int = 32) -> dict:
    """LeCun normal weights and zero biases."""
    height, width, planes = image_shape
    sizes = {
        "conv": (4 * planes, filters),
        "dense": (height * width * filters, hidden),
        "output": (hidden, NUM_CLASSES),
    }
    lecun = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(sizes))
    return {
        name: {"w": lecun(k, size), "b": jnp.zeros(size[1])}
        for k, (name, size) in zip(keys, sizes.items(), strict=True)
    }


def logits(params: dict, images: jax.Array) -> jax.Array:
    """images: [B, height, width, planes] -> [B, 10]"""
    x = jax.nn.relu(conv2x2(params["conv"], images)).reshape(len(images), -1)
    x = jax.nn.relu(x @ params["dense"]["w"] + params["dense"]["b"])
    return x @ params["output"]["w"] + params["output"]["b"]


def mean_loss(params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels))


def num_updates(num_images: int, batch_size: int, num_epochs: int) -> int:
    return num_epochs * (num_images // batch_size)


def train(
    key: jax.Array,
    images,
    labels,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    num_epochs: int,
    on_update: Callable,
):
    """Train on minibatches, in a new order each epoch. -> params, opt_state

    on_update(number, loss) is called after each update; training ends if it returns True.
    """
    key_params, key_order = jax.random.split(key)
    params = init_network(key_params, images.shape[1:])
    opt_state = optimizer.init(params)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    total = num_updates(len(images), batch_size, num_epochs)

    @jax.jit
    def update(params, opt_state, batch, fraction):
        loss, grads = jax.value_and_grad(mean_loss)(params, images[batch], labels[batch])
        extra_args = {"value": loss, "fraction": fraction, "num_steps": float(total)}
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, opt_state, params, **extra_args
        )
        return optax.apply_updates(params, updates), opt_state, loss

    number = 0
    for epoch in range(num_epochs):
        order = jax.random.permutation(jax.random.fold_in(key_order, epoch), len(images))
        for batch in order[: len(images) // batch_size * batch_size].reshape(-1, batch_size):
            params, opt_state, loss = update(params, opt_state, batch, number / total)
            number += 1
            if on_update(number, loss):
                return params, opt_state
    return params, opt_state
