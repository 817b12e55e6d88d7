"""The swimmer against numpy's integral of the drag, and against what is known of swimming."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from environments import swimmer

ENV = swimmer.make("purcell_swimmer")
STEP = partial(jax.jit(ENV.step), jax.random.key(0))  # deterministic


def play(actions):
    """-> states, rewards, from the same start"""
    state, states, rewards = ENV.reset(jax.random.key(0))[0], [], []
    for action in actions:
        state, _, reward, terminated = STEP(state, jnp.float32(action))
        states.append(state)
        rewards.append(float(reward))
        assert not terminated
    return states, np.array(rewards)


def test_forces_and_torques_on_points_of_the_body_add_up_to_nothing():
    rng = np.random.default_rng(0)
    bends, bending = rng.uniform(-1, 1, 5), rng.normal(size=5)
    (vx, vy), turn = swimmer.free_motion(jnp.float32(bends), jnp.float32(bending))
    assert abs(turn) > 0.01
    # The body as 600 points; velocities by differences of places a moment apart.
    num_links, points = 6, 100

    def places(bends, x, y, heading):
        angles = heading + np.concatenate([[0], np.cumsum(bends)])
        along = np.stack([np.cos(angles), np.sin(angles)], axis=1) / num_links
        front = np.array([x, y]) - along[0] / 2 + np.cumsum(along, axis=0)
        back = front - along
        share = (np.arange(points) + 0.5) / points
        return back[:, None] + share[:, None] * along[:, None], along * num_links

    dt = 1e-6
    before, along = places(bends, 0, 0, 0)
    after, _ = places(bends + dt * bending, dt * float(vx), dt * float(vy), dt * float(turn))
    v = (after - before) / dt
    lengthwise = np.sum(v * along[:, None], axis=-1, keepdims=True) * along[:, None]
    force = -(lengthwise + swimmer.SIDEWAYS * (v - lengthwise)) / (num_links * points)
    torque = before[..., 0] * force[..., 1] - before[..., 1] * force[..., 0]
    assert np.abs(force).sum() > 0.01
    np.testing.assert_allclose(force.sum(axis=(0, 1)), 0, atol=2e-5)
    np.testing.assert_allclose(torque.sum(), 0, atol=2e-5)


def test_a_movement_that_is_retraced_leads_nowhere():
    """The scallop theorem (Purcell 1977)."""
    there = np.random.default_rng(1).uniform(-0.5, 0.5, size=(10, 5))
    states, rewards = play([*there, *-there[::-1]])
    np.testing.assert_allclose(rewards.sum(), 0, atol=1e-3 * np.abs(rewards).sum())
    np.testing.assert_allclose(states[-1].heading, 0, atol=1e-5)
    assert abs(states[9].heading) > 0.01


def wave(direction):
    times = 2 * np.pi * np.arange(42)[:, None] / 21
    return 0.6 * np.cos(times - direction * np.arange(5))


def test_it_swims_against_the_wave_along_its_body():
    """As a flagellum does (Taylor 1951)."""
    assert play(wave(1))[1].mean() < -0.1 and play(wave(-1))[1].mean() > 0.1


def test_the_mirrored_body_swims_as_fast_and_turns_the_other_way():
    bends = jnp.array([0.5, -0.3, 0.2, 0.9, -1.0])
    actions = np.random.default_rng(2).uniform(-1, 1, size=5)
    straight, mirrored = (swimmer.State(jnp.float32(0), s * bends) for s in (1, -1))
    state, obs, reward, _ = STEP(straight, jnp.float32(actions))
    other, other_obs, other_reward, _ = STEP(mirrored, jnp.float32(-actions))
    np.testing.assert_allclose(reward, other_reward, rtol=1e-5)
    np.testing.assert_allclose(state.heading, -other.heading, rtol=1e-5)
    np.testing.assert_allclose(obs[0], other_obs[0], rtol=1e-5)
    np.testing.assert_allclose(obs[1:], -other_obs[1:], rtol=1e-5)


def test_joints_stop_at_their_limits_and_actions_are_clipped():
    states, _ = play([np.full(5, 9.0)] * 20)
    np.testing.assert_allclose(states[0].bends - states[1].bends, -0.3, rtol=1e-5)
    np.testing.assert_allclose(states[-1].bends, swimmer.MAX_BEND)


def test_sizes_and_names():
    assert (ENV.obs_size, ENV.action_size) == (7, 5)
    nine = swimmer.make("purcell_swimmer", 9)
    state, obs = nine.reset(jax.random.key(0))
    assert obs.shape == (nine.obs_size,) == (10,) and nine.action_size == 8
    with pytest.raises(ValueError, match="choose from purcell_swimmer"):
        swimmer.make("fish")
