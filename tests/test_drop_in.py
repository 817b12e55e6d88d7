"""The learned optimizers in a project of one's own: what cannot be is refused, schedules work, and
compiling takes no longer for many tensors."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimizers
from adam4rl import adam4rl
from optim4rl import BLOCK, from_blocks, load_theta, optim4rl, to_blocks, to_optax

THETA = {kind: make().init_theta(jax.random.key(0)) for kind, make in optimizers.LEARNED.items()}
DROP_INS = {
    "optim4rl": lambda theta=THETA["optim4rl"], rate=0.1, **given: optim4rl(theta, rate, **given),
    "adam4rl": lambda theta=THETA["adam4rl"], rate=0.1, num_steps=10: adam4rl(
        theta, num_steps, rate
    ),
}
PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}


@pytest.mark.parametrize("kind", DROP_INS)
@pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf")])
def test_a_learning_rate_that_cannot_be_is_refused(kind, rate):
    with pytest.raises(ValueError, match=f"learning rate must be a number from 0 up, got {rate}"):
        DROP_INS[kind](rate=rate)


@pytest.mark.parametrize("num_steps", [0, -3, float("nan"), float("inf")])
def test_a_number_of_updates_that_cannot_be_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"updates of the whole training, got {num_steps}"):
        DROP_INS["adam4rl"](num_steps=num_steps)


@pytest.mark.parametrize("kind", DROP_INS)
@pytest.mark.parametrize("other", [*THETA, None])
def test_a_theta_of_another_kind_is_refused(kind, other):
    if other != kind:
        with pytest.raises(ValueError, match="theta is another optimizer's"):
            DROP_INS[kind](theta=THETA.get(other))


def test_a_theta_of_other_dimensions_is_refused():
    theta = THETA["optim4rl"] | {"rnn1": THETA["optim4rl"]["rnn1"] | {"w_x": jnp.zeros(32)}}
    with pytest.raises(ValueError, match="theta is another optimizer's"):
        DROP_INS["optim4rl"](theta=theta)


@pytest.mark.parametrize("kind", DROP_INS)
def test_a_state_of_other_parameters_is_refused(kind):
    optimizer, larger = DROP_INS[kind](), {"w": jnp.ones((BLOCK, 2))}
    for made, used, counts in ((PARAMS, larger, "1 .* have 2"), (larger, PARAMS, "2 .* have 1")):
        with pytest.raises(ValueError, match=rf"of other parameters \({counts}\)"):
            optimizer.update(used, optimizer.init(made), used)


@pytest.mark.parametrize("kind", DROP_INS)
def test_a_schedule_is_the_learning_rate_of_each_update(kind):
    schedule = optax.piecewise_constant_schedule(0.1, {1: 0.5, 2: 0.0})  # 0.1, 0.05, 0, 0
    scheduled, constant = DROP_INS[kind](rate=schedule), DROP_INS[kind](rate=1.0)
    update, constant_update = jax.jit(scheduled.update), jax.jit(constant.update)
    state, constant_state = scheduled.init(PARAMS), constant.init(PARAMS)
    for rate in (0.1, 0.05, 0.0, 0.0):
        updates, state = update(PARAMS, state, PARAMS)
        full, constant_state = constant_update(PARAMS, constant_state, PARAMS)
        jax.tree.map(
            lambda u, f, rate=rate: np.testing.assert_allclose(u, rate * f, rtol=1e-5),
            updates,
            full,
        )


def test_a_schedule_does_not_scale_the_part_of_star_that_has_no_learning_rate():
    star = optimizers.LEARNED["star"]()
    results = []
    for rate in (0.3, lambda count: 0.3):
        optimizer = to_optax(star, THETA["star"], rate)
        results.append(jax.jit(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *results)


@pytest.mark.parametrize("name", ["catch", "small_dense_long"])  # without clipping, and with
def test_the_recipe_of_the_docstring_is_the_optimizer_that_was_evaluated(name):
    path = str(optimizers.PRETRAINED / f"optim4rl_{name}.npz")
    theta, header = load_theta(path)
    recipe = optim4rl(theta, learning_rate=1e-3, grad_clip=header["config"]["grad_clip"])
    large = jax.tree.map(lambda x: 7.0 * x, PARAMS)
    updates = [
        optimizer.update(large, optimizer.init(PARAMS), PARAMS)[0]
        for optimizer in (recipe, optimizers.make_optimizer(path, 1e-3))
    ]
    jax.tree.map(np.testing.assert_array_equal, *updates)


@pytest.mark.parametrize("kind", DROP_INS)
def test_extra_arguments_of_other_optimizers_are_ignored(kind):
    optimizer = DROP_INS[kind]()
    updates = [
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, **extra)[0]
        for extra in ({}, {"value": 3.0, "nonsense": 1})
    ]
    jax.tree.map(np.testing.assert_array_equal, *updates)


# --- Many tensors ---

MANY = [jnp.arange(n % 5 + 2.0) + n for n in range(100)]


def test_many_empty_tensors_come_back():
    empty = [jnp.zeros((0, n), jnp.bfloat16) for n in range(100)]
    chex.assert_trees_all_equal_shapes_and_dtypes(from_blocks(to_blocks(empty), empty), empty)


def test_many_tensors_come_back_from_blocks_also_under_vmap_and_derivatives():
    there_and_back = lambda tree: from_blocks(to_blocks(tree), MANY)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(there_and_back)(MANY), MANY)
    two = jax.tree.map(lambda x: jnp.stack([x, -x]), MANY)
    back = jax.jit(jax.vmap(there_and_back))(two)
    jax.tree.map(np.testing.assert_array_equal, back, two)

    def loss(tree):  # sum of x^3
        back = from_blocks(to_blocks(tree) ** 2, tree)
        return sum(jnp.sum(x * y) for x, y in zip(tree, back, strict=True))

    jax.tree.map(
        lambda d, x: np.testing.assert_allclose(d, 3 * x**2, rtol=1e-6),
        jax.jit(jax.grad(loss))(MANY),
        MANY,
    )


@pytest.mark.parametrize("kind", DROP_INS)
def test_the_compiled_program_has_no_slice_of_its_own_for_each_of_many_tensors(kind):
    """XLA compiles slices at places that it knows one by one: for 300 tensors it took 2 s."""
    params = [jnp.ones((8, 8 + n % 3)) for n in range(100)]
    optimizer = DROP_INS[kind]()
    lowered = jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
    program = lowered.compile().as_text()
    assert len(re.findall(r" slice\(", program)) < 50
    assert len(re.findall(r" dynamic-slice\(", program)) >= 100


@pytest.mark.parametrize("name", ["untrained", "pretrained/adam4rl"])
def test_updates_outside_of_jit_compile_once(name):
    """jax's cache of traces is by the function: a new one in each update would be compiled anew."""
    optimizer, compiled = optimizers.make_optimizer(name, 1.0), []
    update, state = optax.with_extra_args_support(optimizer).update, optimizer.init(PARAMS)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    for _ in range(3):
        before = len(compiled)
        _, state = update(PARAMS, state, PARAMS, fraction=0.5, num_steps=100.0)
    assert 0 < before == len(compiled)
