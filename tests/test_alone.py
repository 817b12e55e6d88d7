"""Files that work when they are copied into an empty folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A file copied alone makes three steps or updates. files: what is copied; code: what is run beside
# it. (optim4rl.py and adam4rl.py: the README's code below.)
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

def step(key, state, action):  # one observation; the reward is highest for action 0.5
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
