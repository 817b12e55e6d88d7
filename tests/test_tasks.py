"""From names to agents and environments; the settings against the tables of the paper."""

import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import a2c
import gridworld
import ppo
import tasks
from environments import control, swimmer
from pipeline_train import Args
from train_optimizer import fill_in

# Table of the paper's settings: the fields, then the learning rate
PAPER_FIELDS = (
    *("total_steps", "num_envs", "reward_scale", "rollout_steps", "num_minibatches", "batch_size"),
    *("num_epochs", "entropy_weight", "discount"),
)
PAPER = {
    "ant": (1e8, 4096, 10, 5, 32, 2048, 4, 1e-2, 0.97, 3e-4),
    "humanoid": (1e8, 2048, 0.1, 10, 32, 1024, 8, 1e-3, 0.97, 3e-4),
    "inverted_double_pendulum": (2e7, 2048, 10, 5, 32, 1024, 4, 1e-2, 0.97, 3e-4),
    "walker2d": (5e7, 2048, 5, 20, 32, 512, 8, 1e-3, 0.997, 3e-5),
}


def test_tasks_of_the_paper_have_its_settings():
    for name, row in PAPER.items():
        args = tasks.agent_args(name)
        assert tuple(getattr(args, field) for field in PAPER_FIELDS) == row[:-1], name
        assert tasks.agent_settings(name)["learning_rate"] == row[-1], name
        assert (args.gae_lambda, args.clip_range, args.grad_clip, args.episode_length) == (
            0.95,
            0.3,
            1.0,
            1000,
        )
        assert args.policy_layers == (32,) * 4 and args.value_layers == (256,) * 5
    assert tasks.agent_args("walker2d", num_epochs=2, discount=None).num_epochs == 2


def test_the_papers_settings_are_the_defaults():
    """The paper's table; where it swept, a value of its sweep."""
    for name in gridworld.NAMES:
        args = fill_in(Args(env_name=(name,)))
        assert args.reset_interval in ((32, 64) if name == "catch" else (72, 144, 288, 576))
        assert 1e-5 <= args.meta_learning_rate <= (1e-2 if name == "catch" else 1e-3)
        assert (args.inner_updates, args.reward_scale, args.envs_per_unit) == (4, (1.0,), (1,))
        agent = tasks.agent_args(name)
        assert agent.conv_filters == (16 if name.startswith("big") else 0)
        assert agent.hidden_size == (256 if name == "catch" else 32)
        assert (agent.total_steps, agent.num_envs) == ((5e5, 64) if name == "catch" else (3e7, 512))
        assert (agent.rollout_steps, agent.discount, agent.td_lambda) == (20, 0.995, 0.95)
        assert (agent.critic_weight, agent.entropy_weight) == (0.5, 0.01)
    ant = fill_in(Args(env_name=("ant",)))
    (unit,) = tasks.all_unit_args(ant)
    assert ant.reset_interval in (32, 64, 128, 256, 512) and 1e-5 <= ant.meta_learning_rate <= 1e-3
    assert (
        ant.num_units * unit.num_envs == 2048
        and unit.num_minibatches * unit.batch_size == 4 * unit.num_envs
    )
    assert (unit.rollout_steps, unit.num_epochs, unit.value_layers) == (5, 4, (64,) * 5)
    assert ant.num_iterations == 610
    big, catch = fill_in(Args()), fill_in(Args(env_name=("catch",)))
    assert (big.num_units, big.num_iterations, big.learning_rate, big.grad_clip) == (
        512,
        585,
        (3e-3,),
        1.0,
    )
    assert (catch.num_units, catch.num_iterations, catch.learning_rate, catch.grad_clip) == (
        64,
        78,
        (1e-3,),
        np.inf,
    )
    six = (
        "small_dense_long",
        "small_dense_short",
        "big_sparse_short",
        "big_dense_short",
        "big_sparse_long",
        "big_dense_long",
    )
    many = fill_in(Args(env_name=six))
    assert many.learning_rate == (1e-3, 3e-3, 3e-3, 3e-3, 1e-3, 3e-3)
    assert many.reward_scale == (1e3, 1e2, 1e2, 1e1, 1e1, 1.0)
    assert fill_in(Args(env_name=six, learning_rate=(1e-2,))).learning_rate == (1e-2,) * 6


def test_the_bound_of_ppos_gradients_is_set_whatever_the_optimizer_has():
    for given in ({"optimizer": "adam4rl"}, {"theta": "pretrained/optim4rl_small_dense_long"}):
        args = fill_in(Args(env_name=("pendulum",), grad_clip=0.3, num_iterations=1, **given))
        assert tasks.all_unit_args(args)[0].grad_clip == 0.3
        with pytest.raises(ValueError, match="--grad-clip is"):
            fill_in(Args(env_name=("catch",), grad_clip=0.3, num_iterations=1, **given))


def test_every_name_has_one_kind_and_every_control_task_its_settings():
    names = [name for kind in tasks.KINDS for name in kind.names()]
    assert len(set(names)) == len(names)
    for name in (*control.NAMES, *swimmer.NAMES):
        assert name in tasks.settings.AGENT
        learner = tasks.make_learner(name, total_steps=1e4)
        assert learner.agent is ppo and learner.args.episode_length == 200
        state, obs = learner.env.reset(jax.random.key(0))
        assert obs.shape == (learner.env.obs_size,)


@pytest.mark.parametrize("name", ["small_dense_short", "catch"])
def test_ppo_plays_the_same_gridworld_as_a2c(name):
    """Observations, rewards and ends are those of the environment, over several episodes."""
    plain, flat = gridworld.make(name), tasks.make_learner(name, "ppo").env
    state, obs = flat.reset(jax.random.key(0))
    step, plain_step = jax.jit(flat.step), jax.jit(plain.step)
    ends = 0
    for t in range(110):
        key, action = jax.random.key(t), jnp.int32(t % plain.num_actions)
        _, *expected = plain_step(key, state, action)
        state, obs, reward, terminated = step(key, state, action)
        np.testing.assert_array_equal(obs, expected[0].ravel())
        assert reward == expected[1] and terminated == expected[2]
        assert obs.shape == (flat.obs_size,) and obs.dtype == jnp.float32
        ends += int(terminated)
    assert ends >= 2 and flat.resets_itself


def test_an_agent_that_does_not_learn_there_is_refused():
    with pytest.raises(ValueError, match="ppo.py learns there, not a2c.py"):
        tasks.make_learner("pendulum", "a2c")
    assert tasks.agent_of("catch") is a2c and tasks.make_learner("catch", "ppo").agent is ppo
    assert tasks.score_window("catch") == 20 and tasks.score_window("catch by ppo") == 2
    with pytest.raises(ValueError, match="'dqn' is none of a2c, ppo"):
        tasks.score_window("catch by dqn")


def test_minatar_without_gymnax_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)  # an import of it fails
    with pytest.raises(ValueError, match="minatar_freeway: it needs gymnax .pip install gymnax"):
        tasks.make_learner("minatar_freeway")


class FakeGame(NamedTuple):
    """A game as gymnax has them: the state counts steps, and the key's bits are observed."""

    num_actions = 3

    class Params(NamedTuple):
        max_steps_in_episode: int = 5

        def replace(self, **changes):
            return self._replace(**changes)

    def observation_space(self, params):
        return jax.ShapeDtypeStruct((2, 2, 1), jnp.float32)

    def reset_env(self, key, params):
        return jnp.zeros((2, 2, 1), bool), jnp.int32(0)

    def step_env(self, key, state, action, params):
        obs = jax.random.bernoulli(key, 0.5, (2, 2, 1))
        state += 1
        done = (action == 2) | (state >= params.max_steps_in_episode)
        return obs, state, jnp.int32(10 * state + action), done, {}


def test_a_minatar_game_is_gymnaxs_without_its_time_limit(monkeypatch):
    made = lambda name: (FakeGame(), FakeGame.Params())
    monkeypatch.setitem(sys.modules, "gymnax", SimpleNamespace(make=made))
    agent, args, env = tasks.make_learner("minatar_breakout")
    assert agent is ppo and (args.rollout_steps, env.obs_size, env.action_size) == (128, 4, 3)
    assert not args.normalise_observations  # they are bits
    state, obs = env.reset(jax.random.key(0))
    assert obs.shape == (4,) and obs.dtype == jnp.float32
    seen = []
    for t in range(1, 9):
        state, obs, reward, terminated = env.step(jax.random.key(t), state, jnp.int32(2 * (t == 8)))
        assert reward == 10 * t + 2 * (t == 8) and terminated == (t == 8)
        seen.append(tuple(obs.tolist()))
    assert len(set(seen)) > 3  # another key at each step


def test_brax_physics_asks_for_full_precision():
    """An Nvidia GPU would round the factors of its products to 10 bits otherwise."""
    env = tasks.make_env("inverted_pendulum", ppo)
    state, _ = jax.eval_shape(env.reset, jax.random.key(0))
    for text in (
        str(jax.make_jaxpr(env.reset)(jax.random.key(0))),
        str(jax.make_jaxpr(env.step)(jax.random.key(0), state, jnp.zeros(1))),
    ):
        assert text.count("dot_general[") > 5
        assert text.count("dot_general[") == text.count("Precision.HIGHEST, Precision.HIGHEST")
