"""Classical optimizers by name; files that work when they are copied into an empty folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimizers

ROOT = Path(__file__).parent.parent

CLASSICAL = {
    "adam": optax.adam(0.1, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0),
    "adam_linear": optax.adam(0.1, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0),
    "rmsprop": optax.rmsprop(0.1, 0.9, 1e-8, 0.0, eps_in_sqrt=True, centered=False, momentum=None),
    "sgd": optax.sgd(0.1, momentum=None),
    "sign_sgd": optax.sign_sgd(0.1),
}


@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_optimizers_are_those_of_optax_with_these_arguments(name):
    ours, theirs = optimizers.make_optimizer(name, 0.1), CLASSICAL[name]
    ours, params = optax.with_extra_args_support(ours), jnp.ones(4)
    state, expected_state = ours.init(params), theirs.init(params)
    for t in range(4):
        g = jax.random.normal(jax.random.key(t), (4,)) * jnp.array([1.0, 100.0, 1e-7, 0.0])
        updates, state = ours.update(g, state, params, fraction=t / 4)
        expected, expected_state = theirs.update(g, expected_state, params)
        left = 1 - t / 4 if name == "adam_linear" else 1
        np.testing.assert_allclose(updates, left * expected, rtol=1e-6)


def test_unknown_optimizer():
    with pytest.raises(
        ValueError, match="choose from adam, .*rmsprop, .*untrained, pretrained/NAME"
    ):
        optimizers.make_optimizer("adamw", 0.1)


# A file copied alone trains an agent, or parameters, for three updates. files: what is copied;
# code: what is run beside it.
ALONE = {
    "gridworld": (
        ["gridworld"],
        """
import jax, gridworld
env = gridworld.make("small_dense_short")
state, obs = env.reset(jax.random.key(0))
for i in range(3):
    state, obs, reward, done = env.step(jax.random.key(i), state, i)
assert obs.shape == env.obs_shape and int(state.time) == 3
""",
    ),
    "optim4rl": (
        ["optim4rl"],
        """
import jax, optax, optim4rl
optimizer = optim4rl.optim4rl(optim4rl.init_theta(jax.random.key(0)), 0.1)
params = {"w": jax.numpy.ones(3)}
start, opt_state = params, optimizer.init(params)
for _ in range(3):
    updates, opt_state = optimizer.update(params, opt_state, params)
    params = optax.apply_updates(params, updates)
assert (params["w"] < start["w"]).all()
""",
    ),
    "adam4rl": (
        ["adam4rl", "optim4rl"],
        """
import jax, optax, adam4rl
theta = adam4rl.make_adam4rl().init_theta(jax.random.key(0))
optimizer = adam4rl.adam4rl(theta, num_steps=10)
params = {"w": jax.numpy.ones(3)}
start, opt_state = params, optimizer.init(params)
for _ in range(3):
    updates, opt_state = optimizer.update(params, opt_state, params)
    params = optax.apply_updates(params, updates)
assert (params["w"] < start["w"]).all()
""",
    ),
    "a2c": (
        ["a2c"],
        """
from typing import NamedTuple
import jax, jax.numpy as jnp, optax, a2c

class Env(NamedTuple):  # one observation; action 1 is rewarded; episodes of one step
    reset = staticmethod(lambda key: (jnp.int32(0), jnp.ones((1, 1, 1))))
    @staticmethod
    def step(key, state, action):
        return state, jnp.ones((1, 1, 1)), (action == 1) * 1.0, jnp.array(True)

    obs_shape = (1, 1, 1)
    num_actions = 2

args = a2c.Args(env_name="toy", total_steps=3 * 20 * 64, num_envs=64)
history = a2c.train(args, Env(), optax.adam(0.1), lambda *_: None)
assert history["reward"].shape == (1, 3) and history["reward"][0, -1] > 0.55
""",
    ),
    "ppo": (
        ["ppo", "networks"],
        """
import jax, jax.numpy as jnp, optax, ppo

def step(state, action):  # one observation; the reward is highest for action 0.5
    return state, jnp.ones(1), 1 - jnp.abs(action[0] - 0.5), jnp.array(True)

env = ppo.Env(lambda key: (jnp.int32(0), jnp.ones(1)), step, 1, 1)
sizes = {"num_envs": 64, "rollout_steps": 2, "batch_size": 64}
sizes |= {"num_minibatches": 4, "num_epochs": 4, "policy_layers": (8,), "value_layers": (8,)}
settings = {"discount": 0.9, "entropy_weight": 0.0, "reward_scale": 1.0}
args = ppo.Args(total_steps=3 * 2 * 256, num_evals=1, eval_envs=2, **sizes, **settings)
history = ppo.train(args, env, optax.adam(0.01), lambda *_: None)
assert history["reward"].shape == (1, 3)
assert history["eval_return"][0, -1] > history["eval_return"][0, 0]
""",
    ),
}


@pytest.mark.parametrize("module", ALONE)
def test_a_copied_file_works_alone_in_an_empty_folder(module, tmp_path):
    files, code = ALONE[module]
    for name in files:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""}
    )


def test_the_readmes_code_runs_with_copies_of_two_files_and_learns(tmp_path):
    for path in ("optim4rl.py", "adam4rl.py", "pretrained/adam4rl.npz"):
        shutil.copy(ROOT / path, tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code += 'assert abs(params["w"].sum(1) + params["b"].sum() - 3.0).max() < 0.2, params'
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""}
    )
