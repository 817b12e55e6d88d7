r"""A2C on gridworlds, with any optimizer:

    python a2c.py --env-name small_dense_long --optimizer adam --learning-rate 3e-2 \
        --total-steps 3e6 --num-seeds 4

One agent acts in B copies of the environment and learns from the mean gradient over them (Mnih et
al. 2016, arXiv 1602.01783). Flags that are not set take the paper's value for the environment
(settings.py); the script prints all values.

Only the last lines, the command line, need the repository. To use the rest alone, copy this file
and call `train` with an optax optimizer and an environment: `reset(key) -> state, obs`,
`step(key, state, action) -> state, obs, reward, done`, obs_shape, num_actions.

Legend: T steps of a rollout, B environments, A actions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class Args:
    # --- Training ---
    env_name: str = "small_dense_long"
    """one of the eight gridworlds, {small,big}_{sparse,dense}_{short,long}, or catch"""
    total_steps: float = 3e7
    """environment steps of each agent, over all its environments (gridworlds 3e7, catch 5e5)"""
    num_envs: int = 512
    """parallel environments of each agent (catch 64)"""
    num_seeds: int = 1
    """agents trained in parallel, each with its own seed"""
    seed: int = 0
    """seed of the first agent; the same seed gives the same result"""
    # --- Agent ---
    rollout_steps: int = 20
    """steps in each environment between two updates"""
    discount: float = 0.995
    """discount factor of future rewards"""
    td_lambda: float = 0.95
    """lambda of TD(lambda): 0 bootstraps after one step, 1 at the end of the rollout"""
    critic_weight: float = 0.5
    """weight of the critic's loss"""
    entropy_weight: float = 0.01
    """weight of the entropy bonus"""
    reward_scale: float = 1.0
    """factor on rewards in learning; logged returns are not scaled"""
    conv_filters: int = 0
    """filters of the 2x2 convolution, 0 for none (paper: big gridworlds 16)"""
    hidden_size: int = 32
    """units of the dense layer (paper: 32; catch 256)"""


SCORE = ("return", 20)  # a run's score: the mean of the last 20 updates' returns


# --- Network: [Conv 16 2x2 ->] Dense -> actor and critic ---


def init_network(
    key: jax.Array, obs_shape: tuple, num_actions: int, filters: int, hidden: int
) -> dict:
    """LeCun normal weights, zero biases. filters: those of the convolution, 0 for none; hidden:
    units of the dense layer."""
    height, width, planes = obs_shape
    sizes = {"conv": (4 * planes, filters)} if filters else {}
    sizes |= {
        "dense": (height * width * (filters or planes), hidden),
        "actor": (hidden, num_actions),
        "critic": (hidden, 1),
    }
    params = {}
    for k, (name, size) in zip(jax.random.split(key, len(sizes)), sizes.items(), strict=True):
        params[name] = {"w": jax.nn.initializers.lecun_normal()(k, size), "b": jnp.zeros(size[1])}
    return params


def conv2x2(layer: dict, x: jax.Array) -> jax.Array:
    """2x2 convolution, SAME padding.

    x: [..., height, width, planes] -> [..., height, width, filters]. Four shifted slices and one
    matrix product: on a CPU many times faster than lax.conv, above all if each unit has its own
    weights.
    """
    height, width = x.shape[-3:-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, 1), (0, 1), (0, 0)])
    patches = jnp.concatenate(
        [x[..., i : i + height, j : j + width, :] for i in (0, 1) for j in (0, 1)], axis=-1
    )
    return patches @ layer["w"] + layer["b"]


def network(params: dict, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """obs: [..., height, width, planes] -> logits [..., A], value [...]"""
    x = obs.astype(jnp.float32)
    if "conv" in params:
        x = jax.nn.relu(conv2x2(params["conv"], x))
    x = x.reshape(*x.shape[:-3], -1)
    x = jax.nn.relu(x @ params["dense"]["w"] + params["dense"]["b"])
    logits, value = (x @ params[head]["w"] + params[head]["b"] for head in ("actor", "critic"))
    return logits, value[..., 0]


# --- Rollout ---


class Stream(NamedTuple):
    """One environment and its episodes."""

    env_state: Any
    obs: jax.Array  # [height, width, planes]
    episode_return: jax.Array  # [], of the current episode
    last_return: jax.Array  # [], of the last finished episode; NaN before the first


class Batch(NamedTuple):
    """One environment's rollout."""

    obs: jax.Array  # [T + 1, height, width, planes], the last for bootstrapping
    action: jax.Array  # [T] int32
    reward: jax.Array  # [T]
    done: jax.Array  # [T] bool


def start_stream(key: jax.Array, env: Any) -> Stream:
    """The stream of one environment at its first reset."""
    return Stream(*env.reset(key), jnp.zeros(()), jnp.full((), jnp.nan, jnp.float32))


def rollout(
    key: jax.Array, params: dict, stream: Stream, env: Any, num_steps: int
) -> tuple[Batch, Stream]:
    """Act for T = num_steps in one environment. -> Batch [T, ...], stream"""

    def step(stream, key):
        key_action, key_step = jax.random.split(key)
        action = jax.random.categorical(key_action, network(params, stream.obs)[0])
        env_state, obs, reward, done = env.step(key_step, stream.env_state, action)
        so_far = stream.episode_return + reward
        last_return = jnp.where(done, so_far, stream.last_return)
        seen = (stream.obs, action, reward, done)
        return Stream(env_state, obs, jnp.where(done, 0, so_far), last_return), seen

    stream, (obs, *seen) = jax.lax.scan(step, stream, jax.random.split(key, num_steps))
    return Batch(jnp.concatenate([obs, stream.obs[None]]), *seen), stream


# --- Loss ---


def td_lambda_errors(
    values: jax.Array, rewards: jax.Array, discounts: jax.Array, td_lambda: float
) -> jax.Array:
    """G_t - V_t with the lambda-return G_t = r_t + gamma_t ((1 - lambda) V_{t+1} + lambda G_{t+1}),
    G_T = V_T (Sutton & Barto 2018, section 12.1).

    values: [T + 1]; rewards, discounts (0 where an episode ended): [T] -> [T]. Raises
    AssertionError for other shapes.
    """
    chex.assert_equal_shape((values[1:], rewards, discounts))
    deltas = rewards + discounts * values[1:] - values[:-1]

    def backward(error, step):
        delta, discount = step
        error = delta + discount * td_lambda * error
        return error, error

    return jax.lax.scan(backward, jnp.zeros_like(deltas[0]), (deltas, discounts), reverse=True)[1]


def a2c_loss(params: dict, batch: Batch, args: Args) -> jax.Array:
    """Policy gradient with TD(lambda) advantages, squared critic error, entropy bonus (Mnih et al.
    2016); mean over one rollout. batch: [T, ...] -> []"""
    logits, values = network(params, batch.obs)
    discounts = args.discount * (1.0 - batch.done)
    rewards = args.reward_scale * batch.reward
    errors = jax.lax.stop_gradient(td_lambda_errors(values, rewards, discounts, args.td_lambda))
    targets = errors + jax.lax.stop_gradient(values[:-1])

    log_pi = jax.nn.log_softmax(logits[:-1])
    log_pi_action = jnp.take_along_axis(log_pi, batch.action[:, None], axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1)
    losses = (
        -log_pi_action * errors
        + args.critic_weight * (targets - values[:-1]) ** 2
        - args.entropy_weight * entropy
    )
    return jnp.mean(losses)


# --- Agent ---


class Agent(NamedTuple):
    """The functions that meta-training calls; ppo.py has the same.

    A state is a NamedTuple with params and opt_state, among others. The metrics of learn have
    "return", a scalar, NaN before the first episode ends.
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


def make_agent(env: Any, args: Args) -> Agent:
    """A2C in args.num_envs copies of `env`."""

    def init(key, optimizer):
        key_params, key_envs = jax.random.split(key)
        sizes = (args.conv_filters, args.hidden_size)
        params = init_network(key_params, env.obs_shape, env.num_actions, *sizes)
        start = partial(start_stream, env=env)
        streams = jax.vmap(start)(jax.random.split(key_envs, args.num_envs))
        return AgentState(params, optimizer.init(params), streams)

    def fresh_batch(key, state):
        act = partial(rollout, env=env, num_steps=args.rollout_steps)
        keys = jax.random.split(key, args.num_envs)
        batches, streams = jax.vmap(act, (0, None, 0))(keys, state.params, state.streams)
        batches = jax.lax.stop_gradient(batches)
        return batches, jnp.mean(batches.reward), state._replace(streams=streams)

    def mean_loss(params, batches):
        return jnp.mean(jax.vmap(a2c_loss, (None, 0, None))(params, batches, args))

    def mean_loss_and_grads(params, batches):
        """On a CPU, a few environments at a time: what the derivative needs stays in the cache."""
        at_once = math.gcd(args.num_envs, 16) if jax.default_backend() == "cpu" else args.num_envs
        chunks = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), batches)

        def add_chunk(total, chunk):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(params, chunk)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total = jax.lax.scan(add_chunk, zero, chunks)[0]
        return jax.tree.map(lambda x: x * at_once / args.num_envs, total)

    def learn(key, state, optimizer, number=0, total=1):
        batches, reward, state = fresh_batch(key, state)
        loss, grads = mean_loss_and_grads(state.params, batches)
        fraction, num_steps = jnp.float32(number / total), jnp.float32(total)
        extra_args = {"value": loss, "fraction": fraction, "num_steps": num_steps}
        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(grads, state.opt_state, state.params, **extra_args)
        params = optax.apply_updates(state.params, updates)
        state = state._replace(params=params, opt_state=opt_state)
        # With parameters that are not finite it still acts, and its returns look like real ones.
        last_return = jnp.where(jnp.isfinite(loss), jnp.nanmean(state.streams.last_return), jnp.nan)
        metrics = {"return": last_return, "reward": reward, "loss": loss}
        return state, jax.tree.map(lambda x: x[None], (grads, extra_args)), metrics

    def loss(key, state):
        params = state.params
        batches, _, state = fresh_batch(key, jax.lax.stop_gradient(state))
        return mean_loss(params, batches), state._replace(params=params)

    return Agent(init, learn, loss)


class TrainState(NamedTuple):
    number: int  # updates done
    agents: AgentState  # [num_seeds]
    history: dict  # {"return", "reward", "loss": [num_seeds, updates]}, NaN for later updates


def over_seeds(f: Callable, seeds: Any) -> Any:
    """f of each seed. A CPU takes one at a time and keeps it in its cache: a fifth less time."""
    return jax.lax.map(f, seeds) if jax.default_backend() == "cpu" else jax.vmap(f)(seeds)


def update_seeds(number, keys, agents, history, agent: Agent, optimizer, args: Args):
    """Update `number`, from 0, of every seed. -> agents, history, metrics [num_seeds]"""

    def update(key_and_state):
        key, state = key_and_state
        key = jax.random.fold_in(key, number)
        state, _, metrics = agent.learn(key, state, optimizer, number, num_updates(args))
        return state, metrics

    agents, metrics = over_seeds(update, (keys, agents))
    history = jax.tree.map(lambda all, new: all.at[:, number].set(new), history, metrics)
    return agents, history, metrics


def train(args: Args, env: Any, optimizer, on_update: Callable, restore=lambda x: x) -> dict:
    """Train args.num_seeds agents in parallel.

    on_update(updates done, metrics, TrainState) is called after each update; training ends if it
    returns True. restore(initial TrainState) -> the TrainState to start from.

    -> {"return", "reward", "loss": [num_seeds, updates done]}: mean return of the environments'
    last episodes, mean reward of a step, loss of the update
    """
    agent = make_agent(env, args)
    seeds = args.seed + jnp.arange(args.num_seeds)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
    keys_init, keys_learn = jnp.moveaxis(keys, 1, 0)
    update = partial(update_seeds, agent=agent, optimizer=optimizer, args=args)
    update = jax.jit(update, donate_argnums=(2, 3))
    agents = jax.jit(jax.vmap(partial(agent.init, optimizer=optimizer)))(keys_init)
    shape = (args.num_seeds, num_updates(args))
    history = {name: jnp.full(shape, jnp.nan) for name in ("return", "reward", "loss")}
    done, agents, history = restore(TrainState(0, agents, history))
    for number in range(done, num_updates(args)):
        agents, history, metrics = update(number, keys_learn, agents, history)
        done = number + 1
        if on_update(done, metrics, TrainState(done, agents, history)):
            break
    return {name: values[:, :done] for name, values in history.items()}


def steps_per_update(args: Args) -> int:
    return args.rollout_steps * args.num_envs


def num_updates(args: Args) -> int:
    return int(args.total_steps) // steps_per_update(args)


def check(args: Args) -> None:
    """Raises a one-line ValueError for arguments that do not fit together. A2C has none."""
    del args


def main() -> None:
    import a2c  # run as a script this file is __main__, not a key of train_agents.ARGS
    import train_agents

    train_agents.main(a2c)


if __name__ == "__main__":
    main()
