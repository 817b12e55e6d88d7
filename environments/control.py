"""Five analytic continuous-control tasks, as pure functions: `env = make("pendulum")`.

    state, obs = env.reset(key)
    state, obs, reward, terminated = env.step(key, state, action)  # action [A] in [-1, 1]

One environment each; `vmap` them for more. Everything is traceable and every shape is fixed by the
name. An environment neither resets itself nor ends for lack of time: both are the rollout's to do
(settings.py has 200 steps). Every reward is in [0, 1], and smooth.

    pendulum     swing a pendulum up and hold it; the torque is too weak to lift it at once
    cartpole     swing a pole up by pushing its cart, hold it, stay in the middle of the track
    point_mass   push a point in the plane to a random place, and hold it there against a spring
    two_link_reacher    bring the tip of a planar two-link arm to a random place
    acrobot      swing a hanging two-link arm up, by a torque on its elbow alone

The tasks are those of the DeepMind control suite (Tassa et al. 2018, arXiv 1801.00690), with smooth
rewards, and with forces that let PPO learn in 3e5 to 1e6 steps. Cart-pole: Barto, Sutton & Anderson
1983, corrected by Florian 2007. Acrobot: Spong 1995; Sutton & Barto 1998, section 11.3.

Legend: N coordinates, A action size, O observation size. Units: metre, kilogram, second, radian.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

GRAVITY = 9.81
DT = 0.025  # seconds that are integrated at once
REPEATS = 2  # times in a step, under the same force
MAX_SPEED = 20.0  # velocities are clipped to this, as Sutton & Barto do; acrobot's elbow gets there


class Env(NamedTuple):
    """An environment: two pure functions and the sizes that a network needs."""

    reset: Callable  # key -> state, obs [O]
    step: Callable  # key, state, action [A] in [-1, 1] -> state, obs, reward, terminated (bool)
    obs_size: int
    action_size: int


class State(NamedTuple):
    position: jax.Array  # [N] coordinates: places and angles
    velocity: jax.Array  # [N] their rates
    goal: jax.Array  # [2] the place to reach; zeros in a task that has none


class Task(NamedTuple):
    """What a name stands for. Episodes start at rest, uniformly random in middle +- spread."""

    middle: tuple  # [N]
    spread: float
    strength: tuple  # [A] the force or torque of action 1
    acceleration: Callable  # position, velocity, force [A] -> [N]
    observe: Callable  # state -> [O]
    reward: Callable  # state -> [], of the state that the step led to
    goal: tuple = (0.0, 0.0)  # nearest and farthest from the origin that it can be
    edge: float = jnp.inf  # the episode ends where the first coordinate is beyond +- this


# --- What the tasks share ---


def rk4(acceleration: Callable, position, velocity, force, dt: float):
    """One step of the classical Runge-Kutta method, under a force that does not change.

    Semi-implicit Euler is of first order, and nearly keeps the energy only where no acceleration
    depends on a velocity; in cart-pole and the arms they do. -> position [N], velocity [N]
    """
    v1 = velocity
    a1 = acceleration(position, v1, force)
    v2 = velocity + dt / 2 * a1
    a2 = acceleration(position + dt / 2 * v1, v2, force)
    v3 = velocity + dt / 2 * a2
    a3 = acceleration(position + dt / 2 * v2, v3, force)
    v4 = velocity + dt * a3
    a4 = acceleration(position + dt * v3, v4, force)
    position = position + dt / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
    velocity = velocity + dt / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
    return position, velocity


def closeness(x: jax.Array, to: jax.Array | float, scale: float) -> jax.Array:
    """1 at distance 0, 1/2 at distance `scale`: the suite's long-tailed tolerance. x: [n] -> []"""
    return 1 / (1 + jnp.sum((x - to) ** 2) / scale**2)


def height(angle: jax.Array) -> jax.Array:
    """1 upright, where the angle is 0; 0 hanging."""
    return (1 + jnp.cos(angle)) / 2


# --- Pendulum: 1 kg at the end of a massless rod of 1 m. The angle is 0 upright ---


def pendulum_acceleration(position, velocity, torque, damping=0.1):
    """All: [1]"""
    return GRAVITY * jnp.sin(position) + torque - damping * velocity


def pendulum_observe(state: State) -> jax.Array:
    angle = state.position
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle), state.velocity / 5])


def pendulum_reward(state: State) -> jax.Array:
    """Height times slowness: turning round and round brings little."""
    return height(state.position[0]) * closeness(state.velocity, 0, 3)


# --- Cart-pole: a uniform pole on a cart. Coordinates: place of the cart, angle of the pole ---

CART, POLE = 1.0, 0.1  # masses
HALF_POLE = 0.5  # half the pole's length
TRACK = 2.4  # the cart's place is within +- this


def cartpole_acceleration(position, velocity, force):
    """The angle is 0 upright; growing, it tips the pole to greater places. force: [1] -> [2]"""
    mass = CART + POLE
    sin = jnp.sin(position[1])
    cos = jnp.cos(position[1])
    push = (force[0] + POLE * HALF_POLE * velocity[1] ** 2 * sin) / mass
    turn = (GRAVITY * sin - cos * push) / (HALF_POLE * (4 / 3 - POLE * cos**2 / mass))
    return jnp.stack([push - POLE * HALF_POLE * turn * cos / mass, turn])


def cartpole_observe(state: State) -> jax.Array:
    place, angle = state.position
    scaled = state.velocity / jnp.array([2.0, 5.0])
    return jnp.stack([place / TRACK, jnp.cos(angle), jnp.sin(angle), *scaled])


def cartpole_reward(state: State) -> jax.Array:
    """The pole's height, times its slowness, times 1 - (place / TRACK)^2; off the track 0."""
    place, angle = state.position
    centred = jnp.maximum(0.0, 1 - (place / TRACK) ** 2)
    return height(angle) * closeness(state.velocity[1], 0, 3) * centred


# --- Point mass: 1 kg in the plane, damped, drawn to the origin by a spring: it stays near ---


def point_mass_acceleration(position, velocity, force, stiffness=1.0, damping=1.0):
    """All: [2]"""
    return force - stiffness * position - damping * velocity


def point_mass_observe(state: State) -> jax.Array:
    return jnp.concatenate([state.position, state.velocity, state.goal - state.position])


def point_mass_reward(state: State) -> jax.Array:
    return closeness(state.position, state.goal, 0.3)


# --- Two-link arm: uniform rods of 1 kg, 1 m. Angles: first rod, 0 upright; elbow, 0 straight ---


def arm_acceleration(position, velocity, torque, gravity, damping):
    """a of the manipulator equations M(q) a + C(q, v) + G(q) = torque - damping v. All: [2]"""
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


def rods(state: State) -> jax.Array:
    """-> [2], the angle from the upright to each rod"""
    return jnp.stack([state.position[0], state.position[0] + state.position[1]])


def tip(state: State) -> jax.Array:
    """-> [2], where the arm ends: rightward and upward from its shoulder"""
    return jnp.stack([jnp.sum(jnp.sin(rods(state))), jnp.sum(jnp.cos(rods(state)))])


def reacher_observe(state: State) -> jax.Array:
    return jnp.concatenate([acrobot_observe(state), state.goal, state.goal - tip(state)])


def reacher_reward(state: State) -> jax.Array:
    return closeness(tip(state), state.goal, 0.3)


def acrobot_acceleration(position, velocity, torque):
    return arm_acceleration(position, velocity, (0.0, torque[0]), gravity=GRAVITY, damping=0.1)


def acrobot_observe(state: State) -> jax.Array:
    angles = rods(state)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), state.velocity / 4])


def acrobot_reward(state: State) -> jax.Array:
    """The product of both rods' heights, times slowness: folding the arm up brings nothing."""
    return jnp.prod(height(rods(state))) * closeness(state.velocity, 0, 5)


# --- The tasks by name ---

PENDULUM = (pendulum_acceleration, pendulum_observe, pendulum_reward)
CARTPOLE = (cartpole_acceleration, cartpole_observe, cartpole_reward)
POINT_MASS = (point_mass_acceleration, point_mass_observe, point_mass_reward)
REACHER = (partial(arm_acceleration, gravity=0.0, damping=1.0), reacher_observe, reacher_reward)
ACROBOT = (acrobot_acceleration, acrobot_observe, acrobot_reward)
TASKS = {
    "pendulum": Task((jnp.pi,), jnp.pi, (5.0,), *PENDULUM),
    "cartpole": Task((0.0, jnp.pi), 0.1, (10.0,), *CARTPOLE, edge=TRACK),
    "point_mass": Task((0.0, 0.0), 1.0, (3.0, 3.0), *POINT_MASS, goal=(0.5, 1.4)),
    "two_link_reacher": Task((0.0, 0.0), jnp.pi, (4.0, 4.0), *REACHER, goal=(0.5, 1.8)),
    "acrobot": Task((jnp.pi, 0.0), 0.1, (10.0,), *ACROBOT),
}
NAMES = tuple(TASKS)


def make(name: str) -> Env:
    """The environment of that name. Raises ValueError for a name that is not in NAMES."""
    if name not in NAMES:
        raise ValueError(f"unknown task {name!r}; choose from {', '.join(NAMES)}")
    task = TASKS[name]

    def reset(key):
        key_start, key_distance, key_angle = jax.random.split(key, 3)
        middle = jnp.array(task.middle)
        position = middle + task.spread * jax.random.uniform(key_start, middle.shape, minval=-1)
        distance = jax.random.uniform(key_distance, minval=task.goal[0], maxval=task.goal[1])
        angle = jax.random.uniform(key_angle, maxval=2 * jnp.pi)
        goal = distance * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        state = State(position, jnp.zeros_like(position), goal)
        return state, task.observe(state)

    def step(key, state, action):
        del key  # deterministic
        force = jnp.array(task.strength) * jnp.clip(action, -1.0, 1.0)

        def again(_, motion):
            return rk4(task.acceleration, *motion, force, DT)

        # A loop, not unrolled: XLA on a CPU makes an arm's step twice as fast.
        position, velocity = jax.lax.fori_loop(0, REPEATS, again, (state.position, state.velocity))
        state = State(position, jnp.clip(velocity, -MAX_SPEED, MAX_SPEED), state.goal)
        terminated = jnp.abs(position[0]) > task.edge
        return state, task.observe(state), task.reward(state), terminated

    obs_size = jax.eval_shape(reset, jax.random.key(0))[1].size
    return Env(reset, step, obs_size, len(task.strength))
