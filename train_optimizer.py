"""The command line of pipeline_train.py: its arguments with the paper's values, checked; log, files
and checkpoints of a run."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np

import checks
import command_line
import devices
import optimizers
import pipeline_train
import ppo
import runs
import tasks
from checkpoints import Checkpoints, resumed_args
from optim4rl import MAX_BYTES, LearnedOptimizer
from pipeline_train import Args, MetaState, Task, meta_train, new_unit

# --- Arguments ---

PER_ENVIRONMENT = ("learning_rate", "reward_scale", "envs_per_unit")
MOST_DEVICES = 1024  # of one process; a CPU can be as many as it is told to
MAY_BE_UNSET = ("theta", "num_devices", "resume")
POSITIVE = (
    "num_units envs_per_unit inner_updates reset_interval num_iterations total_steps learning_rate "
    "reward_scale meta_learning_rate hidden_size readout_layers num_devices num_processes "
    "save_theta_every checkpoint_minutes"
).split()


def fill_in(args: Args) -> Args:
    """The arguments, with the paper's values for flags that are not set. Raises a one-line
    ValueError for values that do not fit."""
    if not args.env_name or len(set(args.env_name)) < len(args.env_name):
        raise ValueError("--env-name must name at least one environment, and each once")
    if args.total_steps is not None and args.num_iterations is not None:
        raise ValueError("give --total-steps or --num-iterations, not both")
    if args.theta:
        header = optimizers.header_in(args.theta)
        kind = header["optimizer"]
        if args.optimizer != kind and command_line.is_given(args, "optimizer"):
            raise ValueError(f"--optimizer is set by {args.theta}, to {kind}; leave it out")
        args = dataclasses.replace(args, optimizer=kind)
    changed = {name for name in optimizers.SETTINGS if command_line.is_given(args, name)}
    if any(tasks.agent_of(name) is ppo for name in args.env_name):
        changed.discard("grad_clip")  # the agent's, whatever the optimizer has
    optimizers.check_settings(args.optimizer, changed, args.theta)
    paper = tasks.meta_settings(args.env_name)
    made = optimizers.made_from(args.theta, header) if args.theta else None
    learned = made or optimizers.LEARNED[args.optimizer]()
    if learned.own_rate:
        paper["learning_rate"] = (learned.own_rate,)
    unset = {name: value for name, value in paper.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **unset)
    check(args)
    for name in PER_ENVIRONMENT:
        if len(getattr(args, name)) == 1:
            values = getattr(args, name) * len(args.env_name)
            args = dataclasses.replace(args, **{name: values})
    steps = tasks.steps_per_iteration(args)
    if not args.num_iterations:
        checks.total_steps(args.total_steps, steps, "iteration")
    num_iterations = args.num_iterations or int(args.total_steps) // steps
    total_steps = float(num_iterations * steps)
    args = dataclasses.replace(args, num_iterations=num_iterations, total_steps=total_steps)
    check_filled_in(args)
    return args


def resumed(args: Args) -> Args:
    """The arguments of the run to resume, which --num-iterations may make longer. Raises a one-line
    ValueError for other arguments than the run's, or fewer iterations."""
    longer = args.num_iterations
    args = dataclasses.replace(args, num_iterations=None)
    args = resumed_args(args.resume, args, "pipeline_train")
    check_filled_in(args)
    if longer in (None, args.num_iterations):
        return args
    if not args.pipeline:  # the agents live as long as the run
        raise ValueError(f"a run with --no-pipeline keeps its {args.num_iterations} iterations")
    if longer < args.num_iterations:
        raise ValueError(f"--num-iterations must be at least the run's {args.num_iterations}")
    total_steps = float(longer * tasks.steps_per_iteration(args))
    args = dataclasses.replace(args, num_iterations=longer, total_steps=total_steps)
    check_filled_in(args)
    return args


def check_filled_in(args: Args) -> None:
    """Raises a one-line ValueError unless these arguments, perhaps of a run to resume, are those of
    a run."""
    for field in dataclasses.fields(args):
        if getattr(args, field.name) is None and field.name not in MAY_BE_UNSET:
            raise ValueError(f"{field.name} is not set")
    check(args)
    lifetime, flag = args.num_iterations, "--num-iterations"
    if args.pipeline:
        lifetime, flag = args.reset_interval, "--reset-interval"
    if args.inner_updates * lifetime > checks.MOST:
        raise ValueError(f"--inner-updates times {flag} must be at most {checks.MOST}")


def check(args: Args) -> None:
    """Raises a one-line ValueError for an invalid argument."""
    checks.positive(args, *POSITIVE)
    for name in PER_ENVIRONMENT:
        values, flag = getattr(args, name), name.replace("_", "-")
        if len(values) not in (1, len(args.env_name)):
            raise ValueError(f"--{flag} takes 1 value or {len(args.env_name)}, got {len(values)}")
    checks.grad_clip(args.grad_clip)
    checks.seed(args)
    port = re.fullmatch(r"\S+:([1-9]\d{0,4})", args.coordinator)
    if not port or int(port[1]) >= 2**16:
        wanted = "HOST:PORT, such as 127.0.0.1:9876"
        raise ValueError(f"--coordinator must be {wanted}, got {args.coordinator}")
    checks.between(args, 1, MOST_DEVICES, "num_devices")


# --- A run ---

MOST_BAD_UPDATES = 10  # so many in a row end the run


def set_up(args: Args) -> tuple[list[Task], LearnedOptimizer, dict]:
    """-> tasks, optimizer, config of its theta file. Raises a one-line ValueError for an invalid
    --theta, or what surely does not fit into memory."""
    learned, config = make_learned(args)
    all_tasks, needed = [], 0
    for name, rate, unit_args in zip(
        args.env_name, args.learning_rate, tasks.all_unit_args(args), strict=True
    ):
        agent = tasks.agent_of(name)
        env = tasks.make_env(name, agent, args.backend)
        all_tasks.append(Task(agent.make_agent(env, unit_args), rate))
        quick = Task(agent.make_agent(tasks.without_steps(env), unit_args), rate)
        needed += bytes_of_units(quick, learned, args)
    checks.memory("the units", needed, "--num-units, --envs-per-unit or --inner-updates")
    return all_tasks, learned, config


def bytes_of_units(task: Task, learned: LearnedOptimizer, args: Args) -> int:
    """Of this process's units, and of the gradients of inner updates recorded of one, with PPO a
    lower bound."""

    def unit():
        key = jax.random.key(0)
        return new_unit(key, learned.init_theta(key), task, learned)

    units = args.num_units // args.num_processes * checks.size_of(unit)
    return units + args.inner_updates * checks.size_of(lambda: unit().params)


def make_learned(args: Args) -> tuple[LearnedOptimizer, dict]:
    """-> the optimizer, whose initial theta is --theta or random, and its config"""
    if args.theta:
        learned, theta, header = optimizers.load_learned(args.theta)
        return learned._replace(init_theta=lambda key: theta), header["config"]
    config = {
        name: getattr(args, name) if name in optimizers.SETTINGS else default
        for name, default in optimizers.kind_settings(args.optimizer).items()
    }
    if "grad_clip" in config:
        config["grad_clip"] = None if np.isinf(args.grad_clip) else args.grad_clip
    optimizers.check_config(args.optimizer, config)
    learned = optimizers.LEARNED[args.optimizer](**config)
    size = checks.size_of(lambda: learned.init_theta(jax.random.key(0)))
    if size > MAX_BYTES:
        raise ValueError(f"theta would take {size:,} bytes, a file of it at most {MAX_BYTES:,}")
    return learned, config


def summarise(args: Args, folder: Path, state: MetaState, can_resume: bool) -> None:
    """Print the files written and the next commands; exit with code 1 after too many bad
    updates."""
    theta_path = folder / "theta.npz"
    if state.bad_updates >= MOST_BAD_UPDATES:
        message = f"{MOST_BAD_UPDATES} meta-gradients in a row were not finite"
        runs.fail(f"{message}; the last good theta is in {theta_path}", code=1)
    print(f"written: {theta_path}, and metrics.csv, config.json and TensorBoard events beside it")
    if can_resume:
        each = " in each process, with its --process-id" if args.num_processes > 1 else ""
        print(f"to go on: python pipeline_train.py --resume {shlex.quote(str(folder))}{each}")
    names = (str(theta_path), f"untrained:{theta_path}", "sign_sgd", "adam", "rmsprop")
    flags = f"--env-name {args.env_name[0]} --optimizers {shlex.join(names)}"
    print(f"next: python evaluate.py {flags}")


def main() -> None:
    args = command_line.parse(Args, pipeline_train.__doc__)
    with runs.bad_input():
        args = resumed(args) if args.resume else fill_in(args)
        mesh = devices.choose_devices(
            args.num_units, args.num_devices, args.num_processes, args.process_id, args.coordinator
        )
        args = dataclasses.replace(args, num_devices=mesh.size // args.num_processes)
        all_tasks, learned, config = set_up(args)
        name = "+".join(args.env_name)
        folder = devices.folder_of_all(lambda: runs.run_folder(args, name, "pipeline_train"))
        checkpoints = Checkpoints(folder, args)
    if args.process_id == 0:
        print("\n".join(f"{name:18} {value}" for name, value in dataclasses.asdict(args).items()))

    def save(state):
        if args.process_id != 0:
            return
        iterations = int(state.iteration)
        done = {"iterations": iterations, "env_steps": iterations * tasks.steps_per_iteration(args)}
        optimizers.save_theta(
            folder / "theta.npz",
            state.theta,
            args.optimizer,
            config,
            dataclasses.asdict(args) | done,
        )

    with runs.interruptible() as interrupted, runs.Log(folder, args.num_iterations) as log:

        def on_iteration(iteration, state, row):
            try:
                log.write(iteration, row)
                if iteration % args.save_theta_every == 0:
                    save(state)
                stop = devices.largest_of_processes(interrupted())
                # At the end too, so that a run can be made longer.
                last = args.pipeline and iteration == args.num_iterations
                checkpoints.save_if_due(iteration, state, log, stop or last)
            except OSError:
                save(state)  # a disk too full for a checkpoint may have room for theta
                raise
            if row["bad_updates"]:
                log.say(
                    f"iteration {iteration}: the meta-gradient is not finite; theta is unchanged"
                )
            return stop or row["bad_updates"] >= MOST_BAD_UPDATES

        state = meta_train(
            args, all_tasks, learned, mesh, on_iteration, checkpoints.restore_if_resumed
        )
        save(state)
    stopped = devices.largest_of_processes(interrupted())
    if args.process_id == 0:
        summarise(args, folder, state, can_resume=stopped and checkpoints.shared)
    sys.exit(stopped)
