"""momentum4rl against optax's Adam, its docstring's equations in numpy, and what its cells must be
able to tell apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimizers
from baselines.momentum4rl import READOUT_GAIN, make_momentum4rl, momentum4rl
from optim4rl import load_theta, to_optax


def make():
    learned = make_momentum4rl(grad_clip=None)
    return learned, learned.init_theta(jax.random.key(0))


def set_readout(theta, biases):
    """A read-out that gives these numbers whatever the cells hold."""
    layer = theta["readout"]["0"]
    return theta | {"readout": {"0": {"w": jnp.zeros_like(layer["w"]), "b": jnp.array(biases)}}}


@pytest.mark.parametrize(
    "o1, o2, fraction", [(0.0, -jnp.inf, 0.0), (-jnp.inf, 1.5, 0.25), (0.4, 0.7, 0.5)]
)
def test_momentum4rl_is_rmsprop_and_adam_in_the_proportions_of_its_read_out(o1, o2, fraction):
    learned, theta = make()
    optimizer = to_optax(learned, set_readout(theta, [o1 / READOUT_GAIN, o2 / READOUT_GAIN]), 0.1)
    parts = optax.adam(0.1, b1=0.0, b2=0.99), optax.adam(0.1, b1=0.9, b2=0.99)
    params = jnp.ones(5)
    state, states = optimizer.init(params), [part.init(params) for part in parts]
    for seed in range(4):
        g = jax.random.normal(jax.random.key(seed), (5,)) * jnp.array([1.0, 1e-3, 1e-6, 10.0, 0.0])
        updates, state = optimizer.update(g, state, fraction=fraction)
        both = [part.update(g, state) for part, state in zip(parts, states, strict=True)]
        states = [state for _, state in both]
        expected = (1 - fraction) * (np.exp(o1) * both[0][0] + np.exp(o2 - 1.5) * both[1][0])
        np.testing.assert_allclose(updates, expected, rtol=1e-4)


@pytest.mark.parametrize("widest, factor", [(64, 1.0), (128, 1.0), (512, 0.5), (2688, 0.21822)])
def test_momentum4rl_takes_smaller_steps_in_all_layers_of_a_wide_network(widest, factor):
    learned, theta = make()
    optimizer = to_optax(learned, set_readout(theta, [0.0, -jnp.inf]), 0.1)
    grads = {
        "wide": jnp.ones((widest // 16, 16, 3)),
        "narrow": jnp.ones((20, 3)),
        "bias": jnp.ones(6000),
        "scalar": jnp.ones(()),
    }
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.1 * factor, rtol=1e-4)


def test_momentum4rls_read_out_sees_the_inputs_of_its_docstring():
    """A read-out that hands on one input at a time, exp(o1) = exp(x_i), shows what that is; against
    numpy's word by word."""
    learned, theta = make()
    silent = set_readout(theta, [0.0, -jnp.inf])["readout"]["0"]
    rng, fraction, steps = np.random.default_rng(0), 0.25, 4
    grads = [{"w": rng.normal(size=(512, 2)) * 1e-3, "b": rng.normal(size=3)} for _ in range(steps)]
    grads = jax.tree.map(np.float32, grads)

    def last_updates(i):
        hand_on = silent | {
            "w": silent["w"].at[0, 8 + i].set(1 / READOUT_GAIN)
        }  # the cell's 8 come first
        optimizer = to_optax(learned, theta | {"readout": {"0": hand_on}}, 0.1)
        state = optimizer.init(grads[0])
        for grad in grads:
            updates, state = optimizer.update(grad, state, fraction=fraction)
        return updates

    updates = jax.jit(jax.vmap(last_updates))(jnp.arange(10))
    for name, n in (("w", 512), ("b", 1)):
        g, t = [grad[name].astype(float) for grad in grads], steps
        mean = {
            b: sum((1 - b) * b ** (t - 1 - i) * g[i] for i in range(t)) / (1 - b**t)
            for b in (0.5, 0.9, 0.99)
        }
        root = (
            np.sqrt(sum(0.01 * 0.99 ** (t - 1 - i) * g[i] ** 2 for i in range(t)) / (1 - 0.99**t))
            + 1e-8
        )
        x = [np.abs(g[-1]) / root, *[np.sign(g[-1]) * m / root for m in mean.values()]]
        x += [0.1 * np.log(np.abs(g[-1]) + 1e-8), 0.1 * np.log(root)]
        x += [
            np.full_like(root, value)
            for value in (0.1 * np.log(t), 0.1 * np.log(n), 0.1 * np.log(512 / 128), fraction)
        ]
        expected = -0.1 * (1 - fraction) * 0.5 * g[-1] / root * np.exp(x)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-4)


def test_momentum4rls_cells_see_magnitude_and_consistency():
    """Sequences that Optim4RL's raw inputs cannot tell apart lead to different states: small,
    large, alternating."""
    learned, theta = make()
    optimizer, states = to_optax(learned, theta, 0.1), []
    for scale, flip in ((1e-5, 1), (1e-2, 1), (1e-2, -1)):
        state = optimizer.init(jnp.zeros(1))
        for t in range(6):
            _, state = optimizer.update(jnp.array([scale * flip**t]), state)
        states.append(np.asarray(state[0][0][0, :, 0]))
    for i in range(3):
        assert np.abs(states[i] - states[i - 1]).max() > 0.02


def test_the_shipped_weights_are_an_optax_drop_in():
    """It counts its updates: in a chain, without arguments, its updates are those of the agents'
    optimizer that is given the fraction, and 0 after the last."""
    theta, header = load_theta(optimizers.theta_path("pretrained/momentum4rl"))
    dropped_in = optax.chain(
        optax.clip_by_global_norm(1.0), momentum4rl(theta, 6e-2, num_steps=5, **header["config"])
    )
    given = optax.chain(
        optax.clip_by_global_norm(1.0), optimizers.make_optimizer("pretrained/momentum4rl", 6e-2)
    )
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    state, given_state = dropped_in.init(params), given.init(params)
    update = jax.jit(dropped_in.update)
    for t in range(7):
        grads = optax.tree.random_like(jax.random.key(t), params)
        updates, state = update(grads, state, params)
        expected, given_state = given.update(grads, given_state, params, fraction=min(t / 5, 1.0))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9), updates, expected
        )
        assert (np.abs(updates["w"]).max() > 0) == (t < 5)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_the_drop_in_wants_to_know_how_long_training_lasts(num_steps):
    with pytest.raises(ValueError, match="num_steps"):
        momentum4rl(make()[1], 6e-2, num_steps=num_steps)
