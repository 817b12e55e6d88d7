"""Control tasks against mechanics in numpy: energy, momentum, closed forms, hand-made
controllers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import control
from control import GRAVITY, State

every_task = pytest.mark.parametrize("name", control.NAMES)


def make_state(position, velocity=None, goal=(0.0, 0.0)):
    velocity = np.zeros(len(position)) if velocity is None else velocity
    return State(*(jnp.array(x, jnp.float32) for x in (position, velocity, goal)))


def play(name, controller, num_steps=200, num_envs=64, seed=0):
    """Whole episodes. controller: state, key -> action [A]. -> states, obs, rewards, terminated [T,
    B]"""
    env = control.make(name)

    def step(state, key):
        state, *seen = env.step(state, controller(state, key))
        return state, (state, *seen)

    def episode(key):
        return jax.lax.scan(step, env.reset(key)[0], jax.random.split(key, num_steps))[1]

    keys = jax.random.split(jax.random.key(seed), num_envs)
    return jax.jit(jax.vmap(episode, out_axes=1))(keys)


def random_action(name):
    size = control.make(name).action_size
    return lambda state, key: jax.random.uniform(key, (size,), minval=-1, maxval=1)


# --- Mechanics, from the places and speeds of the bodies' centres ---


def rod_energy(mass, length, speed_x, speed_y, spin, centre_height):
    kinetic = mass * (speed_x**2 + speed_y**2) / 2 + mass * length**2 / 12 * spin**2 / 2
    return kinetic + mass * 9.81 * centre_height


def pendulum_energy(q, v):
    return v[..., 0] ** 2 / 2 + 9.81 * np.cos(q[..., 0])


def cartpole_energy(q, v):
    speed_x = v[..., 0] + 0.5 * np.cos(q[..., 1]) * v[..., 1]
    speed_y = -0.5 * np.sin(q[..., 1]) * v[..., 1]
    pole = rod_energy(0.1, 1.0, speed_x, speed_y, v[..., 1], 0.5 * np.cos(q[..., 1]))
    return v[..., 0] ** 2 / 2 + pole


def arm_bodies(q, v):
    """-> the centre's x and y, its speed in x and y, and the spin, of both rods"""
    first, second = q[..., 0], q[..., 0] + q[..., 1]
    spin_1, spin_2 = v[..., 0], v[..., 0] + v[..., 1]
    x, y = np.sin(first), np.cos(first)
    speed_x, speed_y = y * spin_1, -x * spin_1
    yield x / 2, y / 2, speed_x / 2, speed_y / 2, spin_1
    x, y = x + np.sin(second) / 2, y + np.cos(second) / 2
    speed_x = speed_x + np.cos(second) / 2 * spin_2
    speed_y = speed_y - np.sin(second) / 2 * spin_2
    yield x, y, speed_x, speed_y, spin_2


def arm_energy(q, v):
    return sum(rod_energy(1.0, 1.0, vx, vy, w, y) for _, y, vx, vy, w in arm_bodies(q, v))


def point_mass_energy(q, v):
    return (q**2).sum(-1) / 2 + (v**2).sum(-1) / 2


MECHANICS = {  # acceleration with damping to be said, energy, its scale, and N
    "pendulum": (control.pendulum_acceleration, pendulum_energy, 2 * 9.81, 1),
    "cartpole": (
        lambda q, v, f, damping: control.cartpole_acceleration(q, v, f),
        cartpole_energy,
        0.1 * 9.81,
        2,
    ),
    "point_mass": (control.point_mass_acceleration, point_mass_energy, 1.0, 2),
    "arm": (partial(control.arm_acceleration, gravity=GRAVITY), arm_energy, 4 * 9.81, 2),
}
every_mechanism = pytest.mark.parametrize("name", MECHANICS)


def coast(name, dt, seconds, dtype, seed=0):
    """Without force and damping, from random states. -> positions, velocities [T, 16, N]"""
    acceleration, _, _, n = MECHANICS[name]
    rng = np.random.default_rng(seed)
    start = rng.uniform(-np.pi, np.pi, (16, n)), rng.uniform(-1, 1, (16, n))
    force = jnp.zeros(n, dtype)

    def step(carry, _):
        carry = control.rk4(partial(acceleration, damping=0.0), *carry, force, dt)
        return carry, carry

    def one(q, v):
        return jax.lax.scan(step, (q, v), length=round(seconds / dt))[1]

    run = jax.jit(jax.vmap(one, out_axes=1))
    q, v = (jnp.array(x, dtype) for x in start)
    path = run(q, v)
    return [
        np.concatenate([x[None], y]).astype(np.float64) for x, y in zip((q, v), path, strict=True)
    ]


def drift(name, *args):
    """Greatest change of the energy, over the scale of the energy. -> [16]"""
    _, energy, scale, _ = MECHANICS[name]
    energies = energy(*coast(name, *args))
    return np.abs(energies - energies[0]).max(0) / scale


@every_mechanism
def test_energy_is_kept_without_force_and_damping(name):
    print(name, drift(name, control.DT, 10, jnp.float32))


@every_mechanism
def test_energy_drift_falls_with_the_step_as_of_a_fourth_order_method(name):
    with jax.enable_x64(True):
        coarse, fine = (np.median(drift(name, dt, 2, jnp.float64)) for dt in (0.02, 0.01))
    print(name, coarse / fine, fine)
