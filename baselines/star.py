"""STAR: a learned optimizer made stable by a nominal term (Harrison, Metz & Sohl-Dickstein 2022,
arXiv 2209.11208).

A small network reads, for every parameter, momenta, second moments and Adafactor's factored second
moments of its tensor, each feature normalised over the tensor, and an embedding of the step count.
Its outputs d and s, and the nominal term:

    update = -learning_rate d exp(0.001 s)
             - 0.001 exp(0.001) mean over decays of m / sqrt(rms + 1e-6)

theta holds the network and the decays. Not coordinate-wise: a parameter's features depend on the
rest of its tensor. velo.py uses the same moments and features.

Legend: D decays, F features; a tensor of any shape stands behind these axes.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optim4rl import LearnedOptimizer, check_params, init_dense, readout

DECAYS = {"momentum": (0.9, 0.99, 0.999), "rms": (0.999,), "adafactor": (0.9, 0.99, 0.999)}
EXP_SCALE = 1e-3  # of the magnitude s
NOMINAL_STEP = 1e-3 * math.exp(EXP_SCALE)  # as published: its magnitude is 1 without a controller
TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)


class Moments(NamedTuple):
    """Running means of one tensor's gradients. A tensor of fewer than two axes is not factored: row
    is v itself, col a 0 (checkpoints take no empty arrays)."""

    m: jax.Array  # [3, *shape] of g
    rms: jax.Array  # [1, *shape] of g^2
    row: jax.Array  # [3, *shape without its largest axis] of g^2, mean over that axis
    col: jax.Array  # [3, *shape without its second largest axis], likewise


class State(NamedTuple):
    moments: Any  # a Moments for each tensor
    count: jax.Array  # [] int32, updates so far


def factored_axes(shape: tuple) -> tuple[int, int] | None:
    """The axes that row and col are means over: the largest and the second largest; None for fewer,
    or an empty tensor."""
    if len(shape) < 2 or 0 in shape:
        return None
    *_, second, largest = np.argsort(shape, kind="stable").tolist()
    return largest, second


def init_moments(param: jax.Array) -> Moments:
    axes, shape = factored_axes(jnp.shape(param)), jnp.shape(param)
    row, col = (np.delete(shape, axis) for axis in axes) if axes else (shape, (1,))
    sizes = {"m": shape, "rms": shape, "row": row, "col": col}
    decays = {"m": "momentum", "rms": "rms", "row": "adafactor", "col": "adafactor"}
    return Moments(
        **{name: jnp.zeros((len(DECAYS[decays[name]]), *size)) for name, size in sizes.items()}
    )


def running_mean(old: jax.Array, new: jax.Array, decays: jax.Array) -> jax.Array:
    """old: [D, ...]; new: [...]; decays: [D] -> [D, ...]"""
    decays = jnp.clip(decays, 0, 1).reshape(-1, *[1] * new.ndim)
    return decays * old + (1 - decays) * new


def update_moments(moments: Moments, g: jax.Array, decays: dict) -> Moments:
    """decays: for each key of DECAYS an array of as many."""
    square = g * g
    m = running_mean(moments.m, g, decays["momentum"])
    rms = running_mean(moments.rms, square, decays["rms"])
    axes = factored_axes(g.shape)
    square = square + 1e-30
    means = [jnp.mean(square, axis) for axis in axes] if axes else [square, jnp.zeros(1)]
    row = running_mean(moments.row, means[0], decays["adafactor"])
    col = running_mean(moments.col, means[1], decays["adafactor"])
    return Moments(m, rms, row, col)


def safe_rsqrt(x: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.maximum(x, 1e-9))


def adafactor_scales(moments: Moments, shape: tuple) -> jax.Array:
    """1 / sqrt of the second moment that row and col stand for, row col^T / mean(row) (Shazeer &
    Stern 2018). -> [D, *shape]"""
    axes = factored_axes(shape)
    if not axes:
        return safe_rsqrt(moments.row + 1e-9)
    largest, second = axes
    mean = jnp.mean(moments.row, axis=1 + second - (second > largest), keepdims=True)
    row, col = safe_rsqrt(moments.row / (mean + 1e-9)), safe_rsqrt(moments.col)
    return jnp.expand_dims(row, 1 + largest) * jnp.expand_dims(col, 1 + second)


def features(
    p: jax.Array, g: jax.Array, moments: Moments, eps: float = 1e-6
) -> dict[str, jax.Array]:
    """What the networks of STAR and VeLO read of a tensor, by name, [D, *shape] each. eps: see
    "adafactor m"."""
    m, rms, row, col = moments
    rsqrt = jax.lax.rsqrt(rms + 1e-6)
    scales = adafactor_scales(moments, g.shape)
    axes = factored_axes(g.shape)
    if axes:
        row, col = (jnp.expand_dims(v, 1 + axis) for v, axis in zip((row, col), axes, strict=True))
        adafactor_m = m * scales
    else:
        col, adafactor_m = row, m * jax.lax.rsqrt(row + eps)
    shape = (len(row), *g.shape)
    found = {
        "g": g[None],
        "p": p[None],
        "m": m,
        "rms": rms,
        "adam": m * rsqrt,
        "rsqrt": rsqrt,
        "adafactor g": g * scales,
    }
    found |= {
        "row": row,
        "col": col,
        "row rsqrt": jax.lax.rsqrt(row + 1e-8),
        "col rsqrt": jax.lax.rsqrt(col + 1e-8),
    }
    found = {
        name: jnp.broadcast_to(x, shape) if name[:3] in ("row", "col") else x
        for name, x in found.items()
    }
    return found | {"adafactor m": adafactor_m}


def normalise(x: jax.Array) -> jax.Array:
    """Each feature over the root of its mean square in the tensor. x: [F, *shape]"""
    return x * jax.lax.rsqrt(1e-5 + jnp.mean(x * x, axis=tuple(range(1, x.ndim)), keepdims=True))


def network(layers: dict, x: jax.Array) -> jax.Array:
    """Dense layers on the first axis, ReLU between them. x: [F, *shape] -> [outputs, *shape]"""
    out = readout(layers, x.reshape(len(x), math.prod(x.shape[1:])))
    return out.reshape(len(out), *x.shape[1:])


def decays_of(theta: dict) -> dict:
    """The decays as theta has moved them: 1 - (1 - initial) exp(10 x), so that x = 0 is the initial
    one."""
    return {
        name: 1 - (1 - jnp.array(initial)) * jnp.exp(10 * theta["decays"][name])
        for name, initial in DECAYS.items()
    }


def update_tensor(
    theta: dict, g: jax.Array, p: jax.Array, moments: Moments, count, learning_rate
) -> tuple:
    """One tensor's update. g, p: [*shape] -> update [*shape], Moments"""
    dtype, (g, p) = p.dtype, (x.astype(float) for x in (jax.lax.stop_gradient(g), p))
    moments = update_moments(moments, g, decays_of(theta))
    found = features(p, g, moments)
    embedding = jnp.tanh(count / jnp.array(TIMESCALES, float) - 1)
    embedding = jnp.broadcast_to(embedding.reshape(-1, *[1] * g.ndim), (len(TIMESCALES), *g.shape))
    inputs = jnp.concatenate([normalise(jnp.concatenate(list(found.values()))), embedding])
    direction, magnitude = network(theta["network"], inputs)
    update = -learning_rate * direction * jnp.exp(EXP_SCALE * magnitude) - NOMINAL_STEP * jnp.mean(
        found["adam"], axis=0
    )
    return update.astype(dtype), moments


def make_star(mlp_size: int = 4) -> LearnedOptimizer:
    """STAR with two hidden layers of mlp_size."""

    def init_theta(key):
        tensor = jnp.zeros((2, 2))
        num_features = sum(
            len(x) for x in features(tensor, tensor, init_moments(tensor)).values()
        ) + len(TIMESCALES)
        decays = {name: jnp.zeros(len(initial)) for name, initial in DECAYS.items()}
        return {"network": init_dense(key, (num_features, mlp_size, mlp_size, 2)), "decays": decays}

    def init_state(params):
        return State(jax.tree.map(init_moments, params), jnp.int32(0))

    def update(theta, grads, state, params, learning_rate, **extra_args):
        check_params(params)
        del extra_args

        treedef = jax.tree.structure(grads)
        tensors = zip(*map(treedef.flatten_up_to, (grads, params, state.moments)), strict=True)
        pairs = [update_tensor(theta, *tensor, state.count, learning_rate) for tensor in tensors]
        updates, moments = (treedef.unflatten(part) for part in zip(*pairs, strict=True))
        return updates, State(moments, state.count + 1)

    return LearnedOptimizer(init_theta, init_state, update)
