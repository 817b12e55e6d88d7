"""OPEN, a learned optimizer for RL that its authors evolved on whole lifetimes (Goldie et al. 2024,
arXiv 2407.07082), to run its published weights (tools/convert_open.py makes a theta file of them).

Inputs of each coordinate: its value p; sign and log of six momenta and of the gradient, all divided
by their root mean square over the tensor; the fraction of PPO iterations done, the position of the
layer, the fraction of the iteration's epochs done, and the layer's dormancy, here always 1, its
mean. A GRU and a small network read them, and

    u = 0.001 o_0 exp(0.001 o_1) + 0.001 o_2 epsilon          update = u_mean - u

with epsilon normal noise for the actor and 0 for the critic, and u_mean over all coordinates. The
gradient of each network is clipped to the norm 0.5. The learning rate multiplies the update; it is
1 as published.

Actor and critic are the entries "policy" and "value" of the parameters (ppo.py). Parameters without
these are one network, with noise.

Legend: H hidden units, M units of the network's layers; a tensor of n coordinates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim4rl import LearnedOptimizer, check_params

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
NUM_INPUTS = 1 + 2 * len(DECAYS) + 2 + 4
TINY, EPS, NORM_EPS = 1e-13, 1e-5, 1e-6
SCALE = 1e-3
MAX_NORM = 0.5
A2C_DEPTHS = {"conv": 0, "dense": 1, "actor": 2, "critic": 2}
GRU = {"hn": "h", "hr": "h", "hz": "h", "in": "x", "ir": "x", "iz": "x"}
WITHOUT_BIAS = ("hr", "hz")
# What update reads of ppo.py's extra arguments, and the values without them.
EXTRA_ARGS = dict(fraction=0.0, num_steps=1.0, iteration_step=0, num_epochs=1, num_minibatches=1)


class Tensor(NamedTuple):
    """State of one tensor."""

    momenta: jax.Array  # [6, n]
    h: jax.Array  # [H, n]


class State(NamedTuple):
    tensors: Any  # a pytree of Tensor
    count: jax.Array  # [] int32, updates done
    seed: jax.Array  # [] uint32, of the noise


def theta_shapes(hidden: int, width: int) -> dict:
    """Shapes of theta. Weights are [inputs, outputs]."""
    inputs = {"x": NUM_INPUTS, "h": hidden}
    gru = {name: {"w": (inputs[of], hidden)} for name, of in GRU.items()}
    for name in GRU:
        if name not in WITHOUT_BIAS:
            gru[name]["b"] = (hidden,)
    layers = {"0": (hidden, width), "3": (width, width), "6": (width, 3)}
    dense = {name: {"w": shape, "b": shape[1:]} for name, shape in layers.items()}
    norm = {name: {"scale": (width,), "bias": (width,)} for name in ("1", "4")}
    return {"gru": gru, "dense": dense, "norm": norm}


def gru(theta: dict, h: jax.Array, x: jax.Array) -> jax.Array:
    """h: [H, n]; x: [19, n] -> h"""

    def linear(name):
        layer = theta[name]
        out = layer["w"].T @ (x if GRU[name] == "x" else h)
        return out + layer["b"][:, None] if "b" in layer else out

    r, z = jax.nn.sigmoid(linear("ir") + linear("hr")), jax.nn.sigmoid(linear("iz") + linear("hz"))
    return (1 - z) * jnp.tanh(linear("in") + r * linear("hn")) + z * h


def layer_norm(layer: dict, x: jax.Array) -> jax.Array:
    """Over the units of each coordinate. x: [M, n]"""
    mean, variance = jnp.mean(x, axis=0), jnp.var(x, axis=0)
    x = (x - mean) / jnp.sqrt(variance + NORM_EPS)
    return layer["scale"][:, None] * x + layer["bias"][:, None]


def outputs(theta: dict, h: jax.Array) -> jax.Array:
    """h: [H, n] -> o [3, n]"""
    for dense, norm in (("0", "1"), ("3", "4"), ("6", None)):
        layer = theta["dense"][dense]
        h = layer["w"].T @ h + layer["b"][:, None]
        h = jax.nn.relu(layer_norm(theta["norm"][norm], h)) if norm else h
    return h


def inputs(p: jax.Array, g: jax.Array, momenta: jax.Array, shared: list) -> jax.Array:
    """p, g: [n]; momenta: [6, n]; shared: four numbers -> [19, n]"""
    x = jnp.concatenate(
        [
            p[None],
            jnp.sign(momenta),
            jnp.log(jnp.abs(momenta) + TINY),
            jnp.sign(g)[None],
            jnp.log(jnp.abs(g) + TINY)[None],
        ]
    )
    x /= jnp.sqrt(EPS + jnp.mean(jnp.square(x), axis=1, keepdims=True))
    return jnp.concatenate([x, jnp.broadcast_to(jnp.stack(shared)[:, None], (4, p.size))])


def networks_of(params: Any) -> list[list[tuple]]:
    """The leaves of each network, as (path, leaf)."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    if not isinstance(params, dict) or set(params) != {"policy", "value"}:
        return [leaves]
    return [[leaf for leaf in leaves if leaf[0][0].key == name] for name in params]


def positions(params: Any) -> dict:
    """For each leaf's path the position of its layer in its network: 0 the first, 1 the last. The
    order is that of numbers, of a2c.py's layers, or of the alphabet."""
    found = {}
    for leaves in networks_of(params):
        layers = list(dict.fromkeys(path[:-1] for path, _ in leaves))
        depths = {layer: depth(layer, place) for place, layer in enumerate(layers)}
        ranks = sorted({*depths.values()})
        for path, _ in leaves:
            found[path] = ranks.index(depths[path[:-1]]) / max(1, len(ranks) - 1)
    return found


def depth(layer: tuple, place: int) -> int:
    """Of a layer's path, whose place in the alphabet counts if its name says nothing."""
    name = str(getattr(layer[-1], "key", "")) if layer else ""
    return A2C_DEPTHS.get(name, int(name) if name.isdigit() else place)


def clip_each(grads: Any) -> dict:
    """The leaves by path, with each network's gradient clipped to MAX_NORM."""
    clipped = {}
    for leaves in networks_of(grads):
        norm = optax.tree.norm([leaf for _, leaf in leaves])
        scale = jnp.minimum(1.0, MAX_NORM / jnp.maximum(norm, 1e-30))
        clipped |= {path: scale * leaf for path, leaf in leaves}
    return clipped


def shared_inputs(extra_args: dict) -> tuple[jax.Array, jax.Array]:
    """The fractions of PPO's iterations, and of the iteration's epochs, that are done. extra_args:
    ppo.py's; without them it is the first update of one iteration."""
    fraction, num_steps, step, num_epochs, num_minibatches = (
        extra_args.get(name, default) for name, default in EXTRA_ARGS.items()
    )
    steps = num_epochs * num_minibatches  # of an iteration
    iteration = (fraction * num_steps - step) / steps
    done = iteration / jnp.maximum(num_steps / steps - 1, 1)
    return done, (step // num_minibatches) / jnp.maximum(num_epochs - 1, 1)


def step_tensor(theta: dict, tensor: Tensor, p, g, shared: list, noise) -> tuple:
    """p, g, noise: [n] -> u [n], Tensor"""
    decays = jnp.array(DECAYS)[:, None]
    momenta = decays * tensor.momenta + (1 - decays) * g
    x = inputs(p, g, momenta, [jnp.float32(x) for x in shared])
    h = gru(theta["gru"], tensor.h, x)
    o = outputs(theta, h)
    u = SCALE * o[0] * jnp.exp(SCALE * o[1]) + SCALE * o[2] * noise
    return u, Tensor(momenta, h)


def initial_theta(key: jax.Array, hidden: int, width: int) -> dict:
    lecun, shapes = jax.nn.initializers.lecun_normal(), theta_shapes(hidden, width)
    shapes, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(shapes))
    draw = [lecun(k, s) if len(s) > 1 else jnp.zeros(s) for k, s in zip(keys, shapes, strict=True)]
    theta = jax.tree.unflatten(treedef, draw)
    ones = {name: layer | {"scale": jnp.ones(width)} for name, layer in theta["norm"].items()}
    return theta | {"norm": ones}


def make_open(hidden_size: int = 8, width: int = 16) -> LearnedOptimizer:
    """OPEN, with H = hidden_size and M = width."""

    def init_theta(key):
        return initial_theta(key, hidden_size, width)

    def init_state(params):
        def tensor(p):
            size = np.size(p)
            return Tensor(jnp.zeros((len(DECAYS), size)), jnp.zeros((hidden_size, size)))

        leaves = [jnp.asarray(p, jnp.float32) for p in jax.tree.leaves(params)]
        total = jnp.float32(sum(jnp.sum(p) for p in leaves))  # another seed for other parameters
        seed = jax.lax.bitcast_convert_type(total, jnp.uint32)
        return State(jax.tree.map(tensor, params), jnp.int32(0), seed)

    def update(theta, grads, state, params, learning_rate, **extra_args):
        check_params(params)
        done, epoch = shared_inputs(extra_args)
        key = jax.random.fold_in(jax.random.key(state.seed), state.count)
        position, clipped = positions(params), clip_each(jax.lax.stop_gradient(grads))
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        two_networks = len(networks_of(params)) == 2
        us, tensors = [], []
        for i, ((path, p), tensor) in enumerate(
            zip(leaves, treedef.flatten_up_to(state.tensors), strict=True)
        ):
            p, g = (x.astype(jnp.float32).ravel() for x in (p, clipped[path]))
            is_critic = two_networks and path[0].key == "value"
            noise = 0.0 if is_critic else jax.random.normal(jax.random.fold_in(key, i), g.shape)
            u, tensor = step_tensor(theta, tensor, p, g, [done, position[path], epoch, 1.0], noise)
            us.append(u)
            tensors.append(tensor)
        mean = jnp.mean(jnp.concatenate(us)) if us else 0.0
        updates = [
            (-learning_rate * (u - mean)).reshape(p.shape).astype(p.dtype)
            for u, (_, p) in zip(us, leaves, strict=True)
        ]
        tensors = treedef.unflatten(tensors)
        return treedef.unflatten(updates), State(tensors, state.count + 1, state.seed)

    return LearnedOptimizer(init_theta, init_state, update, own_rate=1.0)
