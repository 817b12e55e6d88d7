"""Five analytic continuous-control tasks, as pure functions: `env = make("pendulum")`.

    state, obs = env.reset(key)
    state, obs, reward, terminated = env.step(state, action)  # action [A] in [-1, 1]

One environment each; `vmap` them for more. Everything is traceable and every shape is fixed by the
name. An environment neither resets itself nor ends for lack of time: both are the rollout's to do,
after EPISODE_LENGTH steps. Every reward is in [0, 1], and 1 only at the goal and at rest, or nearly.

    pendulum     swing a pendulum up and hold it; the torque is too weak to lift it at once
    cartpole     swing a pole up by pushing its cart, hold it in the middle, stay on the track
    point_mass   push a point in the plane to a random place and stop there
    reacher      bring the tip of a planar two-link arm to a random place, by torques on both joints
    acrobot      swing a hanging two-link arm up by a torque on its elbow alone

The tasks are those of the DeepMind control suite (Tassa et al. 2018, arXiv 1801.00690), with rewards
that are smooth everywhere, and with forces that let PPO learn in 3e5 to 1e6 steps. Cart-pole: Barto,
Sutton, Anderson 1983, with Florian's 2007 correction. Acrobot: Spong 1995; Sutton & Barto 1998, 11.3.

Legend: N coordinates, A action size, O observation size. Units: metre, kilogram, second, radian.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

GRAVITY = 9.81
DT = 0.05  # seconds of one step, in which the force does not change
MAX_SPEED = 20.0  # velocities are clipped to this, as Sutton & Barto do; only acrobot's elbow gets there


class Env(NamedTuple):
    """An environment: two pure functions and the sizes that a network needs."""

    reset: Callable  # key -> state, obs [O]
    step: Callable  # state, action [A] in [-1, 1] -> state, obs, reward, terminated (bool)
    obs_size: int
    action_size: int


class State(NamedTuple):
    position: jax.Array  # [N] coordinates: places and angles
    velocity: jax.Array  # [N] their rates
    goal: jax.Array  # [2] the place to reach; zeros in a task that has none


class Task(NamedTuple):
    """What a name stands for. At the start coordinates are uniform in middle +- spread, and at rest."""

    middle: tuple  # [N]
    spread: float
    strength: tuple  # [A] force or torque of action 1
    acceleration: Callable  # position, velocity, force [A] -> [N]
    observe: Callable  # state -> [O]
    reward: Callable  # state -> [], of the state that the step led to
    goal: Callable = lambda key: jnp.zeros(2)  # key -> [2]
    terminated: Callable = lambda state: jnp.array(False)  # state -> [] bool


# --- What the tasks share ---


def rk4(acceleration: Callable, position: jax.Array, velocity: jax.Array, dt: float):
    """One step of the classical Runge-Kutta method. acceleration: position, velocity -> [N]

    Not semi-implicit Euler: of first order, and symplectic only where no acceleration depends on a
    velocity. In cart-pole and the arms one does.

    -> position [N], velocity [N]
    """
    v1 = velocity
    a1 = acceleration(position, v1)
    v2 = velocity + dt / 2 * a1
    a2 = acceleration(position + dt / 2 * v1, v2)
    v3 = velocity + dt / 2 * a2
    a3 = acceleration(position + dt / 2 * v2, v3)
    v4 = velocity + dt * a3
    a4 = acceleration(position + dt * v3, v4)
    position = position + dt / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
    velocity = velocity + dt / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
    return position, velocity


def closeness(x: jax.Array, to: jax.Array | float, scale: float) -> jax.Array:
    """1 where x is `to`, 1/2 at the distance `scale`; the suite's long-tailed tolerance. x: [n] -> []"""
    return 1 / (1 + jnp.sum((x - to) ** 2) / scale**2)


def height(angle: jax.Array) -> jax.Array:
    """1 upright, where the angle is 0; 0 hanging."""
    return (1 + jnp.cos(angle)) / 2


# --- Pendulum: 1 kg at the end of a massless rod of 1 m. Its angle is 0 upright ---


def pendulum_acceleration(position, velocity, torque, damping=0.1):
    """All: [1]"""
    return GRAVITY * jnp.sin(position) + torque - damping * velocity


def pendulum_observe(state: State) -> jax.Array:
    """-> [3]"""
    angle = state.position
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle), state.velocity / 5])


def pendulum_reward(state: State) -> jax.Array:
    """Height times slowness: what turns round and round gets little."""
    return height(state.position[0]) * closeness(state.velocity, 0, 3)


# --- Cart-pole: a uniform pole on a cart, without friction. Coordinates: cart's place, pole's angle ---

CART, POLE = 1.0, 0.1  # masses
HALF_POLE = 0.5  # half the pole's length
TRACK = 2.4  # the cart may be at -TRACK .. TRACK


def cartpole_acceleration(position, velocity, force):
    """The pole's angle is 0 upright, and tips over to positive places. position: [2], force: [1] -> [2]"""
    mass = CART + POLE
    sin = jnp.sin(position[1])
    cos = jnp.cos(position[1])
    push = (force[0] + POLE * HALF_POLE * velocity[1] ** 2 * sin) / mass
    turn = (GRAVITY * sin - cos * push) / (HALF_POLE * (4 / 3 - POLE * cos**2 / mass))
    return jnp.stack([push - POLE * HALF_POLE * turn * cos / mass, turn])


def cartpole_observe(state: State) -> jax.Array:
    """-> [5]"""
    place, angle = state.position
    scaled = state.velocity / jnp.array([2.0, 5.0])
    return jnp.stack([place / TRACK, jnp.cos(angle), jnp.sin(angle), *scaled])


def cartpole_reward(state: State) -> jax.Array:
    """The pole's height times its slowness times 1 - (place / TRACK)^2; 0 in the step off the track."""
    place, angle = state.position
    centred = jnp.maximum(0.0, 1 - (place / TRACK) ** 2)
    return height(angle) * closeness(state.velocity[1], 0, 3) * centred


# --- Point mass: 1 kg in a plane without edges, with viscous damping ---


def point_mass_acceleration(position, velocity, force, damping=0.5):
    """All: [2]"""
    return force - damping * velocity


def point_mass_observe(state: State) -> jax.Array:
    """-> [6]"""
    return jnp.concatenate([state.position, state.velocity, state.goal - state.position])


def point_mass_goal(key: jax.Array) -> jax.Array:
    """Uniform in the square that the start is uniform in. -> [2]"""
    return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)


# --- Two-link arm of uniform rods, 1 kg and 1 m each. Angles: shoulder's, 0 upright; elbow's, 0 straight ---


def arm_acceleration(position, velocity, torque, gravity, damping):
    """The manipulator equations M(q) a + C(q, v) + G(q) = torque - damping v, for a. All: [2]"""
    q1, q2 = position
    v1, v2 = velocity
    m11 = 5 / 3 + jnp.cos(q2)
    m12 = 1 / 3 + jnp.cos(q2) / 2
    m22 = 1 / 3
    c1 = -jnp.sin(q2) / 2 * (2 * v1 * v2 + v2**2)
    c2 = jnp.sin(q2) / 2 * v1**2
    g2 = -gravity / 2 * jnp.sin(q1 + q2)
    g1 = -gravity * 3 / 2 * jnp.sin(q1) + g2
    f1 = torque[0] - damping * v1 - c1 - g1
    f2 = torque[1] - damping * v2 - c2 - g2
    return jnp.stack([m22 * f1 - m12 * f2, m11 * f2 - m12 * f1]) / (m11 * m22 - m12**2)


def links(state: State) -> jax.Array:
    """-> [2], the angle of each link to the upright"""
    return jnp.stack([state.position[0], state.position[0] + state.position[1]])


def tip(state: State) -> jax.Array:
    """-> [2], where the arm ends; the shoulder is at 0"""
    return jnp.stack([jnp.sum(jnp.sin(links(state))), jnp.sum(jnp.cos(links(state)))])


def arm_observe(state: State) -> jax.Array:
    """-> [6]"""
    angles = links(state)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), state.velocity / 4])


def reacher_observe(state: State) -> jax.Array:
    """-> [10]"""
    return jnp.concatenate([arm_observe(state), state.goal, state.goal - tip(state)])


def reacher_goal(key: jax.Array) -> jax.Array:
    """0.5 to 1.8 away from the shoulder, in any direction. -> [2]"""
    distance, angle = jax.random.uniform(key, (2,)) * jnp.array([1.3, 2 * jnp.pi]) + jnp.array([0.5, 0])
    return distance * jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def acrobot_reward(state: State) -> jax.Array:
    """The product of both links' heights, times slowness: nothing for folding the arm upwards."""
    return jnp.prod(height(links(state))) * closeness(state.velocity, 0, 3)


# --- The tasks by name ---

TASKS = {
    "pendulum": Task(
        (jnp.pi,), jnp.pi, (5.0,), pendulum_acceleration, pendulum_observe, pendulum_reward
    ),
    "cartpole": Task(
        (0.0, jnp.pi),
        0.1,
        (10.0,),
        cartpole_acceleration,
        cartpole_observe,
        cartpole_reward,
        terminated=lambda state: jnp.abs(state.position[0]) > TRACK,
    ),
    "point_mass": Task(
        (0.0, 0.0),
        1.0,
        (2.0, 2.0),
        point_mass_acceleration,
        point_mass_observe,
        lambda state: closeness(state.position, state.goal, 0.2),
        point_mass_goal,
    ),
    "reacher": Task(
        (0.0, 0.0),
        jnp.pi,
        (4.0, 4.0),
        lambda q, v, torque: arm_acceleration(q, v, torque, 0.0, 1.0),
        reacher_observe,
        lambda state: closeness(tip(state), state.goal, 0.3),
        reacher_goal,
    ),
    "acrobot": Task(
        (jnp.pi, 0.0),
        0.1,
        (10.0,),
        lambda q, v, torque: arm_acceleration(q, v, (0.0, torque[0]), GRAVITY, 0.1),
        arm_observe,
        acrobot_reward,
    ),
}
NAMES = tuple(TASKS)
EPISODE_LENGTH = dict.fromkeys(NAMES, 200)  # steps


def make(name: str) -> Env:
    """The environment of that name. Raises ValueError for a name that is not in NAMES."""
    if name not in NAMES:
        raise ValueError(f"unknown task {name!r}; choose from {', '.join(NAMES)}")
    task = TASKS[name]

    def reset(key):
        key_start, key_goal = jax.random.split(key)
        middle = jnp.array(task.middle)
        spread = jax.random.uniform(key_start, middle.shape, minval=-task.spread, maxval=task.spread)
        state = State(middle + spread, jnp.zeros(middle.shape), task.goal(key_goal))
        return state, task.observe(state)

    def step(state, action):
        force = jnp.array(task.strength) * jnp.clip(action, -1.0, 1.0)

        def forced(position, velocity):
            return task.acceleration(position, velocity, force)

        position, velocity = rk4(forced, state.position, state.velocity, DT)
        state = State(position, jnp.clip(velocity, -MAX_SPEED, MAX_SPEED), state.goal)
        return state, task.observe(state), task.reward(state), task.terminated(state)

    obs_size = jax.eval_shape(reset, jax.random.key(0))[1].size
    return Env(reset, step, obs_size, len(task.strength))
