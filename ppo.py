"""PPO on Brax, with any optimizer:

    python ppo.py --env-name ant --optimizer adam
    python ppo.py --env-name inverted_pendulum --optimizer adam --num-seeds 4

One agent acts in B copies of the environment (Schulman et al. 2017, arXiv 1707.06347). Flags left unset take the setting
of Lan et al. 2024 for the task, or Brax's usual one; what was taken is printed. Everything above main() stands alone; to run
the script keep the repository. An environment is the Env below, an optimizer is optax's.

Legend: T steps of a rollout, B environments, A action size, O observation size, S gradient steps of one update.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

BACKENDS = ("spring", "generalized", "positional", "mjx")


@dataclass(frozen=True)
class Args:
    env_name: str = "inverted_pendulum"
    """a Brax task: ant, halfcheetah, hopper, humanoid, humanoidstandup, inverted_pendulum, inverted_double_pendulum, pusher,
    reacher, swimmer, walker2d; not each runs on every backend and jax"""
    backend: Literal["spring", "generalized", "positional", "mjx"] = "spring"
    """Brax's physics: spring (the paper's), generalized, positional or mjx"""
    optimizer: str = "adam"
    """adam, adam_linear (falling to 0), rmsprop, sgd, sign_sgd, untrained (Optim4RL before meta-training; untrained:star),
    pretrained/NAME, or the path of a .npz"""
    learning_rate: float | None = None
    """learning rate (paper: 3e-4; walker2d 3e-5)"""
    grad_clip: float = 1.0
    """gradients are clipped elementwise to this; inf: not"""
    total_steps: float | None = None
    """environment steps in all, over all environments (paper: 2e7 to 1e8)"""
    num_envs: int | None = None
    """environments that the agent acts in at once (paper: 2048; ant 4096)"""
    num_seeds: int = 1
    """agents trained side by side, each from its own seed, as far as memory goes"""
    seed: int = 0
    """seed of the first agent; the same seed gives the same result"""
    episode_length: int = 1000
    """steps after which an episode is cut off, and its rest estimated by the critic"""
    # --- The agent ---
    rollout_steps: int | None = None
    """steps T of one rollout, the piece that advantages are computed on (paper: 5 to 20)"""
    batch_size: int | None = None
    """rollouts in a minibatch (paper: 512 to 2048)"""
    num_minibatches: int | None = None
    """minibatches between two acting phases, which so collect batch size x minibatches rollouts (paper: 32)"""
    num_epochs: int | None = None
    """times that each rollout is learned from (paper: 4 or 8)"""
    discount: float | None = None
    """discount factor of future rewards (paper: 0.97; walker2d 0.997)"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip_range: float = 0.3
    """the probability ratio is clipped to 1 - this .. 1 + this"""
    critic_weight: float = 0.25
    """weight of the critic's squared error"""
    entropy_weight: float | None = None
    """weight of the entropy bonus (paper: 1e-2 or 1e-3)"""
    reward_scale: float | None = None
    """rewards are multiplied by this before learning; the logged returns are not"""
    policy_layers: tuple[int, ...] = (32, 32, 32, 32)
    """hidden layers of the policy"""
    value_layers: tuple[int, ...] = (256, 256, 256, 256, 256)
    """hidden layers of the critic (the paper meta-trains with 64 64 64 64 64)"""
    # --- The run ---
    num_evals: int = 20
    """evaluations after the first, at regular steps: whole episodes of the policy's mode, in environments of their own"""
    eval_envs: int = 128
    """episodes of an evaluation"""
    checkpoint_minutes: float = 5.0
    """minutes between two checkpoints of the whole state"""
    resume: str | None = None
    """continue the run in this folder, with its arguments"""
    runs_dir: str = "runs"
    """the run's folder is made in here"""


class Setting(NamedTuple):
    """What a task sets; the names are those of Args."""

    total_steps: float
    num_envs: int
    reward_scale: float
    rollout_steps: int
    num_minibatches: int
    batch_size: int
    num_epochs: int
    entropy_weight: float
    discount: float
    learning_rate: float


SETTINGS = {
    # The paper's
    "ant": Setting(1e8, 4096, 10, 5, 32, 2048, 4, 1e-2, 0.97, 3e-4),
    "humanoid": Setting(1e8, 2048, 0.1, 10, 32, 1024, 8, 1e-3, 0.97, 3e-4),
    "inverted_double_pendulum": Setting(2e7, 2048, 10, 5, 32, 1024, 4, 1e-2, 0.97, 3e-4),
    "walker2d": Setting(5e7, 2048, 5, 20, 32, 512, 8, 1e-3, 0.997, 3e-5),
    # Brax's usual ones
    "inverted_pendulum": Setting(2e6, 2048, 10, 5, 32, 1024, 4, 1e-2, 0.97, 3e-4),
    "halfcheetah": Setting(5e7, 2048, 1, 20, 32, 512, 8, 1e-3, 0.95, 3e-4),
    "humanoidstandup": Setting(1e8, 2048, 0.1, 15, 32, 1024, 8, 1e-2, 0.97, 6e-4),
    "pusher": Setting(5e7, 2048, 5, 30, 16, 512, 8, 1e-2, 0.95, 3e-4),
    "reacher": Setting(5e7, 2048, 5, 50, 32, 256, 8, 1e-3, 0.95, 3e-4),
}
OTHER = Setting(5e7, 2048, 1, 20, 32, 512, 8, 1e-3, 0.97, 3e-4)


# --- Environment ---


class Env(NamedTuple):
    """An environment that neither resets itself nor ends for lack of time: both are the rollout's to do."""

    reset: Callable  # key -> state, obs [O]
    step: Callable  # state, action [A] in [-1, 1] -> state, obs, reward, terminated (bool)
    obs_size: int
    action_size: int


def task_names() -> list[str]:
    """Brax's tasks. Raises ValueError, in one line, if Brax or a package that it needs is missing.

    Imported here, so that training on gridworlds does not wait for Brax.
    """
    warnings.filterwarnings("ignore", module="brax")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints about itself helps nobody
            import brax.envs
    except ImportError as error:
        raise ValueError(f"Brax cannot be imported ({error}); pip install -r requirements.txt") from None
    return list(brax.envs._envs)


def make_env(name: str, backend: str) -> Env:
    """A Brax task. Raises ValueError, in one line, if there is no such task or backend, or not the one on the other."""
    if name not in task_names():
        close = difflib.get_close_matches(name, task_names(), 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(task_names())}"
        raise ValueError(f"unknown Brax task {name!r}; {hint}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    import brax.envs

    try:
        env = brax.envs.get_environment(name, backend=backend)
        start = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
        jax.eval_shape(env.step, start, jnp.zeros(env.action_size))
    except Exception as error:  # whatever Brax, a package that it lacks, or a newer jax than it knows raises
        raise ValueError(f"{name} cannot be made with backend {backend} ({type(error).__name__}: {error})") from None

    def reset(key):
        state = env.reset(jax.random.key_data(key))  # Brax knows old-style keys only
        return state, state.obs

    def step(state, action):
        state = env.step(state, action)
        return state, state.obs, state.reward, state.done > 0.5

    return Env(reset, step, start.obs.shape[-1], env.action_size)


# --- Networks ---


def init_mlp(key: jax.Array, sizes: tuple[int, ...]) -> dict:
    """LeCun uniform weights, zero biases. sizes: input, hidden ..., output"""
    keys = jax.random.split(key, len(sizes) - 1)
    lecun, layers = jax.nn.initializers.lecun_uniform(), zip(keys, sizes[:-1], sizes[1:], strict=True)
    return {str(i): {"w": lecun(k, (n, m)), "b": jnp.zeros(m)} for i, (k, n, m) in enumerate(layers)}


def mlp(layers: dict, x: jax.Array) -> jax.Array:
    """Dense layers, swish between them. x: [..., input] -> [..., output]"""
    batch_shape, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    for i in range(len(layers)):
        x = (jax.nn.swish(x) if i else x) @ layers[str(i)]["w"] + layers[str(i)]["b"]
    return x.reshape(*batch_shape, -1)


def policy(params: dict, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The normal distribution whose tanh is the action. obs: [..., O], normalised -> mean, standard deviation [..., A]"""
    mean, spread = jnp.split(mlp(params["policy"], obs), 2, axis=-1)
    return mean, jax.nn.softplus(spread) + 1e-3


def value(params: dict, obs: jax.Array) -> jax.Array:
    """obs: [..., O], normalised -> [...]"""
    return mlp(params["value"], obs)[..., 0]


# --- Tanh-squashed normal distribution; x [..., A] is the action before tanh ---


def log_slope(x: jax.Array) -> jax.Array:
    """log d tanh(x) / dx, without the cancellation of log(1 - tanh(x)^2)."""
    return 2 * (math.log(2) - x - jax.nn.softplus(-2 * x))


def log_prob(mean: jax.Array, std: jax.Array, x: jax.Array) -> jax.Array:
    """Log-density of the action tanh(x). -> [...]"""
    return jnp.sum(jax.scipy.stats.norm.logpdf(x, mean, std) - log_slope(x), axis=-1)


def entropy(key: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Estimate, from one sample, of the entropy of the action; it has no closed form. -> [...]"""
    x = mean + std * jax.random.normal(key, mean.shape)
    return jnp.sum(0.5 * math.log(2 * math.pi * math.e) + jnp.log(std) + log_slope(x), axis=-1)


# --- Running observation statistics ---


class Normaliser(NamedTuple):
    count: jax.Array  # []
    mean: jax.Array  # [O]
    sum_squares: jax.Array  # [O] of the distances to the mean


def update_normaliser(normaliser: Normaliser, obs: jax.Array) -> Normaliser:
    """Take in more observations, all at once (Chan, Golub, LeVeque 1979; Welford's method for a batch). obs: [..., O]"""
    obs = obs.reshape(-1, obs.shape[-1])
    mean = jnp.mean(obs, axis=0)
    sum_squares = jnp.sum((obs - mean) ** 2, axis=0)
    count = normaliser.count + len(obs)
    distance = mean - normaliser.mean
    return Normaliser(
        count,
        normaliser.mean + distance * len(obs) / count,
        normaliser.sum_squares + sum_squares + distance**2 * normaliser.count * len(obs) / count,
    )


def normalise(normaliser: Normaliser, obs: jax.Array) -> jax.Array:
    std = jnp.sqrt(normaliser.sum_squares / normaliser.count)
    return (obs - normaliser.mean) / jnp.clip(std, 1e-6, 1e6)


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
    x: jax.Array  # [T, A] actions before tanh
    log_prob: jax.Array  # [T] of the actions when they were taken
    reward: jax.Array  # [T]
    terminated: jax.Array  # [T] bool, the episode ended
    truncated: jax.Array  # [T] bool, it was cut off


def start_stream(key: jax.Array, env: Env) -> Stream:
    first = env.reset(key)
    return Stream(*first, first, jnp.int32(0), jnp.zeros(()), jnp.full((), jnp.nan, jnp.float32))


def rollout(key, params, normaliser, stream: Stream, env: Env, num_steps: int, episode_length: int) -> tuple[Batch, Stream]:
    """Act for num_steps in one environment."""

    def step(carry, key):
        stream, final_obs = carry
        mean, std = policy(params, normalise(normaliser, stream.obs))
        x = mean + std * jax.random.normal(key, mean.shape)
        env_state, obs, reward, terminated = env.step(stream.env_state, jnp.tanh(x))
        truncated = (stream.steps + 1 >= episode_length) & ~terminated
        done = terminated | truncated
        final_obs = jnp.where(truncated, obs, final_obs)
        seen = (stream.obs, x, log_prob(mean, std, x), reward, terminated, truncated)
        env_state, obs = jax.tree.map(lambda old, new: jnp.where(done, old, new), stream.first, (env_state, obs))
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


def ppo_loss(params: dict, normaliser: Normaliser, batch: Batch, key: jax.Array, args: Args) -> jax.Array:
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

    mean, std = policy(params, obs)
    ratio = jnp.exp(log_prob(mean, std, batch.x) - batch.log_prob)
    clipped = jnp.clip(ratio, 1 - args.clip_range, 1 + args.clip_range)
    advantages = (advantages - jnp.mean(advantages)) / (jnp.std(advantages) + 1e-8)
    losses = -jnp.minimum(ratio * advantages, clipped * advantages)
    losses += args.critic_weight * (targets - values) ** 2 - args.entropy_weight * entropy(key, mean, std)
    return jnp.mean(losses)


# --- Agent ---


class Agent(NamedTuple):
    """What meta-training needs of an agent; a2c.py gives the same.

    A state is a NamedTuple with params, opt_state and reward_factor (a scalar that multiplies its rewards). learn's metrics
    have "return", a scalar, NaN before the first episode ends.
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


def make_agent(env: Env, args: Args) -> Agent:
    """PPO in args.num_envs copies of `env`. Every setting of args must be there: see fill_in."""
    num_rollouts = args.batch_size * args.num_minibatches

    def init(key, optimizer):
        key_policy, key_value, key_envs, key_first = jax.random.split(key, 4)
        policy_sizes = (env.obs_size, *args.policy_layers, 2 * env.action_size)
        value_sizes = (env.obs_size, *args.value_layers, 1)
        params = {"policy": init_mlp(key_policy, policy_sizes), "value": init_mlp(key_value, value_sizes)}
        streams = jax.vmap(partial(start_stream, env=env))(jax.random.split(key_envs, args.num_envs))
        # The first statistics come from a rollout that nothing is learned from.
        zeros, ones = jnp.zeros(env.obs_size), jnp.ones(env.obs_size)
        batch, streams = act(key_first, params, Normaliser(jnp.ones(()), zeros, ones), streams)
        normaliser = update_normaliser(Normaliser(jnp.zeros(()), zeros, zeros), batch.obs[:, :-1])
        return AgentState(params, optimizer.init(params), streams, normaliser, jnp.ones(()))

    def act(key, params, normaliser, streams):
        """One rollout in every environment. -> Batch [B, ...], streams"""
        one = partial(rollout, env=env, num_steps=args.rollout_steps, episode_length=args.episode_length)
        return jax.vmap(one, (0, None, None, 0))(jax.random.split(key, args.num_envs), params, normaliser, streams)

    def collect(key, state):
        """As many rollouts as one update learns from. -> Batch [num_rollouts, ...], mean reward of a step, state"""

        def again(streams, key):
            batch, streams = act(key, state.params, state.normaliser, streams)
            return streams, batch

        streams, batches = jax.lax.scan(again, state.streams, jax.random.split(key, num_rollouts // args.num_envs))
        batch = jax.tree.map(lambda x: x.reshape(num_rollouts, *x.shape[2:]), batches)
        reward = jnp.mean(batch.reward)
        batch = jax.lax.stop_gradient(batch._replace(reward=state.reward_factor * batch.reward))
        return batch, reward, state._replace(streams=streams)

    def learn(key, state, optimizer, progress=(0.0, 1.0)):
        """progress: how much of training is done before this update and after it, from 0 to 1; some optimizers read it."""
        key_collect, key_epochs = jax.random.split(key)
        batch, reward, state = collect(key_collect, state)

        def gradient_step(carry, minibatch):
            params, opt_state = carry
            batch, key, fraction = minibatch
            loss, grads = jax.value_and_grad(ppo_loss)(params, state.normaliser, batch, key, args)
            extra_args = {"value": loss, "fraction": fraction}
            update = optax.with_extra_args_support(optimizer).update
            updates, opt_state = update(grads, opt_state, params, **extra_args)
            return (optax.apply_updates(params, updates), opt_state), (grads, extra_args)

        def epoch(carry, key_and_fractions):
            key, fractions = key_and_fractions
            key_shuffle, key_entropy = jax.random.split(key)
            order = jax.random.permutation(key_shuffle, num_rollouts).reshape(args.num_minibatches, args.batch_size)
            minibatches = jax.tree.map(lambda x: x[order], batch)
            keys = jax.random.split(key_entropy, args.num_minibatches)
            return jax.lax.scan(gradient_step, carry, (minibatches, keys, fractions))

        shape = (args.num_epochs, args.num_minibatches)
        fractions = progress[0] + (progress[1] - progress[0]) * jnp.arange(np.prod(shape)).reshape(shape) / np.prod(shape)
        keys = jax.random.split(key_epochs, args.num_epochs)
        start = (state.params, state.opt_state)
        (params, opt_state), seen = jax.lax.scan(epoch, start, (keys, fractions.astype(jnp.float32)))
        seen = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)
        healthy = all_finite((batch.obs, batch.reward, params))
        metrics = {"return": jnp.nanmean(state.streams.last_return), "reward": reward, "loss": jnp.mean(seen[1]["value"])}
        metrics |= {"healthy": healthy}
        # What was acted with is also learned with, so that the ratio starts at 1; the statistics are then brought up to date.
        normaliser = update_normaliser(state.normaliser, batch.obs[:, :-1])
        state = state._replace(params=params, opt_state=opt_state, normaliser=normaliser)
        return state, seen, metrics

    def loss(key, state):
        key_collect, key_entropy = jax.random.split(key)
        params = state.params
        batch, _, state = collect(key_collect, jax.lax.stop_gradient(state))
        return ppo_loss(params, state.normaliser, batch, key_entropy, args), state._replace(params=params)

    return Agent(init, learn, loss, steps_per_update(args))


def evaluate(key: jax.Array, state: AgentState, env: Env, args: Args) -> jax.Array:
    """Mean return of args.eval_envs whole episodes of the policy's mode, in environments of their own. -> []"""

    def goes_on(episode):
        number, *_, terminated, _ = episode
        return (number < args.episode_length) & ~terminated

    def step(episode):
        number, env_state, obs, _, total = episode
        mean, _ = policy(state.params, normalise(state.normaliser, obs))
        env_state, obs, reward, terminated = env.step(env_state, jnp.tanh(mean))
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


def fill_in(args: Args) -> Args:
    """The arguments with the task's setting where they were left unset. Raises ValueError, in one line, for what cannot be."""
    setting = SETTINGS.get(args.env_name, OTHER)._asdict()
    args = dataclasses.replace(args, **{name: value for name, value in setting.items() if getattr(args, name) is None})
    for name in ("discount", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be from 0 to 1, got {getattr(args, name):g}")
    if args.batch_size * args.num_minibatches % args.num_envs:
        raise ValueError(
            f"--batch-size {args.batch_size} times --num-minibatches {args.num_minibatches} is "
            f"{args.batch_size * args.num_minibatches}, which must be a multiple of --num-envs {args.num_envs}"
        )
    if args.rollout_steps > args.episode_length:
        raise ValueError(f"--rollout-steps {args.rollout_steps} must not be above --episode-length {args.episode_length}")
    return args


def main() -> None:
    import optimizers
    import runs
    from checkpoints import Checkpoints, resumed_args

    args = runs.parse(Args, __doc__)
    with runs.bad_input():
        runs.check_positive(args, "learning_rate", "total_steps", "num_envs", "num_seeds", "episode_length", "rollout_steps")
        runs.check_positive(args, "batch_size", "num_minibatches", "num_epochs", "clip_range", "reward_scale")
        runs.check_between(args, 0, 1e6, "critic_weight", "entropy_weight")
        runs.check_positive(args, "num_evals", "eval_envs", "policy_layers", "value_layers", "checkpoint_minutes")
        if not args.grad_clip > 0:
            raise ValueError(f"--grad-clip must be above 0, or inf for no clipping, got {args.grad_clip:g}")
        args = resumed_args(args.resume, args) if args.resume else fill_in(args)
        if not num_updates(args):
            raise ValueError(f"--total-steps {args.total_steps:g} is less than one update's rollouts")
        optimizer = optimizers.make_optimizer(args.optimizer, args.learning_rate)
        env = make_env(args.env_name, args.backend)
        folder = runs.run_folder(args, args.env_name, "ppo")
        checkpoints = Checkpoints(folder, args.checkpoint_minutes)
    print("\n".join(f"{name:18} {value}" for name, value in dataclasses.asdict(args).items()))
    lost: set[int] = set()

    with runs.interruptible() as interrupted, runs.Log(folder, num_updates(args)) as log:

        def on_update(number, metrics, state):
            per_seed = {f"eval_return_seed_{args.seed + i}": x for i, x in enumerate(metrics["eval_return"])}
            means = {name: jnp.nanmean(x) for name, x in metrics.items()}
            env_steps = number * steps_per_update(args)
            log.write(number, {"env_steps": env_steps, **means, **per_seed})
            for i in set(jnp.flatnonzero(jnp.isnan(metrics["loss"])).tolist()) - lost:
                lost.add(i)
                log.say(f"seed {args.seed + i}: numbers that are not finite by step {env_steps:,}; this seed ends here")
            checkpoints.save_if_due(number, state, log, interrupted())
            return interrupted()

        history = train(args, env, optimizer, on_update, checkpoints.restore if args.resume else lambda state: state)
    evals = history["eval_return"]
    final = evals[:, ~jnp.isnan(evals).all(axis=0)][:, -2:].mean(axis=1)  # of those that were made before an interrupt
    print(f"return of the last 2 evaluations: {jnp.nanmean(final):.1f} (by seed: {', '.join(f'{x:.1f}' for x in final)})")
    print(f"written: {folder}/config.json, metrics.csv, TensorBoard events (tensorboard --logdir {args.runs_dir})")
    if interrupted():
        print(f"to go on: python ppo.py --resume {folder}")
    sys.exit(interrupted())


if __name__ == "__main__":
    main()
