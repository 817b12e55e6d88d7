"""PPO on Brax, with any optimizer:

    python ppo.py --env-name ant --optimizer adam
    python ppo.py --env-name inverted_pendulum --optimizer adam --num-seeds 4

One agent acts in B copies of the environment (Schulman et al. 2017, arXiv 1707.06347). Flags left unset take the setting
of Lan et al. 2024 for the task, or Brax's usual one (settings.py); what was taken is printed. Everything above the
last lines stands alone: copy the file, and give `train` an Env and an optax optimizer. The script needs the repository.

Legend: T steps of a rollout, B environments, A action size, O observation size, R rollouts of one update, E epochs,
M minibatches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from networks import TANH_NORMAL, Distribution, Normaliser, init_mlp, mlp, normalise, update_normaliser


@dataclass(frozen=True)
class Args:
    # --- Training ---
    env_name: str = "inverted_pendulum"
    """a Brax task: ant, halfcheetah, hopper, humanoid, humanoidstandup, inverted_pendulum, inverted_double_pendulum, pusher,
    reacher, swimmer, walker2d; not each runs on every backend and jax"""
    grad_clip: float = 1.0
    """gradients are clipped elementwise to this; inf: not"""
    total_steps: float = 2e6
    """environment steps in all, over all environments (paper: 2e7 to 1e8)"""
    num_envs: int = 2048
    """environments that the agent acts in at once (paper: 2048; ant 4096)"""
    num_seeds: int = 1
    """agents trained side by side, each from its own seed, as far as memory goes"""
    seed: int = 0
    """seed of the first agent; the same seed gives the same result"""
    episode_length: int = 1000
    """steps after which an episode is cut off, and its rest estimated by the critic"""
    # --- Agent ---
    rollout_steps: int = 5
    """steps T of one rollout, the piece that advantages are computed on (paper: 5 to 20)"""
    batch_size: int = 1024
    """rollouts in a minibatch (paper: 512 to 2048)"""
    num_minibatches: int = 32
    """minibatches between two acting phases, which so collect batch size x minibatches rollouts (paper: 32)"""
    num_epochs: int = 4
    """times that each rollout is learned from (paper: 4 or 8)"""
    discount: float = 0.97
    """discount factor of future rewards (paper: 0.97; walker2d 0.997)"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip_range: float = 0.3
    """the probability ratio is clipped to 1 - this .. 1 + this"""
    critic_weight: float = 0.25
    """weight of the critic's squared error"""
    entropy_weight: float = 1e-2
    """weight of the entropy bonus (paper: 1e-2 or 1e-3)"""
    reward_scale: float = 10.0
    """rewards are multiplied by this before learning; the logged returns are not"""
    policy_layers: tuple[int, ...] = (32, 32, 32, 32)
    """hidden layers of the policy"""
    value_layers: tuple[int, ...] = (256, 256, 256, 256, 256)
    """hidden layers of the critic (the paper meta-trains with 64 64 64 64 64)"""
    # --- Evaluation ---
    num_evals: int = 20
    """evaluations after the first, at regular steps: whole episodes with deterministic actions"""
    eval_envs: int = 128
    """episodes of an evaluation"""


SCORE = ("eval_return", 2)  # a run's score: the mean of the last 2 evaluations


# --- Environment ---


class Env(NamedTuple):
    """An environment. It neither ends for lack of time nor, unless it says so, resets itself: the rollout does both."""

    reset: Callable  # key -> state, obs [O]
    step: Callable  # state, action -> state, obs, reward, terminated (bool)
    obs_size: int
    action_size: int
    distribution: Distribution = TANH_NORMAL  # actions [A] in [-1, 1]; or CATEGORICAL, [] in 0 .. A - 1
    resets_itself: bool = False  # then state and obs after a termination are those of the next episode


# --- Rollout ---


class Stream(NamedTuple):
    """One environment, and how its episodes go. Like Brax's own, it starts every episode in the state of its first."""

    env_state: Any
    obs: jax.Array  # [O]
    first: tuple  # env_state, obs
    steps: jax.Array  # [] int32, of the episode under way
    episode_return: jax.Array  # [] of the episode under way
    last_return: jax.Array  # [] of the last episode that ended, NaN before


class Batch(NamedTuple):
    """One environment's rollout. No more than one episode is cut off in it, so one final_obs is enough."""

    obs: jax.Array  # [T + 1, O], the last one to bootstrap from
    final_obs: jax.Array  # [O] where the episode was cut off, if one was
    x: jax.Array  # [T, A] actions before tanh; [T] if there are A choices
    log_prob: jax.Array  # [T] of the actions when they were taken
    reward: jax.Array  # [T]
    terminated: jax.Array  # [T] bool, the episode ended
    truncated: jax.Array  # [T] bool, it was cut off


def start_stream(key: jax.Array, env: Env) -> Stream:
    first = env.reset(key)
    return Stream(*first, first, jnp.int32(0), jnp.zeros(()), jnp.full((), jnp.nan, jnp.float32))


def rollout(key, params, normaliser, stream: Stream, env: Env, num_steps: int, episode_length: int) -> tuple[Batch, Stream]:
    """Act for num_steps in one environment."""
    actions = env.distribution

    def step(carry, key):
        stream, final_obs = carry
        outputs = mlp(params["policy"], normalise(normaliser, stream.obs))
        x = actions.sample(key, outputs)
        env_state, obs, reward, terminated = env.step(stream.env_state, actions.to_action(x))
        truncated = (stream.steps + 1 >= episode_length) & ~terminated
        done = terminated | truncated
        final_obs = jnp.where(truncated, obs, final_obs)
        seen = (stream.obs, x, actions.log_prob(outputs, x), reward, terminated, truncated)
        restart = truncated if env.resets_itself else done
        start_or_next = partial(jnp.where, restart)
        env_state, obs = jax.tree.map(start_or_next, stream.first, (env_state, obs))
        so_far = stream.episode_return + reward
        last_return = jnp.where(done, so_far, stream.last_return)
        counts = jnp.where(done, 0, stream.steps + 1), jnp.where(done, 0, so_far)
        return (Stream(env_state, obs, stream.first, *counts, last_return), final_obs), seen

    start = (stream, jnp.zeros_like(stream.obs))
    (stream, final_obs), (obs, *seen) = jax.lax.scan(step, start, jax.random.split(key, num_steps))
    return Batch(jnp.concatenate([obs, stream.obs[None]]), final_obs, *seen), stream


# --- Loss ---


def gae(values, next_values, rewards, terminated, truncated, discount: float, gae_lambda: float) -> jax.Array:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438). All: [T] -> [T]

    next_values: of the observation that the step led to, also where the episode was cut off there and another one began.
    """
    chex.assert_equal_shape((values, next_values, rewards, terminated, truncated))
    errors = rewards + discount * (1.0 - terminated) * next_values - values
    decays = discount * gae_lambda * (1.0 - (terminated | truncated))

    def backward(advantage, step):
        error, decay = step
        advantage = error + decay * advantage
        return advantage, advantage

    return jax.lax.scan(backward, jnp.zeros_like(errors[0]), (errors, decays), reverse=True)[1]


def value(params: dict, obs: jax.Array) -> jax.Array:
    """obs: [..., O], normalised -> [...]"""
    return mlp(params["value"], obs)[..., 0]


def ppo_loss(params, normaliser: Normaliser, batch: Batch, key, actions: Distribution, args: Args) -> jax.Array:
    """Clipped policy objective, squared critic error, entropy bonus; the mean over rollouts. batch: [rollouts, ...]"""
    obs = normalise(normaliser, batch.obs[:, :-1])
    ahead = normalise(normaliser, jnp.stack([batch.obs[:, -1], batch.final_obs], axis=1))
    values = value(params, obs)
    last, final = jnp.moveaxis(jax.lax.stop_gradient(value(params, ahead)), 1, 0)
    next_values = jnp.concatenate([values[:, 1:], last[:, None]], axis=1)
    next_values = jnp.where(batch.truncated, final[:, None], next_values)
    estimate = partial(gae, discount=args.discount, gae_lambda=args.gae_lambda)
    rewards = args.reward_scale * batch.reward
    advantages = jax.vmap(estimate)(values, next_values, rewards, batch.terminated, batch.truncated)
    advantages = jax.lax.stop_gradient(advantages)
    targets = jax.lax.stop_gradient(values) + advantages

    outputs = mlp(params["policy"], obs)
    ratio = jnp.exp(actions.log_prob(outputs, batch.x) - batch.log_prob)
    clipped = jnp.clip(ratio, 1 - args.clip_range, 1 + args.clip_range)
    advantages = (advantages - jnp.mean(advantages)) / (jnp.std(advantages) + 1e-8)
    losses = -jnp.minimum(ratio * advantages, clipped * advantages)
    losses += args.critic_weight * (targets - values) ** 2 - args.entropy_weight * actions.entropy(key, outputs)
    return jnp.mean(losses)


# --- Agent ---


class Agent(NamedTuple):
    """The functions that meta-training calls; a2c.py has the same.

    A state is a NamedTuple with params, opt_state and reward_factor (a scalar that multiplies its rewards). learn's
    metrics have "return", a scalar, NaN before the first episode ends.
    """

    init: Callable  # key, optimizer -> state
    learn: Callable  # key, state, optimizer, progress -> state, (grads, extra_args) [gradient steps, ...], metrics
    loss: Callable  # key, state -> loss on a fresh rollout, state
    num_steps: int  # environment steps of one update, over all the agent's environments


class AgentState(NamedTuple):
    params: dict
    opt_state: Any
    streams: Stream  # [B]
    normaliser: Normaliser
    reward_factor: jax.Array  # [], on top of args.reward_scale; meta-training may spread it over agents


def act(key, params, normaliser, streams: Stream, env: Env, args: Args) -> tuple[Batch, Stream]:
    """One rollout in every environment. streams: [B] -> Batch [B, ...], streams"""
    one = partial(rollout, env=env, num_steps=args.rollout_steps, episode_length=args.episode_length)
    keys = jax.random.split(key, args.num_envs)
    return jax.vmap(one, (0, None, None, 0))(keys, params, normaliser, streams)


def collect(key, state: AgentState, env: Env, args: Args) -> tuple[Batch, jax.Array, AgentState]:
    """The rollouts of one update. -> Batch [R, ...], mean reward of a step, state"""

    def again(streams, key):
        batch, streams = act(key, state.params, state.normaliser, streams, env, args)
        return streams, batch

    num_rollouts = args.batch_size * args.num_minibatches
    keys = jax.random.split(key, num_rollouts // args.num_envs)
    streams, batches = jax.lax.scan(again, state.streams, keys)
    batch = jax.tree.map(lambda x: x.reshape(num_rollouts, *x.shape[2:]), batches)
    reward = jnp.mean(batch.reward)
    batch = jax.lax.stop_gradient(batch._replace(reward=state.reward_factor * batch.reward))
    return batch, reward, state._replace(streams=streams)


def learn_epochs(key, state: AgentState, batch: Batch, optimizer, progress: tuple, actions: Distribution, args: Args):
    """E epochs of M gradient steps, each on a minibatch of a new permutation of the rollouts. batch: [R, ...]

    -> state, what the optimizer was given (grads, extra_args), each [E * M, ...]
    """
    update = optax.with_extra_args_support(optimizer).update

    def gradient_step(carry, minibatch):
        params, opt_state = carry
        batch, key, fraction = minibatch
        loss, grads = jax.value_and_grad(ppo_loss)(params, state.normaliser, batch, key, actions, args)
        extra_args = {"value": loss, "fraction": fraction}
        updates, opt_state = update(grads, opt_state, params, **extra_args)
        return (optax.apply_updates(params, updates), opt_state), (grads, extra_args)

    def epoch(carry, key_and_fractions):
        key, fractions = key_and_fractions
        key_shuffle, key_entropy = jax.random.split(key)
        order = jax.random.permutation(key_shuffle, args.num_minibatches * args.batch_size)
        order = order.reshape(args.num_minibatches, args.batch_size)
        minibatches = jax.tree.map(lambda x: x[order], batch)
        keys = jax.random.split(key_entropy, args.num_minibatches)
        return jax.lax.scan(gradient_step, carry, (minibatches, keys, fractions))

    num_steps = args.num_epochs * args.num_minibatches
    fractions = progress[0] + (progress[1] - progress[0]) * jnp.arange(num_steps) / num_steps
    fractions = fractions.reshape(args.num_epochs, args.num_minibatches).astype(jnp.float32)
    keys = jax.random.split(key, args.num_epochs)
    start = (state.params, state.opt_state)
    (params, opt_state), recorded = jax.lax.scan(epoch, start, (keys, fractions))
    recorded = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), recorded)
    return state._replace(params=params, opt_state=opt_state), recorded


def make_agent(env: Env, args: Args) -> Agent:
    """PPO in args.num_envs copies of `env`. Raises ValueError, in one line, for arguments that do not fit together."""
    check(args)

    def init(key, optimizer):
        key_policy, key_value, key_envs, key_first = jax.random.split(key, 4)
        policy_sizes = (env.obs_size, *args.policy_layers, env.distribution.num_outputs(env.action_size))
        value_sizes = (env.obs_size, *args.value_layers, 1)
        params = {"policy": init_mlp(key_policy, policy_sizes), "value": init_mlp(key_value, value_sizes)}
        streams = jax.vmap(partial(start_stream, env=env))(jax.random.split(key_envs, args.num_envs))
        # The first statistics come from a rollout that nothing is learned from.
        zeros, ones = jnp.zeros(env.obs_size), jnp.ones(env.obs_size)
        batch, streams = act(key_first, params, Normaliser(jnp.ones(()), zeros, ones), streams, env, args)
        normaliser = update_normaliser(Normaliser(jnp.zeros(()), zeros, zeros), batch.obs[:, :-1])
        return AgentState(params, optimizer.init(params), streams, normaliser, jnp.ones(()))

    def learn(key, state, optimizer, progress=(0.0, 1.0)):
        """progress: the fractions of training that are done before and after this update."""
        key_collect, key_epochs = jax.random.split(key)
        batch, reward, state = collect(key_collect, state, env, args)
        state, recorded = learn_epochs(key_epochs, state, batch, optimizer, progress, env.distribution, args)
        metrics = {
            "return": jnp.nanmean(state.streams.last_return),
            "reward": reward,
            "loss": jnp.mean(recorded[1]["value"]),
            "healthy": all_finite((batch.obs, batch.reward, state.params)),
        }
        # Acting and learning use the same statistics, so that the ratio starts at 1; they are updated afterwards.
        normaliser = update_normaliser(state.normaliser, batch.obs[:, :-1])
        return state._replace(normaliser=normaliser), recorded, metrics

    def loss(key, state):
        key_collect, key_entropy = jax.random.split(key)
        params = state.params
        batch, _, state = collect(key_collect, jax.lax.stop_gradient(state), env, args)
        loss = ppo_loss(params, state.normaliser, batch, key_entropy, env.distribution, args)
        return loss, state._replace(params=params)

    return Agent(init, learn, loss, steps_per_update(args))


def evaluate(key: jax.Array, state: AgentState, env: Env, args: Args) -> jax.Array:
    """Mean return of args.eval_envs whole episodes with deterministic actions, in environments of their own. -> []"""
    actions = env.distribution

    def goes_on(episode):
        number, *_, terminated, _ = episode
        return (number < args.episode_length) & ~terminated

    def step(episode):
        number, env_state, obs, _, total = episode
        x = actions.mode(mlp(state.params["policy"], normalise(state.normaliser, obs)))
        env_state, obs, reward, terminated = env.step(env_state, actions.to_action(x))
        return number + 1, env_state, obs, terminated, total + reward

    def whole_return(key):
        start = (jnp.int32(0), *env.reset(key), jnp.array(False), jnp.zeros(()))
        return jax.lax.while_loop(goes_on, step, start)[-1]

    # All stop when the longest has ended: an agent that soon falls is soon evaluated.
    return jnp.mean(jax.vmap(whole_return)(jax.random.split(key, args.eval_envs)))


def all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


class TrainState(NamedTuple):
    number: int  # of updates done
    agents: AgentState  # [num_seeds]
    alive: jax.Array  # [num_seeds] bool
    history: dict  # {"return", "reward", "loss": [num_seeds, updates]}, NaN for updates to come
    evals: jax.Array  # [num_seeds, evaluations], NaN for those to come


def train(args: Args, env: Env, optimizer: optax.GradientTransformation, on_update: Callable, restore=lambda x: x) -> dict:
    """Train args.num_seeds agents side by side. on_update(number of updates done, metrics, TrainState) is called after each
    update, and ends training by True. restore(the TrainState of the start) -> the one to begin with.

    A seed whose simulation, loss or parameters are no longer finite is left as it was before, and its metrics are NaN from
    then on; when none is left, training ends.
    -> {"return", "reward", "loss": [num_seeds, updates done], "eval_return": [num_seeds, evaluations], "eval_steps"}
    """
    agent = make_agent(env, args)
    optimizer = optax.chain(optax.clip(args.grad_clip), optimizer)
    seeds = args.seed + jnp.arange(args.num_seeds)
    keys_init, keys, keys_eval = jnp.moveaxis(jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(seeds), 1, 0)

    def over_seeds(f, seeds):
        # A CPU takes one seed at a time and keeps it in its cache: a seventh less time than all at once.
        return jax.lax.map(f, seeds) if jax.default_backend() == "cpu" else jax.vmap(f)(seeds)

    def update_all(number, agents, alive, history):
        def update(seed):
            key, state, alive = seed
            progress = ((number - 1) / num_updates(args), number / num_updates(args))
            new, _, metrics = agent.learn(jax.random.fold_in(key, number), state, optimizer, progress)
            alive &= metrics.pop("healthy")
            state = jax.tree.map(lambda old, new: jnp.where(alive, new, old), state, new)
            return state, alive, jax.tree.map(lambda x: jnp.where(alive, x, jnp.nan), metrics)

        agents, alive, metrics = over_seeds(update, (keys, agents, alive))
        return agents, alive, jax.tree.map(lambda all, new: all.at[:, number - 1].set(new), history, metrics), metrics

    update_all = jax.jit(update_all, donate_argnums=(1, 2, 3))
    mean_return = jax.jit(lambda keys, agents: over_seeds(lambda seed: evaluate(*seed, env, args), (keys, agents)))
    agents = jax.jit(jax.vmap(lambda key: agent.init(key, optimizer)))(keys_init)
    history = {name: jnp.full((args.num_seeds, num_updates(args)), jnp.nan) for name in ("return", "reward", "loss")}
    column = {number: i for i, number in enumerate((0, *sorted(eval_updates(args))))}
    evals = jnp.full((args.num_seeds, len(column)), jnp.nan)
    state = restore(TrainState(0, agents, jnp.ones(args.num_seeds, bool), history, evals))
    done, agents, alive, history, evals = state
    if not done:
        evals = evals.at[:, 0].set(mean_return(keys_eval, agents))
    for number in range(done + 1, num_updates(args) + 1):
        agents, alive, history, metrics = update_all(number, agents, alive, history)
        done = number
        if number in column:
            evals = evals.at[:, column[number]].set(jnp.where(alive, mean_return(keys_eval, agents), jnp.nan))
        latest = max(i for at, i in column.items() if at <= number)
        state = TrainState(number, agents, alive, history, evals)
        if on_update(number, metrics | {"eval_return": evals[:, latest]}, state) or not alive.any():
            break
    history = {name: values[:, :done] for name, values in history.items()}
    return history | {"eval_return": evals, "eval_steps": agent.num_steps * jnp.array(list(column))}


def steps_per_update(args: Args) -> int:
    return args.rollout_steps * args.batch_size * args.num_minibatches


def num_updates(args: Args) -> int:
    return int(args.total_steps) // steps_per_update(args)


def eval_updates(args: Args) -> set[int]:
    """After which updates there is an evaluation."""
    updates, evals = num_updates(args), min(args.num_evals, num_updates(args))
    return {updates * i // evals for i in range(1, evals + 1)}


def check(args: Args) -> None:
    """Raises ValueError, in one line, for arguments that do not fit together."""
    num_rollouts = args.batch_size * args.num_minibatches
    if num_rollouts % args.num_envs:
        raise ValueError(
            f"--batch-size {args.batch_size} times --num-minibatches {args.num_minibatches} is {num_rollouts}, "
            f"which must be a multiple of --num-envs {args.num_envs}"
        )
    if args.rollout_steps > args.episode_length:
        raise ValueError(
            f"--rollout-steps {args.rollout_steps} must not be above --episode-length {args.episode_length}"
        )


if __name__ == "__main__":
    import ppo
    import train_agents

    train_agents.main(ppo)
