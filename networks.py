"""The parts of PPO's agents: dense networks, action distributions, running statistics of
observations. all_finite is meta-training's, too.

Legend: O observation size, A action size.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# --- Dense networks ---


def init_mlp(key: jax.Array, sizes: tuple[int, ...]) -> dict:
    """LeCun uniform weights, zero biases. sizes: input, hidden ..., output"""
    lecun = jax.nn.initializers.lecun_uniform()
    keys = jax.random.split(key, len(sizes) - 1)
    layers = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return {
        str(i): {"w": lecun(k, (n, m)), "b": jnp.zeros(m)} for i, (k, n, m) in enumerate(layers)
    }


def mlp(layers: dict, x: jax.Array) -> jax.Array:
    """Dense layers, swish between them. x: [..., input] -> [..., output]"""
    batch_shape = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    for i in range(len(layers)):
        x = (jax.nn.swish(x) if i else x) @ layers[str(i)]["w"] + layers[str(i)]["b"]
    return x.reshape(*batch_shape, -1)


# --- Distributions of actions, from the policy network's outputs ---


class Distribution(NamedTuple):
    """x is a sample, to_action(x) the action."""

    num_outputs: Callable  # action size -> size of the policy network's output
    sample: Callable  # key, outputs -> x
    log_prob: Callable  # outputs, x -> [...]
    entropy: Callable  # key, outputs -> [...]
    choose: Callable  # key, outputs -> x in an evaluation
    to_action: Callable  # x -> action


def normal(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., 2 A] -> mean, standard deviation, [..., A]"""
    mean, spread = jnp.split(outputs, 2, axis=-1)
    return mean, jax.nn.softplus(spread) + 1e-3


def sample_normal(key: jax.Array, outputs: jax.Array) -> jax.Array:
    mean, std = normal(outputs)
    return mean + std * jax.random.normal(key, mean.shape)


def log_slope(x: jax.Array) -> jax.Array:
    """log d tanh(x) / dx, without the cancellation of log(1 - tanh(x)^2)."""
    return 2 * (math.log(2) - x - jax.nn.softplus(-2 * x))


def tanh_normal_log_prob(outputs: jax.Array, x: jax.Array) -> jax.Array:
    """Log-density of the action tanh(x). x: [..., A] -> [...]"""
    mean, std = normal(outputs)
    return jnp.sum(jax.scipy.stats.norm.logpdf(x, mean, std) - log_slope(x), axis=-1)


def tanh_normal_entropy(key: jax.Array, outputs: jax.Array) -> jax.Array:
    """One-sample estimate of the action's entropy, which has no closed form. -> [...]"""
    _, std = normal(outputs)
    x = sample_normal(key, outputs)
    return jnp.sum(0.5 * math.log(2 * math.pi * math.e) + jnp.log(std) + log_slope(x), axis=-1)


def categorical_log_prob(outputs: jax.Array, x: jax.Array) -> jax.Array:
    """outputs: [..., A] logits; x: [...] int -> [...]"""
    return jnp.take_along_axis(jax.nn.log_softmax(outputs), x[..., None], axis=-1)[..., 0]


def categorical_entropy(key: jax.Array, outputs: jax.Array) -> jax.Array:
    """outputs: [..., A] logits -> [...]"""
    del key
    log_pi = jax.nn.log_softmax(outputs)
    return -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1)


TANH_NORMAL = Distribution(  # A numbers from -1 to 1
    num_outputs=lambda action_size: 2 * action_size,
    sample=sample_normal,
    log_prob=tanh_normal_log_prob,
    entropy=tanh_normal_entropy,
    choose=lambda key, outputs: normal(outputs)[0],
    to_action=jnp.tanh,
)
CATEGORICAL = Distribution(  # one of A
    num_outputs=lambda action_size: action_size,
    sample=jax.random.categorical,
    log_prob=categorical_log_prob,
    entropy=categorical_entropy,
    choose=jax.random.categorical,  # the mode would repeat one episode of a game without chance
    to_action=lambda x: x,
)


# --- Running statistics of observations ---


class Normaliser(NamedTuple):
    count: jax.Array  # []
    mean: jax.Array  # [O]
    sum_squares: jax.Array  # [O], of the distances to the mean


def update_normaliser(normaliser: Normaliser, obs: jax.Array) -> Normaliser:
    """Add a batch of observations (Welford's method; Chan, Golub, LeVeque 1979). obs: [..., O]"""
    obs = obs.reshape(-1, obs.shape[-1])
    mean = jnp.mean(obs, axis=0)
    sum_squares = jnp.sum((obs - mean) ** 2, axis=0)
    count = normaliser.count + len(obs)
    distance = mean - normaliser.mean
    return Normaliser(
        count,
        normaliser.mean + distance * len(obs) / count,
        normaliser.sum_squares + sum_squares + distance**2 * normaliser.count * len(obs) / count,
    )


def normalise(normaliser: Normaliser, obs: jax.Array) -> jax.Array:
    """Observations in standard deviations from their mean. obs: [..., O] -> [..., O]"""
    std = jnp.sqrt(normaliser.sum_squares / normaliser.count)
    return (obs - normaliser.mean) / jnp.clip(std, 1e-6, 1e6)


# --- Pytrees ---


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a pytree is finite. -> [] bool"""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
