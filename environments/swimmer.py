"""A swimmer of N links in a very viscous fluid (Purcell 1977): `env = make("purcell_swimmer")`.

    state, obs = env.reset(key)
    state, obs, reward, terminated = env.step(key, state, action)  # action [N - 1] in [-1, 1]

An action turns the joints; the fluid resists a link's sideways motion twice as much as its
lengthwise motion. Without inertia all forces and torques add up to 0 at every moment, which gives
the body's velocity (resistive force theory; Becker, Koehler & Stone 2003). A movement that is
retraced leads back to where it began: to swim, the joints have to go round.

The reward is the speed of the body's centre along x, in lengths of the body a second, times
REWARD_SCALE. An environment neither resets itself nor ends for lack of time: both are the
rollout's to do.

Legend: N links, J = N - 1 joints. Units: the body is 1 long, second, radian.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from environments.control import Env

NAMES = ("purcell_swimmer",)
NUM_LINKS = 6
DT = 0.1  # seconds of a step
MAX_TURN = 3.0  # radians a second, of a joint at action 1
MAX_BEND = 1.5  # radians, of a joint
SIDEWAYS = 2.0  # drag of sideways motion, that of lengthwise motion being 1
REWARD_SCALE = 10.0


class State(NamedTuple):
    heading: jax.Array  # [] of the first link, 0 along x
    bends: jax.Array  # [J] of the joints, 0 straight


def velocities(bends, velocity, turn, bending) -> tuple:
    """Of every link, in axes along (x) and across (y) the first one.

    bends, bending: [J] angles of the joints and their rates; velocity: [2] of the first link's
    centre; turn: [] its angular velocity -> angles [N], velocities [N, 2], angular velocities [N]
    """
    half = 0.5 / (len(bends) + 1)
    angles = jnp.concatenate([jnp.zeros(1), jnp.cumsum(bends)])
    turns = turn + jnp.concatenate([jnp.zeros(1), jnp.cumsum(bending)])
    across = jnp.stack([-jnp.sin(angles), jnp.cos(angles)], axis=1)
    ends = half * turns[:, None] * across  # of a link's front relative to its centre
    steps = jnp.concatenate([velocity[None], ends[:-1] + ends[1:]])
    return angles, jnp.cumsum(steps, axis=0), turns


def drag(bends, velocity, turn, bending) -> jax.Array:
    """-> [3], the fluid's force (x, y) and its torque about the first link's centre"""
    num_links = len(bends) + 1
    length = 1 / num_links
    angles, v, turns = velocities(bends, velocity, turn, bending)
    along = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    lengthwise = jnp.sum(v * along, axis=1, keepdims=True) * along
    forces = -length * (lengthwise + SIDEWAYS * (v - lengthwise))
    halves = length / 2 * along
    centres = jnp.cumsum(jnp.concatenate([jnp.zeros((1, 2)), halves[:-1] + halves[1:]]), axis=0)
    torques = centres[:, 0] * forces[:, 1] - centres[:, 1] * forces[:, 0]
    torques -= SIDEWAYS * length**3 / 12 * turns
    return jnp.append(jnp.sum(forces, axis=0), jnp.sum(torques))


def free_motion(bends, bending) -> tuple[jax.Array, jax.Array]:
    """The motion at which the drag is 0, for joints that bend at these rates -> velocity [2] and
    angular velocity [] of the first link"""
    none, still = jnp.zeros(2), jnp.zeros_like(bends)
    x = drag(bends, jnp.array([1.0, 0.0]), 0.0, still)
    y = drag(bends, jnp.array([0.0, 1.0]), 0.0, still)
    turn = drag(bends, none, 1.0, still)
    wanted = -drag(bends, none, 0.0, bending)
    # Cramer's rule for x a + y b + turn c = wanted.
    volume = jnp.dot(x, jnp.cross(y, turn))
    numerators = (jnp.cross(y, turn), jnp.cross(turn, x), jnp.cross(x, y))
    solution = jnp.stack([jnp.dot(wanted, n) for n in numerators]) / volume
    return solution[:2], solution[2]


def observe(state: State) -> jax.Array:
    return jnp.concatenate(
        [jnp.stack([jnp.cos(state.heading), jnp.sin(state.heading)]), state.bends]
    )


def make(name: str, num_links: int = NUM_LINKS) -> Env:
    """The environment of that name. Raises ValueError for a name that is not in NAMES."""
    if name not in NAMES:
        raise ValueError(f"unknown task {name!r}; choose from {', '.join(NAMES)}")
    num_joints = num_links - 1

    def reset(key):
        bends = 0.1 * jax.random.uniform(key, (num_joints,), minval=-1)
        state = State(jnp.zeros(()), bends)
        return state, observe(state)

    def step(key, state, action):
        del key  # deterministic
        wanted = state.bends + DT * MAX_TURN * jnp.clip(action, -1.0, 1.0)
        bends = jnp.clip(wanted, -MAX_BEND, MAX_BEND)
        middle, bending = (state.bends + bends) / 2, (bends - state.bends) / DT
        velocity, turn = free_motion(middle, bending)
        _, v, _ = velocities(middle, velocity, turn, bending)
        heading = state.heading + DT * turn / 2  # in the middle of the step
        centre = jnp.mean(v, axis=0)
        speed = jnp.cos(heading) * centre[0] - jnp.sin(heading) * centre[1]
        state = State(state.heading + DT * turn, bends)
        return state, observe(state), REWARD_SCALE * speed, jnp.array(False)

    return Env(reset, step, num_joints + 2, num_joints)
