r"""Search theta of adam4rl.py by CMA-ES (Hansen 2016, arXiv 1604.00772), on whole lifetimes:

    pip install cma
    python experiments/search.py                                            # on two cores: hours
    python experiments/search.py --population 64 --tasks-per-generation 17  # on an accelerator

A generation trains agents with every candidate on a few tasks, drawn in turn from TASKS: A2C and
PPO on random gridworlds, PPO on control tasks, each with a random number of updates. On a task all
candidates have the same seed, and are ranked by their mean return over training and by that of the
last tenth; the sum of these ranks is the fitness, so reward scales do not matter. Two more
candidates are ranked and not used: theta as it is written, and Adam (untrained).

The network on top is searched from what was found without it:

    python experiments/search.py --theta runs/adam4rl.npz --network-size 8 --out runs/network

Writes OUT.npz (theta: the mean of the distribution, averaged over the last third of all
generations, as one generation is mostly chance) and OUT.jsonl (a line a generation), and continues
from OUT.pkl if it is there.
"""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import a2c
import checks
import gridworld
import optimizers
import ppo
import runs
import tasks
from adam4rl import make_adam4rl, network_size
from environments import swimmer
from networks import all_finite
from optim4rl import to_optax


@dataclass(frozen=True)
class Args:
    out: str = "runs/adam4rl"
    """files are written with this name and the endings .npz, .jsonl, .pkl"""
    generations: int = 30
    """in total; the same command with more of them continues"""
    population: int = 16
    """candidates in a generation"""
    tasks_per_generation: int = 5
    """tasks that each candidate is trained on"""
    theta: str | None = None
    """theta file (.npz) of adam4rl to start from; by default Adam"""
    network_size: int = 0
    """hidden units of the network; 0 is none. With one, CMA-ES keeps variances only, not
    covariances"""
    only_network: bool = False
    """leave the other numbers of theta as they are"""
    spread: float = 0.4
    """standard deviation of the first candidates, relative to SCALES"""
    seed: int = 1
    """seed of CMA-ES and of the choice of tasks"""


class SearchTask(NamedTuple):
    """What candidates are trained on."""

    make_agent: Callable  # () -> a2c.Agent or ppo.Agent
    metric: str  # "return", or "reward" (of a step) where episodes are as long as the training
    fewest: int  # updates
    most: int


# The scale of each number of theta in the first distribution; of the network's see search_space.
SCALES = {
    "rate": (0.5, 0.25),
    "schedule": (0.5,) * 6,
    "momenta": (0.6,) * 4,
    "squares": (0.6, 0.6),
    "whitening": (0.6,),
    "shape": (0.5, 1.0),
}
CHUNKS = 3  # jobs of a task on a CPU, so that all cores are busy to the end of a generation


def a2c_on(grid: gridworld.Grid, num_envs: int, make=gridworld.make_grid, **sizes) -> a2c.Agent:
    return a2c.make_agent(make(grid), a2c.Args(num_envs=num_envs, **sizes))


def moving(grid: gridworld.Grid) -> gridworld.Env:
    """The gridworld with objects that move: one column a step, the first, third, ... to the left,
    the others to the right, and from one side to the other. As in a game, where to go depends on
    where things will be."""
    env = gridworld.make_grid(grid)
    direction = jnp.where(jnp.arange(2 * grid.num_each) % 2, 1, -1)

    def step(key, state, action):
        state, _, reward, done = env.step(key, state, action)
        row, col = state.objects // grid.cols, state.objects % grid.cols
        state = state._replace(objects=row * grid.cols + (col + direction) % grid.cols)
        return state, gridworld.grid_observe(state, grid), reward, done

    return env._replace(step=step)


def ppo_on_moving(grid: gridworld.Grid) -> ppo.Agent:
    """PPO where objects move, in the setting of MinAtar's games."""
    args = tasks.agent_args("minatar_breakout")
    return ppo.make_agent(tasks.flat_gridworld(moving(grid)), args)


def ppo_on(name: str, copies: int = 1, obs_size: int = 0, links: int = 0, **changes) -> ppo.Agent:
    """PPO on a task, on some copies of it at once, with obs_size mixtures as observations, or on a
    swimmer of so many links."""
    learner = tasks.make_learner(name, "ppo", **changes)
    env = ppo.Env(*swimmer.make(name, links)) if links else learner.env
    env = several(env, copies) if copies > 1 else env
    return ppo.make_agent(mixed(env, obs_size) if obs_size else env, learner.args)


def several(env: ppo.Env, copies: int) -> ppo.Env:
    """Independent copies as one environment, which ends with the first copy that ends. Its reward
    is their mean, so that, as on Brax's robots, an action is seen through the noise of others."""

    def reset(key):
        states, obs = jax.vmap(env.reset)(jax.random.split(key, copies))
        return states, obs.reshape(-1)

    def step(key, states, action):
        keys, actions = jax.random.split(key, copies), action.reshape(copies, -1)
        states, obs, rewards, terminated = jax.vmap(env.step)(keys, states, actions)
        return states, obs.reshape(-1), jnp.mean(rewards), jnp.any(terminated)

    sizes = copies * env.obs_size, copies * env.action_size
    return env._replace(reset=reset, step=step, obs_size=sizes[0], action_size=sizes[1])


def mixed(env: ppo.Env, obs_size: int) -> ppo.Env:
    """Observations are fixed random mixtures of the environment's: many, and redundant."""
    mixing = jax.random.normal(jax.random.key(0), (env.obs_size, obs_size))
    mixing /= math.sqrt(env.obs_size)

    def reset(key):
        state, obs = env.reset(key)
        return state, jnp.tanh(obs @ mixing)

    def step(key, state, action):
        state, obs, reward, terminated = env.step(key, state, action)
        return state, jnp.tanh(obs @ mixing), reward, terminated

    return env._replace(reset=reset, step=step, obs_size=obs_size)


SMALL = [gridworld.GRIDS[f"small_{name}"] for name in ("dense_short", "sparse_long", "dense_long")]
# As on Brax: short rollouts, a deep critic, rewards scaled by 10. Some of these lifetimes are long:
# else a large number of updates and a deep network would mean the same.
DEEP = {"policy_layers": (32,) * 4, "value_layers": (64,) * 5, "num_envs": 128}
DEEP |= {"rollout_steps": 5, "batch_size": 64, "num_minibatches": 8, "reward_scale": 10.0}
# 128 updates an iteration: in few of these the policy changes much in each.
FEW = DEEP | {"batch_size": 128, "num_minibatches": 32}
LARGE_REWARDS = {"reward_scale": 100.0}  # more of the critic's gradients are clipped
UNCLIPPED = {"grad_clip": math.inf}  # on some tasks, as it may be where theta is used
SQUARE, OBLONG = gridworld.Grid(5, 5, 2, 0.2, 100), gridworld.Grid(5, 6, 2, 0.3, 200)
MOVING = gridworld.Grid(6, 8, 2, 0.05, 200)
TASKS = {
    "small_dense_short": SearchTask(partial(a2c_on, SMALL[0], 512), "return", 120, 400),
    "small_sparse_long": SearchTask(partial(a2c_on, SMALL[1], 512), "return", 120, 400),
    "small_dense_long": SearchTask(partial(a2c_on, SMALL[2], 512), "return", 120, 400),
    "5 x 5": SearchTask(partial(a2c_on, SQUARE, 128, hidden_size=64), "return", 200, 800),
    "5 x 6, convolution": SearchTask(
        partial(a2c_on, OBLONG, 512, conv_filters=16), "return", 120, 240
    ),
    "pendulum": SearchTask(partial(ppo_on, "pendulum", reward_scale=10.0), "reward", 30, 100),
    "cartpole": SearchTask(partial(ppo_on, "cartpole", **UNCLIPPED), "reward", 30, 240),
    "two_link_reacher": SearchTask(partial(ppo_on, "two_link_reacher"), "reward", 30, 240),
    "acrobot, deep": SearchTask(
        partial(ppo_on, "acrobot", entropy_weight=1e-2, **DEEP), "reward", 40, 320
    ),
    "cartpole, few iterations": SearchTask(
        partial(ppo_on, "cartpole", **FEW | LARGE_REWARDS), "reward", 8, 24
    ),
    "4 cartpoles, deep": SearchTask(
        partial(ppo_on, "cartpole", copies=4, **DEEP | LARGE_REWARDS), "reward", 40, 320
    ),
    "3 pendulums, mixed": SearchTask(
        partial(ppo_on, "pendulum", copies=3, obs_size=40, **DEEP, **UNCLIPPED), "reward", 40, 320
    ),
    "swimmer": SearchTask(partial(ppo_on, "purcell_swimmer", **UNCLIPPED), "reward", 40, 320),
    "swimmer of 9, mixed": SearchTask(
        partial(ppo_on, "purcell_swimmer", links=9, obs_size=120, **DEEP), "reward", 40, 320
    ),
    "small_dense_short by ppo": SearchTask(
        partial(ppo_on, "small_dense_short", **UNCLIPPED), "return", 30, 100
    ),
    "6 x 8, moving": SearchTask(partial(ppo_on_moving, MOVING), "return", 30, 120),
    "6 x 8, moving, by a2c": SearchTask(
        partial(a2c_on, MOVING, 128, moving, hidden_size=64), "return", 200, 800
    ),
}


# --- Lifetimes ---


def make_lifetimes(search: SearchTask, network_size: int = 0):
    """-> f(thetas [P, D], key, number of updates) -> [P, 2], the mean metric over all of training
    and over the last tenth; -1e9 for parameters that are not finite. Candidates share the key."""
    agent, metric = search.make_agent(), search.metric
    learned = make_adam4rl(network_size)
    unflatten = ravel_pytree(learned.init_theta(jax.random.key(0)))[1]

    def lifetime(theta, key, num_updates):
        optimizer = to_optax(learned, unflatten(theta), 1.0)
        last = jnp.maximum(1, num_updates // 10)
        key_init, key_learn = jax.random.split(key)

        def update(n, carry):
            state, sums, counts = carry
            key = jax.random.fold_in(key_learn, n)
            state, _, metrics = agent.learn(key, state, optimizer, n, num_updates)
            value = metrics[metric]
            use = jnp.isfinite(value) & jnp.array([True, n >= num_updates - last])
            return state, sums + jnp.where(use, value, 0), counts + use

        start = (agent.init(key_init, optimizer), jnp.zeros(2), jnp.zeros(2))
        state, sums, counts = jax.lax.fori_loop(0, num_updates, update, start)
        return jnp.where(all_finite(state.params), sums / jnp.maximum(counts, 1), -1e9)

    def lifetimes(thetas, key, num_updates):
        return jax.vmap(lambda theta: lifetime(theta, key, num_updates))(thetas)

    return jax.jit(lifetimes)


@functools.cache
def compiled(name: str, network_size: int) -> Callable:
    return make_lifetimes(TASKS[name], network_size)


def score(network_size: int, name: str, thetas, seed: int, num_updates: int) -> np.ndarray:
    """The scores of a task's lifetimes, in a worker. -> [P, 2]"""
    lifetimes = compiled(name, network_size)
    return np.asarray(lifetimes(jnp.float32(thetas), jax.random.key(seed), num_updates))


def prepare(cores) -> None:
    """A worker on a CPU: it has a core of its own, and ends with its parent."""
    os.sched_setaffinity(0, {cores.get()})
    runs.cache_programs()

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def start_workers(network_size: int):
    """`with start_workers(size) as submit:` submit(name, thetas, seed, num_updates) is a Future of
    score. On a CPU a process on each core; on an accelerator a thread for each task, so that one
    compiles while another trains."""
    if jax.default_backend() == "cpu":
        context, cores = multiprocessing.get_context("spawn"), os.sched_getaffinity(0)
        own = context.SimpleQueue()
        for core in cores:
            own.put(core)
        pool = ProcessPoolExecutor(len(cores), context, prepare, (own,))
    else:
        pool = ThreadPoolExecutor(len(TASKS))
    try:
        yield partial(pool.submit, score, network_size)
    finally:
        pool.shutdown(cancel_futures=True)


# --- Search ---


class Space(NamedTuple):
    """Where thetas are searched, as vectors of D numbers."""

    adam: np.ndarray  # [D], untrained
    start: np.ndarray  # [D]
    scale: np.ndarray  # [D]; 0: not searched
    unflatten: Callable  # [D] -> theta

    def thetas(self, x: np.ndarray) -> np.ndarray:
        """Theta of the points of CMA-ES. x: [P, numbers that are searched] -> [P, D]"""
        thetas = np.tile(self.start, (len(x), 1))
        thetas[:, self.scale > 0] += self.scale[self.scale > 0] * x
        return thetas


def load(path: str) -> tuple[dict, int, dict]:
    """-> theta, hidden units of its network, how it was trained. Raises a one-line ValueError for a
    file that is not adam4rl's."""
    _, theta, header = optimizers.load_learned(path)
    if header["optimizer"] != "adam4rl":
        raise ValueError(f"{path}: of {header['optimizer']}, not of adam4rl")
    return theta, network_size(theta), header["trained"]


def search_space(args: Args) -> Space:
    """Raises a one-line ValueError for a network size that does not fit, or for a theta file that
    is not adam4rl's or has a network of another size."""
    optimizers.check_config("adam4rl", {"network_size": args.network_size})
    untrained = make_adam4rl(args.network_size).init_theta(jax.random.key(args.seed))
    start = dict(untrained)
    if args.theta:
        theta, size, _ = load(args.theta)
        if size not in (0, args.network_size):
            raise ValueError(f"{args.theta} has a network: give --network-size {size}")
        start |= theta
    scale = {name: jnp.array(x) * (not args.only_network) for name, x in SCALES.items()}
    if args.network_size:
        hidden, output = untrained["network"]["0"], untrained["network"]["1"]
        scale["network"] = {
            "0": jax.tree.map(lambda x: jnp.full(x.shape, 0.3), hidden),
            "1": jax.tree.map(lambda x: jnp.full(x.shape, 0.15), output),
        }
    vectors = [np.asarray(ravel_pytree(tree)[0], float) for tree in (untrained, start, scale)]
    return Space(*vectors, ravel_pytree(untrained)[1])


def ranks(scores: np.ndarray) -> np.ndarray:
    """-0.5 for the lowest to 0.5 for the highest; equal scores have equal ranks. scores: [P]"""
    below = np.mean(scores[:, None] > scores, axis=1)
    above = np.mean(scores[:, None] < scores, axis=1)
    return (below - above) / 2


def late_mean(means: list) -> np.ndarray:
    """The average of the last third. means: of the distribution before each generation, and now"""
    return np.mean(means[-math.ceil(len(means) / 3) :], axis=0)


def draw(rng, name: str) -> tuple:
    """-> the task's name, a seed, the number of updates of its lifetimes"""
    fewest, most = TASKS[name].fewest, TASKS[name].most
    return name, int(rng.integers(2**31)), int(np.exp(rng.uniform(np.log(fewest), np.log(most))))


def train(thetas: np.ndarray, drawn: list[tuple], submit, chunks: int = 1) -> np.ndarray:
    """thetas: [P, D], trained with in every lifetime drawn; chunks: jobs of each
    -> scores [drawn, P, 2]"""
    parts = np.array_split(np.arange(len(thetas)), chunks)
    jobs = [[submit(name, thetas[part], *rest) for part in parts] for name, *rest in drawn]
    return np.array([np.concatenate([job.result() for job in some]) for some in jobs])


def fitness(scores: np.ndarray) -> np.ndarray:
    """Mean ranks. scores: [drawn, P, 2] -> [P]"""
    return np.mean([ranks(found[:, i]) for found in scores for i in (0, 1)], axis=0)


def generation(strategy, drawn: list[tuple], written, space: Space, submit) -> dict:
    """Sample, train, rank and update the distribution. written: the point that is also ranked
    -> the row to log"""
    candidates = strategy.ask()
    thetas = np.array([*space.thetas(np.array([*candidates, written])), space.adam])
    chunks = CHUNKS if jax.default_backend() == "cpu" else 1
    scores = train(thetas, drawn, submit, chunks)
    ranked = fitness(scores)
    strategy.tell(candidates, list(-ranked[: len(candidates)]))
    row = {"rank of theta": ranked[-2], "rank of adam": ranked[-1]}
    for (name, *_), found in zip(drawn, scores, strict=True):
        row[name] = {"theta": found[-2].tolist(), "adam": found[-1].tolist()}
        row[name]["median"] = np.median(found[:-2], axis=0).tolist()
    return row


def begin(args: Args, space: Space, state: Path) -> tuple:
    """-> the strategy, the generator and the deck of tasks, the means so far; those in the file
    `state`, which this script wrote on this machine, if it is there. Raises a one-line ValueError
    if cma is missing, or the file is of a search with other arguments."""
    try:
        import cma
    except ImportError:
        raise ValueError("the search needs the package cma: pip install cma") from None
    numbers = np.count_nonzero(space.scale)
    if state.exists():
        begun_with, *found = pickle.loads(state.read_bytes())
        for name, value in begun_with.items():
            if name not in ("out", "generations") and value != getattr(args, name):
                flag = name.replace("_", "-")
                raise ValueError(
                    f"{state} was begun with --{flag} {value}; give that, or another --out"
                )
        return tuple(found)
    options = {"popsize": args.population, "seed": args.seed, "verbose": -9}
    options["CMA_diagonal"] = args.network_size > 0
    strategy = cma.CMAEvolutionStrategy(np.zeros(numbers), args.spread, options)
    return strategy, np.random.default_rng(args.seed), [], [np.zeros(numbers)]


def save(args: Args, space: Space, generations: int, mean: np.ndarray) -> None:
    """Write the theta of a point of the search."""
    theta = space.unflatten(jnp.float32(space.thetas(mean[None])[0]))
    trained = {"env_name": list(TASKS), "seed": args.seed, "generations": generations}
    trained |= {"population": args.population, "start": args.theta}
    config, path = {"network_size": args.network_size}, f"{args.out}.npz"
    optimizers.save_theta(path, theta, "adam4rl", config, trained)


def main() -> None:
    args = runs.parse(Args, __doc__)
    with runs.bad_input():
        checks.positive(args, "generations", "population", "tasks_per_generation", "spread")
        checks.seed(args)
        if args.only_network and not args.network_size:
            raise ValueError("--only-network needs a --network-size")
        space, state = search_space(args), Path(f"{args.out}.pkl")
        strategy, rng, deck, means = begin(args, space, state)
    state.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=args.generations, initial=strategy.countiter, unit="generation")
    with start_workers(args.network_size) as submit:
        while strategy.countiter < args.generations:
            while len(deck) < args.tasks_per_generation:
                deck = [*deck, *map(str, rng.permutation(list(TASKS)))]
            names, deck = deck[: args.tasks_per_generation], deck[args.tasks_per_generation :]
            drawn = [draw(rng, name) for name in names]
            row = generation(strategy, drawn, late_mean(means), space, submit)
            means.append(np.array(strategy.mean))
            row = {"generation": strategy.countiter, "sigma": strategy.sigma, **row}
            bar.set_postfix({name: round(row[name], 2) for name in row if name.startswith("rank")})
            bar.update()
            with open(f"{args.out}.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            save(args, space, strategy.countiter, late_mean(means))
            found = pickle.dumps((vars(args), strategy, rng, deck, means))
            runs.write_whole(state, lambda file, found=found: file.write(found))
    bar.close()
    print(f"written: {args.out}.npz, {args.out}.jsonl; more --generations continue it")
    print(f"next: python experiments/parts.py --theta {args.out}.npz")


if __name__ == "__main__":
    main()
