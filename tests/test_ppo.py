"""PPO against computations of its own kind in numpy and scipy, and on environments with a known
answer."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats

import networks
import optimizers
import ppo
from environments import brax_env

PROBE = ppo.Args(
    total_steps=40_000,
    num_envs=32,
    rollout_steps=4,
    batch_size=32,
    num_minibatches=4,
    num_epochs=4,
    entropy_weight=0.0,
    discount=0.9,
    reward_scale=1.0,
    policy_layers=(16,),
    value_layers=(16,),
    episode_length=8,
    eval_envs=4,
    num_evals=2,
)


def probe_env():
    """One step, reward -(a - 0.3)^2, then the end."""

    def step(key, state, action):
        return state, jnp.ones(1), -((action[0] - 0.3) ** 2), jnp.array(True)

    return ppo.Env(lambda key: (jnp.int32(0), jnp.ones(1)), step, 1, 1)


def count_env(ends_after=10**6, blind=False):
    """Reward 1 at every step, whatever is done; the observation is the number of steps taken, or,
    blind, always 0."""

    def step(key, state, action):
        state = state + 1
        return state, jnp.where(blind, 0.0, state)[None], jnp.float32(1), state >= ends_after

    return ppo.Env(lambda key: (jnp.int32(0), jnp.zeros(1)), step, 1, 1)


def random_batch(seed=0, rollouts=6, steps=5, obs_size=3, action_size=2):
    rng = np.random.default_rng(seed)
    terminated = rng.random((rollouts, steps)) < 0.2
    truncated = np.zeros((rollouts, steps), bool)
    truncated[::2, 2] = ~terminated[::2, 2]
    return ppo.Batch(
        *(
            rng.normal(size=shape).astype(np.float32)
            for shape in ((rollouts, steps + 1, obs_size), (rollouts, obs_size))
        ),
        *(
            rng.normal(size=(rollouts, steps, *tail)).astype(np.float32)
            for tail in ((action_size,), (), ())
        ),
        terminated,
        truncated,
    )


def naive_advantages(values, next_values, rewards, terminated, truncated, discount, gae_lambda):
    """The definition: a sum of discounted one-step errors up to the end of the episode, or of the
    rollout."""
    errors = [
        r + discount * n * (not t) - v
        for r, n, t, v in zip(rewards, next_values, terminated, values, strict=True)
    ]
    advantages = []
    for start in range(len(errors)):
        total = 0.0
        for k in range(start, len(errors)):
            total += (discount * gae_lambda) ** (k - start) * errors[k]
            if terminated[k] or truncated[k]:
                break
        advantages.append(total)
    return advantages


def test_gae_is_its_definition():
    rng, batch = np.random.default_rng(1), random_batch()
    for i in range(len(batch.reward)):
        values, next_values = rng.normal(size=(2, 5)).astype(np.float32)
        args = (
            values,
            next_values,
            batch.reward[i],
            batch.terminated[i],
            batch.truncated[i],
            0.9,
            0.8,
        )
        np.testing.assert_allclose(ppo.gae(*args), naive_advantages(*args), rtol=1e-5, atol=1e-6)


def outputs_of(mean, std):
    """The policy network's outputs that stand for this normal distribution."""
    return jnp.concatenate([jnp.atleast_1d(mean), jnp.log(jnp.expm1(jnp.atleast_1d(std) - 1e-3))])


def test_categorical_distribution_is_scipys():
    logits = np.array([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]])
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    actions = networks.CATEGORICAL
    log_prob = actions.log_prob(jnp.asarray(logits), jnp.array([2, 1]))
    np.testing.assert_allclose(log_prob, np.log([p[0, 2], p[1, 1]]), rtol=1e-6)
    entropy = actions.entropy(jax.random.key(0), jnp.asarray(logits))
    np.testing.assert_allclose(entropy, scipy.stats.entropy(p, axis=-1), rtol=1e-6)
    assert actions.num_outputs(5) == 5
    keys = jax.random.split(jax.random.key(1), 4000)
    for draw in actions.sample, actions.choose:  # in a rollout, in an evaluation
        x = jax.vmap(draw, (0, None))(keys, jnp.asarray(logits[0]))
        counts = np.bincount(actions.to_action(x), minlength=3)
        assert scipy.stats.chisquare(counts, 4000 * p[0]).pvalue > 1e-3


def test_a_discrete_environment_is_solved():
    """One observation of three says which of three actions pays."""

    def reset(key):
        right = jax.random.randint(key, (), 0, 3)
        return right, jax.nn.one_hot(right, 3)

    def step(key, state, action):
        after, obs = reset(key)
        return after, obs, (action == state) * 1.0, jnp.array(True)

    env = ppo.Env(reset, step, 3, 3, networks.CATEGORICAL, resets_itself=True)
    history = ppo.train(PROBE, env, optax.adam(1e-2), lambda *_: None)
    assert (
        history["eval_return"][0, -1] == 1
        and history["reward"][0, 0] < 0.6 < 0.9 < history["reward"][0, -1]
    )


def test_log_prob_is_that_of_the_squashed_action():
    """By the change of variables in its textbook form, and in that the density integrates to 1."""
    mean, std = np.array([0.3, -0.8]), np.array([0.5, 1.2])
    x = np.array([[0.1, -1.0], [2.0, 0.5], [-0.7, 0.0]])
    both, first = outputs_of(mean, std), outputs_of(mean[:1], std[:1])
    expected = np.sum(scipy.stats.norm.logpdf(x, mean, std) - np.log(1 - np.tanh(x) ** 2), axis=-1)
    np.testing.assert_allclose(
        networks.TANH_NORMAL.log_prob(both, jnp.asarray(x)), expected, rtol=1e-5
    )

    def density(a):
        return np.exp(float(networks.TANH_NORMAL.log_prob(first, jnp.arctanh(jnp.array([a])))))

    np.testing.assert_allclose(
        scipy.integrate.quad(density, -0.9999, 0.9999, limit=100)[0], 1, rtol=1e-3
    )


def test_log_prob_of_extreme_actions_is_finite():
    x = jnp.array([[30.0], [-30.0]])
    got = networks.TANH_NORMAL.log_prob(outputs_of(0.0, 1.0), x)
    # log(1 - tanh(30)^2) = log 4 - 60 but for 1e-26
    np.testing.assert_allclose(got, scipy.stats.norm.logpdf(30) - (np.log(4) - 60), rtol=1e-5)


def test_entropy_is_that_of_the_squashed_action():
    mean, std = 0.4, 0.7
    outputs, log_prob = outputs_of(mean, std), networks.TANH_NORMAL.log_prob

    def integrand(x):
        return -scipy.stats.norm.pdf(x, mean, std) * float(log_prob(outputs, jnp.array([x])))

    expected = scipy.integrate.quad(integrand, mean - 6 * std, mean + 6 * std)[0]
    keys = jax.random.split(jax.random.key(0), 20_000)
    samples = jax.vmap(networks.TANH_NORMAL.entropy, (0, None))(keys, outputs)
    np.testing.assert_allclose(samples.mean(), expected, atol=4 * samples.std() / np.sqrt(20_000))


def test_normaliser_is_numpys_mean_and_std():
    """Batches of unlike size, far from zero, where the naive E[x^2] - E[x]^2 has no digit left, and
    of unlike means, as observations that drift."""
    rng = np.random.default_rng(0)
    batches = [
        1e4 + rng.normal(size=(n, 3)) * [1.0, 2.0, 0.1] + shift * np.array([1.0, 2.0, 0.1])
        for n, shift in ((2, 0), (100, 3), (70, -4), (1000, 1))
    ]
    normaliser = networks.Normaliser(jnp.zeros(()), jnp.zeros(3), jnp.zeros(3))
    for batch in batches:
        normaliser = networks.update_normaliser(normaliser, jnp.asarray(batch, jnp.float32))
    everything = np.concatenate(batches).astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(normaliser.mean, everything.mean(axis=0), rtol=1e-6)
    std = np.sqrt(normaliser.sum_squares / normaliser.count)
    np.testing.assert_allclose(std, everything.std(axis=0), rtol=5e-3)
    got = networks.normalise(normaliser, jnp.asarray(everything, jnp.float32))
    np.testing.assert_allclose(np.std(got, axis=0), 1, rtol=1e-2)


def numpy_mlp(layers, x):
    for i in range(len(layers)):
        x = x / (1 + np.exp(-x)) if i else x
        x = x @ np.asarray(layers[str(i)]["w"], float) + np.asarray(layers[str(i)]["b"], float)
    return x


def test_initial_weights_of_the_networks_are_uniform_with_the_variance_of_their_fan_in():
    layers = networks.init_mlp(jax.random.key(0), (50, 400, 300))
    for name, fan_in in (("0", 50), ("1", 400)):
        w = np.asarray(layers[name]["w"]).ravel()
        assert not layers[name]["b"].any()
        bound = (3 / fan_in) ** 0.5
        assert scipy.stats.kstest(w, scipy.stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3


def test_loss_is_its_definition():
    args = dataclasses.replace(
        PROBE, entropy_weight=0.02, clip_range=0.2, critic_weight=0.3, reward_scale=2.0
    )
    batch = random_batch()
    batch = batch._replace(log_prob=batch.log_prob * 0.3 - 2)
    key_policy, key_value, key = jax.random.split(jax.random.key(0), 3)
    params = {
        "policy": networks.init_mlp(key_policy, (3, 8, 4)),
        "value": networks.init_mlp(key_value, (3, 8, 1)),
    }
    normaliser = networks.Normaliser(
        jnp.float32(4), jnp.array([0.1, -0.2, 0.3]), jnp.array([4.0, 1.0, 9.0])
    )
    loss = jax.jit(partial(ppo.ppo_loss, policy=networks.TANH_NORMAL, args=args))
    got, kl = loss(params, normaliser, batch, key)

    def norm(obs):
        return (obs - np.array([0.1, -0.2, 0.3])) / np.sqrt(np.array([4.0, 1.0, 9.0]) / 4)

    values, advantages = [], []
    for i in range(6):
        v = numpy_mlp(params["value"], norm(batch.obs[i]))[:, 0]
        final = numpy_mlp(params["value"], norm(batch.final_obs[i]))[0]
        ahead = [final if batch.truncated[i, t] else v[t + 1] for t in range(5)]
        values.append(v[:-1])
        rest = (batch.terminated[i], batch.truncated[i], args.discount, args.gae_lambda)
        advantages.append(naive_advantages(v[:-1], ahead, 2.0 * batch.reward[i], *rest))
    values, advantages = np.array(values), np.array(advantages)
    out = numpy_mlp(params["policy"], norm(batch.obs[:, :-1]))
    mean, std = out[..., :2], np.log1p(np.exp(out[..., 2:])) + 1e-3
    log_p = np.sum(
        scipy.stats.norm.logpdf(batch.x, mean, std)
        - np.log(1 - np.tanh(batch.x.astype(float)) ** 2),
        axis=-1,
    )
    ratio = np.exp(log_p - batch.log_prob)
    scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    objective = np.minimum(ratio * scaled, np.clip(ratio, 0.8, 1.2) * scaled)
    x = mean + std * np.asarray(jax.random.normal(key, mean.shape))
    entropy = np.sum(scipy.stats.norm.entropy(mean, std) + np.log(1 - np.tanh(x) ** 2), axis=-1)
    expected = np.mean(-objective + 0.3 * advantages**2 - 0.02 * entropy)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    np.testing.assert_allclose(kl, np.mean(ratio - 1 - np.log(ratio)), rtol=1e-4)
    # The critic is drawn to values + advantages; nothing flows through the targets.
    slopes, _ = jax.grad(loss, has_aux=True)(params, normaliser, batch, key)
    slope = slopes["value"]["1"]["b"]
    np.testing.assert_allclose(slope[0], np.mean(-2 * 0.3 * advantages), rtol=1e-3)


def acted(env, args, seed=0):
    """The batch of one rollout in one environment, and the stream after it."""
    params = {
        "policy": networks.init_mlp(jax.random.key(seed), (1, 4, 2)),
        "value": networks.init_mlp(jax.random.key(1), (1, 4, 1)),
    }
    normaliser = networks.Normaliser(jnp.ones(()), jnp.zeros(1), jnp.ones(1))
    act = partial(
        ppo.rollout, env=env, num_steps=args.rollout_steps, episode_length=args.episode_length
    )
    return act(jax.random.key(2), params, normaliser, ppo.start_stream(jax.random.key(3), env))


def test_episode_is_cut_off_at_its_length_and_starts_again():
    args = dataclasses.replace(PROBE, rollout_steps=7, episode_length=4)
    batch, stream = acted(count_env(), args)
    assert batch.obs[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.truncated.tolist() == [False, False, False, True, False, False, False]
    assert not batch.terminated.any()
    assert batch.final_obs.tolist() == [4]
    assert stream.last_return == 4 and stream.episode_return == 3


def test_end_at_the_last_step_is_an_end_not_a_cut():
    args = dataclasses.replace(PROBE, rollout_steps=6, episode_length=4)
    batch, stream = acted(count_env(ends_after=4), args)
    assert batch.terminated.tolist() == [False, False, False, True, False, False]
    assert not batch.truncated.any()


def test_an_environment_that_resets_itself_is_reset_at_a_cut_off_only():
    """Its observation counts all steps; every second ends an episode."""

    def step(key, state, action):
        state = state + 1
        return state, jnp.float32(state)[None], jnp.float32(1), state % 2 == 0

    env = ppo.Env(lambda key: (jnp.int32(0), jnp.zeros(1)), step, 1, 1, resets_itself=True)
    args = dataclasses.replace(PROBE, rollout_steps=5, episode_length=4)
    batch, stream = acted(env, args)
    assert batch.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.terminated.tolist() == [False, True, False, True, False]
    assert not batch.truncated.any() and stream.last_return == 2 and stream.episode_return == 1
    batch, _ = acted(env, dataclasses.replace(args, episode_length=1))
    assert batch.obs[:, 0].tolist() == [0, 0, 0, 0, 0, 0] and batch.truncated.all()


def chance_env(ends=True):
    """A reward and an observation of chance, in episodes of one step or without an end."""

    def step(key, state, action):
        chance = jax.random.uniform(key)
        return state, chance[None], chance, jnp.array(ends)

    return ppo.Env(lambda key: (jnp.int32(0), jnp.zeros(1)), step, 1, 1)


def test_no_step_has_the_chance_of_another():
    """Not of another episode, environment or rollout; nor has the action's."""
    args = dataclasses.replace(PROBE, batch_size=64)
    agent = ppo.make_agent(chance_env(), args).init(jax.random.key(0), optax.sgd(0.1))
    batch, _, _ = jax.jit(partial(ppo.collect, env=chance_env(), args=args))(
        jax.random.key(1), agent
    )
    rewards = np.asarray(batch.reward)
    assert rewards.shape == (256, 4) and np.unique(rewards).size == rewards.size
    assert abs(np.corrcoef(rewards.ravel(), np.asarray(batch.x).ravel())[0, 1]) < 0.1


def test_steps_of_an_evaluation_differ_in_chance():
    """Their sum over 8 steps has the mean 4, and the variance 8 / 12; of one repeated, 64 / 12."""
    env = chance_env(ends=False)
    args = dataclasses.replace(PROBE, eval_envs=1)
    agent = ppo.make_agent(env, args).init(jax.random.key(0), optax.sgd(0.1))
    evaluate = jax.jit(jax.vmap(lambda key: ppo.evaluate(key, agent, env, args)))
    returns = np.asarray(evaluate(jax.random.split(jax.random.key(1), 2000)))
    assert abs(returns.mean() - 4) < 0.1 and abs(returns.var() - 8 / 12) < 0.1


def test_an_evaluation_samples_the_actions_of_a_categorical_policy():
    """Each of 8 steps pays its action, 0 or 1 with the same probability: the sum has the mean 4
    and the variance 2; of one action repeated, 16. The mean action of a Gaussian policy is one."""

    def returns(distribution):
        def step(key, state, action):
            return state, jnp.zeros(1), jnp.sum(jnp.float32(action)), jnp.array(False)

        env = ppo.Env(lambda key: (jnp.int32(0), jnp.zeros(1)), step, 1, 2, distribution)
        args = dataclasses.replace(PROBE, eval_envs=1, policy_layers=())
        agent = ppo.make_agent(env, args).init(jax.random.key(0), optax.sgd(0.1))
        evaluate = jax.jit(jax.vmap(lambda key: ppo.evaluate(key, agent, env, args)))
        return np.asarray(evaluate(jax.random.split(jax.random.key(1), 2000)))

    chosen = returns(networks.CATEGORICAL)
    assert abs(chosen.mean() - 4) < 0.15 and abs(chosen.var() - 2) < 0.3
    assert returns(networks.TANH_NORMAL).std() < 1e-5


def test_observations_that_are_not_normalised_reach_the_networks_as_they_are():
    """Here one that is first seen after training began."""
    plain = dataclasses.replace(PROBE, normalise_observations=False)
    seen = {}
    for args in (PROBE, plain):
        agent, optimizer = ppo.make_agent(probe_env(), args), optax.sgd(0.1)

        @jax.jit
        def normaliser(agent=agent, optimizer=optimizer):  # alone: XLA leaves out the rest
            state = agent.init(jax.random.key(0), optimizer)
            return agent.learn(jax.random.key(1), state, optimizer)[0].normaliser

        seen[args] = float(networks.normalise(normaliser(), jnp.full(1, 2.0))[0])
    assert seen[plain] == 2 and seen[PROBE] > 1e5


def test_an_update_goes_on_where_the_last_one_ended_and_counts_its_observations():
    """Observations count steps: 0 .. 3 before training, then 4 .. 19 in the same episodes."""
    args = dataclasses.replace(PROBE, episode_length=1000)
    agent, optimizer = ppo.make_agent(count_env(), args), optax.sgd(0.0)
    before = agent.init(jax.random.key(0), optimizer)
    after = jax.jit(lambda s: agent.learn(jax.random.key(1), s, optimizer)[0])(before)
    first = args.rollout_steps
    rollouts = args.batch_size * args.num_minibatches // args.num_envs
    steps = first * (1 + rollouts)
    np.testing.assert_array_equal(before.streams.steps, first)
    np.testing.assert_array_equal(after.streams.steps, steps)
    for state, seen in ((before, first), (after, steps)):
        assert state.normaliser.count == args.num_envs * seen
        np.testing.assert_allclose(state.normaliser.mean, (seen - 1) / 2, rtol=1e-5)


def test_cut_off_episodes_are_worth_as_much_as_endless_ones():
    """Reward 1 for ever at discount 0.9 is worth 10, although episodes last 8 steps; one that ends
    after 8 is worth less."""
    args = dataclasses.replace(
        PROBE, total_steps=400_000, gae_lambda=0.5, critic_weight=1.0, num_seeds=1
    )

    def learned_value(env):
        agent, optimizer = ppo.make_agent(env, args), optax.adam(3e-3)
        state = agent.init(jax.random.key(0), optimizer)
        learn = jax.jit(lambda key, state: agent.learn(key, state, optimizer)[0])
        for number in range(200):
            state = learn(jax.random.key(number), state)
        return float(ppo.value(state.params, networks.normalise(state.normaliser, jnp.zeros(1))))

    np.testing.assert_allclose(learned_value(count_env(blind=True)), 10, rtol=0.03)
    np.testing.assert_allclose(
        learned_value(count_env(ends_after=8)), (1 - 0.9**8) / 0.1, rtol=0.03
    )


def test_an_evaluation_is_the_mean_of_whole_episodes():
    """Episodes end by themselves after 2 to 12 steps, each of which pays 1, or are cut off after 8;
    later steps pay NaN."""
    lengths = []

    def reset(key):
        length = jax.random.randint(key, (), 2, 13)
        jax.debug.callback(lambda length: lengths.append(int(length)), length)
        return (length, jnp.int32(0)), jnp.zeros(1)

    def step(key, state, action):
        length, steps = state
        reward = jnp.where(steps < length, 1.0, jnp.nan)
        return (length, steps + 1), jnp.zeros(1), reward, steps + 1 == length

    args, env = dataclasses.replace(PROBE, eval_envs=50), ppo.Env(reset, step, 1, 1)
    agent = ppo.make_agent(env, args).init(jax.random.key(0), optax.sgd(0.1))
    jax.effects_barrier()
    lengths.clear()
    got = jax.jit(partial(ppo.evaluate, env=env, args=args))(jax.random.key(1), agent)
    jax.effects_barrier()
    assert len(lengths) == 50 and len(set(lengths)) > 5
    np.testing.assert_allclose(got, np.mean(np.minimum(lengths, args.episode_length)), rtol=1e-6)


def test_probe_environment_is_solved():
    history = ppo.train(
        PROBE, probe_env(), optimizers.make_optimizer("adam_linear", 3e-3), lambda *_: None
    )
    # The mode's reward: 0 at a = 0.3. The steps fall to zero, so that the last ones do not move it
    # away.
    assert history["eval_return"][0, -1] > -5e-4
    assert history["eval_return"][0, 0] < -0.05
    assert history["eval_steps"][-1] == ppo.num_updates(PROBE) * ppo.steps_per_update(PROBE)


def test_the_optimizer_is_given_the_loss_and_where_in_training_it_is():
    """The second of two updates, 2 epochs of 3 minibatches."""
    sizes = dict(num_envs=4, batch_size=4, num_minibatches=3, num_epochs=2, rollout_steps=2)
    agent = ppo.make_agent(count_env(), dataclasses.replace(PROBE, **sizes))
    state = agent.init(jax.random.key(0), optax.sgd(0.1))
    _, (_, extra), metrics = agent.learn(jax.random.key(1), state, optax.sgd(0.1), 1, 2)
    np.testing.assert_allclose(extra["fraction"], 0.5 + np.arange(6) / 12, rtol=1e-6)
    np.testing.assert_allclose(extra["num_steps"], 12)
    np.testing.assert_array_equal(extra["iteration_step"], np.arange(6))
    assert set(extra["num_epochs"].tolist()) == {2}
    assert set(extra["num_minibatches"].tolist()) == {3}
    # First the policy that acted, then others: the estimate of the divergence is not negative.
    kl = np.asarray(extra["kl"])
    assert abs(kl[0]) < 1e-6 and kl[1:].max() > 1e-5 and kl.min() > -1e-6
    np.testing.assert_allclose(np.mean(extra["value"]), metrics["loss"], rtol=1e-6)
    assert len(set(extra["value"].tolist())) == 6


def test_the_optimizer_and_meta_training_are_given_the_loss_of_the_rollouts():
    """All of them in one minibatch, with the statistics that they were made with."""
    args = dataclasses.replace(PROBE, num_epochs=1, num_minibatches=1, reward_scale=3.0)
    env, optimizer = chance_env(), optax.sgd(0.1)
    agent, key = ppo.make_agent(env, args), jax.random.key(1)

    @jax.jit
    def losses():
        state = agent.init(jax.random.key(0), optimizer)
        _, (_, extra_args), _ = agent.learn(key, state, optimizer)
        batch, _, acted = ppo.collect(jax.random.split(key)[0], state, env, args)
        inputs = (state.params, state.normaliser, batch, key, env.distribution, args)
        return extra_args["value"][0], ppo.ppo_loss(*inputs)[0], acted, agent.loss(key, state)

    given, expected, acted, (meta_loss, after) = losses()
    np.testing.assert_allclose([given, meta_loss], expected, rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, after, acted)


def test_fractions_of_a_whole_training_start_at_0_and_do_not_reach_1():
    recorded = []

    def update(grads, state, params=None, *, fraction, **_):
        jax.debug.callback(lambda fraction: recorded.append(float(fraction)), fraction)
        return jax.tree.map(jnp.zeros_like, grads), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    args = dataclasses.replace(PROBE, total_steps=3 * 512, num_epochs=2)
    history = ppo.train(args, chance_env(), optimizer, lambda *_: None)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(recorded), np.arange(24) / 24, atol=1e-6)
    assert np.unique(history["reward"]).size == 3  # another chance in every update


@pytest.mark.parametrize(
    "updates, evals, expected", [(10, 4, {2, 5, 7, 10}), (3, 20, {1, 2, 3}), (9, 1, {9})]
)
def test_evaluations_are_evenly_spaced_and_one_is_at_the_end(updates, evals, expected):
    args = dataclasses.replace(PROBE, total_steps=updates * 512, num_evals=evals)
    assert ppo.eval_updates(args) == expected


def test_an_epoch_takes_every_rollout_once_and_each_in_another_order():
    """Gradients of minibatches of one size, without an update and without clipping: their mean is
    that of all rollouts."""
    args = dataclasses.replace(PROBE, num_epochs=2, grad_clip=float("inf"))
    agent = ppo.make_agent(chance_env(), args)
    state = agent.init(jax.random.key(0), optax.sgd(0.0))
    _, (grads, _), _ = agent.learn(jax.random.key(1), state, optax.sgd(0.0))
    first, second = np.asarray(grads["value"]["1"]["b"]).reshape(2, 4)  # the critic's: linear
    np.testing.assert_allclose(first.mean(), second.mean(), rtol=1e-4)
    assert not np.isclose(first[:, None], second, rtol=1e-4).any()


def test_every_gradient_is_clipped_elementwise():
    """The first step's gradient is that of an agent that does not clip, cut at the bound; the
    optimizer sees it cut in all steps."""
    recorded, moved = {}, {}
    for bound in (float("inf"), 0.03):
        args = dataclasses.replace(PROBE, grad_clip=bound, reward_scale=10.0)
        agent = ppo.make_agent(count_env(), args)
        before = agent.init(jax.random.key(0), optax.sgd(0.1))
        after, (recorded[bound], _), _ = agent.learn(jax.random.key(1), before, optax.sgd(0.1))
        moved[bound] = jax.tree.map(jnp.subtract, before.params, after.params)
    whole, cut = jax.tree.leaves(recorded[float("inf")]), jax.tree.leaves(recorded[0.03])
    for g, clipped, change in zip(whole, cut, jax.tree.leaves(moved[0.03]), strict=True):
        np.testing.assert_allclose(clipped[0], np.clip(g[0], -0.03, 0.03), rtol=1e-5)
        assert np.abs(clipped).max() <= np.float32(0.03)
        np.testing.assert_allclose(change, 0.1 * np.sum(clipped, axis=0), atol=1e-6)
    assert max(np.abs(g[0]).max() for g in whole) > 0.3


def test_ratio_is_one_when_learning_begins():
    """With a learning rate of 0 every gradient step sees the policy that acted: ratio 1, and the
    critic's loss alone."""
    args = dataclasses.replace(PROBE, critic_weight=0.0)
    agent = ppo.make_agent(count_env(), args)
    state = agent.init(jax.random.key(0), optax.sgd(0.0))
    _, _, metrics = agent.learn(jax.random.key(1), state, optax.sgd(0.0))
    np.testing.assert_allclose(metrics["loss"], 0, atol=1e-5)


def test_seeds_side_by_side_are_seeds_alone():
    run = partial(ppo.train, env=probe_env(), optimizer=optax.adam(3e-3), on_update=lambda *_: None)
    args = dataclasses.replace(PROBE, total_steps=5_120)
    both = run(dataclasses.replace(args, num_seeds=2, seed=3))
    alone = run(dataclasses.replace(args, seed=4))
    assert np.isfinite(alone["return"]).all()
    np.testing.assert_allclose(both["return"][1], alone["return"][0], rtol=1e-4, atol=1e-5)


def test_a_simulation_that_breaks_ends_its_seed_only():
    """Environments that happen to start above 0.985 break after 5 steps; seeds that have none learn
    on."""

    def reset(key):
        return (jax.random.uniform(jax.random.fold_in(key, 0)), jnp.int32(0)), jnp.ones(1)

    def step(key, state, action):
        start, steps = state
        broken = (start > 0.985) & (steps >= 5)
        obs = jnp.where(broken, jnp.nan, 1.0)
        return (start, steps + 1), obs[None], -((action[0] - 0.3) ** 2), jnp.array(False)

    args = dataclasses.replace(PROBE, num_seeds=4, total_steps=5_120, episode_length=8)
    history = ppo.train(args, ppo.Env(reset, step, 1, 1), optax.adam(3e-3), lambda *_: None)
    broken = np.isnan(history["loss"]).any(axis=1)
    assert 0 < broken.sum() < 4, "the test needs some seeds of each kind"
    assert (
        np.isfinite(history["loss"][~broken]).all() and np.isnan(history["loss"][broken, -1]).all()
    )
    assert np.isnan(history["eval_return"][broken, -1]).all()


def test_training_ends_when_no_seed_is_left_also_if_it_continues_from_there():
    args = dataclasses.replace(PROBE, total_steps=5_120)
    states = []
    run = partial(ppo.train, args, probe_env(), optax.sgd(jnp.nan))
    whole = run(lambda number, metrics, state: states.append(jax.tree.map(jnp.copy, state)))
    assert [state.number for state in states] == [1] and not states[0].alive.any()
    numbers = []
    resumed = run(lambda number, *_: numbers.append(number), restore=lambda _: states[0])
    assert numbers == []
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.parametrize(
    "name, backend", [("inverted_pendulum", "spring"), ("reacher", "generalized")]
)
def test_brax_steps_are_brax_steps(name, backend):
    import brax.envs

    env, ours = brax.envs.get_environment(name, backend=backend), brax_env.make(name, backend)
    # Both in one program, which compiles what is the same in them once.
    reset = jax.jit(lambda key: (env.reset(jax.random.key_data(key)), ours.reset(key)))
    step = jax.jit(
        lambda theirs, state, action: (
            env.step(theirs, action),
            ours.step(jax.random.key(0), state, action),
        )
    )
    theirs, (state, obs) = reset(jax.random.key(5))
    for i in range(3):
        theirs, (state, obs, reward, terminated) = step(
            theirs, state, jnp.full(env.action_size, 0.3 * i)
        )
    np.testing.assert_array_equal(obs, theirs.obs)
    assert reward == theirs.reward and terminated == (theirs.done > 0)
    assert ours.obs_size == obs.size and ours.action_size == env.action_size


@pytest.mark.slow
def test_inverted_pendulum_is_solved():
    """Three seeds, with a longer horizon than the usual setting, which stalls at 100 to 150."""
    sizes = {
        "num_envs": 64,
        "rollout_steps": 40,
        "batch_size": 64,
        "num_minibatches": 8,
        "value_layers": (64, 64),
    }
    args = ppo.Args(discount=0.997, gae_lambda=0.98, reward_scale=0.1, entropy_weight=0.0, **sizes)
    args = dataclasses.replace(args, total_steps=2e6, num_seeds=3)
    history = ppo.train(
        args, brax_env.make("inverted_pendulum", "spring"), optax.adam(1e-3), lambda *_: None
    )
    np.testing.assert_array_equal(history["eval_return"].max(axis=1), 1000)


def test_on_an_accelerator_training_is_that_of_the_cpu(monkeypatch):
    """The branch for an accelerator, run here: all seeds at once."""
    args = dataclasses.replace(PROBE, num_seeds=2, total_steps=2 * 512)

    def train():
        return ppo.train(args, probe_env(), optax.sgd(0.1), lambda *_: None)

    here = train()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    there = train()
    assert here["return"].shape == (2, 2)
    for name, values in here.items():
        np.testing.assert_allclose(there[name], values, rtol=1e-5, atol=1e-6)
