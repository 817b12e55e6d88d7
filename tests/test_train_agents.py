"""The last line of a run of a2c.py or ppo.py, by hand-made histories."""

import jax.numpy as jnp
import numpy as np

import a2c
import ppo
import train_agents

NAN = np.nan
EIGHT_STEPS = ppo.Args(num_envs=2, batch_size=2, num_minibatches=1, rollout_steps=4)  # an update


def test_a_lost_seed_of_ppo_is_left_out_of_the_mean():
    """4 updates; evaluations before training, after 16 and after 32 steps."""
    assert ppo.steps_per_update(EIGHT_STEPS) == 8
    history = {
        "return": jnp.zeros((3, 4)),
        "eval_steps": [0, 16, 32],
        "eval_return": jnp.array([[9.0, 1.0, 3.0], [9.0, 5.0, NAN], [9.0, 4.0, 6.0]]),
    }
    line = train_agents.last_returns(ppo, EIGHT_STEPS, history)
    assert line == "mean return of the last 2 evaluations: 3.5 (by seed: 2, nan, 5)"


def test_an_evaluation_that_an_interrupted_run_did_not_make_does_not_count():
    history = {"eval_steps": [0, 16, 32], "eval_return": jnp.array([[9.0, 1.0, NAN]])}
    for done, line in (
        (3, "mean return of the last evaluation: 1 (by seed: 1)"),
        (1, "no evaluation yet"),
    ):
        history["return"] = jnp.zeros((1, done))
        assert train_agents.last_returns(ppo, EIGHT_STEPS, history) == line


def test_a2cs_is_of_the_last_20_updates():
    returns = jnp.array([np.arange(30.0), np.full(30, 2.0)])
    line = train_agents.last_returns(a2c, a2c.Args(), {"return": returns})
    assert line == "mean return of the last 20 updates: 10.75 (by seed: 19.5, 2)"
