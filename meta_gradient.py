"""Three estimators of the meta-gradient, d meta-loss / d theta. Each also trains its units for K
updates:

    estimator(theta, schedule, units, agent, learned, ...)
        -> sum of the units' meta-gradients, units, metrics

schedule: a pipeline_train.Schedule, of which age, sign and key are read.

**backprop**, the paper's. The meta-loss is the agent loss on one more rollout. Agent-gradients are
constants to the meta-gradient (optim4rl.py stops the derivative there), so with g_1 .. g_K
recorded,

    params_K(theta) = params_0 + sum_k update_k(theta; g_1 .. g_k)
    cotangent = d meta-loss / d params_K
    d meta-loss / d theta = cotangent * d params_K / d theta

This needs no derivative of rollouts, losses or agent-gradients, and equals jax.grad through
everything.

**pes**, persistent evolution strategies (Vicol, Metz & Sohl-Dickstein 2021, arXiv 2112.13835). The
meta-loss is minus the return of the latest episodes, averaged over the K updates. Each unit learns
with a perturbed theta, newly perturbed every K updates, and

    d meta-loss / d theta ~ mean over units of
        meta-loss * (sum of the unit's perturbations since its reset) / sigma^2

This needs no derivative, and it has no bias from the K updates being only a window of a lifetime.
Units come in antithetic pairs that share their keys and differ in the sign of their perturbations.

**nres**, noise-reuse evolution strategies (Li, Harrison, Sohl-Dickstein, Smith & Metz 2023, arXiv
2304.12180; ES-Single of Vicol, Kolter & Swersky 2023 is the same). As pes, but a unit keeps one
perturbation for its lifetime, which replaces the sum. The windows of a lifetime then move together.
The estimate has less noise: the randomness of a late window is multiplied by one perturbation, not
by the sum of many.

Legend: N units, K inner updates, S gradient steps of an update, M blocks of C coordinates
(optim4rl.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim4rl import LearnedOptimizer, to_blocks, to_optax


class Unit(NamedTuple):
    agent: Any  # the state of an a2c.Agent or ppo.Agent
    learning_rate: jax.Array  # []
    # Like theta, perturbations / (sign sigma). pes: the sum since the reset; nres: the one;
    # backprop: ().
    noise: Any


def inner_loop(key, unit, age, theta, agent, learned, inner_updates, lifetime):
    """K updates of one unit's agent. age, lifetime: in meta-iterations.

    -> state of the agent, inputs of the optimizer (grads, extra_args), each [K, S, ...],
    metrics [K]
    """
    optimizer = to_optax(learned, theta, unit.learning_rate)

    def update(state, key_and_number):
        key, number = key_and_number
        done = age * inner_updates + number
        progress = (done / (lifetime * inner_updates), (done + 1) / (lifetime * inner_updates))
        state, recorded, metrics = agent.learn(key, state, optimizer, progress)
        return state, (recorded, metrics)

    keys = jax.random.split(key, inner_updates)
    state, (recorded, metrics) = jax.lax.scan(update, unit.agent, (keys, jnp.arange(inner_updates)))
    return state, recorded, metrics


# --- backprop ---


def backprop(theta, schedule, units, agent, learned, inner_updates, lifetime, sigma):
    """The paper's meta-gradient, by record and replay. -> its sum over units, units, metrics [N]"""
    del sigma
    start = units.agent

    def train(key, unit, age):
        key_inner, key_meta = jax.random.split(key)
        state, recorded, metrics = inner_loop(
            key_inner, unit, age, theta, agent, learned, inner_updates, lifetime
        )

        def meta_loss(params):
            return agent.loss(key_meta, state._replace(params=params))

        (loss, state), cotangent = jax.value_and_grad(meta_loss, has_aux=True)(state.params)
        recorded = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), recorded)
        return (
            unit._replace(agent=state),
            recorded,
            cotangent,
            {"meta_loss": loss, "return": metrics["return"][-1]},
        )

    units, recorded, cotangent, metrics = jax.vmap(train)(schedule.key, units, schedule.age)
    if learned.rule:
        gradient = streamed_replay_gradient(
            learned.rule, theta, start.opt_state, recorded[0], cotangent, units.learning_rate
        )
    else:
        replay = jax.vmap(partial(replay_gradient, learned, theta))
        gradients = replay(
            (start.params, start.opt_state), *recorded, cotangent, units.learning_rate
        )
        gradient = jax.tree.map(lambda g: jnp.sum(g, axis=0), gradients)
    return gradient, units, metrics


def replay_gradient(
    learned: LearnedOptimizer, theta, start, grads, extra_args, cotangent, learning_rate
) -> Any:
    """d <cotangent, params after the K recorded updates> / d theta, by replay, for one agent and
    any learned optimizer.

    start: (params, opt_state) before the updates; grads: [K, ...] like params; extra_args:
    {name: [K]}, the optimizer's extra arguments; cotangent: like params.
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
    rule: Callable, theta, opt_state, grads, cotangent, learning_rates
) -> Any:
    """The sum of replay_gradient over units, for a coordinate-wise optimizer, in the memory of one
    block.

    Updates add up and coordinates do not interact, so each block is replayed on its own: forward
    and backward through its K updates, then the next block. opt_state: [N, M, ...]; grads:
    [N, K, ...] like params; cotangent: [N, ...].
    """
    blocks = (
        jnp.moveaxis(jax.vmap(jax.vmap(to_blocks))(grads), 1, 2),  # [N, M, K, C]
        opt_state,
        -learning_rates[:, None, None] * jax.vmap(to_blocks)(cotangent),  # [N, M, C]
    )
    blocks = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), blocks)

    def moved(theta, block):
        """<cotangent, sum of the steps>: how far the block moves along the cotangent."""
        grads, state, cotangent = block

        def step(state, g):
            step, state = rule(theta, g, state)
            return state, step

        # Few updates: the cache holds what their derivatives need. Many: keep the states, recompute
        # the rest.
        few = grads.shape[0] <= 4
        steps = jax.lax.scan(step if few else jax.checkpoint(step), state, grads, unroll=few)[1]
        return jnp.vdot(cotangent, jnp.sum(steps, axis=0))

    if jax.default_backend() != "cpu":  # an accelerator takes all blocks at once
        return jax.grad(lambda theta: jnp.sum(jax.vmap(moved, (None, 0))(theta, blocks)))(theta)

    def add_block(total, block):
        return jax.tree.map(jnp.add, total, jax.grad(moved)(theta, block)), None

    return jax.lax.scan(add_block, jax.tree.map(jnp.zeros_like, theta), blocks)[0]


# --- pes and nres ---


def evolution(theta, schedule, units, agent, learned, inner_updates, lifetime, sigma, reuse):
    """pes, or nres if `reuse`. The two units of a pair have the same key and the signs 1 and -1.

    -> the sum over units of their estimates, units, metrics [N]
    """

    def train(key, unit, age, sign):
        key_noise, key_inner = jax.random.split(key)
        noise = unit.noise if reuse else optax.tree.random_like(key_noise, theta, jax.random.normal)
        perturbed = optax.tree.add_scale(theta, sign * sigma, noise)
        state, _, metrics = inner_loop(
            key_inner, unit, age, perturbed, agent, learned, inner_updates, lifetime
        )
        noise = noise if reuse else optax.tree.add(unit.noise, noise)
        loss = -jnp.mean(jnp.nan_to_num(metrics["return"]))  # NaN before the first episode ends
        metrics = {"meta_loss": loss, "return": metrics["return"][-1]}
        return (
            optax.tree.scale(sign * loss / sigma, noise),
            Unit(state, unit.learning_rate, noise),
            metrics,
        )

    gradients, units, metrics = jax.vmap(train)(schedule.key, units, schedule.age, schedule.sign)
    return jax.tree.map(lambda g: jnp.sum(g, axis=0), gradients), units, metrics


pes, nres = partial(evolution, reuse=False), partial(evolution, reuse=True)

ESTIMATORS = {"backprop": backprop, "pes": pes, "nres": nres}
