"""Pipeline training: meta-train an optimizer on many agents that are reset at staggered times (Lan et al. 2024):

    python pipeline_train.py --env-name big_dense_long
    python pipeline_train.py --env-name catch
    python pipeline_train.py --env-name ant

A unit is an agent in its own environments with its own optimizer state. One meta-iteration:

    1. reset every unit whose turn it is                              (schedule, reset_due)
    2. K updates of every unit with the optimizer theta               (train_group, meta_gradient.inner_loop)
    3. the meta-gradient of the agents' loss on one more rollout      (train_group, meta_gradient.backprop)
    4. its mean over units and tasks goes to Adam, which moves theta  (meta_step)

With --meta-estimator pes or nres the meta-loss is minus the agents' return, and its gradient is estimated by perturbing theta.
Flags left unset take the paper's value for the environment; what was taken is printed.

Legend: N units, K inner updates, S gradient steps of one update, m reset interval.
"""

import dataclasses
import sys
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
from orbax.checkpoint import multihost

import a2c
import optimizers
import ppo
import runs
import tasks
from checkpoints import Checkpoints, resumed_args
from meta_gradient import ESTIMATORS, Unit
from optim4rl import LearnedOptimizer, load_theta, save_theta, to_optax

# --- Pipeline training ---


class Task(NamedTuple):
    agent: a2c.Agent | ppo.Agent
    learning_rate: float


class MetaState(NamedTuple):
    theta: Any
    meta_opt_state: Any
    units: tuple  # for each task its units, a meta_gradient.Unit of [N, ...]
    iteration: jax.Array  # [] int32
    bad_updates: jax.Array  # [] int32, updates in a row that were skipped because the meta-gradient was not finite


class Schedule(NamedTuple):
    """What a meta-iteration means to each unit."""

    due: jax.Array  # [N] bool, is reset
    age: jax.Array  # [N] int32, meta-iterations since its reset
    sign: jax.Array  # [N], of its perturbation (meta_gradient.evolution)
    key: jax.Array  # [N]


def reset_slots(num_units: int, reset_interval: int) -> np.ndarray:
    """[N] int: unit i is reset at every meta-iteration t with t mod m equal to its slot."""
    return np.floor(np.linspace(0, reset_interval - 1, num_units)).astype(np.int32)


def schedule(key: jax.Array, iteration: jax.Array, args: "Args") -> Schedule:
    """Until its first reset, and always without the pipeline, a unit is as old as training. With pes and nres, pairs share
    keys and slots."""
    pair, slots = 1, reset_slots(args.num_units, args.reset_interval)
    if args.meta_estimator != "backprop":  # few pairs: evenly round a circle, so that the last is not next to the first
        pair, num_pairs = 2, args.num_units // 2
        slots = np.repeat(np.arange(num_pairs) * args.reset_interval // num_pairs, pair)
    since_reset = (iteration - slots) % args.reset_interval
    age = jnp.minimum(since_reset, iteration) if args.pipeline else jnp.full(args.num_units, iteration)
    number = jnp.arange(args.num_units)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number // pair)
    return Schedule((since_reset == 0) & args.pipeline, age, 1.0 - 2 * (number % 2), keys)


def new_unit(key: jax.Array, theta: Any, task: Task, learned: LearnedOptimizer, args: "Args") -> Unit:
    """A unit with a new agent, and a learning rate and a reward scale drawn from their ranges."""
    key_agent, key_rate, key_reward = jax.random.split(key, 3)
    key_noise = jax.random.fold_in(key, 3)
    agent = task.agent.init(key_agent, to_optax(learned, theta, 1.0))
    agent = agent._replace(reward_factor=log_uniform(key_reward, args.reward_scale_range))
    learning_rate = task.learning_rate * log_uniform(key_rate, args.learning_rate_range)
    noise = {
        "backprop": lambda: (),
        "pes": lambda: optax.tree.zeros_like(theta),
        "nres": lambda: optax.tree.random_like(key_noise, theta, jax.random.normal),
    }[args.meta_estimator]()
    return Unit(agent, learning_rate, noise)


def reset_due(keys: jax.Array, units: Unit, due: jax.Array, new: Callable) -> Unit:
    """Whole new units (parameters, optimizer state, environments) where due; the others unchanged. due: [N] bool."""

    def reset(units):
        def choose(new, old):
            return jnp.where(due.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return jax.tree.map(choose, jax.vmap(new)(keys), units)

    return jax.lax.cond(jnp.any(due), reset, lambda units: units, units)


def train_group(theta, schedule: Schedule, units: Unit, task: Task, learned: LearnedOptimizer, args: "Args"):
    """Reset and train some units side by side. -> sum of their meta-gradients, units, metrics [N]

    A unit whose parameters are no longer finite is reset too; a sum that is not finite is left out. metrics["broken"] says
    whose they were.
    """
    key_reset, key_train = jnp.moveaxis(jax.vmap(jax.random.split)(schedule.key), 1, 0)
    broken = ~jax.vmap(ppo.all_finite)(units.agent.params)
    new = partial(new_unit, theta=theta, task=task, learned=learned, args=args)
    units = reset_due(key_reset, units, schedule.due | broken, new)
    lifetime = args.reset_interval if args.pipeline else args.num_iterations
    estimate = partial(ESTIMATORS[args.meta_estimator], inner_updates=args.inner_updates, lifetime=lifetime, sigma=args.sigma)
    gradient, units, metrics = estimate(theta, schedule._replace(key=key_train), units, task.agent, learned)
    lost = ~ppo.all_finite(gradient)
    gradient = keep_if_finite(gradient, optax.tree.zeros_like(gradient))
    return gradient, units, metrics | {"broken": broken | lost}


def init_meta_state(key: jax.Array, all_tasks: list[Task], learned: LearnedOptimizer, args: "Args") -> MetaState:
    key_theta, key_units = jax.random.split(key)
    theta = learned.init_theta(key_theta)
    units = []
    for i, task in enumerate(all_tasks):
        keys = schedule(jax.random.fold_in(key_units, i), 0, args).key
        units.append(jax.vmap(partial(new_unit, theta=theta, task=task, learned=learned, args=args))(keys))
    return MetaState(theta, meta_optimizer(args).init(theta), tuple(units), jnp.int32(0), jnp.int32(0))


def meta_step(key: jax.Array, state: MetaState, all_tasks: list[Task], learned: LearnedOptimizer, args: "Args", mesh: Mesh):
    """One meta-iteration. -> MetaState, for each task its metrics"""
    gradients, all_units, all_metrics = [], [], []
    for i, (task, units) in enumerate(zip(all_tasks, state.units, strict=True)):
        key_task = jax.random.fold_in(jax.random.fold_in(key, state.iteration), i)
        train = partial(train_group, task=task, learned=learned, args=args)
        plan = schedule(key_task, state.iteration, args)
        gradient, units, metrics = runs.mean_over_units(train, state.theta, plan, units, mesh)
        gradient = optax.tree.scale(jnp.where(jnp.all(metrics["broken"]), jnp.nan, 1.0), gradient)
        gradients.append(gradient)
        all_units.append(units)
        all_metrics.append(
            {
                "meta_loss": jnp.nanmean(metrics["meta_loss"]),
                "return": jnp.nanmean(metrics["return"]),
                "meta_grad_norm": optax.tree.norm(gradient),
                "broken_units": jnp.sum(metrics["broken"]),
            }
        )
    clip = META_CLIPS[args.meta_clip]
    clipped = [clip.update(gradient, clip.init(gradient))[0] for gradient in gradients]
    gradient = jax.tree.map(lambda *gs: sum(gs) / len(gs), *clipped)
    updates, meta_opt_state = meta_optimizer(args).update(gradient, state.meta_opt_state)
    after = (optax.apply_updates(state.theta, updates), meta_opt_state, jnp.int32(0))
    before = (state.theta, state.meta_opt_state, state.bad_updates + 1)
    theta, meta_opt_state, bad_updates = keep_if_finite(after, before, (after, gradients))
    return MetaState(theta, meta_opt_state, tuple(all_units), state.iteration + 1, bad_updates), all_metrics


META_CLIPS = {"global_norm": optax.clip_by_global_norm(0.5), "elementwise": optax.clip(1.0), "none": optax.identity()}


def meta_optimizer(args: "Args") -> optax.GradientTransformation:
    last = 0.0 if args.anneal_meta_lr else args.meta_learning_rate
    return optax.adam(optax.linear_schedule(args.meta_learning_rate, last, args.num_iterations))


def log_uniform(key: jax.Array, limits: tuple) -> jax.Array:
    """A number between the limits, uniform in its logarithm."""
    low, high = jnp.log(jnp.array(limits))
    return jnp.exp(jax.random.uniform(key, minval=low, maxval=high))


def keep_if_finite(new: Any, old: Any, judge: Any = None) -> Any:
    """new where all of it (or of `judge`) is finite, old otherwise."""
    finite = ppo.all_finite(new if judge is None else judge)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def jit_meta_step(args: "Args", all_tasks: list[Task], learned: LearnedOptimizer, mesh: Mesh) -> tuple[Callable, Callable]:
    """-> init(key) -> MetaState, step(key, MetaState) -> MetaState, metrics

    theta is on every device of the mesh, the units are spread over them; step reuses the buffers of its MetaState.
    """
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("units"))
    shardings = MetaState(whole, whole, split, whole, whole)
    init = partial(init_meta_state, all_tasks=all_tasks, learned=learned, args=args)
    step = partial(meta_step, all_tasks=all_tasks, learned=learned, args=args, mesh=mesh)
    options = {"out_shardings": (shardings, whole), "compiler_options": runs.COMPILER_OPTIONS}
    return jax.jit(init, out_shardings=shardings), jax.jit(step, donate_argnums=1, **options)


# --- The command line ---

MOST_BAD_UPDATES = 10  # in a row end the run
SHORTER = "--num-units 64 with --total-steps 1e6, or fewer --num-iterations, make it short; Ctrl-C keeps what was trained"


@dataclass(frozen=True)
class Args:
    # --- Training ---
    env_name: tuple[str, ...] = ("big_dense_long",)
    """one or several of the eight gridworlds, catch (with A2C), and Brax's tasks (with PPO); meta-gradients are averaged"""
    seed: int = 0
    """the same seed gives the same theta"""
    # --- Optimizer ---
    optimizer: str = "optim4rl"
    """the kind of learned optimizer: optim4rl, momentum4rl (not in the paper), linear_optim, l2lgd2, star or velo"""
    cell: Literal["lstm", "gru"] = "lstm"
    """recurrent cell (not of star, velo); the authors' code has gru"""
    inputs: Literal["raw", "log"] = "raw"
    """what Optim4RL's cells read: g and g^2, or (sign g, log|g|) and 2 log|g|"""
    hidden_size: int = 8
    """hidden units of each cell (not of star, velo)"""
    readout_layers: tuple[int, ...] = ()
    """hidden layers of the read-outs, e.g. 16 16; none in the paper"""
    grad_clip: float | None = None
    """agent-gradients are clipped elementwise to this (paper: 1; on catch inf, that is, not)"""
    theta: str | None = None
    """start from these weights, with their kind of optimizer and its settings: pretrained/NAME or a .npz; else from scratch"""
    # --- Pipeline training ---
    num_units: int | None = None
    """agents trained in parallel, for each environment (paper: 512; catch 64; here 16 for Brax's tasks)"""
    envs_per_unit: tuple[int, ...] | None = None
    """environments that each unit acts in: one number, or one for each environment (paper: 1; here 128 for Brax's tasks)"""
    inner_updates: int = 4
    """agent updates in a meta-iteration"""
    reset_interval: int | None = None
    """meta-iterations between two resets of a unit (paper: 72 to 576; catch 32 or 64)"""
    pipeline: bool = True
    """with --no-pipeline units are never reset"""
    total_steps: float | None = None
    """environment steps in all, in the first environment (paper: 3e7; catch 5e5; Brax 1e8)"""
    num_iterations: int | None = None
    """meta-iterations, instead of --total-steps"""
    # --- Agents ---
    learning_rate: tuple[float, ...] | None = None
    """the agents' learning rate: one, or one for each environment (paper: by environment)"""
    reward_scale: tuple[float, ...] | None = None
    """rewards are multiplied by this: one, or one for each environment (paper: by environment)"""
    backend: Literal["spring", "generalized", "positional", "mjx"] = "spring"
    """physics of Brax's tasks: spring, generalized, positional or mjx"""
    reward_scale_range: tuple[float, float] = (1.0, 1.0)
    """each unit's reward scale is this range's times the environment's, drawn at each reset, e.g. 0.1 100"""
    learning_rate_range: tuple[float, float] = (1.0, 1.0)
    """likewise each unit's learning rate"""
    # --- Meta-gradient ---
    meta_estimator: Literal["backprop", "pes", "nres"] = "backprop"
    """the paper's meta-gradient of the agents' loss, or persistent or noise-reuse evolution strategies on their return"""
    sigma: float = 0.05
    """pes, nres: standard deviation of the perturbations of theta"""
    meta_learning_rate: float | None = None
    """learning rate of Adam on theta (paper: 1e-5 to 1e-3; catch to 1e-2)"""
    anneal_meta_lr: bool = False
    """with --anneal-meta-lr that learning rate falls linearly to 0 at the last iteration"""
    meta_clip: Literal["global_norm", "elementwise", "none"] = "global_norm"
    """how each environment's meta-gradient is clipped: to norm 0.5, each element to 1, or not"""
    # --- Run ---
    num_devices: int | None = None
    """devices of this process that units are spread over (as many as divide the units; on a CPU each core is one)"""
    num_processes: int = 1
    """processes, on one host or several, that the units are spread over; start each with the same flags but --process-id"""
    process_id: int = 0
    """which of them this is, from 0, which alone writes the run's folder"""
    coordinator: str = "127.0.0.1:9876"
    """address and a free port of process 0's host"""
    save_theta_every: int = 20
    """iterations between two writings of theta.npz"""
    checkpoint_minutes: float = 5.0
    """minutes between two checkpoints of the whole state"""
    resume: str | None = None
    """continue the run in this folder, with its arguments"""
    runs_dir: str = "runs"
    """the run's folder is made in here"""


OPTIMIZER_SETTINGS = ("cell", "inputs", "hidden_size", "readout_layers", "grad_clip")
POSITIVE = (
    *("num_units", "envs_per_unit", "inner_updates", "reset_interval", "total_steps", "num_iterations"),
    *("hidden_size", "readout_layers", "learning_rate", "reward_scale", "meta_learning_rate", "sigma"),
    *("num_devices", "num_processes", "save_theta_every", "checkpoint_minutes"),
)


def fill_in(args: Args) -> Args:
    """The paper's values where flags were left unset. Raises ValueError, in one line, for what cannot be."""
    if not args.env_name or len(set(args.env_name)) < len(args.env_name):
        raise ValueError("--env-name must name at least one environment, and each once")
    if args.total_steps is not None and args.num_iterations is not None:
        raise ValueError("give --total-steps or --num-iterations, not both")
    args = check_optimizer(args)
    paper = tasks.meta_settings(args.env_name)
    left_unset = {name: value for name, value in paper.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **left_unset)
    runs.check_positive(args, *POSITIVE)
    for name in ("learning_rate", "reward_scale", "envs_per_unit"):
        values = getattr(args, name)
        if len(values) not in (1, len(args.env_name)):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} takes 1 value or {len(args.env_name)}, got {len(values)}")
        if len(values) == 1:
            args = dataclasses.replace(args, **{name: values * len(args.env_name)})
    for name in ("reward_scale_range", "learning_rate_range"):
        low, high = getattr(args, name)
        if not 0 < low <= high < float("inf"):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be two numbers above 0, the lower first, got {low:g} {high:g}")
    if args.meta_estimator != "backprop" and args.num_units % 2:
        raise ValueError(
            f"--num-units must be even with {args.meta_estimator} (antithetic pairs), got {args.num_units}"
        )
    if not args.grad_clip > 0:
        raise ValueError(f"--grad-clip must be above 0, or inf for no clipping, got {args.grad_clip:g}")
    steps = steps_per_iteration(args)
    num_iterations = args.num_iterations or int(args.total_steps) // steps
    if not num_iterations:
        raise ValueError(f"--total-steps {args.total_steps:g} is less than one iteration ({steps} steps)")
    return dataclasses.replace(args, num_iterations=num_iterations, total_steps=float(num_iterations * steps))


def check_optimizer(args: Args) -> Args:
    """The arguments with the kind that is in --theta. Raises ValueError for a setting that the kind does not have."""
    if args.theta:  # its header only: nothing may be put on a device before main chooses the devices
        header = load_theta(optimizers.theta_path(args.theta))[1]
        args = dataclasses.replace(args, optimizer=header["optimizer"])
    known = optimizers.kind_settings(args.optimizer)
    for name in OPTIMIZER_SETTINGS:
        if getattr(args, name) == getattr(Args, name):
            continue
        flag = name.replace("_", "-")
        if name not in known:
            raise ValueError(f"--{flag} is not a setting of {args.optimizer}")
        if args.theta:
            raise ValueError(f"--{flag} is what it is in {args.theta}; leave it out")
    return args


def all_unit_args(args: Args) -> list:
    """For each environment the agent's arguments of its units."""
    sizes = zip(args.env_name, args.envs_per_unit, args.reward_scale, strict=True)
    return [tasks.unit_args(*size) for size in sizes]


def steps_per_iteration(args: Args) -> int:
    """Environment steps of a meta-iteration in the first environment: K rollouts, and backprop's one more, of every unit."""
    agent = tasks.kind_of(args.env_name[0]).agent
    rollouts = args.inner_updates + (args.meta_estimator == "backprop")
    return args.num_units * rollouts * agent.steps_per_update(all_unit_args(args)[0])


def set_up(args: Args) -> tuple[list[Task], LearnedOptimizer, dict]:
    """-> the tasks, the optimizer, and the config of its theta file. Raises ValueError, in one line, for an unfit --theta."""
    learned, config = make_learned(args)
    all_tasks = []
    for name, rate, unit_args in zip(args.env_name, args.learning_rate, all_unit_args(args), strict=True):
        agent = tasks.kind_of(name).agent
        env = tasks.make_env(name, agent, args.backend)
        all_tasks.append(Task(agent.make_agent(env, unit_args), rate))
    return all_tasks, learned, config


def make_learned(args: Args) -> tuple[LearnedOptimizer, dict]:
    """-> the optimizer, which starts from --theta or from scratch, and its config."""
    if args.theta:
        learned, theta, header = optimizers.load_learned(args.theta)
        return learned._replace(init_theta=lambda key: theta), header["config"]
    config = {name: getattr(args, name, default) for name, default in optimizers.kind_settings(args.optimizer).items()}
    if "grad_clip" in config:
        config["grad_clip"] = None if np.isinf(args.grad_clip) else args.grad_clip
    return optimizers.LEARNED[args.optimizer](**config), config


def meta_train(args: Args, all_tasks: list[Task], learned: LearnedOptimizer, mesh: Mesh, on_iteration: Callable, checkpoints=None):
    """All iterations. on_iteration(iteration, MetaState, row of metrics) is called after each, and ends them by True.

    checkpoints: the run's; with --resume the iterations go on from the last. -> MetaState
    """
    key_init, key_train = jax.random.split(jax.random.key(args.seed))
    init, step = jit_meta_step(args, all_tasks, learned, mesh)
    state, steps = init(key_init), steps_per_iteration(args)
    state = checkpoints.restore(state) if args.resume else state
    done = int(state.iteration)
    began = time.perf_counter()
    step = step.lower(key_train, state).compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s")
    # Between CPUs' processes a collective gives up on whoever comes 30 s late, and one may have had to compile and another not.
    multihost.get_barrier_sync_fn()(key="compiled", timeout_ms=3_600_000)
    for iteration in range(done + 1, args.num_iterations + 1):
        began = time.perf_counter()
        # One iteration in flight at a time: with more, XLA's CPU devices were seen to wait for each other for ever.
        state, metrics = jax.block_until_ready(step(key_train, state))
        if iteration == done + 1:
            runs.warn_if_long((time.perf_counter() - began) * (args.num_iterations - done), SHORTER)
        row = {"env_steps": iteration * steps, "bad_updates": int(state.bad_updates)}
        for task_name, values in zip(args.env_name, metrics, strict=True):
            row |= {f"{name}_{task_name}" if len(all_tasks) > 1 else name: value for name, value in values.items()}
        if on_iteration(iteration, state, row):
            break
    return state


def main() -> None:
    args = runs.parse(Args, __doc__)
    with runs.bad_input():
        args = resumed_args(args.resume, args) if args.resume else fill_in(args)
        mesh = runs.choose_devices(args.num_units, args.num_devices, args.num_processes, args.process_id, args.coordinator)
        args = dataclasses.replace(args, num_devices=mesh.size // args.num_processes)
        all_tasks, learned, config = set_up(args)
        if args.process_id != 0:
            meta_train(args, all_tasks, learned, mesh, lambda *_: None)
            return
        folder = runs.run_folder(args, "+".join(args.env_name), "pipeline_train")
        # With several processes there is theta.npz only: orbax would wait for the others to write too.
        checkpoints = Checkpoints(folder, args.checkpoint_minutes) if args.num_processes == 1 else None
    print("\n".join(f"{name:18} {value}" for name, value in dataclasses.asdict(args).items()))

    def save(state):
        iterations = int(state.iteration)
        done = {"iterations": iterations, "env_steps": iterations * steps_per_iteration(args)}
        save_theta(folder / "theta.npz", state.theta, args.optimizer, config, dataclasses.asdict(args) | done)

    with runs.interruptible() as interrupted:
        with runs.Log(folder, args.num_iterations) as log:

            def on_iteration(iteration, state, row):
                log.write(iteration, row)
                if iteration % args.save_theta_every == 0:
                    save(state)
                if checkpoints:
                    checkpoints.save_if_due(iteration, state, log, interrupted())
                if row["bad_updates"]:
                    log.say(f"iteration {iteration}: the meta-gradient is not finite; theta stays as it is")
                return interrupted() or row["bad_updates"] == MOST_BAD_UPDATES

            state = meta_train(args, all_tasks, learned, mesh, on_iteration, checkpoints)
        save(state)
    theta_path = folder / "theta.npz"
    if state.bad_updates == MOST_BAD_UPDATES:
        runs.fail(f"{MOST_BAD_UPDATES} meta-gradients in a row were not finite; the last good theta is in {theta_path}", code=1)
    print(f"written: {theta_path}, and metrics.csv, config.json and TensorBoard events beside it")
    if interrupted() and checkpoints:
        print(f"to go on: python pipeline_train.py --resume {folder}")
    print(f"next: python evaluate.py --env-name {args.env_name[0]} --optimizers {theta_path} untrained sign_sgd adam rmsprop")
    sys.exit(interrupted())


if __name__ == "__main__":
    main()
