"""The baseline of bench.py: Optim4RL's meta-gradient in the usual form.

The optimizer's state is [P, H], one row per coordinate. jax.grad differentiates a scan over the
inner updates, with their rollouts, for all units in parallel on one device. Agent, environments and
theta are this project's, so the ratio measures only the form of the meta-gradient.
"""

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from optim4rl import EPS


def lstm(weights, state, x):
    """state: (h, c), each [P, H]; x: [P]"""
    h, c = state
    z = h @ weights["w_h"].T + x[:, None] * weights["w_x"][:, 0] + weights["b"]
    i, f, u, o = jnp.split(z, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(u)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def optim4rl(theta, learning_rate):
    """LSTM cell, raw inputs, one dense layer as read-out; the same numbers as in optim4rl.py."""

    def init(params):
        zeros = jnp.zeros((ravel_pytree(params)[0].size, theta["rnn1"]["w_h"].shape[1]))
        return ((zeros, zeros), (zeros, zeros))

    def update(grads, state, params=None):
        flat, unravel = ravel_pytree(grads)
        g = jnp.clip(jax.lax.stop_gradient(flat), -1.0, 1.0)
        state = lstm(theta["rnn1"], state[0], g), lstm(theta["rnn2"], state[1], jnp.square(g))
        o1, o2 = (
            state[i][0] @ theta[f"readout{i + 1}"]["0"]["w"][0] + theta[f"readout{i + 1}"]["0"]["b"]
            for i in (0, 1)
        )
        return unravel(
            -learning_rate * jnp.sign(g) * jnp.exp(o1) / jnp.sqrt(jnp.exp(o2) + EPS)
        ), state

    return optax.GradientTransformation(init, update)


def meta_gradient(theta, keys, units, agent, learning_rate, inner_updates, checkpoint=False):
    """-> mean meta-gradient of all units, units. checkpoint: keep the states between updates,
    recompute the rest."""

    def meta_loss(theta, key, unit):
        optimizer = optim4rl(theta, learning_rate)
        key_inner, key_meta = jax.random.split(key)
        keys = jax.random.split(key_inner, inner_updates)

        def inner_update(unit, key):
            return agent.learn(key, unit, optimizer)[0], None

        unit, _ = jax.lax.scan(
            jax.checkpoint(inner_update) if checkpoint else inner_update, unit, keys
        )
        return agent.loss(key_meta, unit)

    def mean_loss(theta):
        losses, new_units = jax.vmap(meta_loss, (None, 0, 0))(theta, keys, units)
        return jnp.mean(losses), new_units

    return jax.grad(mean_loss, has_aux=True)(theta)
