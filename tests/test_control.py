"""Control tasks against mechanics in numpy: energy, momentum, closed forms, hand-made
controllers."""

import ast
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from environments import control
from environments.control import GRAVITY, State

KEY = jax.random.key(0)  # of a step: the tasks are deterministic
every_task = pytest.mark.parametrize("name", control.NAMES)


def make_state(position, velocity=None, goal=(0.0, 0.0)):
    velocity = np.zeros(len(position)) if velocity is None else velocity
    return State(*(jnp.array(x, jnp.float32) for x in (position, velocity, goal)))


def play(name, controller, num_steps=200, num_envs=32, seed=0):
    """Whole episodes. controller: state, key -> action [A]

    -> states, obs, rewards, terminated [T, B]
    """
    env = control.make(name)

    def step(state, key):
        state, *seen = env.step(key, state, controller(state, key))
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
    """Ten seconds from any angles, in single precision. The arm's motion is fast at times."""
    drifts = drift(name, control.DT, 10, jnp.float32)
    assert np.median(drifts) < (1e-2 if name == "arm" else 1e-5)
    assert np.max(drifts) < (5e-2 if name == "arm" else 2e-5)


@every_mechanism
def test_energy_drift_falls_with_the_step_as_of_a_fourth_order_method(name):
    with jax.enable_x64(True):
        coarse, fine = (np.median(drift(name, dt, 2, jnp.float64)) for dt in (0.02, 0.01))
    assert (
        12 < coarse / fine < 40
    )  # 2^4 where the energy's error has a term of that order, else 2^5


@every_mechanism
def test_energy_changes_by_the_work_of_force_and_damping(name):
    acceleration, energy, _, n = MECHANICS[name]
    damping = 0.0 if name == "cartpole" else 0.3
    rng = np.random.default_rng(1)
    q, v, force = rng.uniform(-3, 3, (3, 100, n))
    if name == "cartpole":
        force[:, 1] = 0  # no motor is on the hinge
    with jax.enable_x64(True):
        a = np.asarray(jax.vmap(partial(acceleration, damping=damping))(q, v, force))
    h = 1e-5
    power = (energy(q + h * v, v + h * a) - energy(q - h * v, v - h * a)) / (2 * h)
    np.testing.assert_allclose(power, ((force - damping * v) * v).sum(-1), atol=1e-6)


def test_cartpole_keeps_its_momentum_without_force():
    q, v = coast("cartpole", control.DT, 5, jnp.float32)
    momentum = 1.0 * v[..., 0] + 0.1 * (v[..., 0] + 0.5 * np.cos(q[..., 1]) * v[..., 1])
    np.testing.assert_allclose(momentum, np.tile(momentum[0], (len(momentum), 1)), atol=1e-4)


def test_arm_keeps_its_angular_momentum_under_a_torque_on_its_elbow_alone():
    def step(carry, t):
        torque = jnp.stack([0.0, 3 * jnp.sin(5 * t)])
        move = partial(control.arm_acceleration, gravity=0.0, damping=0.0)
        carry = control.rk4(move, *carry, torque, control.DT)
        return carry, carry

    start = jnp.array([0.3, 1.0]), jnp.array([0.5, -1.0])
    q, v = jax.lax.scan(step, start, control.DT * jnp.arange(200))[1]
    bodies = arm_bodies(np.asarray(q, np.float64), np.asarray(v, np.float64))
    momentum = sum(y * vx - x * vy + w / 12 for x, y, vx, vy, w in bodies)
    assert np.ptp(np.asarray(v)[:, 1]) > 1  # it does move
    np.testing.assert_allclose(momentum, momentum[0], atol=1e-3)


# --- Single steps ---


def test_point_mass_steps_as_a_damped_oscillator_does():
    """q'' = 3 u - q - q': with w^2 = 3/4, q - 3 u = exp(-t / 2) (a cos w t + b sin w t)."""
    q, v, action = np.array([0.4, -0.7]), np.array([0.5, 1.0]), np.array([0.5, -0.25])
    after, _, reward, terminated = control.make("point_mass").step(
        KEY, make_state(q, v, (0.4, -0.7)), jnp.array(action)
    )
    w, t, rest = np.sqrt(3) / 2, 0.05, 3 * action
    a = q - rest
    b = (v + a / 2) / w
    expected = rest + np.exp(-t / 2) * (a * np.cos(w * t) + b * np.sin(w * t))
    rate = np.exp(-t / 2) * (w * (b * np.cos(w * t) - a * np.sin(w * t)))
    np.testing.assert_allclose(after.position, expected, atol=1e-6)
    np.testing.assert_allclose(after.velocity, rate - (expected - rest) / 2, atol=1e-6)
    distance = np.sum((expected - q) ** 2)
    np.testing.assert_allclose(reward, 0.09 / (0.09 + distance), rtol=1e-5)
    assert not terminated


def test_pendulum_steps_as_its_equation_says():
    after, obs, reward, _ = control.make("pendulum").step(
        KEY, make_state([1.0], [-2.0]), jnp.array([0.6])
    )

    def slope(t, y):
        return [y[1], 9.81 * np.sin(y[0]) + 5 * 0.6 - 0.1 * y[1]]

    angle, speed = scipy.integrate.solve_ivp(slope, (0, 0.05), [1.0, -2.0], rtol=1e-10).y[:, -1]
    np.testing.assert_allclose([*after.position, *after.velocity], [angle, speed], atol=1e-5)
    np.testing.assert_allclose(obs, [np.cos(angle), np.sin(angle), speed / 5], atol=1e-5)
    np.testing.assert_allclose(reward, (1 + np.cos(angle)) / 2 / (1 + speed**2 / 9), rtol=1e-5)


@pytest.mark.parametrize(
    "name, position, action",
    [
        ("pendulum", [-np.pi / 6], [0.5 * 9.81 / 5]),  # gravity's torque is 9.81 sin(angle)
        ("pendulum", [np.pi], [0.0]),
        ("cartpole", [0.7, np.pi], [0.0]),
        ("cartpole", [0.7, 0.0], [0.0]),
        ("point_mass", [0.6, -0.9], [0.2, -0.3]),  # the spring pulls with 1 N per m
        ("two_link_reacher", [0.4, -1.3], [0.0, 0.0]),
        ("acrobot", [0.0, 0.0], [0.0]),
        ("acrobot", [np.pi, 0.0], [0.0]),
    ],
)
def test_equilibria(name, position, action):
    after = control.make(name).step(KEY, make_state(position), jnp.array(action))[0]
    np.testing.assert_allclose(after.position, position, atol=1e-6)
    np.testing.assert_allclose(after.velocity, 0, atol=1e-5)


# --- The contract ---


@every_task
def test_shapes_and_types_are_fixed(name):
    env = control.make(name)
    assert env._fields == ("reset", "step", "obs_size", "action_size")  # the first of ppo.Env's
    state, obs = jax.eval_shape(env.reset, jax.random.key(0))
    after = jax.eval_shape(env.step, KEY, state, jnp.zeros(env.action_size))
    assert (state, obs) == after[:2]  # dtypes and weak types too
    keys = jax.random.split(jax.random.key(0), 5)
    state, obs = jax.eval_shape(jax.jit(jax.vmap(env.reset)), keys)
    actions = jnp.ones((5, env.action_size))
    step = jax.jit(jax.vmap(env.step))
    _, obs_after, reward, terminated = jax.eval_shape(step, keys, state, actions)
    assert obs.shape == obs_after.shape == (5, env.obs_size)
    assert reward.shape == terminated.shape == (5,)
    assert (obs.dtype, reward.dtype, terminated.dtype) == (jnp.float32, jnp.float32, jnp.bool)
    assert {x.dtype for x in state} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["pendulum", "point_mass"])
def test_actions_beyond_1_are_as_1(name):
    env = control.make(name)
    state, _ = env.reset(jax.random.key(3))
    step = jax.jit(env.step)
    for sign in (-1.0, 1.0):
        seen = [step(KEY, state, jnp.full(env.action_size, sign * size)) for size in (1.0, 7.0)]
        jax.tree.map(np.testing.assert_array_equal, *seen)


@every_task
def test_under_random_actions(name):
    """Rewards are in [0, 1], observations about 1; only cart-pole ends, where its track does."""
    states, obs, rewards, terminated = play(name, random_action(name))
    assert np.all((0 <= rewards) & (rewards <= 1)) and np.std(rewards) > 0
    on_track = (
        np.abs(states.position[..., 0]) <= 2.4
        if name == "cartpole"
        else np.full(rewards.shape, True)
    )
    np.testing.assert_array_equal(terminated, ~on_track)
    assert np.all(np.abs(np.asarray(obs)[on_track]) < 8) and np.all(
        np.asarray(rewards)[~on_track] == 0
    )


@pytest.mark.parametrize("name", ["pendulum", "two_link_reacher", "acrobot"])
def test_numbers_stay_finite_under_the_worst_actions(name):
    """Forces along the velocities, which put in all the energy that they can."""
    size = control.make(name).action_size

    def along(state, key):
        return jnp.where(state.velocity[-size:] < 0, -1.0, 1.0)

    states, obs, rewards, _ = play(name, along, num_steps=1000, num_envs=4)
    assert np.all(np.isfinite(obs)) and np.all((0 <= rewards) & (rewards <= 1))
    assert np.max(np.abs(states.velocity)) <= control.MAX_SPEED


@every_task
def test_starts_vary_and_are_at_rest(name):
    reset = jax.jit(jax.vmap(control.make(name).reset))
    state, _ = reset(jax.random.split(jax.random.key(0), 1000))
    assert np.all(np.asarray(state.velocity) == 0) and np.all(np.std(state.position, axis=0) > 0.01)
    distance = np.linalg.norm(state.goal, axis=-1)
    nearest, farthest = {"point_mass": (0.5, 1.4), "two_link_reacher": (0.5, 1.8)}.get(name, (0, 0))
    assert (
        nearest <= distance.min() <= nearest + 0.1 and farthest - 0.1 <= distance.max() <= farthest
    )


# --- Goals ---

GOALS = {"pendulum": [0.0], "cartpole": [0.0, 0.0], "acrobot": [0.0, 0.0]}


def bent(goal):
    """The reacher's angles with its tip at the goal: a triangle with two sides of 1 m."""
    elbow = 2 * np.arccos(np.linalg.norm(goal) / 2)
    return [np.arctan2(goal[0], goal[1]) - elbow / 2, elbow]


@every_task
def test_reward_is_1_at_the_goal_and_less_elsewhere(name):
    task = control.TASKS[name]
    goal = np.array([0.9, -0.8]) if any(task.goal) else np.zeros(2)
    position = GOALS.get(name, bent(goal) if name == "two_link_reacher" else goal)
    np.testing.assert_allclose(task.reward(make_state(position, None, goal)), 1, atol=1e-5)
    rng = np.random.default_rng(0)
    away = State(
        jnp.array(position + rng.normal(0, 0.3, (50, len(position)))),
        jnp.array(rng.normal(0, 1, (50, len(position)))),
        jnp.tile(goal, (50, 1)),
    )
    assert np.all(jax.vmap(task.reward)(away) < 1)


def test_point_mass_and_reacher_get_to_every_goal():
    def to_point(state, key):
        return (state.goal + 2 * (state.goal - state.position) - state.velocity) / 3

    def to_reacher(state, key):
        jacobian = jax.jacobian(lambda q: control.tip(state._replace(position=q)))(state.position)
        return (10 * jacobian.T @ (state.goal - control.tip(state)) - state.velocity) / 4

    for name, controller in (("point_mass", to_point), ("two_link_reacher", to_reacher)):
        rewards = play(name, controller)[2]
        assert np.mean(np.asarray(rewards)[-20:] > 0.9) > 0.95, name


def test_pendulum_is_too_heavy_to_lift_at_once_and_light_enough_to_swing_up():
    step = jax.jit(control.make("pendulum").step)
    heights = {}
    for name, action in (("constant", lambda v: 1.0), ("along", lambda v: 1.0 if v >= 0 else -1.0)):
        state, heights[name] = make_state([np.pi]), -1.0
        for _ in range(100):
            state, obs, *_ = step(KEY, state, jnp.array([action(float(state.velocity[0]))]))
            heights[name] = max(heights[name], float(obs[0]))
    assert heights["constant"] < 0 < 0.95 < heights["along"]


def test_names():
    assert control.NAMES == ("pendulum", "cartpole", "point_mass", "two_link_reacher", "acrobot")
    with pytest.raises(
        ValueError, match="unknown task 'pendulums'; choose from pendulum, .*, acrobot$"
    ):
        control.make("pendulums")


def test_the_file_stands_alone():
    tree = ast.parse(Path(control.__file__).read_text())
    modules = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"collections.abc", "functools", "typing", "jax", "jax.numpy"}
