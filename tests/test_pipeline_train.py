"""Pipeline training: resets, devices, determinism."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import devices
import optimizers
import pipeline_train
from meta_gradient import meta_gradient
from optim4rl import LearnedOptimizer, make_optim4rl
from pipeline_train import (
    jit_meta_step,
    keep_if_finite,
    new_unit,
    reset_due,
    reset_slots,
    schedule,
    train_group,
)
from tasks import all_unit_args
from train_optimizer import set_up
from units import (
    group_of,
    make_regression_task,
    make_task,
    make_units,
    pick,
    planned,
    relative,
    small_args,
)

# --- Resets ---


@pytest.mark.parametrize(
    "num_units, reset_interval, slots",
    [
        (4, 8, [0, 2, 4, 7]),
        (3, 2, [0, 0, 1]),
        (5, 1, [0, 0, 0, 0, 0]),
        (1, 10, [0]),
        (6, 4, [0, 0, 1, 1, 2, 3]),
        (2, 72, [0, 71]),
    ],
)
def test_reset_slots_by_hand(num_units, reset_interval, slots):
    np.testing.assert_array_equal(reset_slots(num_units, reset_interval), slots)


@pytest.mark.parametrize("pipeline", [True, False])
def test_clocks_count_from_each_reset(pipeline):
    args, ages = small_args(pipeline=pipeline), np.zeros(4, int)
    for t in range(8):
        plan = schedule(jax.random.key(t), jnp.int32(t), args)
        expected_due = [pipeline and t % 3 == slot for slot in reset_slots(4, 3)]
        ages = np.where(expected_due, 0, ages)
        np.testing.assert_array_equal(plan.due, expected_due)
        np.testing.assert_array_equal(plan.age, ages)
        assert len(set(map(tuple, jax.random.key_data(plan.key).tolist()))) == 4
        ages = ages + 1


def test_a_due_unit_is_reset_whole_and_the_others_not_at_all():
    task, learned = make_task(2), make_optim4rl()
    theta, units = make_units(task, learned, 4)
    due, keys = jnp.array([False, True, False, True]), jax.random.split(jax.random.key(3), 4)
    new = functools.partial(new_unit, theta=theta, task=task, learned=learned)
    after = jax.jit(functools.partial(reset_due, new=new))(keys, units, due)
    for i in range(4):
        if due[i]:
            same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
            jax.tree.map(same, pick(after, i), jax.jit(new)(keys[i]))
        else:
            jax.tree.map(np.testing.assert_array_equal, pick(after, i), pick(units, i))
    before, after = (tree.opt_state[0][0] for tree in (units, after))
    assert np.abs(before).max() > 0 and np.abs(after[1]).max() == 0


def test_units_begin_apart_in_all_tasks():
    args = small_args(env_name=("small_dense_short", "catch"))
    learned, two = set_up(args)[1], [make_regression_task(), make_regression_task()]
    init = functools.partial(
        pipeline_train.init_meta_state, all_tasks=two, learned=learned, args=args
    )
    units = jax.jit(init)(jax.random.key(0)).units
    weights = np.concatenate([some.params["w"].reshape(4, -1) for some in units])
    assert len(np.unique(weights, axis=0)) == 8


def test_each_task_has_its_own_settings():
    given = {"learning_rate": (0.3, 0.1), "reward_scale": (7.0, 2.0), "envs_per_unit": (2, 3)}
    args = small_args(env_name=("small_dense_long", "catch"), **given)
    all_tasks, _, config = set_up(args)
    assert [task.learning_rate for task in all_tasks] == [0.3, 0.1] and config["grad_clip"] == 1
    units = [(x.env_name, x.num_envs, x.reward_scale) for x in all_unit_args(args)]
    assert units == [("small_dense_long", 2, 7.0), ("catch", 3, 2.0)]
    assert set_up(small_args(env_name=("catch",)))[2]["grad_clip"] is None  # not clipped
    assert set_up(small_args(grad_clip=0.3))[2]["grad_clip"] == 0.3


def test_metrics_of_an_iteration_are_means_over_the_units_that_have_them():
    metrics = {
        "meta_loss": jnp.array([1.0, jnp.nan, 3.0]),
        "return": jnp.array([jnp.nan, 5.0, 9.0]),
        "lost": jnp.array([False, True, False]),
    }
    found = pipeline_train.mean_metrics(metrics, {"a": jnp.array([3.0]), "b": jnp.array([[-4.0]])})
    assert found == {"meta_loss": 2, "return": 7, "meta_grad_norm": 5, "lost_units": 1}


# In place of gridworlds where the task does not matter: it compiles in a tenth of the time.
REGRESSION = (make_regression_task(),)


@functools.lru_cache
def compiled_meta_step(args, num_devices, tasks):
    all_tasks, learned, _ = set_up(args)
    mesh = Mesh(jax.devices()[:num_devices], "units")
    return jit_meta_step(args, tasks or all_tasks, learned, mesh)


def iterate(args, iterations=4, num_devices=1, tasks=None):
    """-> the MetaState before every iteration and after the last, on the host. tasks: instead of
    those of args"""
    init, step = compiled_meta_step(dataclasses.replace(args, seed=0), num_devices, tasks)
    state = init(jax.random.key(args.seed))
    states = [jax.device_get(state)]
    for _ in range(iterations):
        state, _ = step(jax.random.key(args.seed + 1), state)
        states.append(jax.device_get(state))
    return states


@pytest.mark.parametrize("pipeline", [True, False])
def test_units_are_reset_when_the_schedule_says(pipeline):
    states = iterate(small_args(pipeline=pipeline), iterations=5, tasks=REGRESSION)
    weights = np.stack([state.units[0].params["w"] for state in states])  # [6, N, 30, 40]
    moved = np.abs(np.diff(weights, axis=0)).max(axis=(2, 3))
    due = np.array([[pipeline and t % 3 == slot for slot in reset_slots(4, 3)] for t in range(5)])
    # Two updates of about the learning rate each, or a whole new set of weights.
    np.testing.assert_array_equal(moved > 0.15, due)
    assert moved.min() > 0
    new = weights[1:][due].round(1).reshape(due.sum(), 30 * 40)  # no two units are the same
    assert len(np.unique(new, axis=0)) == len(new)


# --- Iterations ---


def test_one_two_and_four_devices_give_the_same():
    args = small_args(num_units=8)
    one, two, four = (iterate(args, num_devices=n, tasks=REGRESSION) for n in (1, 2, 4))
    for other in (two, four):
        assert relative(other[-1].theta, one[-1].theta) < 1e-5
        assert relative(other[-1].units[0].params, one[-1].units[0].params) < 1e-4


def test_same_seed_same_theta_bit_for_bit():
    first, second, other = (
        iterate(small_args(seed=seed), tasks=REGRESSION)[-1].theta for seed in (0, 0, 5)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert relative(other, first) > 0.1


def test_one_trace_for_all_iterations(monkeypatch):
    chex.clear_trace_counter()
    monkeypatch.setattr(
        devices, "mean_over_units", chex.assert_max_traces(devices.mean_over_units, n=1)
    )
    compiled_meta_step.cache_clear()
    iterate(small_args(), tasks=REGRESSION)


def test_clipping():
    gradient = {"a": jnp.array([3.0, -0.2]), "b": jnp.array([[4.0]])}

    def clip(kind, tree):
        clipping = pipeline_train.META_CLIPS[kind]
        return clipping.update(tree, clipping.init(tree))[0]

    np.testing.assert_allclose(optax.tree.norm(clip("global_norm", gradient)), 0.5, rtol=1e-6)
    np.testing.assert_allclose(
        clip("global_norm", gradient)["b"] / clip("global_norm", gradient)["a"][0],
        [[4 / 3]],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(
        clip("global_norm", {"a": jnp.array([0.1])})["a"], jnp.array([0.1])
    )
    np.testing.assert_allclose(clip("elementwise", gradient)["a"], [1.0, -0.2])
    np.testing.assert_array_equal(clip("none", gradient)["b"], gradient["b"])
    small = jax.tree.map(lambda x: 1e-3 * x, gradient)
    for tree in (gradient, small):
        expected = jax.tree.map(lambda x: 0.5 * x / 5.004, gradient)  # 5.004: the norm
        assert relative(clip("rescale", tree), expected) < 1e-2


@pytest.mark.parametrize("meta_clip", ["global_norm", "none"])
def test_several_tasks_mean_of_clipped_gradients(meta_clip):
    args = small_args(env_name=("small_dense_short", "catch"), meta_clip=meta_clip)
    tasks, learned = (make_regression_task(1e4), *REGRESSION), set_up(args)[1]
    states = iterate(args, iterations=1, tasks=tasks)
    gradients = []
    for i, task in enumerate(tasks):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), i)
        group = jax.jit(functools.partial(train_group, task=task, learned=learned, args=args))
        plan = schedule(key, jnp.int32(0), args)
        gradients.append(
            jax.tree.map(lambda g: g / 4, group(states[0].theta, plan, states[0].units[i])[0])
        )
    norms = [float(optax.tree.norm(g)) for g in gradients]
    assert min(norms) < 0.5 < max(norms)
    most = 0.5 if meta_clip == "global_norm" else float("inf")
    clipped = [
        jax.tree.map(lambda x, n=n: x * min(1, most / n), g)
        for g, n in zip(gradients, norms, strict=True)
    ]
    adam = states[1].meta_opt_state[0]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *clipped)
    assert relative(adam.mu, jax.tree.map(lambda g: 0.1 * g, mean)) < 1e-4
    # Adam's first step descends, by the meta-learning rate.
    moved = jax.tree.map(jnp.subtract, states[1].theta, states[0].theta)
    rate = args.meta_learning_rate
    expected = jax.tree.map(lambda g: -rate * g / (jnp.abs(g) + 1e-8), mean)
    assert relative(moved, expected) < 1e-2


def make_by_loss():
    """Gradient descent whose step depends on the loss, as VeLO's does."""

    def update(theta, grads, state, params, learning_rate, value, **extra_args):
        step = learning_rate * jnp.tanh(theta * value)
        return jax.tree.map(lambda g: -step * g, grads), state

    return LearnedOptimizer(lambda key: jnp.ones(()), lambda params: (), update, None)


@pytest.mark.parametrize("learned", [make_optim4rl(), make_by_loss()])
def test_a_unit_that_goes_wrong_is_left_out_and_reset(learned):
    """One that comes in with NaN is new at once; one whose numbers overflow on the way adds
    nothing, and is new next time; one whose loss alone overflows adds nothing."""
    task, plan = make_regression_task(), planned(3, age=2)
    theta, units = make_units(task, learned, 3)
    group, mesh = group_of(task, learned), Mesh(jax.devices()[:1], "units")
    all_units = jax.jit(functools.partial(devices.mean_over_units, group, mesh=mesh))
    good = jnp.array([0, 2])
    whole = group(theta, pick(plan, good), pick(units, good))[0]
    cases = ((jnp.nan, False, False), (3e38, True, False), (1e21, True, True))
    for value, overflows, again in cases:
        bad_params = jax.tree.map(lambda x, value=value: x.at[1].set(value), units.params)
        bad = units._replace(params=bad_params)
        gradient, after, metrics = all_units(theta, plan, bad)
        np.testing.assert_array_equal(metrics["lost"], [False, overflows, False])
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
        left_out = relative(jax.tree.map(lambda g: 3 * g, gradient), whole) < 1e-5
        assert left_out == overflows
        side_by_side, _, metrics = group(theta, plan, bad)
        np.testing.assert_array_equal(metrics["lost"], [False, overflows, False])
        assert (relative(side_by_side, whole) < 1e-5) == overflows
        _, after, metrics = all_units(theta, plan, after)
        np.testing.assert_array_equal(metrics["lost"], [False, again, False])
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(after.params))


def test_a_unit_whose_replay_overflows_is_left_out():
    """Its agent stays finite: only the derivative by theta does not."""

    def update(theta, grads, state, params, learning_rate, **extra_args):
        large = jnp.where(optax.tree.norm(params) > 1e5, 1e35, 1.0) * theta
        step = learning_rate * (1 + large - jax.lax.stop_gradient(large))
        return jax.tree.map(lambda g: -step * g, grads), state

    learned = LearnedOptimizer(lambda key: jnp.zeros(()), lambda params: (), update)
    task, plan = make_regression_task(), planned(3, age=2)
    theta, units = make_units(task, learned, 3)
    params = jax.tree.map(lambda x: x.at[1].set(1e6), units.params)
    group, good = group_of(task, learned), jnp.array([0, 2])
    whole = group(theta, pick(plan, good), pick(units, good))[0]
    gradient, after, metrics = group(theta, plan, units._replace(params=params))
    np.testing.assert_array_equal(metrics["lost"], [False, True, False])
    np.testing.assert_allclose(gradient, whole, rtol=1e-5)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(after.params))


def test_a_unit_that_went_wrong_is_as_young_as_any_new_one(monkeypatch):
    task, learned = make_regression_task(), make_optim4rl()
    theta, units = make_units(task, learned, 3)
    bad = units._replace(params=jax.tree.map(lambda x: x.at[1].set(jnp.nan), units.params))
    seen = []

    def spy(theta, keys, ages, *rest):
        seen.append((ages, rest[-1]))
        return meta_gradient(theta, keys, ages, *rest)

    monkeypatch.setattr(pipeline_train, "meta_gradient", spy)
    for pipeline, lifetime in ((True, 9), (False, 70)):  # without resets, the whole training
        args = small_args(reset_interval=9, num_iterations=70, pipeline=pipeline)
        pipeline_train.train_group(theta, planned(3, age=5), bad, task, learned, args)
        np.testing.assert_array_equal(seen[-1][0], [5, 0, 5])
        assert seen[-1][1] == lifetime


def test_an_update_is_skipped_only_if_all_units_are_lost_in_it():
    """3e38 overflows on the way. What comes in as NaN is reset first, and then counts."""
    args = small_args(num_units=1, inner_updates=1)
    all_tasks, learned, _ = set_up(args)
    init, step = jit_meta_step(args, all_tasks, learned, Mesh(jax.devices()[:1], "units"))
    for value, updates in ((jnp.nan, 1), (3e38, 0)):
        state = init(jax.random.key(0))._replace(iteration=jnp.int32(1))  # not due
        params = jax.tree.map(lambda x, v=value: jnp.full_like(x, v), state.units[0].params)
        units = (state.units[0]._replace(params=params),)
        after, (metrics,) = step(jax.random.key(1), state._replace(units=units))
        assert after.bad_updates == metrics["lost_units"] == 1 - updates
        assert after.meta_opt_state[0].count == updates


def test_one_lost_unit_of_four_does_not_skip_the_update():
    args = small_args(num_units=4, inner_updates=1)
    _, learned, _ = set_up(args)
    mesh = Mesh(jax.devices()[:1], "units")
    init, step = jit_meta_step(args, (make_regression_task(),), learned, mesh)
    state = init(jax.random.key(0))._replace(iteration=jnp.int32(1))
    params = jax.tree.map(lambda x: x.at[0].set(3e38), state.units[0].params)
    units = (state.units[0]._replace(params=params),)
    after, (metrics,) = step(jax.random.key(1), state._replace(units=units))
    assert (after.bad_updates, metrics["lost_units"]) == (0, 1)
    assert after.meta_opt_state[0].count == 1


def test_groups_of_units_on_an_accelerator_are_each_trained_once(monkeypatch):
    """66 units are two groups of 33: a group has at most 64."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def train(theta, schedule, units):
        return theta * jnp.sum(units), units + 1, {"seen": units}

    mesh, units = Mesh(jax.devices()[:1], "units"), jnp.arange(66.0)
    gradient, after, metrics = devices.mean_over_units(train, jnp.ones(()), units, units, mesh)
    assert gradient == 32.5
    np.testing.assert_array_equal(after, units + 1)
    np.testing.assert_array_equal(np.sort(metrics["seen"]), units)


@pytest.mark.parametrize("size, updates", [(1e15, 1), (1e20, 0), (jnp.nan, 0)])
def test_a_meta_gradient_without_a_finite_norm_changes_nothing(size, updates, monkeypatch):
    train = pipeline_train.train_group

    def huge(*args, **given):
        gradient, *rest = train(*args, **given)
        return jax.tree.map(lambda g: jnp.full_like(g, size), gradient), *rest

    monkeypatch.setattr(pipeline_train, "train_group", huge)
    args = small_args(num_units=1, inner_updates=1)
    all_tasks, learned, _ = set_up(args)
    init, step = jit_meta_step(args, all_tasks, learned, Mesh(jax.devices()[:1], "units"))
    before = init(jax.random.key(0))
    theta = jax.tree.map(np.array, before.theta)
    after, _ = step(jax.random.key(1), before)
    assert after.bad_updates == 1 - updates and after.meta_opt_state[0].count == updates
    same = jax.tree.map(np.array_equal, after.theta, theta)
    assert all(jax.tree.leaves(same)) == (updates == 0)


def test_new_values_are_kept_only_if_all_that_judges_them_is_finite():
    new, old = (
        {"a": jnp.ones(2), "b": jnp.array([1, 2])},
        {"a": jnp.zeros(2), "b": jnp.array([3, 4])},
    )
    for judge, expected in (
        ({"g": jnp.array([1.0, jnp.inf])}, old),
        ({"g": jnp.array([1.0])}, new),
    ):
        jax.tree.map(np.testing.assert_array_equal, keep_if_finite(new, old, judge), expected)


def test_training_goes_on_from_given_weights(tmp_path):
    learned = make_optim4rl("gru", "log", 4)
    theta = learned.init_theta(jax.random.key(7))
    optimizers.save_theta(
        tmp_path / "x.npz",
        theta,
        "optim4rl",
        {"cell": "gru", "inputs": "log", "hidden_size": 4},
        {},
    )
    args = small_args(theta=str(tmp_path / "x.npz"))
    states = iterate(args, iterations=1, tasks=REGRESSION)
    jax.tree.map(np.testing.assert_array_equal, states[0].theta, theta)
    assert 0 < relative(states[1].theta, theta) < 0.1
    assert set_up(args)[2]["hidden_size"] == 4


def test_on_an_accelerator_an_iteration_is_that_of_the_cpu(monkeypatch):
    """The branches for an accelerator, run here: all units and all blocks at once."""
    args = small_args()
    here = iterate(args, iterations=2, tasks=REGRESSION)[-1]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    there = iterate(args, iterations=2, tasks=(make_regression_task(),))[-1]  # not from the cache
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, there.theta, here.theta)
    jax.tree.map(same, there.units[0].params, here.units[0].params)


@pytest.mark.parametrize("num_units, expected", [(6, 3), (7, 1), (8, 4), (1, 1)])
def test_by_default_the_most_devices_that_divide_the_units_are_used(
    num_units, expected, monkeypatch
):
    monkeypatch.setattr(devices, "start_devices", lambda of_a_cpu: 4)
    assert devices.choose_devices(num_units, None).size == expected
