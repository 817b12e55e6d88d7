"""The optimizers by name: the classical ones against numpy or optax, and their learning rates."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import a2c
import evaluate
import optimizers
import ppo
import tasks
import train_agents
from adam4rl import SIZES

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}


def gradients(t):
    keys = jax.random.split(jax.random.key(t))
    return {
        name: jax.random.normal(k, PARAMS[name].shape) for name, k in zip("wb", keys, strict=True)
    }


def updates_of(optimizer, extra_args):
    """One update for each dict of extra arguments."""
    optimizer = optax.with_extra_args_support(optimizer)
    state, update, updates = optimizer.init(PARAMS), jax.jit(optimizer.update), []
    for t, extra in enumerate(extra_args):
        step, state = update(gradients(t), state, PARAMS, **extra)
        updates.append(step)
    return updates


def assert_same(got, expected):
    for g, e in zip(got, expected, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), g, e)


@pytest.mark.parametrize("name", optimizers.CLASSICAL)
def test_every_classical_optimizer_descends_with_an_agents_extra_arguments(name):
    extra = {"fraction": 0.1, "num_steps": 100.0, "iteration_step": 0, "kl": 0.01, "value": 0.0}
    optimizer = optimizers.make_optimizer(name, 1e-2)
    for step in updates_of(optimizer, [extra]):
        grads = gradients(0)
        assert sum(jnp.sum(step[key] * grads[key]) for key in grads) < 0


@pytest.mark.parametrize(
    "name", ["adam", "adam_b99", "rmsprop", "rmsprop_linear", "sgd", "sign_sgd"]
)
def test_classical_optimizers_are_their_equations(name):
    """With gradients that are large, far below epsilon, and zero; a tenth of training is done."""
    optimizer = optax.with_extra_args_support(optimizers.make_optimizer(name, 0.1))
    state, update, m, v = optimizer.init(jnp.ones(4)), jax.jit(optimizer.update), 0.0, 0.0
    b1 = 0.99 if name == "adam_b99" else 0.9
    b2 = {"rmsprop": 0.9, "rmsprop_linear": 0.99}.get(name, 0.999)
    for t in range(1, 4):
        g = np.random.default_rng(t).normal(size=4) * [1.0, 100.0, 1e-7, 0.0]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        adam = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        expected = {
            "adam": adam,
            "adam_b99": adam,
            "rmsprop": g / np.sqrt(v + 1e-8),  # epsilon within the root
            "rmsprop_linear": 0.9 * g / np.sqrt(v / (1 - b2**t) + 1e-8),
            "sgd": g,
            "sign_sgd": np.sign(g),
        }[name]
        updates, state = update(jnp.float32(g), state, jnp.ones(4), fraction=0.1)
        np.testing.assert_allclose(updates, -0.1 * expected, rtol=1e-4)


def test_adam_rel_counts_from_the_start_of_an_iteration():
    steps = [0, 1, 2, 0, 1]
    m, v, expected = 0.0, 0.0, []
    for t, count in enumerate(steps):
        g = np.asarray(gradients(t)["w"])
        m, v, n = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, count + 1
        expected.append(-0.3 * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8))
    given = [{"iteration_step": jnp.int32(step)} for step in steps]
    got = [step["w"] for step in updates_of(optimizers.make_optimizer("adam_rel", 0.3), given)]
    assert_same(got, expected)
    without = updates_of(optimizers.make_optimizer("adam_rel", 0.3), [{}] * 5)  # as with A2C
    assert_same(without, updates_of(optax.adam(0.3), [{}] * 5))


def test_adam_kl_changes_its_rate_by_the_divergence():
    kls = [0.0, 0.1, 0.01, 0.001, 0.001]
    rates = [1e-3, 1e-3 / 1.5, 1e-3 / 1.5, 1e-3, 1.5e-3]
    got = updates_of(optimizers.make_optimizer("adam_kl", 1e-3), [{"kl": kl} for kl in kls])
    full = updates_of(optax.adam(1.0), [{}] * 5)
    assert_same(got, [optax.tree.scale(r, u) for r, u in zip(rates, full, strict=True)])


def test_adam_kls_first_rate_is_kept_where_the_divergence_does_not_change_it():
    for rate in (0.3, 1e-7):
        got = updates_of(optimizers.make_optimizer("adam_kl", rate), [{}, {"kl": 0.01}])
        assert_same(got, updates_of(optax.adam(rate), [{}] * 2))


def test_adam_kls_rate_is_bounded():
    for kl, bound in ((0.1, 1e-5), (1e-4, 1e-2)):
        got = updates_of(optimizers.make_optimizer("adam_kl", 1e-3), [{"kl": kl}] * 20)[-1]
        full = updates_of(optax.adam(bound), [{}] * 20)[-1]
        assert_same([got], [full])


@pytest.mark.parametrize(
    "name, made", [("adam", optax.adam), ("sign", optax.sign_sgd), ("muon", optax.contrib.muon)]
)
def test_linear_ones_fall_to_zero(name, made):
    got = updates_of(
        optimizers.make_optimizer(f"{name}_linear", 0.1), [{"fraction": f} for f in (0, 0.25, 1)]
    )
    full = updates_of(made(0.1), [{}] * 3)
    assert_same(got, [optax.tree.scale(s, u) for s, u in zip((1, 0.75, 0), full, strict=True)])


def test_rmsprop_auto_is_rmsprop_linear_at_18_over_the_number_of_updates():
    given = [{"fraction": f, "num_steps": 900.0} for f in (0, 0.5)]
    got = updates_of(optimizers.make_optimizer("rmsprop_auto", 1.0), given)
    expected = updates_of(optimizers.make_optimizer("rmsprop_linear", 0.02), given)
    assert_same(got, expected)


def test_curves_and_results_of_both_agents():
    by_a2c, by_ppo = tasks.make_learner("catch", num_envs=4), tasks.make_learner("catch", "ppo")
    returns, run = np.ones((2, 3)), evaluate.Run("catch", "adam", "adam", (0.1,))
    steps, _ = evaluate.curves(by_a2c, {"return": returns})
    np.testing.assert_array_equal(steps, [80, 160, 240])  # after each update of 20 steps
    history = {"return": 0 * returns, "eval_return": returns, "eval_steps": [0, 5, 9]}
    steps, found = evaluate.curves(by_ppo, history)
    np.testing.assert_array_equal(steps, [0, 5, 9])
    assert found.all()
    results = [evaluate.result(x, run, 0.1, steps, returns, [0, 1]) for x in (by_a2c, by_ppo)]
    assert [(r.env_name, r.last) for r in results] == [("catch", 20), ("catch by ppo", 2)]


def test_a_file_called_like_an_optimizer_does_not_stand_in_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("adam", "open"):
        (tmp_path / name).touch()
    assert optimizers.own_rate("adam") is None and optimizers.theta_header("adam") is None
    assert optimizers.own_rate("untrained:open") == 1.0


def test_unknown_optimizer():
    with pytest.raises(
        ValueError, match="choose from adam, .*rmsprop, .*untrained, pretrained/NAME"
    ):
        optimizers.make_optimizer("adamw", 0.1)


# --- Learning rates of optimizers that have their own ---


@pytest.fixture
def adam4rl_file(tmp_path):
    path = str(tmp_path / "adam4rl.npz")
    theta = {name: np.zeros(size, np.float32) for name, size in SIZES.items()}
    optimizers.save_theta(path, theta, "adam4rl", {}, {})
    return path


def test_an_infinite_bound_in_a_header_is_strict_json(tmp_path):
    theta = {name: np.zeros(size, np.float32) for name, size in SIZES.items()}
    optimizers.save_theta(tmp_path / "x.npz", theta, "adam4rl", {}, {"grad_clip": float("inf")})
    header = json.loads(str(np.load(tmp_path / "x.npz")["header"]), parse_constant=pytest.fail)
    assert header["trained"] == {"grad_clip": "inf"}


def test_own_rates(adam4rl_file):
    for name in (adam4rl_file, f"untrained:{adam4rl_file}", "untrained:adam4rl", "rmsprop_auto"):
        assert optimizers.own_rate(name) == 1.0
    for name in ("adam", "untrained", "pretrained/optim4rl_catch", "nosuch"):
        assert optimizers.own_rate(name) is None


def rates_of(**given):
    return {run.optimizer: run.rates for run in evaluate.plan(evaluate.Args(**given))}


def test_evaluate_gives_each_optimizer_its_rate_and_sweeps_those_without(adam4rl_file):
    names = ("adam", "rmsprop_auto", adam4rl_file)
    given = {"env_name": ("small_dense_long",), "optimizers": names}
    assert rates_of(**given) == {"adam": (3e-2,), "rmsprop_auto": (1.0,), adam4rl_file: (1.0,)}
    swept = rates_of(**given, learning_rates=(0.1, 0.2))
    assert swept == {"adam": (0.1, 0.2), "rmsprop_auto": (1.0,), adam4rl_file: (1.0,)}
    given = rates_of(**given, learning_rate=0.5)
    assert given == {"adam": (0.5,), "rmsprop_auto": (1.0,), adam4rl_file: (1.0,)}


def test_the_rate_of_meta_training_is_taken_where_it_was_one():
    grids, brax = ["catch", "small_dense_long"], ["ant", "humanoid"]
    for names, rates, env_name, expected in (
        (["catch"], [1e-3], "catch", 1e-3),
        (["catch"], [1e-3], "small_dense_long", None),
        (grids, [1e-3, 1e-3], "big_dense_long", 1e-3),
        (grids, [1e-3, 3e-3], "catch", None),
        (grids, [1e-3, 3e-3], "big_dense_long", None),
        (grids, [1e-3, 1e-3], "ant", None),
        (brax, [1e-4, 1e-4], "ant", 1e-4),
        (brax, [1e-4, 1e-4], "small_dense_long", None),
        (["catch", "ant"], [1e-4, 1e-4], "small_dense_long", None),
    ):
        trained = {"env_name": names, "learning_rate": rates}
        assert tasks.trained_rate(trained, env_name) == expected, (names, rates, env_name)
    assert tasks.trained_rate({"env_name": [], "learning_rate": []}, "catch") is None


def test_evaluate_clips_gradients_as_the_paper_or_as_it_is_told():
    for given, bound in ((None, 1.0), (0.5, 0.5), (float("inf"), float("inf"))):
        args = evaluate.Args(env_name=("pendulum",), grad_clip=given)
        assert evaluate.make_learner(args, "pendulum").args.grad_clip == bound


def test_agents_scripts_take_the_optimizers_rate_or_the_environments(adam4rl_file):
    def rate(optimizer, given=None):
        args = train_agents.PPOArgs(env_name="pendulum", optimizer=optimizer, learning_rate=given)
        return train_agents.fill_in(ppo, args).learning_rate

    assert rate("adam") == tasks.agent_settings("pendulum")["learning_rate"]
    assert (rate(adam4rl_file), rate("rmsprop_auto"), rate(adam4rl_file, 0.5)) == (1.0, 1.0, 0.5)


def test_a_shipped_optimizer_has_the_rate_of_its_meta_training_in_every_script():
    name, env_name = "pretrained/optim4rl_small_dense_short", "small_dense_short"
    assert tasks.agent_settings(env_name)["learning_rate"] == 3e-3
    args = train_agents.A2CArgs(env_name=env_name, optimizer=name)
    (run,) = evaluate.plan(evaluate.Args((env_name,), (name,)))
    assert train_agents.fill_in(a2c, args).learning_rate == run.rates[0] == 3e-2
    (by_ppo,) = evaluate.plan(evaluate.Args((env_name,), (name,), agent="ppo"))
    assert by_ppo.rates == (3e-3,)  # meta-training was with A2C


def test_a_flag_of_ppo_is_refused_where_no_agent_is():
    for env_names, refused in ((("catch",), True), (("catch", "pendulum"), False)):
        args = evaluate.Args(env_names, grad_clip=0.1)
        learners = {name: evaluate.make_learner(args, name) for name in env_names}
        with pytest.raises(ValueError) if refused else contextlib.nullcontext():
            evaluate.check_used(args, learners)
