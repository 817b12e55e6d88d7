"""A2C against naive loops, a case worked out by hand, and probe environments."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import a2c
import gridworld
import optimizers
import tasks
from a2c import Args, Batch, td_lambda_errors


@pytest.mark.parametrize("td_lambda", [0.0, 0.7, 1.0])
def test_td_lambda_errors_are_a_mixture_of_n_step_returns(td_lambda):
    rng, num_steps = np.random.default_rng(0), 7
    values, rewards = rng.normal(size=num_steps + 1), rng.normal(size=num_steps)
    discounts = 0.9 * (rng.random(num_steps) > 0.3)
    errors = []
    for t in range(num_steps):
        n_step = []  # n-step returns from t, n = 1 .. T - t
        for n in range(1, num_steps - t + 1):
            rewards_part = sum(np.prod(discounts[t : t + i]) * rewards[t + i] for i in range(n))
            n_step.append(rewards_part + np.prod(discounts[t : t + n]) * values[t + n])
        weights = [(1 - td_lambda) * td_lambda**i for i in range(len(n_step) - 1)] + [
            td_lambda ** (len(n_step) - 1)
        ]
        errors.append(np.dot(weights, n_step) - values[t])
    np.testing.assert_allclose(
        td_lambda_errors(jnp.array(values), jnp.array(rewards), jnp.array(discounts), td_lambda),
        errors,
        atol=1e-5,
    )


def test_gradient_of_the_loss_of_two_steps_worked_out_by_hand():
    """With the dense layer at zero the policy is softmax(b) and the value is c everywhere, for any
    observation."""
    args = Args(
        discount=0.9, td_lambda=0.5, critic_weight=0.7, entropy_weight=0.2, reward_scale=10.0
    )
    b, c = np.array([0.3, -0.2, 0.5]), 2.0
    params = {
        "dense": {"w": jnp.zeros((4, 2)), "b": jnp.zeros(2)},
        "actor": {"w": jnp.ones((2, 3)), "b": jnp.array(b)},
        "critic": {"w": jnp.ones((2, 1)), "b": jnp.array([c])},
    }
    batch = Batch(
        jnp.ones((3, 2, 2, 1)), jnp.array([2, 0]), jnp.array([0.1, -0.3]), jnp.array([False, True])
    )
    errors_1 = -3.0 - c  # the episode ends: no bootstrap
    errors_0 = 1.0 + 0.9 * c - c + 0.9 * 0.5 * errors_1
    pi = np.exp(b) / np.exp(b).sum()
    entropy = -np.sum(pi * np.log(pi))
    actor = -(errors_0 * (np.eye(3)[2] - pi) + errors_1 * (np.eye(3)[0] - pi)) / 2
    actor += (
        args.entropy_weight * pi * (np.log(pi) + entropy)
    )  # d entropy / d b = -pi (log pi + entropy)
    critic = -2 * args.critic_weight * (errors_0 + errors_1) / 2
    loss = -(errors_0 * np.log(pi[2]) + errors_1 * np.log(pi[0])) / 2
    loss += args.critic_weight * (errors_0**2 + errors_1**2) / 2 - args.entropy_weight * entropy

    got, grads = jax.value_and_grad(a2c.a2c_loss)(params, batch, args)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(grads["actor"]["b"], actor, rtol=1e-4)
    np.testing.assert_allclose(grads["critic"]["b"], [critic], rtol=1e-5)


@pytest.mark.parametrize("filters", [0, 3])
def test_the_network_is_convolution_relu_dense_relu_heads(filters):
    """By numpy loops, with biases that are not zero."""
    shape, rng = (4, 3, 2), np.random.default_rng(0)
    params = a2c.init_network(jax.random.key(0), shape, 5, filters, 6)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    x = obs = rng.integers(0, 2, shape).astype(np.uint8)
    if filters:
        w, b = params["conv"]["w"].reshape(2, 2, 2, 3), params["conv"]["b"]
        x = np.tile(b, (4, 3, 1))
        for row, col, i, j in np.ndindex(4, 3, 2, 2):
            if row + i < 4 and col + j < 3:
                x[row, col] += obs[row + i, col + j] @ w[i, j]
        x = np.maximum(x, 0)
    x = np.maximum(x.ravel() @ params["dense"]["w"] + params["dense"]["b"], 0)
    logits, value = a2c.network(jax.tree.map(jnp.float32, params), jnp.asarray(obs))
    np.testing.assert_allclose(logits, x @ params["actor"]["w"] + params["actor"]["b"], rtol=1e-4)
    np.testing.assert_allclose(
        value, x @ params["critic"]["w"][:, 0] + params["critic"]["b"][0], rtol=1e-4
    )


def test_initial_weights_have_the_scale_of_their_fan_in_and_biases_are_zero():
    """Within four standard errors of a standard deviation, sd / sqrt(2 n)."""
    for filters, fan_ins in ((32, {"conv": 4 * 8, "dense": 5 * 4 * 32}), (0, {"dense": 5 * 4 * 8})):
        params = a2c.init_network(jax.random.key(0), (5, 4, 8), 16, filters, 1024)
        fan_ins |= {"actor": 1024, "critic": 1024}
        assert params.keys() == fan_ins.keys()
        for name, fan_in in fan_ins.items():
            w, b = np.asarray(params[name]["w"]), params[name]["b"]
            assert len(w) == fan_in and b.shape == w.shape[1:] and not b.any()
            np.testing.assert_allclose(w.std(), fan_in**-0.5, rtol=4 / (2 * w.size) ** 0.5)


def counting_env(length=3):
    """The observation counts the steps of the episode; the reward is the action."""

    def reset(key):
        return jnp.int32(0), jnp.zeros((1, 1, 1), jnp.uint8)

    def step(key, state, action):
        state = jnp.where(state + 1 == length, 0, state + 1)
        return (
            state,
            state.astype(jnp.uint8).reshape(1, 1, 1),
            action.astype(jnp.float32),
            state == 0,
        )

    return gridworld.Env(reset, step, (1, 1, 1), 4)


def test_rollout_lines_up_and_keeps_returns():
    env = counting_env()
    params = a2c.init_network(
        jax.random.key(0), env.obs_shape, env.num_actions, filters=0, hidden=3
    )
    stream = a2c.start_stream(jax.random.key(1), env)
    assert np.isnan(stream.last_return)
    first, stream = a2c.rollout(jax.random.key(2), params, stream, env, 4)
    second, stream = a2c.rollout(jax.random.key(3), params, stream, env, 4)
    np.testing.assert_array_equal(first.obs.ravel(), [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(second.obs.ravel(), [1, 2, 0, 1, 2])
    np.testing.assert_array_equal(first.done, [False, False, True, False])
    actions = np.concatenate([first.action, second.action])
    np.testing.assert_array_equal(np.concatenate([first.reward, second.reward]), actions)
    assert stream.last_return == actions[3:6].sum() and stream.episode_return == actions[6:].sum()


def test_actions_follow_the_policy_and_are_independent_of_the_environment():
    """Rewards are the environment's chance: no two are the same, and every action's mean is 1/2."""

    def step(key, state, action):
        return state, jnp.zeros((1, 1, 1), jnp.uint8), jax.random.uniform(key), jnp.array(False)

    reset = lambda key: (jnp.int32(0), jnp.zeros((1, 1, 1), jnp.uint8))
    env = gridworld.Env(reset, step, (1, 1, 1), 3)
    params = a2c.init_network(jax.random.key(0), env.obs_shape, 3, filters=0, hidden=2)
    logits = jnp.array([0.5, -0.5, 0.0])
    params["actor"]["b"] = logits  # of an observation of 0 the rest is 0
    streams = jax.vmap(lambda key: a2c.start_stream(key, env))(
        jax.random.split(jax.random.key(1), 300)
    )
    act = jax.vmap(lambda key, stream: a2c.rollout(key, params, stream, env, 10)[0])
    batch = act(jax.random.split(jax.random.key(2), 300), streams)
    rewards, actions = np.asarray(batch.reward).ravel(), np.asarray(batch.action).ravel()
    assert np.unique(rewards).size > 2990  # of 3,000 in float32
    counts = np.bincount(actions, minlength=3)
    assert (
        scipy.stats.chisquare(
            counts, 3000 * np.exp(logits, dtype=float) / np.exp(logits, dtype=float).sum()
        ).pvalue
        > 1e-3
    )
    means = [rewards[actions == a].mean() for a in range(3)]
    np.testing.assert_allclose(means, 0.5, atol=4 * 12**-0.5 / counts.min() ** 0.5)


def test_loss_and_grads_are_the_mean_over_environments():
    args = Args(env_name="small_dense_short", num_envs=3, rollout_steps=5)
    env, optimizer = gridworld.make(args.env_name), optax.sgd(1.0)
    agent = a2c.make_agent(env, args)
    state = jax.jit(lambda key: agent.init(key, optimizer))(jax.random.key(0))
    cells = np.column_stack([state.streams.env_state.agent, state.streams.env_state.objects])
    assert len(np.unique(cells, axis=0)) == 3  # the environments start apart
    last_return = jnp.array([jnp.nan, 2.0, 4.0])  # no episode ends in these five steps
    state = state._replace(streams=state.streams._replace(last_return=last_return))
    key = jax.random.key(1)
    learn = jax.jit(lambda key, state: agent.learn(key, state, optimizer))
    after, (grads, _), metrics = learn(key, state)
    assert metrics["return"] == 3  # the mean of those that there are

    @jax.jit
    def loss_and_gradient(key, stream):
        batch, _ = a2c.rollout(key, state.params, stream, env, 5)
        return jax.value_and_grad(a2c.a2c_loss)(state.params, batch, args)

    streams = [jax.tree.map(lambda x, i=i: x[i], state.streams) for i in range(3)]
    keys = jax.random.split(key, 3)
    each = [loss_and_gradient(k, s) for k, s in zip(keys, streams, strict=True)]
    expected_loss, expected = jax.tree.map(lambda *xs: sum(xs) / 3, *each)
    close = partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(lambda g, e: close(g[0], e), grads, expected)
    jax.tree.map(lambda p, q, g: close(q, p - g[0]), state.params, after.params, grads)
    # The meta-loss is the same loss, and its rollout moves the environments on.
    loss, moved = jax.jit(agent.loss)(key, state)
    np.testing.assert_allclose([loss, metrics["loss"]], expected_loss, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, moved, state._replace(streams=after.streams))


def recorder(recorded):
    """An optimizer that changes nothing and records its extra arguments."""

    def update(grads, state, params=None, *, value, fraction, num_steps):
        jax.debug.callback(
            lambda *given: recorded.append(tuple(map(float, given))), fraction, value, num_steps
        )
        return jax.tree.map(jnp.zeros_like, grads), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def chance_env(num_actions):
    """Observation 0, no end, and a reward of chance."""
    blank = jnp.zeros((1, 1, 1), jnp.uint8)

    def step(key, state, action):
        return state, blank, jax.random.uniform(key), jnp.array(False)

    return gridworld.Env(lambda key: (jnp.int32(0), blank), step, (1, 1, 1), num_actions)


def test_optimizers_get_the_loss_and_the_fraction_of_training_done():
    recorded, args = [], Args(num_envs=2, rollout_steps=5, total_steps=45)
    history = a2c.train(args, chance_env(2), recorder(recorded), lambda *_: None)
    jax.effects_barrier()
    fractions, values, num_steps = zip(*sorted(recorded), strict=True)
    np.testing.assert_allclose(fractions, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(values, history["loss"][0], rtol=1e-6)
    np.testing.assert_allclose(num_steps, 4, rtol=1e-5)
    assert np.unique(history["reward"]).size == 4  # another chance in every update


def run(env_name="catch", optimizer="adam", learning_rate=1e-3, total_steps=5e4, **given):
    args = tasks.agent_args(env_name, total_steps=total_steps, **given)
    optimizer = optimizers.make_optimizer(optimizer, learning_rate)
    return a2c.train(args, gridworld.make(env_name), optimizer, lambda *_: None)


def test_an_agent_whose_parameters_are_not_finite_has_no_return():
    args = tasks.agent_args("catch", total_steps=5 * 1280)
    history = a2c.train(args, gridworld.make("catch"), optax.sgd(1e20), lambda *_: None)
    assert np.isfinite(history["return"][0, 0]) and np.isnan(history["return"][0, -1])


def test_same_seed_same_result_and_seeds_do_not_depend_on_each_other():
    one, again, three = run(), run(), run(num_seeds=3)
    np.testing.assert_array_equal(one["return"], again["return"])
    np.testing.assert_array_equal(one["loss"], again["loss"])
    for name in ("return", "loss"):
        np.testing.assert_allclose(three[name][0], one[name][0], rtol=1e-5)
    assert np.abs(three["loss"][1] - three["loss"][0]).max() > 1e-3
    np.testing.assert_allclose(run(seed=2)["loss"][0, :5], three["loss"][2, :5], rtol=1e-3)


def test_one_trace_for_all_updates(monkeypatch):
    chex.clear_trace_counter()
    monkeypatch.setattr(a2c, "a2c_loss", chex.assert_max_traces(a2c.a2c_loss, n=1))
    run(total_steps=1e4)


def test_on_an_accelerator_training_is_that_of_the_cpu(monkeypatch):
    """The branches for an accelerator, run here: all seeds and all environments at once."""
    args = Args(env_name="catch", num_envs=32, num_seeds=2, rollout_steps=10, total_steps=2 * 320)

    def train():
        agents = []
        keep = lambda number, metrics, state: agents.append(state.agents)
        history = a2c.train(args, gridworld.make("catch"), optax.sgd(0.1), keep)
        return history, agents[-1]._replace(opt_state=())

    here = train()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, train(), here)


def test_learns_catch():
    assert run(total_steps=3e5)["return"][0, -20:].mean() > 0.7


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_name, optimizer, learning_rate, total_steps, at_least",
    [("small_dense_long", "adam", 3e-2, 3e6, 22.0), ("big_dense_long", "rmsprop", 3e-3, 4e6, 4.0)],
)
def test_reaches_the_return_of_the_authors_code(
    env_name, optimizer, learning_rate, total_steps, at_least
):
    history = run(
        env_name=env_name,
        optimizer=optimizer,
        learning_rate=learning_rate,
        total_steps=total_steps,
        num_envs=512,
    )
    assert history["return"][0, -20:].mean() >= at_least
