"""Train agents with many candidates for theta of adam4rl.py, and rank the candidates.

A lifetime is the whole training of one agent on a task of search_tasks.py. On a task all candidates
have the same seed, and are ranked by their mean return over training and by that of the last tenth,
so that reward scales do not matter.

    with start_workers(network_size=0) as submit:
        scores = train(thetas, drawn, submit)  # drawn: of search_tasks.draw
    better = fitness(scores)
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import devices
import runs
from adam4rl import make_adam4rl
from networks import all_finite
from optim4rl import to_optax
from search_tasks import TASKS, SearchTask


def make_lifetimes(task: SearchTask, network_size: int = 0):
    """-> f(thetas [P, D], key, number of updates) -> [P, 2], the mean metric over all of training
    and over the last tenth; -1e9 for parameters that are not finite. Candidates share the key."""
    agent, metric = task.make_agent(), task.metric
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
    """A worker on a CPU: it has a core of its own, and ends with its parent and at Ctrl-C, which
    then need not wait for its lifetimes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {core})
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
        context, cores = multiprocessing.get_context("spawn"), devices.cores()
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


def flat(theta: dict) -> np.ndarray:
    """-> [D]"""
    return np.asarray(ravel_pytree(jax.tree.map(jnp.float32, theta))[0])


def train(thetas: np.ndarray, drawn: list[tuple], submit, chunks: int = 1) -> np.ndarray:
    """Train with every theta in every lifetime drawn, each lifetime split into `chunks` jobs.
    thetas: [P, D] -> scores [drawn, P, 2]"""
    parts = np.array_split(np.arange(len(thetas)), chunks)
    jobs = [[submit(name, thetas[part], *rest) for part in parts] for name, *rest in drawn]
    return np.array([np.concatenate([job.result() for job in some]) for some in jobs])


def ranks(scores: np.ndarray) -> np.ndarray:
    """Half of the share of candidates below minus the share above: from -0.5 to 0.5. Equal scores
    have equal ranks. scores: [P]"""
    below = np.mean(scores[:, None] > scores, axis=1)
    above = np.mean(scores[:, None] < scores, axis=1)
    return (below - above) / 2


def fitness(scores: np.ndarray) -> np.ndarray:
    """Mean ranks. scores: [drawn, P, 2] -> [P]"""
    return np.mean([ranks(found[:, i]) for found in scores for i in (0, 1)], axis=0)
