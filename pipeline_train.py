"""Pipeline training (Lan et al. 2024): meta-train an optimizer on agents reset at staggered times:

    python pipeline_train.py --env-name big_dense_long
    python pipeline_train.py --env-name catch
    python pipeline_train.py --env-name ant

A unit is an agent in its own environments with its own optimizer state. One meta-iteration:

    1. reset every unit that is due                                (schedule, reset_due)
    2. K updates of every unit with the optimizer theta            (meta_gradient.inner_loop)
    3. the meta-gradient of the agents' loss on one more rollout   (meta_gradient.py)
    4. its mean over units, clipped to the norm .5 (--meta-clip), and a step of Adam on theta with
       the mean of these over tasks                                (meta_step)

Flags that are not set take the paper's value for the environment, but where PPO learns 16 units of
128 environments each; the script prints all values.

Legend: N units, K inner updates, m reset interval.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import a2c
import devices
import ppo
import runs
import settings
import tasks
from meta_gradient import meta_gradient
from networks import all_finite
from optim4rl import LearnedOptimizer, to_optax

# --- Pipeline training ---


class Task(NamedTuple):
    """What the units of an environment learn: the agent, which holds the environment and its
    arguments, and the learning rate of the learned optimizer."""

    agent: a2c.Agent | ppo.Agent
    learning_rate: float


class MetaState(NamedTuple):
    theta: Any
    meta_opt_state: Any
    units: tuple  # for each task the states of its agents, [N, ...]
    iteration: jax.Array  # [] int32
    bad_updates: jax.Array  # [] int32, updates skipped in a row: the meta-gradient was not finite


class Schedule(NamedTuple):
    """What a meta-iteration does with each unit."""

    due: jax.Array  # [N] bool, whether it is reset
    age: jax.Array  # [N] int32, meta-iterations since it was due
    key: jax.Array  # [N]


def reset_slots(num_units: int, reset_interval: int) -> np.ndarray:
    """[N] int: unit i is reset at every meta-iteration t with t mod m equal to its slot."""
    return np.floor(np.linspace(0, reset_interval - 1, num_units)).astype(np.int32)


def schedule(key: jax.Array, iteration: jax.Array, args: "Args") -> Schedule:
    """The schedule of an iteration. Before its first reset, and without the pipeline, a unit is as
    old as training."""
    slots = reset_slots(args.num_units, args.reset_interval)
    since_reset = (iteration - slots) % args.reset_interval
    age = jnp.where(args.pipeline, jnp.minimum(since_reset, iteration), iteration)
    return Schedule((since_reset == 0) & args.pipeline, age, unit_keys(key, args.num_units))


def unit_keys(key: jax.Array, num_units: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_units))


def new_unit(key: jax.Array, theta, task: Task, learned: LearnedOptimizer) -> Any:
    """The state of a new agent."""
    # Split once, so that the commands in pretrained/README.md still give those weights.
    key = jax.random.split(key)[0]
    return task.agent.init(key, to_optax(learned, theta, task.learning_rate))


def reset_due(keys: jax.Array, units: Any, due: jax.Array, new: Callable) -> Any:
    """New units (parameters, optimizer state, environments) where due, the others unchanged.
    due: [N] bool"""

    def reset(units):
        def choose(new, old):
            return jnp.where(due.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return jax.tree.map(choose, jax.vmap(new)(keys), units)

    return jax.lax.cond(jnp.any(due), reset, lambda units: units, units)


def train_group(theta, plan: Schedule, units, task: Task, learned, args: "Args"):
    """Reset and train some units in parallel. -> sum of their meta-gradients, units, metrics [N]

    A unit whose parameters are not finite is reset too; its age is 0 in this iteration, and later
    again that of its schedule. metrics["lost"]: as in meta_gradient.
    """
    key_reset, key_train = jnp.moveaxis(jax.vmap(jax.random.split)(plan.key), 1, 0)
    broken = ~jax.vmap(all_finite)(units.params)
    new = partial(new_unit, theta=theta, task=task, learned=learned)
    units = reset_due(key_reset, units, plan.due | broken, new)
    ages = jnp.where(broken, 0, plan.age)
    lifetime = args.reset_interval if args.pipeline else args.num_iterations
    return meta_gradient(theta, key_train, ages, units, task, learned, args.inner_updates, lifetime)


def init_meta_state(key, all_tasks: list[Task], learned: LearnedOptimizer, args: "Args"):
    """-> MetaState"""
    key_theta, key_units = jax.random.split(key)
    theta = learned.init_theta(key_theta)
    units = []
    for i, task in enumerate(all_tasks):
        keys = unit_keys(jax.random.fold_in(key_units, i), args.num_units)
        new = partial(new_unit, theta=theta, task=task, learned=learned)
        units.append(jax.vmap(new)(keys))
    meta_opt_state = meta_optimizer(args).init(theta)
    return MetaState(theta, meta_opt_state, tuple(units), jnp.int32(0), jnp.int32(0))


def meta_step(key, state: MetaState, all_tasks: list[Task], learned, args: "Args", mesh: Mesh):
    """One meta-iteration. -> MetaState, metrics of each task. Units that are lost count as zeros in
    the mean of the meta-gradients; if all of a task are lost, or the norm of a mean is not finite,
    theta stays."""
    gradients, all_units, all_metrics = [], [], []
    for i, (task, units) in enumerate(zip(all_tasks, state.units, strict=True)):
        key_task = jax.random.fold_in(jax.random.fold_in(key, state.iteration), i)
        train = partial(train_group, task=task, learned=learned, args=args)
        plan = schedule(key_task, state.iteration, args)
        gradient, units, metrics = devices.mean_over_units(train, state.theta, plan, units, mesh)
        # With NaN keep_if_finite keeps theta.
        gradient = optax.tree.scale(jnp.where(jnp.all(metrics["lost"]), jnp.nan, 1.0), gradient)
        gradients.append(gradient)
        all_units.append(units)
        all_metrics.append(mean_metrics(metrics, gradient))
    clip = META_CLIPS[args.meta_clip]
    clipped = [clip.update(gradient, clip.init(gradient))[0] for gradient in gradients]
    gradient = jax.tree.map(lambda *gs: sum(gs) / len(gs), *clipped)
    updates, meta_opt_state = meta_optimizer(args).update(gradient, state.meta_opt_state)
    after = (optax.apply_updates(state.theta, updates), meta_opt_state, jnp.int32(0))
    before = (state.theta, state.meta_opt_state, state.bad_updates + 1)
    # The norms, as clipping makes zeros of a gradient whose norm overflows.
    norms = [metrics["meta_grad_norm"] for metrics in all_metrics]
    theta, meta_opt_state, bad_updates = keep_if_finite(after, before, (after, norms))
    units, iteration = tuple(all_units), state.iteration + 1
    return MetaState(theta, meta_opt_state, units, iteration, bad_updates), all_metrics


def mean_metrics(metrics: dict, gradient: Any) -> dict:
    """One task's metrics of an iteration. metrics: [N] each"""
    return {
        "meta_loss": jnp.nanmean(metrics["meta_loss"]),
        "return": jnp.nanmean(metrics["return"]),
        "meta_grad_norm": optax.tree.norm(gradient),
        "lost_units": jnp.sum(metrics["lost"]),
    }


META_CLIPS = {
    "global_norm": optax.clip_by_global_norm(0.5),
    "elementwise": optax.clip(1.0),
    "rescale": optax.normalize_by_update_norm(0.5),
    "none": optax.identity(),
}


def meta_optimizer(args: "Args") -> optax.GradientTransformation:
    return optax.adam(args.meta_learning_rate)


def keep_if_finite(new: Any, old: Any, judge: Any) -> Any:
    """new if all of `judge` is finite, old otherwise."""
    finite = all_finite(judge)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def jit_meta_step(
    args: "Args", all_tasks: list[Task], learned: LearnedOptimizer, mesh: Mesh
) -> tuple[Callable, Callable]:
    """-> init(key) -> MetaState, step(key, MetaState) -> MetaState, metrics

    theta is on every device of the mesh, the units are split over them. step reuses the buffers of
    its MetaState.
    """
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("units"))
    shardings = MetaState(whole, whole, split, whole, whole)
    init = partial(init_meta_state, all_tasks=all_tasks, learned=learned, args=args)
    step = partial(meta_step, all_tasks=all_tasks, learned=learned, args=args, mesh=mesh)
    options = {"out_shardings": (shardings, whole), "compiler_options": devices.COMPILER_OPTIONS}
    return jax.jit(init, out_shardings=shardings), jax.jit(step, donate_argnums=1, **options)


# --- Arguments, and the loop over iterations ---

SHORTER = (
    "fewer --num-iterations or a smaller --total-steps shorten it; "
    "Ctrl-C keeps the theta trained so far"
)


@dataclass(frozen=True)
class Args:
    # --- Training ---
    env_name: tuple[str, ...] = ("big_dense_long",)
    """one or more of the eight gridworlds, catch (all with A2C), control tasks, MinAtar's games and
    Brax's tasks (with PPO); their meta-gradients are averaged"""
    seed: int = 0
    """the same seed gives the same theta"""
    # --- Optimizer ---
    optimizer: str = "optim4rl"
    """kind of learned optimizer: optim4rl, linear_optim, l2lgd2, star, velo; not in the paper:
    adam4rl, open"""
    cell: Literal["lstm", "gru"] = "lstm"
    """recurrent cell of optim4rl, linear_optim and l2lgd2; the authors' code has gru"""
    inputs: Literal["raw", "log"] = "raw"
    """inputs of Optim4RL's two cells: g and g^2, or (sign g, log|g|) and 2 log|g|"""
    hidden_size: int = 8
    """hidden units of each cell (not adam4rl, star, velo)"""
    readout_layers: tuple[int, ...] = ()
    """hidden layers of the read-outs of optim4rl, linear_optim and l2lgd2, e.g. 16 16 (paper:
    none)"""
    grad_clip: float | None = None
    """elementwise bound on agent-gradients, of the optimizer and of PPO's agent (paper: 1; catch
    inf, no clipping). With --theta, which has its own, and for adam4rl, open, star and velo only
    that of PPO's agent"""
    theta: str | None = None
    """initial weights, with their kind of optimizer and its settings: pretrained/NAME or the path
    of a .npz (default: random weights)"""
    # --- Pipeline training ---
    num_units: int | None = None
    """agents trained in parallel in each of --env-name (paper: 512; catch 64; here 16 where PPO
    learns). This default and those of --reset-interval and --meta-learning-rate are those of the
    first of --env-name"""
    envs_per_unit: tuple[int, ...] | None = None
    """environment copies of each unit: one number, or one for each of --env-name (paper: 1; here
    128 where PPO learns)"""
    inner_updates: int = 4
    """agent updates per meta-iteration"""
    reset_interval: int | None = None
    """meta-iterations between two resets of a unit (paper: 72 to 576; catch 32 or 64)"""
    pipeline: bool = True
    """with --no-pipeline units are never reset"""
    total_steps: float | None = None
    """environment steps in total in the first of --env-name (paper: 3e7; catch 5e5; Brax 1e8)"""
    num_iterations: int | None = None
    """meta-iterations, instead of --total-steps"""
    # --- Agents ---
    learning_rate: tuple[float, ...] | None = None
    """learning rate of the agents: one, or one for each of --env-name (paper: by environment); of
    adam4rl and open a factor of their own (1)"""
    reward_scale: tuple[float, ...] | None = None
    """factor on rewards: one, or one for each of --env-name (paper: by environment)"""
    backend: settings.Backend = "spring"
    """physics of Brax's tasks: spring, generalized, positional or mjx"""
    # --- Meta-gradient ---
    meta_learning_rate: float | None = None
    """learning rate of Adam on theta (paper: 1e-5 to 1e-3; catch up to 1e-2)"""
    meta_clip: Literal["global_norm", "elementwise", "rescale", "none"] = "global_norm"
    """what is done to each environment's meta-gradient: clipped to norm 0.5, each element to 1,
    scaled to norm 0.5, as the authors' code can for six gridworlds, or nothing"""
    # --- Run ---
    num_devices: int | None = None
    """devices of this process that the units are split over (default: the most that divide the
    units; on a CPU each core is a device)"""
    num_processes: int = 1
    """processes, on one or more hosts, that the units are split over; start all with the same flags
    except --process-id"""
    process_id: int = 0
    """index of this process, from 0; only process 0 writes the run's folder"""
    coordinator: str = "127.0.0.1:9876"
    """address of process 0's host, and a free port there"""
    save_theta_every: int = 20
    """iterations between two writes of theta.npz"""
    checkpoint_minutes: float = 5.0
    """minutes between two checkpoints of the whole state; the first comes after one at most"""
    resume: str | None = None
    """continue the run in this folder, with its arguments, or with more --num-iterations, or on
    other --num-devices, then not bit for bit the same; each of several processes needs the same,
    --coordinator, its --process-id, and a disk that all share"""
    runs_dir: str = "runs"
    """the run's folder is created in this folder"""


def meta_train(
    args: Args,
    all_tasks: list[Task],
    learned: LearnedOptimizer,
    mesh: Mesh,
    on_iteration: Callable,
    restore=lambda state: state,
):
    """All iterations. -> MetaState

    on_iteration(iteration, MetaState, row of metrics) is called after each; training ends if it
    returns True. restore(initial MetaState) -> the MetaState to start from.
    """
    key_init, key_train = jax.random.split(jax.random.key(args.seed))
    init, step = jit_meta_step(args, all_tasks, learned, mesh)
    state = restore(init(key_init))
    done, env_steps = int(state.iteration), tasks.steps_per_iteration(args)
    began = time.perf_counter()
    step = step.lower(key_train, state).compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s")
    # On CPUs a collective fails if a process is 30 s late, as one may be that has to compile.
    devices.wait_for_all("compiled")
    for iteration in range(done + 1, args.num_iterations + 1):
        began = time.perf_counter()
        # One iteration in flight at a time: with more, XLA's CPU devices have deadlocked.
        state, metrics = jax.block_until_ready(step(key_train, state))
        if iteration == done + 1:
            runs.warn_if_long((time.perf_counter() - began) * (args.num_iterations - done), SHORTER)
        row = {"env_steps": iteration * env_steps, "bad_updates": int(state.bad_updates)}
        for task_name, values in zip(args.env_name, metrics, strict=True):
            row |= {
                f"{name}_{task_name}" if len(all_tasks) > 1 else name: value
                for name, value in values.items()
            }
        if on_iteration(iteration, state, row):
            break
    return state


def main() -> None:
    import train_optimizer

    train_optimizer.main()


if __name__ == "__main__":
    main()
