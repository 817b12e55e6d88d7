"""Tasks and units for the tests of pipeline training and of the meta-gradient; recurrent cells, a
number at a time."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import a2c
import gridworld
import ppo
from optim4rl import to_optax
from pipeline_train import Args, Schedule, Task, train_group
from train_optimizer import fill_in

# Environment variables of a script that a test starts, which then compiles in less time.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
KINDS = [(cell, inputs) for cell in ("lstm", "gru") for inputs in ("raw", "log")]


def make_task(envs_per_unit=1, env_name="small_dense_short", **changes):
    args = a2c.Args(
        env_name=env_name, num_envs=envs_per_unit, rollout_steps=5, reward_scale=100.0, **changes
    )
    return Task(a2c.make_agent(gridworld.make(env_name), args), 0.01)


def make_ppo_task():
    """PPO on a point that is to be held at the origin; 2 gradient steps in each of 2 epochs of an
    update."""

    def reset(key):
        position = jax.random.uniform(key, (2,), minval=-1)
        return position, position

    def step(key, position, action):
        position = position + 0.1 * action
        return position, position, -jnp.sum(position**2), jnp.any(jnp.abs(position) > 1.5)

    sizes = {
        "rollout_steps": 3,
        "batch_size": 4,
        "num_minibatches": 2,
        "num_epochs": 2,
        "episode_length": 7,
    }
    args = ppo.Args(num_envs=4, discount=0.9, entropy_weight=0.01, reward_scale=1.0, **sizes)
    args = dataclasses.replace(args, policy_layers=(16,), value_layers=(32, 16))
    return Task(ppo.make_agent(ppo.Env(reset, step, 2, 2), args), 0.01)


def make_regression_task(scale=1.0):
    """A linear model of noisy data, which compiles soon. scale: of the loss"""

    def init(key, optimizer):
        params = {"w": 0.1 * jax.random.normal(key, (30, 40)), "b": jnp.zeros(40)}
        return a2c.AgentState(params, optimizer.init(params), ())

    def loss(key, state):
        x = jax.random.normal(key, (3, 30))
        y = jnp.sin(jnp.cumsum(x, axis=1))[:, :1]
        error = x @ state.params["w"] + state.params["b"] - y
        return scale * jnp.mean(error**2), state

    def learn(key, state, optimizer, number=0, total=1):
        value, grads = jax.value_and_grad(
            lambda params: loss(key, state._replace(params=params))[0]
        )(state.params)
        extra_args = {"value": value, "fraction": jnp.float32(number / total)}
        extra_args["num_steps"] = jnp.float32(total)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra_args)
        state = state._replace(
            params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
        return state, jax.tree.map(lambda x: x[None], (grads, extra_args)), {"return": -value}

    return Task(a2c.Agent(init, learn, loss), 0.01)


TASKS = {"regression": make_regression_task, "a2c": lambda: make_task(4), "ppo": make_ppo_task}


def make_units(task, learned, num_units, seed=0, shift=0.1):
    """Units whose optimizer states are not all zero, and a theta with every part at work."""

    @jax.jit  # one program, not hundreds of small ones to compile
    def make():
        theta = jax.tree.map(lambda x: x + shift, learned.init_theta(jax.random.key(seed)))
        optimizer = to_optax(learned, theta, task.learning_rate)
        agents = jax.vmap(task.agent.init, (0, None))(
            jax.random.split(jax.random.key(seed + 1), num_units), optimizer
        )
        learn = jax.vmap(lambda key, agent: task.agent.learn(key, agent, optimizer)[0])
        agents = learn(jax.random.split(jax.random.key(seed + 2), num_units), agents)
        return theta, agents

    return make()


@jax.jit
def relative(a, b):
    return optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b)


def planned(num_units, age=0, seed=7):
    """A schedule in which no unit is reset."""
    keys, ages = jax.random.split(jax.random.key(seed), num_units), jnp.full(num_units, age)
    return Schedule(jnp.zeros(num_units, bool), ages, keys)


def group_of(task, learned, **changes):
    """train_group, jitted, of this task and optimizer."""
    args = small_args(**{"reset_interval": 9, **changes})
    return jax.jit(functools.partial(train_group, task=task, learned=learned, args=args))


@jax.jit
def pick(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def small_args(**changes):
    defaults = {
        "env_name": ("small_dense_short",),
        "num_units": 4,
        "reset_interval": 3,
        "num_iterations": 4,
    }
    return fill_in(Args(**{**defaults, "inner_updates": 2, **changes}))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def scalar_cell(weights, state, x, cell):
    """A step of an LSTM or GRU, a number at a time. -> state"""
    w_x, w_h, b = (np.asarray(weights[name], float) for name in ("w_x", "w_h", "b"))
    h, size = state[0], len(state[0])
    from_x = [sum(w_x[r, d] * x[d] for d in range(len(x))) + b[r] for r in range(len(b))]
    from_h = [sum(w_h[r, k] * h[k] for k in range(size)) for r in range(len(b))]
    new_h, new_c = [], []
    for k in range(size):
        a = [(from_x[gate * size + k], from_h[gate * size + k]) for gate in range(len(b) // size)]
        if cell == "lstm":
            i, f, u, o = (p + q for p, q in a)
            new_c.append(sigmoid(f) * state[1][k] + sigmoid(i) * math.tanh(u))
            new_h.append(sigmoid(o) * math.tanh(new_c[k]))
        else:
            r, z = sigmoid(sum(a[0])), sigmoid(sum(a[1]))
            n = math.tanh(a[2][0] + r * (a[2][1] + float(weights["b_n"][k])))
            new_h.append((1 - z) * n + z * h[k])
    return [new_h, new_c]
