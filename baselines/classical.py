"""Classical optimizers by name, as functions of the learning rate.

They get extra arguments from the agents, which optax's own ignore: `fraction`, of training that is
done; `num_steps`, updates in all; of PPO `iteration_step`, which update of its iteration this is,
and `kl`.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax


def scale_by(factor: Callable) -> optax.GradientTransformationExtraArgs:
    """Scales updates by factor(**extra_args)."""

    def update(updates, state, params=None, **extra_args):
        del params
        return optax.tree.scale(factor(**extra_args), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def falling(make: Callable) -> Callable:
    """The optimizer with a learning rate that falls linearly to 0 over training, of which
    `fraction`, an extra argument, is done."""
    remaining = scale_by(lambda fraction=0.0, **_: 1.0 - fraction)
    return lambda learning_rate: optax.chain(make(learning_rate), remaining)


def adam_rel(learning_rate) -> optax.GradientTransformationExtraArgs:
    """Adam-Rel (Ellis et al. 2024, arXiv 2412.17113): at the first update of a PPO iteration, which
    has the extra argument iteration_step 0, Adam's count returns to 0; the moments stay. Without
    that argument, as with A2C, it is Adam."""
    adam = optax.scale_by_adam()

    def update(grads, state, params=None, *, iteration_step=1, **extra_args):
        del extra_args
        state = state._replace(count=jnp.where(iteration_step == 0, 0, state.count))
        updates, state = adam.update(grads, state, params)
        return optax.tree.scale(-learning_rate, updates), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def adam_kl(learning_rate) -> optax.GradientTransformationExtraArgs:
    """Adam with an adaptive learning rate, as in RSL-RL and Brax (Schulman et al. 2017, section 4):
    divided by 1.5 where the policy's divergence from that of the rollout, the extra argument kl, is
    above 0.02, but not below 1e-5; times 1.5 below 0.005, but not above 1e-2. learning_rate: the
    initial one."""
    adam = optax.scale_by_adam()

    def init(params):
        return adam.init(params), jnp.float32(learning_rate)

    def update(grads, state, params=None, *, kl=0.0, **extra_args):
        del extra_args
        adam_state, rate = state
        lower, higher = jnp.maximum(rate * (1 / 1.5), 1e-5), jnp.minimum(rate * 1.5, 1e-2)
        small = (kl > 0) & (kl < 0.005)
        rate = jnp.where(kl > 0.02, lower, jnp.where(small, higher, rate))
        updates, adam_state = adam.update(grads, adam_state, params)
        return optax.tree.scale(-rate, updates), (adam_state, rate)

    return optax.GradientTransformationExtraArgs(init, update)


def slow_rmsprop(learning_rate) -> optax.GradientTransformation:
    return optax.rmsprop(learning_rate, decay=0.99, bias_correction=True)


CLASSICAL: dict[str, Callable] = {
    "adam": optax.adam,
    "adam_b99": lambda learning_rate: optax.adam(learning_rate, b1=0.99),
    "adam_linear": falling(optax.adam),
    "adam_kl": adam_kl,
    "adam_rel": adam_rel,
    "muon_linear": falling(optax.contrib.muon),
    "rmsprop": optax.rmsprop,
    "rmsprop_linear": falling(slow_rmsprop),
    # rmsprop_linear at 18 / num_steps, which is near its best on many tasks
    "rmsprop_auto": lambda multiplier: optax.chain(
        falling(slow_rmsprop)(18 * multiplier), scale_by(lambda num_steps, **_: 1.0 / num_steps)
    ),
    "sgd": optax.sgd,
    "sign_sgd": optax.sign_sgd,
    "sign_linear": falling(optax.sign_sgd),
}
OWN_RATE = {"rmsprop_auto": 1.0}  # of those without one to tune
