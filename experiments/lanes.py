"""All agents of an environment in one program, whatever their optimizer and learning rate, for an
accelerator (experiments/table.py uses it there).

It compiles one program, instead of one for each pair of optimizer and learning rate.

A lane is an agent with its own optimizer, learning rate and seed.
"""

import dataclasses
import itertools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate
import optimizers
from figures import report

MOST_ENVS = 2**15  # environments of all lanes at once: 20 GB with A2C on a big gridworld


class Lane(NamedTuple):
    run: evaluate.Run
    learning_rate: float
    seed: int


class LaneState(NamedTuple):
    learning_rate: jax.Array  # []
    states: tuple  # of every optimizer; only that of the lane's own optimizer is used


def slices(lanes: list[Lane]) -> dict[str, slice]:
    """optimizer -> its lanes, which are next to each other."""
    names = [lane.run.optimizer for lane in lanes]
    return {
        name: slice(names.index(name), names.index(name) + len([*group]))
        for name, group in itertools.groupby(names)
    }


def optimizer_of_lanes(lanes: list[Lane]) -> optax.GradientTransformationExtraArgs:
    """An optimizer that under `vmap` over the lanes updates each with its own optimizer. Only its
    init works outside `vmap`. lanes: those of an optimizer next to each other"""
    where = slices(lanes)

    def make(name, learning_rate):
        return optax.with_extra_args_support(optimizers.make_optimizer(name, learning_rate))

    def init(params, learning_rate=1.0):
        states = tuple(make(name, learning_rate).init(params) for name in where)
        return LaneState(jnp.float32(learning_rate), states)

    @jax.custom_batching.custom_vmap
    def update(grads, state, params, extra_args):
        # For shapes only: under vmap over_lanes stands in its place, and without it NaN shows.
        del params, extra_args
        return jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads), state

    @update.def_vmap
    def over_lanes(size, is_batched, *inputs):
        grads, state, params, extra_args = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (size, *jnp.shape(x))),
            inputs,
            tuple(is_batched),
        )
        updates, states = [], []
        for name, own, old in zip(where, where.values(), state.states, strict=True):

            def one(learning_rate, state, grads, params, extra_args, name=name):
                return make(name, learning_rate).update(grads, state, params, **extra_args)

            inputs = (state.learning_rate, old, grads, params, extra_args)
            update, new = jax.vmap(one)(*jax.tree.map(lambda x, own=own: x[own], inputs))
            updates.append(update)
            states.append(jax.tree.map(lambda x, y, own=own: x.at[own].set(y), old, new))
        updates = jax.tree.map(lambda *x: jnp.concatenate(x), *updates)
        out = updates, state._replace(states=tuple(states))
        return out, jax.tree.map(lambda _: True, out)

    def update_fn(grads, state, params=None, **extra_args):
        return update(grads, state, params, jax.tree.map(jnp.float32, extra_args))

    return optax.GradientTransformationExtraArgs(init, update_fn)


def train(learner, lanes: list[Lane], title: str, interrupted) -> list[report.Result]:
    """-> a Result for each pair of optimizer and learning rate; [] if interrupted"""
    lanes = sorted(lanes, key=lambda lane: lane.run.optimizer)  # is stable
    returns, most = [], max(1, MOST_ENVS // learner.args.num_envs)
    for some in np.array_split(np.arange(len(lanes)), math.ceil(len(lanes) / most)):
        which = f"{title}, agents {some[0] + 1} to {some[-1] + 1} of {len(lanes)}"
        history = train_some(learner, [lanes[i] for i in some], which, interrupted)
        if interrupted():
            return []
        env_steps, own = evaluate.curves(learner, history)
        returns.append(own)
    returns, results = np.concatenate(returns), []
    for (run, rate), group in itertools.groupby(range(len(lanes)), lambda i: lanes[i][:2]):
        group = list(group)
        seeds = np.array([lanes[i].seed for i in group])
        results.append(evaluate.result(learner, run, rate, env_steps, returns[group], seeds))
    return results


def train_some(learner, lanes: list[Lane], title: str, interrupted) -> dict:
    """Train sorted lanes in one program. -> the history of agent.train"""
    # agent.train adds 0, 1, 2, ... to args.seed.
    seeds = np.array([lane.seed for lane in lanes]) - np.arange(len(lanes))
    args = dataclasses.replace(learner.args, seed=seeds, num_seeds=len(lanes))
    optimizer = optimizer_of_lanes(lanes)
    rates = jnp.array([lane.learning_rate for lane in lanes], jnp.float32)

    def set_rates(state):
        opt_state = jax.jit(jax.vmap(optimizer.init))(state.agents.params, rates)
        opt_state = jax.tree.map(jnp.copy, opt_state)  # no buffer twice: they will be donated
        return state._replace(agents=state.agents._replace(opt_state=opt_state))

    learner = learner._replace(args=args)
    return evaluate.train_with_progress(learner, optimizer, title, interrupted, set_rates)


def lanes_of(run: evaluate.Run, rate: float, args: Any, swept: bool = False) -> list[Lane]:
    """evaluate.py's seeds of an optimizer at a learning rate."""
    first = args.seed + (args.num_seeds if swept else 0)
    count = args.sweep_seeds if swept else args.num_seeds
    return [Lane(run, rate, seed) for seed in range(first, first + count)]


def evaluate_all(learner, to_run: list[evaluate.Run], args: Any, interrupted) -> list:
    """What evaluate.py does with these runs of one environment, in two rounds: all sweeps, then the
    shown seeds of all optimizers. -> a Result of each run; [] if interrupted"""
    name, tried = learner.args.env_name, {}
    sweeps = [run for run in to_run if len(run.rates) > 1]
    lanes = [lane for run in sweeps for r in run.rates for lane in lanes_of(run, r, args, True)]
    for result in train(learner, lanes, f"{name}, sweep", interrupted) if lanes else ():
        tried.setdefault(result.label, []).append(result)
    if interrupted():
        return []
    best = {label: max(some, key=report.Result.rank) for label, some in tried.items()}
    rates = {
        run: best[run.label].learning_rate if run in sweeps else run.rates[0] for run in to_run
    }
    lanes = [lane for run in to_run for lane in lanes_of(run, rates[run], args)]
    return train(learner, lanes, name, interrupted)
