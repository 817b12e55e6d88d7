"""The meta-gradient of pipeline training, d meta-loss / d theta, by record and replay.

The meta-loss is the agent loss on one more rollout after K updates. Agent-gradients are constants
to the meta-gradient (optim4rl.py stops the derivative there), so with the gradients g_1 .. g_KS of
all gradient steps recorded, theta acts through the optimizer only:

    params_s = params_(s-1) + update(theta; g_s, opt_state_(s-1), params_(s-1)),  s = 1 .. K S
    cotangent = d meta-loss / d params_KS
    d meta-loss / d theta = cotangent * d params_KS / d theta

This needs no derivative of rollouts, losses or agent-gradients, and equals jax.grad through
everything. The updates of a coordinate-wise optimizer do not depend on params, so its blocks of
coordinates are replayed each by itself, on a CPU one by one.

Legend: N units, K inner updates, S gradient steps of an update, M blocks of C coordinates
(optim4rl.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from networks import all_finite
from optim4rl import LearnedOptimizer, on_cpu, to_blocks, to_optax


def inner_loop(key, state, age, theta, task, learned, inner_updates, lifetime):
    """K updates of one unit. state: its agent's; age, lifetime: in meta-iterations.

    -> state, inputs of the optimizer (grads, extra_args), each [K, S, ...], metrics [K]
    """
    optimizer = to_optax(learned, theta, task.learning_rate)

    def update(state, key_and_number):
        key, number = key_and_number
        number, total = age * inner_updates + number, lifetime * inner_updates
        state, recorded, metrics = task.agent.learn(key, state, optimizer, number, total)
        return state, (recorded, metrics)

    keys = jax.random.split(key, inner_updates)
    state, (recorded, metrics) = jax.lax.scan(update, state, (keys, jnp.arange(inner_updates)))
    return state, recorded, metrics


def meta_gradient(theta, keys, ages, units, task, learned, inner_updates, lifetime):
    """Train units for K updates. -> the sum of their meta-gradients, units, metrics [N]

    keys, ages: [N]; units: states of task.agent, [N, ...]; task: a pipeline_train.Task. Units
    whose meta-loss or meta-gradient is not finite add nothing, and are marked in metrics["lost"].
    But a coordinate-wise optimizer whose replay overflows for one unit loses all N (on a CPU N is
    1).
    """

    def train(key, state, age):
        key_inner, key_meta = jax.random.split(key)
        state, recorded, metrics = inner_loop(
            key_inner, state, age, theta, task, learned, inner_updates, lifetime
        )

        def meta_loss(params):
            return task.agent.loss(key_meta, state._replace(params=params))

        (loss, state), cotangent = jax.value_and_grad(meta_loss, has_aux=True)(state.params)
        grads, extra_args = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), recorded)
        lost = ~jnp.isfinite(loss)
        if len(keys) > 1:  # of a unit alone the gradient below shows it
            # A NaN in a gradient is one in the parameters, and so in the cotangent.
            lost |= ~all_finite(cotangent)
            grads, cotangent = zero_if(lost, (grads, cotangent))
        metrics = {"meta_loss": loss, "return": metrics["return"][-1], "lost": lost}
        return state, (grads, extra_args), cotangent, metrics

    after, recorded, cotangent, metrics = jax.vmap(train)(keys, units, ages)
    if learned.rule:
        gradient = streamed_replay_gradient(
            learned.rule, theta, units.opt_state, recorded[0], cotangent, task.learning_rate
        )
    else:
        replay = partial(replay_gradient, learned, theta, learning_rate=task.learning_rate)
        start = (units.params, units.opt_state)
        gradients = jax.vmap(replay)(start, *recorded, cotangent)
        # extra_args may not be finite, and the replay may overflow.
        metrics["lost"] |= ~jax.vmap(all_finite)(gradients)
        gradients = jax.vmap(zero_if)(metrics["lost"], gradients)
        gradient = jax.tree.map(lambda g: jnp.sum(g, axis=0), gradients)
    lost = metrics["lost"] | ~all_finite(gradient)
    return zero_if(jnp.all(lost), gradient), after, metrics | {"lost": lost}


def zero_if(lost: jax.Array, tree: Any) -> Any:
    """Zeros in place of a pytree if lost, [] bool."""
    return jax.tree.map(lambda x: jnp.where(lost, 0, x), tree)


def replay_gradient(
    learned: LearnedOptimizer, theta, start, grads, extra_args, cotangent, learning_rate
) -> Any:
    """d <cotangent, params after the K recorded updates> / d theta, by replay, for one agent and
    any learned optimizer.

    start: (params, opt_state) before the updates; grads: [K S, ...] like params, with the S
    gradient steps of each update; extra_args: {name: [K S]}, the optimizer's extra arguments;
    cotangent: like params.
    """

    @jax.checkpoint  # keep the states, recompute the rest
    def step(theta, carry, recorded):
        (params, opt_state), (grad, extra_args) = carry, recorded
        updates, opt_state = learned.update(
            theta, grad, opt_state, params, learning_rate, **extra_args
        )
        return optax.apply_updates(params, updates), opt_state

    def replayed(theta):
        params, _ = jax.lax.scan(
            lambda carry, x: (step(theta, carry, x), None), start, (grads, extra_args)
        )[0]
        return optax.tree.vdot(cotangent, params)

    return jax.grad(replayed)(theta)


def streamed_replay_gradient(
    rule: Callable, theta, opt_state, grads, cotangent, learning_rate
) -> Any:
    """The sum of replay_gradient over units, for a coordinate-wise optimizer, on a CPU in the
    memory of one block.

    Updates add up and coordinates do not interact, so each block is replayed on its own: forward
    and backward through all its gradient steps, then the next block. opt_state: [N, M, ...];
    grads: [N, K S, ...] like params; cotangent: [N, ...].
    """
    blocks = (
        jnp.moveaxis(jax.vmap(jax.vmap(to_blocks))(grads), 1, 2),  # [N, M, K S, C]
        opt_state,
        -learning_rate * jax.vmap(to_blocks)(cotangent),  # [N, M, C]
    )
    blocks = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), blocks)  # [N M, ...]

    def moved(theta, block):
        """<cotangent, sum of the steps>: how far the block moves along the cotangent."""
        grads, state, cotangent = block

        def step(state, g):
            step, state = rule(theta, g, state)
            return state, step

        # Few steps: the cache holds what their derivatives need. Many: keep the states, recompute
        # the rest.
        few = grads.shape[0] <= 4
        steps = jax.lax.scan(step if few else jax.checkpoint(step), state, grads, unroll=few)[1]
        return jnp.vdot(cotangent, jnp.sum(steps, axis=0))

    if not on_cpu():  # an accelerator takes all blocks at once
        return jax.grad(lambda theta: jnp.sum(jax.vmap(moved, (None, 0))(theta, blocks)))(theta)

    def add_block(total, block):
        return jax.tree.map(jnp.add, total, jax.grad(moved)(theta, block)), None

    return jax.lax.scan(add_block, jax.tree.map(jnp.zeros_like, theta), blocks)[0]
