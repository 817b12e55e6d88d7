"""Pipeline training's units: many agents that learn side by side, start anew at staggered times, and are spread over devices.

A unit is an agent in environments of its own with its own optimizer state (meta_gradient.Unit). train_units is one
meta-iteration of all units of a task: those that are due start anew, all learn for K updates, and their meta-gradients are
averaged.

Legend: N units, K inner updates, m reset interval.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import a2c
import ppo
from meta_gradient import ESTIMATORS, Unit
from optim4rl import LearnedOptimizer, to_optax


class Task(NamedTuple):
    agent: a2c.Agent | ppo.Agent
    learning_rate: float


def reset_slots(num_units: int, reset_interval: int) -> np.ndarray:
    """[N] int: unit i starts anew at every meta-iteration t with t mod m equal to its slot."""
    return np.floor(np.linspace(0, reset_interval - 1, num_units)).astype(np.int32)


class Schedule(NamedTuple):
    """What a meta-iteration means to each unit."""

    due: jax.Array  # [N] bool, starts anew
    age: jax.Array  # [N] int32, meta-iterations since it started
    sign: jax.Array  # [N], of its perturbation (meta_gradient.evolution)
    key: jax.Array  # [N]


def schedule(key: jax.Array, iteration: jax.Array, args: Any) -> Schedule:
    """Until its first reset, and always without the pipeline, a unit is as old as training. With pes and nres, pairs share
    keys and slots."""
    pair, slots = 1, reset_slots(args.num_units, args.reset_interval)
    if args.meta_estimator != "backprop":  # few pairs: they go round a circle, lest the last be next to the first
        pair, num_pairs = 2, args.num_units // 2
        slots = np.repeat(np.arange(num_pairs) * args.reset_interval // num_pairs, pair)
    since_reset = (iteration - slots) % args.reset_interval
    age = jnp.minimum(since_reset, iteration) if args.pipeline else jnp.full(args.num_units, iteration)
    number = jnp.arange(args.num_units)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number // pair)
    return Schedule((since_reset == 0) & args.pipeline, age, 1.0 - 2 * (number % 2), keys)


def spread(key: jax.Array, limits: tuple) -> jax.Array:
    """A number between the limits, uniform in its logarithm."""
    low, high = jnp.log(jnp.array(limits))
    return jnp.exp(jax.random.uniform(key, minval=low, maxval=high))


def new_unit(key: jax.Array, theta: Any, task: Task, learned: LearnedOptimizer, args: Any) -> Unit:
    """A unit that starts now: an agent that has learned nothing, a step size and a reward scale from their ranges."""
    key_agent, key_rate, key_reward = jax.random.split(key, 3)
    key_noise = jax.random.fold_in(key, 3)
    agent = task.agent.init(key_agent, to_optax(learned, theta, 1.0))
    agent = agent._replace(reward_factor=spread(key_reward, args.reward_scale_range))
    rate = task.learning_rate * spread(key_rate, args.learning_rate_range)
    noise = {
        "backprop": lambda: (),
        "pes": lambda: optax.tree.zeros_like(theta),
        "nres": lambda: optax.tree.random_like(key_noise, theta, jax.random.normal),
    }[args.meta_estimator]()
    return Unit(agent, rate, noise)


def reset_due(keys, units, due, new: Callable):
    """Whole new units (parameters, optimizer state, environments) where due; the others as they were. due: [N] bool."""

    def reset(units):
        def choose(new, old):
            return jnp.where(due.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return jax.tree.map(choose, jax.vmap(new)(keys), units)

    return jax.lax.cond(jnp.any(due), reset, lambda units: units, units)


def only_finite(new: Any, old: Any, judge: Any = None) -> Any:
    """new where all of it (or of `judge`) is finite, old otherwise."""
    finite = ppo.all_finite(new if judge is None else judge)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def train_group(theta, schedule: Schedule, units, task, learned, args):
    """Reset and train some units side by side. -> sum of their meta-gradients, units, metrics [N]

    A unit whose parameters are no longer finite also starts anew; a sum that is not finite is left out. metrics["broken"] says
    whose they were.
    """
    key_reset, key_train = jnp.moveaxis(jax.vmap(jax.random.split)(schedule.key), 1, 0)
    broken = ~jax.vmap(ppo.all_finite)(units.agent.params)
    new = partial(new_unit, theta=theta, task=task, learned=learned, args=args)
    units = reset_due(key_reset, units, schedule.due | broken, new)
    options = {"agent": task.agent, "learned": learned, "inner_updates": args.inner_updates, "sigma": args.sigma}
    estimate = partial(ESTIMATORS[args.meta_estimator], **options)
    lifetime = args.reset_interval if args.pipeline else args.num_iterations
    gradient, units, metrics = estimate(theta, key_train, units, schedule.age, schedule.sign, lifetime=lifetime)
    lost = ~ppo.all_finite(gradient)
    gradient = only_finite(gradient, jax.tree.map(jnp.zeros_like, gradient))
    return gradient, units, metrics | {"broken": broken | lost}


def train_units(theta, schedule: Schedule, units, train: Callable, mesh):
    """All of a task's units: spread over the devices, on each device group by group. -> mean meta-gradient, units, metrics"""
    num_units = schedule.key.size
    per_device = num_units // mesh.size
    # On a CPU one unit at a time stays in the cache; an accelerator wants many, as far as its memory goes.
    most = 1 if jax.default_backend() == "cpu" else 64
    group = max(size for size in range(1, most + 1) if per_device % size == 0)

    def on_device(theta, schedule, units):
        def on_group(carry, start):
            total, units = carry
            some = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, group), (schedule, units))
            some = jax.lax.optimization_barrier(some)  # a copy of these few, lest XLA copies all to update them in place
            gradient, some, metrics = train(theta, *some)
            units = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0), units, some)
            return (jax.tree.map(jnp.add, total, gradient), units), metrics

        # The units are the loop's carry, and so updated in place: they are most of the memory.
        start = (jax.tree.map(jnp.zeros_like, theta), units)
        (total, units), metrics = jax.lax.scan(on_group, start, jnp.arange(0, per_device, group))
        metrics = jax.tree.map(jnp.ravel, metrics)
        return jax.lax.psum(total, "units"), units, metrics

    split, whole = PartitionSpec("units"), PartitionSpec()
    on_devices = jax.shard_map(
        on_device, mesh=mesh, in_specs=(whole, split, split), out_specs=(whole, split, split), check_vma=False
    )
    total, units, metrics = on_devices(theta, schedule, units)
    return jax.tree.map(lambda g: g / num_units, total), units, metrics
