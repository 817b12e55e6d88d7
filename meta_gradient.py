"""The derivative of the meta-loss with respect to theta, by replaying recorded updates.

Agent-gradients are constants to the meta-gradient (optim4rl.py stops the derivative there). So with g_1 .. g_K recorded,

    params_K(theta) = params_0 + sum_k update_k(theta; g_1 .. g_k)
    d meta-loss / d theta = cotangent * d params_K / d theta,    cotangent = d meta-loss / d params_K

and no derivative of rollouts, losses or agent-gradients is needed: it is the same as jax.grad through everything.

Legend: N units, K recorded gradients, M blocks of C coordinates (optim4rl.py).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim4rl import LearnedOptimizer, to_blocks


def replay_gradient(learned: LearnedOptimizer, theta, start, grads, extra_args, cotangent, learning_rate) -> Any:
    """d <cotangent, params after the K recorded updates> / d theta, by replaying them. For any learned optimizer.

    start: (params, opt_state) before the updates; grads: [K, ...] like params; extra_args: {name: [K]}, what the optimizer
    was told besides; cotangent: like params. One agent.
    """

    @jax.checkpoint  # keep the states, compute the rest anew
    def step(theta, carry, seen):
        (params, opt_state), (grad, extra_args) = carry, seen
        updates, opt_state = learned.update(theta, grad, opt_state, params, learning_rate, **extra_args)
        return optax.apply_updates(params, updates), opt_state

    def replayed(theta):
        params, _ = jax.lax.scan(lambda carry, seen: (step(theta, carry, seen), None), start, (grads, extra_args))[0]
        return optax.tree.vdot(cotangent, params)

    return jax.grad(replayed)(theta)


def streamed_replay_gradient(rule: Callable, theta, opt_state, grads, cotangent, learning_rate) -> Any:
    """The sum of replay_gradient over units, for a coordinate-wise optimizer, in the memory of one block.

    Updates add up and no coordinate sees another, so the replay falls apart into blocks: forward and backward through the
    K updates of one block, then the next. opt_state: [N, M, ...]; grads: [N, K, ...] like params; cotangent: [N, ...].
    """
    blocks = (
        jnp.moveaxis(jax.vmap(jax.vmap(to_blocks))(grads), 1, 2),  # [N, M, K, C]
        opt_state,
        jax.vmap(to_blocks)(cotangent),  # [N, M, C]
    )
    blocks = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), blocks)

    def moved(theta, block):
        """<cotangent, sum of the updates>: how far along the cotangent the block is moved."""
        grads, state, cotangent = block

        def step(state, g):
            step, state = rule(theta, g, state)
            return state, step

        # Few updates: keep what their derivatives need, in the cache. Many: keep only the states, compute the rest anew.
        few = grads.shape[0] <= 4
        steps = jax.lax.scan(step if few else jax.checkpoint(step), state, grads, unroll=few)[1]
        return -learning_rate * jnp.vdot(cotangent, jnp.sum(steps, axis=0))

    if jax.default_backend() != "cpu":  # an accelerator wants all the blocks at once
        return jax.grad(lambda theta: jnp.sum(jax.vmap(moved, (None, 0))(theta, blocks)))(theta)

    def add_block(total, block):
        return jax.tree.map(jnp.add, total, jax.grad(moved)(theta, block)), None

    return jax.lax.scan(add_block, jax.tree.map(jnp.zeros_like, theta), blocks)[0]
