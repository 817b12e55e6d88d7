"""PPO on Brax, control tasks, MinAtar's games and gridworlds, with any optimizer:

    python ppo.py --env-name ant --optimizer adam
    python ppo.py --env-name inverted_pendulum --optimizer adam --num-seeds 4

One agent acts in B copies of the environment (Schulman et al. 2017, arXiv 1707.06347). Flags that
are not set take the setting of Lan et al. 2024 for the task, or Brax's usual one (settings.py); the
script prints all values.

Only the last lines, the command line, need the repository. To use the rest alone, copy this file
and networks.py, and call `train` with an Env and an optax optimizer.

Legend: T steps of a rollout, B environments, A action size, O observation size, R rollouts of one
update, E epochs, M minibatches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from networks import (
    TANH_NORMAL,
    Distribution,
    Normaliser,
    all_finite,
    init_mlp,
    mlp,
    normalise,
    update_normaliser,
)


@dataclass(frozen=True)
class Args:
    # --- Training ---
    env_name: str = "inverted_pendulum"
    """a Brax task: ant, halfcheetah, hopper, humanoid, inverted_pendulum, inverted_double_pendulum,
    humanoidstandup, pusher, reacher, walker2d; a control task, e.g. acrobot; purcell_swimmer; a
    game of MinAtar, e.g. minatar_breakout; a gridworld, or catch"""
    grad_clip: float = 1.0
    """elementwise bound on gradients; inf: no clipping"""
    total_steps: float = 2e6
    """environment steps of each agent, over all its environments (paper: 2e7 to 1e8)"""
    num_envs: int = 2048
    """parallel environments of each agent (paper: 2048; ant 4096)"""
    num_seeds: int = 1
    """agents trained in parallel, each with its own seed"""
    seed: int = 0
    """seed of the first agent; the same seed gives the same result"""
    episode_length: int = 1000
    """maximum steps of an episode; the critic estimates the rest"""
    # --- Agent ---
    rollout_steps: int = 5
    """steps T of a rollout, over which advantages are computed (paper: 5 to 20)"""
    batch_size: int = 1024
    """rollouts per minibatch (paper: 512 to 2048)"""
    num_minibatches: int = 32
    """minibatches per epoch; an update collects --batch-size x this many rollouts (paper: 32)"""
    num_epochs: int = 4
    """passes over the rollouts of an update (paper: 4 or 8)"""
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
    """factor on rewards in learning; logged returns are not scaled"""
    normalise_observations: bool = True
    """by their running mean and standard deviation; not where they are bits: one that is 0 for long
    would be up to a million deviations away when it is 1"""
    policy_layers: tuple[int, ...] = (32, 32, 32, 32)
    """hidden layers of the policy"""
    value_layers: tuple[int, ...] = (256, 256, 256, 256, 256)
    """hidden layers of the critic (the paper meta-trains with 64 64 64 64 64)"""
    # --- Evaluation ---
    num_evals: int = 20
    """evaluations after the initial one, evenly spaced, each from the same initial states: whole
    episodes, the mean of a Gaussian policy, sampled actions of a categorical one"""
    eval_envs: int = 128
    """episodes per evaluation"""


SCORE = ("eval_return", 2)  # a run's score: the mean of the last 2 evaluations


class Env(NamedTuple):
    """An environment without a time limit. The rollout sets one, and resets ended episodes.

    Actions are [A] in [-1, 1], or with CATEGORICAL [] in 0 .. A - 1. If resets_itself, state and
    obs after a termination are those of the next episode.
    """

    reset: Callable  # key -> state, obs [O]
    step: Callable  # key, state, action -> state, obs, reward, terminated (bool)
    obs_size: int
    action_size: int
    distribution: Distribution = TANH_NORMAL
    resets_itself: bool = False


# --- Rollout ---


class Stream(NamedTuple):
    """One environment and its episodes. As in Brax, all start in the state of the first one; if the
    environment resets itself, only those after a cut-off do."""

    env_state: Any
    obs: jax.Array  # [O]
    first: tuple  # env_state, obs
    steps: jax.Array  # [] int32, of the current episode
    episode_return: jax.Array  # [], of the current episode
    last_return: jax.Array  # [], of the last finished episode; NaN before the first


class Batch(NamedTuple):
    """One environment's rollout. It cuts off at most one episode: one final_obs is enough."""

    obs: jax.Array  # [T + 1, O], the last for bootstrapping
    final_obs: jax.Array  # [O], where an episode was cut off, if one was
    x: jax.Array  # [T, A], actions before tanh; [T] if there are A choices
    log_prob: jax.Array  # [T], of the actions when they were taken
    reward: jax.Array  # [T]
    terminated: jax.Array  # [T] bool, the episode ended
    truncated: jax.Array  # [T] bool, it was cut off


def start_stream(key: jax.Array, env: Env) -> Stream:
    first = env.reset(key)
    return Stream(*first, first, jnp.int32(0), jnp.zeros(()), jnp.full((), jnp.nan, jnp.float32))


def rollout(key, params, normaliser, stream, env: Env, num_steps: int, episode_length: int):
    """Act for T = num_steps in one environment. -> Batch [T, ...], Stream"""
    policy = env.distribution

    def step(carry, key):
        stream, final_obs = carry
        outputs = mlp(params["policy"], normalise(normaliser, stream.obs))
        x = policy.sample(key, outputs)
        key_env = jax.random.fold_in(key, 1)
        action = policy.to_action(x)
        env_state, obs, reward, terminated = env.step(key_env, stream.env_state, action)
        truncated = (stream.steps + 1 >= episode_length) & ~terminated
        done = terminated | truncated
        final_obs = jnp.where(truncated, obs, final_obs)
        seen = (stream.obs, x, policy.log_prob(outputs, x), reward, terminated, truncated)
        restart = truncated if env.resets_itself else done
        env_state, obs = jax.tree.map(partial(jnp.where, restart), stream.first, (env_state, obs))
        so_far = stream.episode_return + reward
        last_return = jnp.where(done, so_far, stream.last_return)
        steps = jnp.where(done, 0, stream.steps + 1)
        so_far = jnp.where(done, 0, so_far)
        return (Stream(env_state, obs, stream.first, steps, so_far, last_return), final_obs), seen

    start = (stream, jnp.zeros_like(stream.obs))
    (stream, final_obs), (obs, *seen) = jax.lax.scan(step, start, jax.random.split(key, num_steps))
    return Batch(jnp.concatenate([obs, stream.obs[None]]), final_obs, *seen), stream


# --- Loss ---


def gae(values, next_values, rewards, terminated, truncated, discount: float, gae_lambda: float):
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438). All: [T] -> [T]
    next_values are of the observations that the steps led to, also at a cut-off. Raises
    AssertionError for other shapes."""
    chex.assert_equal_shape((values, next_values, rewards, terminated, truncated))
    errors = rewards + discount * (1.0 - terminated) * next_values - values
    decays = discount * gae_lambda * (1.0 - (terminated | truncated))

    def backward(advantage, step):
        error, decay = step
        advantage = error + decay * advantage
        return advantage, advantage

    return jax.lax.scan(backward, jnp.zeros_like(errors[0]), (errors, decays), reverse=True)[1]


def value(params: dict, obs: jax.Array) -> jax.Array:
    """The critic's estimate. obs: [..., O], normalised -> [...]"""
    return mlp(params["value"], obs)[..., 0]


def advantages_and_targets(params, normaliser, batch: Batch, values, args: Args):
    """Constants, for rollouts [R, T]. values: of the observations acted on -> [R, T], [R, T]"""
    params, values = jax.lax.stop_gradient((params, values))
    ahead = normalise(normaliser, jnp.stack([batch.obs[:, -1], batch.final_obs], axis=1))
    last_value, value_at_cut = jnp.moveaxis(value(params, ahead), 1, 0)
    next_values = jnp.concatenate([values[:, 1:], last_value[:, None]], axis=1)
    next_values = jnp.where(batch.truncated, value_at_cut[:, None], next_values)
    estimate = partial(gae, discount=args.discount, gae_lambda=args.gae_lambda)
    rewards = args.reward_scale * batch.reward
    advantages = jax.vmap(estimate)(values, next_values, rewards, batch.terminated, batch.truncated)
    return advantages, values + advantages


def ppo_loss(params, normaliser, batch: Batch, key, policy: Distribution, args: Args):
    """Clipped policy objective, squared critic error, entropy bonus (Schulman et al. 2017, equation
    9); mean over rollouts [R, ...]. -> loss, an estimate of KL(the rollout's policy, this one)"""
    obs = normalise(normaliser, batch.obs[:, :-1])
    values, outputs = value(params, obs), mlp(params["policy"], obs)
    advantages, targets = advantages_and_targets(params, normaliser, batch, values, args)
    log_ratio = policy.log_prob(outputs, batch.x) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - args.clip_range, 1 + args.clip_range)
    advantages = (advantages - jnp.mean(advantages)) / (jnp.std(advantages) + 1e-8)
    losses = -jnp.minimum(ratio * advantages, clipped * advantages)
    losses += args.critic_weight * (targets - values) ** 2
    losses -= args.entropy_weight * policy.entropy(key, outputs)
    return jnp.mean(losses), jnp.mean(ratio - 1 - log_ratio)


# --- Agent ---


class Agent(NamedTuple):
    """The functions that meta-training calls; a2c.py has the same.

    A state is a NamedTuple with params and opt_state, among others. The metrics of learn have
    "return", a scalar, NaN before the first episode ends; here also "healthy", whether all numbers
    are finite.
    """

    init: Callable  # key, optimizer -> state
    # key, state, optimizer, number, total -> state, (grads, extra_args) [gradient steps, ...],
    # metrics; it is update `number`, from 0, of `total`
    learn: Callable
    loss: Callable  # key, state -> loss on a fresh rollout, state


class AgentState(NamedTuple):
    params: dict
    opt_state: Any
    streams: Stream  # [B]
    normaliser: Normaliser


def act(key, params, normaliser, streams: Stream, env: Env, args: Args) -> tuple[Batch, Stream]:
    """One rollout in every environment. streams: [B] -> Batch [B, ...], streams"""
    one = partial(
        rollout, env=env, num_steps=args.rollout_steps, episode_length=args.episode_length
    )
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
    batch = jax.lax.stop_gradient(batch)
    return batch, jnp.mean(batch.reward), state._replace(streams=streams)


def learn_epochs(key, state: AgentState, batch: Batch, optimizer, number, total, env, args: Args):
    """E epochs of M gradient steps on minibatches; each epoch permutes the rollouts.

    batch: [R, ...] -> state, the optimizer's inputs (grads, extra_args), each [E * M, ...]
    """
    update = optax.with_extra_args_support(optimizer).update
    sizes = {"num_epochs": args.num_epochs, "num_minibatches": args.num_minibatches}
    per_update = args.num_epochs * args.num_minibatches  # gradient steps
    num_steps = jnp.float32(total * per_update)  # of the whole training

    def gradient_step(carry, minibatch):
        (params, opt_state), (batch, key, step) = carry, minibatch
        inputs = (state.normaliser, batch, key, env.distribution, args)
        (loss, kl), grads = jax.value_and_grad(ppo_loss, has_aux=True)(params, *inputs)
        grads = jax.tree.map(lambda g: jnp.clip(g, -args.grad_clip, args.grad_clip), grads)
        extra_args = {"value": loss, "kl": kl, "iteration_step": step, "num_steps": num_steps}
        extra_args |= {"fraction": (number * per_update + step) / num_steps} | sizes
        updates, opt_state = update(grads, opt_state, params, **extra_args)
        return (optax.apply_updates(params, updates), opt_state), (grads, extra_args)

    def epoch(carry, key_and_steps):
        key, steps = key_and_steps
        key_order, key_entropy = jax.random.split(key)
        order = jax.random.permutation(key_order, len(batch.reward)).reshape(
            args.num_minibatches, -1
        )
        minibatches = jax.tree.map(lambda x: x[order], batch)
        keys = jax.random.split(key_entropy, args.num_minibatches)
        return jax.lax.scan(gradient_step, carry, (minibatches, keys, steps))

    steps = jnp.arange(per_update).reshape(args.num_epochs, args.num_minibatches)
    keys = jax.random.split(key, args.num_epochs)
    carry = (state.params, state.opt_state)
    (params, opt_state), recorded = jax.lax.scan(epoch, carry, (keys, steps))
    state = state._replace(params=params, opt_state=opt_state)
    return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), recorded)


def init_state(key: jax.Array, optimizer, env: Env, args: Args) -> AgentState:
    key_policy, key_value, key_envs, key_first = jax.random.split(key, 4)
    num_outputs = env.distribution.num_outputs(env.action_size)
    params = {
        "policy": init_mlp(key_policy, (env.obs_size, *args.policy_layers, num_outputs)),
        "value": init_mlp(key_value, (env.obs_size, *args.value_layers, 1)),
    }
    start = partial(start_stream, env=env)
    streams = jax.vmap(start)(jax.random.split(key_envs, args.num_envs))
    # The first statistics come from a rollout that is not learned from.
    zeros, ones = jnp.zeros(env.obs_size), jnp.ones(env.obs_size)
    normaliser = Normaliser(jnp.ones(()), zeros, ones)  # changes nothing
    batch, streams = act(key_first, params, normaliser, streams, env, args)
    if args.normalise_observations:
        nothing_seen = Normaliser(jnp.zeros(()), zeros, zeros)
        normaliser = update_normaliser(nothing_seen, batch.obs[:, :-1])
    return AgentState(params, optimizer.init(params), streams, normaliser)


def make_agent(env: Env, args: Args) -> Agent:
    """PPO in args.num_envs copies of `env`. Raises ValueError for arguments that do not fit."""
    check(args)

    def init(key, optimizer):
        return init_state(key, optimizer, env, args)

    def learn(key, state, optimizer, number=0, total=1):
        key_collect, key_epochs = jax.random.split(key)
        batch, reward, state = collect(key_collect, state, env, args)
        state, (grads, extra_args) = learn_epochs(
            key_epochs, state, batch, optimizer, number, total, env, args
        )
        metrics = {
            "return": jnp.nanmean(state.streams.last_return),
            "reward": reward,
            "loss": jnp.mean(extra_args["value"]),
            "healthy": all_finite((batch.obs, batch.reward, state.params)),
        }
        if args.normalise_observations:
            # Only now: acting and learning use the same statistics, so the ratio starts at 1.
            normaliser = update_normaliser(state.normaliser, batch.obs[:, :-1])
            state = state._replace(normaliser=normaliser)
        return state, (grads, extra_args), metrics

    def loss(key, state):
        key_collect, key_entropy = jax.random.split(key)
        params = state.params
        batch, _, state = collect(key_collect, jax.lax.stop_gradient(state), env, args)
        loss, _ = ppo_loss(params, state.normaliser, batch, key_entropy, env.distribution, args)
        return loss, state._replace(params=params)

    return Agent(init, learn, loss)


def evaluate(key: jax.Array, state: AgentState, env: Env, args: Args) -> jax.Array:
    """Mean return of args.eval_envs whole episodes: the mean action of a Gaussian policy, sampled
    ones of a categorical policy. -> []"""
    policy = env.distribution

    def goes_on(episode):
        number, *_, terminated, _ = episode
        return (number < args.episode_length) & ~terminated

    def whole_return(key):
        def step(episode):
            number, env_state, obs, _, total = episode
            key_action = jax.random.fold_in(key, number)
            outputs = mlp(state.params["policy"], normalise(state.normaliser, obs))
            action = policy.to_action(policy.choose(key_action, outputs))
            key_env = jax.random.fold_in(key_action, 1)
            env_state, obs, reward, terminated = env.step(key_env, env_state, action)
            return number + 1, env_state, obs, terminated, total + reward

        start = (jnp.int32(0), *env.reset(key), jnp.array(False), jnp.zeros(()))
        return jax.lax.while_loop(goes_on, step, start)[-1]

    # The loop ends with the longest episode, so agents that fall early are evaluated fast.
    return jnp.mean(jax.vmap(whole_return)(jax.random.split(key, args.eval_envs)))


class TrainState(NamedTuple):
    number: int  # updates done
    agents: AgentState  # [num_seeds]
    alive: jax.Array  # [num_seeds] bool
    history: dict  # {"return", "reward", "loss": [num_seeds, updates]}, NaN for later updates
    evals: jax.Array  # [num_seeds, evaluations], NaN for later ones


def over_seeds(f: Callable, seeds: Any) -> Any:
    """f of each seed. On a CPU one at a time, which stays in the cache: a seventh less time."""
    return jax.lax.map(f, seeds) if jax.default_backend() == "cpu" else jax.vmap(f)(seeds)


def update_seeds(number, keys, agents, alive, history, agent: Agent, optimizer, args: Args):
    """Update `number`, from 1, of every seed. -> agents, alive, history, metrics [num_seeds]"""

    def update(seed):
        key, state, alive = seed
        key, total = jax.random.fold_in(key, number), num_updates(args)
        new, _, metrics = agent.learn(key, state, optimizer, number - 1, total)
        alive &= metrics.pop("healthy")
        state = jax.tree.map(partial(jnp.where, alive), new, state)
        return state, alive, jax.tree.map(lambda x: jnp.where(alive, x, jnp.nan), metrics)

    agents, alive, metrics = over_seeds(update, (keys, agents, alive))
    history = jax.tree.map(lambda all, new: all.at[:, number - 1].set(new), history, metrics)
    return agents, alive, history, metrics


def train(args: Args, env: Env, optimizer, on_update: Callable, restore=lambda x: x) -> dict:
    """Train args.num_seeds agents in parallel.

    on_update(updates done, metrics, TrainState) is called after each update; training ends if it
    returns True. restore(initial TrainState) -> the TrainState to start from. A seed whose
    simulation or parameters are not finite keeps its previous state, and its metrics are NaN from
    then on; training ends when none is left.

    -> {"return", "reward", "loss": [num_seeds, updates done],
    "eval_return": [num_seeds, evaluations], "eval_steps": [evaluations]}
    """
    agent = make_agent(env, args)
    seeds = args.seed + jnp.arange(args.num_seeds)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(seeds)
    keys_init, keys_learn, keys_eval = jnp.moveaxis(keys, 1, 0)
    update = partial(update_seeds, agent=agent, optimizer=optimizer, args=args)
    update = jax.jit(update, donate_argnums=(2, 3, 4))

    @jax.jit
    def eval_seeds(agents, alive):
        returns = over_seeds(lambda seed: evaluate(*seed, env, args), (keys_eval, agents))
        return jnp.where(alive, returns, jnp.nan)

    eval_at = [0, *sorted(eval_updates(args))]

    def with_eval(state):
        if state.number not in eval_at:
            return state
        returns = eval_seeds(state.agents, state.alive)
        return state._replace(evals=state.evals.at[:, eval_at.index(state.number)].set(returns))

    agents = jax.jit(jax.vmap(partial(agent.init, optimizer=optimizer)))(keys_init)
    shape = (args.num_seeds, num_updates(args))
    history = {name: jnp.full(shape, jnp.nan) for name in ("return", "reward", "loss")}
    evals = jnp.full((args.num_seeds, len(eval_at)), jnp.nan)
    state = restore(TrainState(0, agents, jnp.ones(args.num_seeds, bool), history, evals))
    state = state if state.number else with_eval(state)
    for number in range(state.number + 1, num_updates(args) + 1):
        if not state.alive.any():
            break
        agents, alive, history, metrics = update(
            number, keys_learn, state.agents, state.alive, state.history
        )
        state = with_eval(TrainState(number, agents, alive, history, state.evals))
        latest = sum(at <= number for at in eval_at) - 1
        metrics |= {"eval_return": state.evals[:, latest]}
        if on_update(number, metrics, state):
            break
    history = {name: values[:, : state.number] for name, values in state.history.items()}
    return history | {
        "eval_return": state.evals,
        "eval_steps": [steps_per_update(args) * at for at in eval_at],  # may be above int32
    }


def steps_per_update(args: Args) -> int:
    return args.rollout_steps * args.batch_size * args.num_minibatches


def num_updates(args: Args) -> int:
    return int(args.total_steps) // steps_per_update(args)


def eval_updates(args: Args) -> set[int]:
    """The updates that are followed by an evaluation."""
    updates, evals = num_updates(args), min(args.num_evals, num_updates(args))
    return {updates * i // evals for i in range(1, evals + 1)}


def check(args: Args) -> None:
    """Raises a one-line ValueError for arguments that do not fit together."""
    if args.batch_size * args.num_minibatches % args.num_envs:
        product = "--batch-size times --num-minibatches"
        raise ValueError(f"{product} must be a multiple of --num-envs {args.num_envs}")
    if args.rollout_steps > args.episode_length:
        raise ValueError(f"--rollout-steps is above --episode-length {args.episode_length}")


def main() -> None:
    import ppo  # run as a script this file is __main__, not a key of train_agents.ARGS
    import train_agents

    train_agents.main(ppo)


if __name__ == "__main__":
    main()
