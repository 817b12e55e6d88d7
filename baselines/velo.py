"""VeLO: a learned optimizer with two levels (Metz et al. 2022, arXiv 2211.09760).

For each tensor an LSTM reads its moments, the course of the training loss and the fraction of
training done. It outputs the weights of a small network (a mixture of bases in theta) and a step
multiplier. The small network reads the features of star.py for every parameter of the tensor. With
its outputs d and s

    update = -learning_rate multiplier d exp(0.001 s) sqrt(mean(p^2))

The loss and the fraction are extra arguments of optax: optimizer.update(grads, state, params,
value=loss, fraction=done).

tools/convert_velo.py makes a theta file from the published weights, whose learning rate is 1e-3 in
all environments.

Legend: D decays, F features, M tensors, B bases.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from baselines import star
from baselines.star import Moments, features, init_moments, normalise, update_moments
from optim4rl import LearnedOptimizer, check_params, init_dense, init_rnn, lstm, readout

FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
LOSS_MEANS = 10  # running means of the loss, with time constants from 10 updates to all of training
TENSOR_FEATURES = len(FRACTIONS) + (LOSS_MEANS - 1) + 1 + 5 + 3 + 3
HIDDEN = 4  # units in each of the small network's two hidden layers


class LossMeans(NamedTuple):
    mean: jax.Array  # [LOSS_MEANS], debiased
    lowest: jax.Array  # [LOSS_MEANS], the lowest value of each so far


class State(NamedTuple):
    moments: Any  # a star.Moments for each tensor
    lstm: tuple  # h and c, each [H, M]
    loss: LossMeans
    count: jax.Array  # [] int32, updates so far


# --- What the LSTM reads ---


def loss_decays(count: jax.Array, fraction: jax.Array) -> jax.Array:
    """[LOSS_MEANS], time constants spaced evenly in log from 10 to the total number of updates,
    count / fraction."""
    total = jnp.clip(count / jnp.maximum(fraction, 1e-9), 10.0, 1e6)  # at more a decay rounds to 1
    return jnp.exp(-1 / 10 ** jnp.linspace(1.0, jnp.log10(total), LOSS_MEANS))


def update_loss(
    means: LossMeans, loss: jax.Array, count: jax.Array, fraction: jax.Array
) -> LossMeans:
    """The means with one more loss, which is clipped to twice the greatest mean. The first update
    needs no total number of updates, because the means are debiased."""
    decays = loss_decays(count, fraction)
    weight = 1 - decays ** (count + 1)
    greatest = jnp.max(means.mean * (1 - decays**count) / weight)
    loss = jnp.where(count == 0, loss, jnp.minimum(2 * jnp.abs(greatest), loss))
    mean = means.mean + (1 - decays) / weight * (loss - means.mean)
    return LossMeans(mean, jnp.minimum(means.lowest, mean))


def loss_features(means: LossMeans, count: jax.Array) -> jax.Array:
    """The position of each mean between its lowest value and the next longer mean, minus 1.

    count: updates done, with this one. -> [LOSS_MEANS - 1]
    """
    short, lowest, longer = means.mean[:-1], means.lowest[:-1], means.mean[1:]
    height = (short - lowest) / jnp.maximum(longer - lowest, 1e-8)
    return jnp.where(count <= 2, 0.0, jnp.clip(height - 1, -1, 1))


def tensor_features(
    p: jax.Array, moments: Moments, loss: jax.Array, fraction: jax.Array
) -> jax.Array:
    """The LSTM's input for a tensor; moments: those before the current gradient.
    -> [TENSOR_FEATURES]"""
    if not p.size:
        return jnp.zeros(TENSOR_FEATURES)
    scale = jax.lax.rsqrt(jnp.maximum(jnp.mean(p * p), 1e-9))
    axes = tuple(range(1, 1 + p.ndim))
    m, rms = scale * moments.m, scale * moments.rms
    mean_m, mean_rms = jnp.mean(m, axes, keepdims=True), jnp.mean(rms, axes)
    var_m = jnp.mean((m - mean_m) ** 2, axes)
    # About the mean of m, as in the training of the published weights.
    var_rms = jnp.mean((rms - mean_m) ** 2, axes)

    def log(x):
        return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10 * x)), -5, 5)

    rank = jax.nn.one_hot(sum(size > 1 for size in p.shape), 5)
    done = jnp.tanh(10 * (fraction - jnp.array(FRACTIONS)))
    return jnp.concatenate([done, loss, log(mean_rms), rank, log(var_m), log(var_rms)])


# --- The two networks ---


def per_tensor(theta: dict, x: jax.Array, state: tuple) -> tuple:
    """The LSTM, for all tensors at once. x: [TENSOR_FEATURES, M] -> mixture [B, M], step multiplier
    [M], state"""
    mixed = jnp.max(jax.nn.relu(readout(theta["mix"], x)), axis=1, keepdims=True)
    h, c = lstm(theta["lstm"], state, readout(theta["input"], x) + mixed)
    return readout(theta["mixture"], h), readout(theta["multiplier"], h)[0], (h, c)


def update_tensor(bases: dict, mixture, multiplier, g, p, moments: Moments) -> jax.Array:
    """The update of one tensor, before the learning rate. bases: layers with a leading axis B;
    mixture: [B]. -> [*shape]"""
    # With the 256 published bases this is 100 times the mean; with fewer, weights of the same size.
    layers = jax.tree.map(
        lambda base: 6.25 * jnp.tensordot(mixture, base, 1) / len(base) ** 0.5, bases
    )
    found = features(p, g, moments, eps=0.0)
    found |= {"clipped g": jnp.clip(g, -0.1, 0.1)[None], "g / rms": g * found["rsqrt"]}
    inputs = jnp.concatenate([normalise(found[name]) for name in INPUTS])
    direction, magnitude, _ = star.network(layers, inputs)
    return (
        -multiplier
        * direction
        * jnp.exp(star.EXP_SCALE * magnitude)
        * jnp.sqrt(jnp.mean(p * p) + 1e-9)
    )


# In the order of the published weights, with the size of each.
INPUTS = {
    "g": 1,
    "clipped g": 1,
    "p": 1,
    "m": 3,
    "rms": 1,
    "adam": 3,
    "rsqrt": 1,
    "adafactor g": 3,
    "g / rms": 1,
}
INPUTS |= {"row": 3, "col": 3, "row rsqrt": 3, "col rsqrt": 3, "adafactor m": 3}


def init_theta(key: jax.Array, lstm_size: int, num_bases: int) -> dict:
    keys = jax.random.split(key, 6)
    key_mix, key_input, key_lstm, key_mixture, key_multiplier, key_bases = keys
    sizes = (sum(INPUTS.values()), HIDDEN, HIDDEN, 3)
    return {
        "mix": init_dense(key_mix, (TENSOR_FEATURES, lstm_size)),
        "input": init_dense(key_input, (TENSOR_FEATURES, lstm_size)),
        "lstm": init_rnn(key_lstm, "lstm", lstm_size, lstm_size),
        "start": {"h": jnp.zeros(lstm_size), "c": jnp.zeros(lstm_size)},
        "mixture": init_dense(key_mixture, (lstm_size, num_bases)),
        "multiplier": init_dense(key_multiplier, (lstm_size, 1)),
        "bases": jax.vmap(lambda key: init_dense(key, sizes))(
            jax.random.split(key_bases, num_bases)
        ),
    }


def make_velo(
    lstm_size: int = 128, num_bases: int = 64, step_size: float | None = None
) -> LearnedOptimizer:
    """VeLO; by default a small one, for meta-training. step_size: its learning rate in all
    environments; None: the environment's"""

    def new_theta(key):
        return init_theta(key, lstm_size, num_bases)

    def init_state(params):
        num_tensors = len(jax.tree.leaves(params))
        h = jnp.zeros((lstm_size, num_tensors))
        loss = LossMeans(jnp.zeros(LOSS_MEANS), jnp.full(LOSS_MEANS, 1e12))
        return State(jax.tree.map(init_moments, params), (h, h), loss, jnp.int32(0))

    def update(theta, grads, state, params, learning_rate, *, value, fraction, **extra_args):
        check_params(params)
        del extra_args
        # The loss and the gradients are constants to the meta-gradient.
        loss = update_loss(state.loss, jax.lax.stop_gradient(value), state.count, fraction)
        count = state.count + 1
        treedef = jax.tree.structure(grads)
        gs = [
            jnp.clip(jax.lax.stop_gradient(g).astype(float), -1000, 1000)
            for g in jax.tree.leaves(grads)
        ]
        ps = [p.astype(float) for p in jax.tree.leaves(params)]
        before = treedef.flatten_up_to(state.moments)
        decays = {name: jnp.array(initial) for name, initial in star.DECAYS.items()}
        after = [update_moments(moments, g, decays) for moments, g in zip(before, gs, strict=True)]

        loss_inputs = loss_features(loss, count)
        x = jnp.stack(
            [tensor_features(p, m, loss_inputs, fraction) for p, m in zip(ps, before, strict=True)],
            axis=1,
        )
        start = (theta["start"]["h"][:, None], theta["start"]["c"][:, None])
        hidden = jax.tree.map(
            lambda start, now: jnp.where(state.count == 0, start, now), start, state.lstm
        )
        mixture, multiplier, hidden = per_tensor(theta, x, hidden)

        each = zip(mixture.T, multiplier, gs, ps, after, strict=True)
        updates = [learning_rate * update_tensor(theta["bases"], *one) for one in each]
        updates = [u.astype(p.dtype) for u, p in zip(updates, jax.tree.leaves(params), strict=True)]
        return treedef.unflatten(updates), State(treedef.unflatten(after), hidden, loss, count)

    return LearnedOptimizer(new_theta, init_state, update, own_rate=step_size)
