"""Meta-gradients against jax.grad through everything and finite differences."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimizers
from baselines import one_network
from meta_gradient import replay_gradient, streamed_replay_gradient
from optim4rl import BLOCK, make_optim4rl, to_optax
from units import KINDS, TASKS, group_of, make_units, pick, planned, relative

LEARNED = {
    "optim4rl": make_optim4rl,
    "linear_optim": one_network.make_linear_optim,
    "l2lgd2": one_network.make_l2lgd2,
    "star": optimizers.make_star,
    "adam4rl": lambda: optimizers.make_adam4rl(network_size=4),
    "open": optimizers.make_open,
    "velo": lambda: optimizers.make_velo(lstm_size=8, num_bases=4),
}
CASES = [("optim4rl", "a2c"), ("optim4rl", "ppo"), *((kind, "regression") for kind in LEARNED)]


@pytest.mark.parametrize("kind, agent", CASES)
def test_meta_gradient_is_jax_grad_through_everything(kind, agent):
    num_units, inner_updates = 2, 3
    task, learned = TASKS[agent](), LEARNED[kind]()
    theta, units = make_units(task, learned, num_units, shift=0.01 if kind == "velo" else 0.1)
    plan = planned(num_units, age=2)
    num_params = sum(x.size for x in jax.tree.leaves(pick(units.params, 0)))
    assert num_params > BLOCK and num_params % BLOCK

    def meta_loss(theta, key, agent):
        """Rollouts and all: nothing is recorded, nothing replayed."""
        optimizer = to_optax(learned, theta, task.learning_rate)

        def learn(agent, key_and_number):
            key, number = key_and_number
            agent, _, metrics = task.agent.learn(key, agent, optimizer, 6 + number, 27)
            return agent, metrics["return"]

        key_inner, key_meta = jax.random.split(jax.random.split(key)[1])
        numbered = (jax.random.split(key_inner, inner_updates), jnp.arange(inner_updates))
        agent, returns = jax.lax.scan(learn, agent, numbered)
        loss, agent = task.agent.loss(key_meta, agent)
        return loss, (returns[-1], agent._replace(opt_state=()))

    through_everything = jax.jit(jax.value_and_grad(meta_loss, has_aux=True))
    each = [through_everything(theta, plan.key[i], pick(units, i)) for i in range(num_units)]
    loss = sum(loss for (loss, _), _ in each)
    expected = jax.tree.map(lambda *xs: sum(xs), *(gradient for _, gradient in each))
    gradient, after, metrics = group_of(task, learned, inner_updates=inner_updates)(
        theta, plan, units
    )
    assert relative(gradient, expected) < 1e-5
    gradient.pop("start", None)  # VeLO's, read at the first update only, which was before
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(jnp.sum(metrics["meta_loss"]), loss, rtol=1e-5)
    returns = [last for (_, (last, _)), _ in each]  # of the last inner update
    np.testing.assert_allclose(metrics["return"], returns, rtol=1e-5)
    for i, ((_, (_, agent)), _) in enumerate(each):  # after the rollout of the meta-loss
        unit = pick(after, i)._replace(opt_state=())
        chex.assert_trees_all_close(unit, agent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell, inputs", KINDS)
def test_meta_gradient_against_finite_differences_in_float64(cell, inputs):
    """The loss on a fixed batch after replaying recorded gradients, with theta moved a little both
    ways."""
    with jax.enable_x64(True):
        learned = make_optim4rl(cell, inputs, hidden_size=4)
        theta = jax.tree.map(lambda x: x.astype(float) + 0.1, learned.init_theta(jax.random.key(0)))
        params = {"w": jnp.linspace(-1.0, 1.0, 6), "b": jnp.float64(0.5)}
        grads = jax.tree.map(
            lambda p: jax.random.normal(jax.random.key(1), (5, *p.shape), float), params
        )
        start = (params, jax.tree.map(lambda x: x + 0.05, learned.init_state(params)))

        def loss_of(params):
            return jnp.sum(jnp.sin(3 * params["w"]) * params["b"]) + params["b"] ** 3

        @jax.jit
        def replayed(theta):
            params, state = start
            for k in range(5):
                updates, state = learned.update(theta, pick(grads, k), state, params, 0.1)
                params = optax.apply_updates(params, updates)
            return params

        cotangent = jax.grad(loss_of)(replayed(theta))
        one_unit = jax.tree.map(lambda x: x[None], (start[1], grads, cotangent))
        streamed = streamed_replay_gradient(learned.rule, theta, *one_unit, 0.1)
        unstreamed = replay_gradient(learned, theta, start, grads, {}, cotangent, 0.1)
        loss = jax.jit(lambda theta: loss_of(replayed(theta)))
        for seed in range(5):
            leaves, treedef = jax.tree.flatten(theta)
            noise = [jax.random.normal(jax.random.key(seed), leaf.shape, float) for leaf in leaves]
            direction = jax.tree.unflatten(treedef, noise)
            forth, back = (
                loss(optax.tree.add_scale(theta, step, direction)) for step in (1e-5, -1e-5)
            )
            for gradient in (streamed, unstreamed):
                np.testing.assert_allclose(
                    optax.tree.vdot(gradient, direction), (forth - back) / 2e-5, rtol=1e-6
                )
