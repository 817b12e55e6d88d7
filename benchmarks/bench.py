"""Time and memory of the project's main parts, compared with the usual way:

    python benchmarks/bench.py           # under ten minutes on 2 cores
    python benchmarks/bench.py --quick   # under two; writes no file
    python benchmarks/bench.py --growth  # only the figure: units and inner updates
    python benchmarks/bench.py --ppo     # only PPO, compared with Brax's, which needs jax 0.9.2

Each measurement runs in its own process, on the cores it names: peak memory is its own, and
compiling does not disturb other measurements. Times are the minimum of several repeats. Prints a
markdown table and writes benchmarks/bench.json.
"""

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]


@dataclass(frozen=True)
class Args:
    quick: bool = False
    """fewer and smaller measurements"""
    growth: bool = False
    """instead: draw benchmarks/growth.png, time and memory against units and inner updates"""
    ppo: bool = False
    """instead: measure PPO on Brax"""
    worker: str = ""
    """for the script itself: the measurement to make, as JSON"""


# --- In the worker ---


def seconds(f, *args, repeats=5, donate=()):
    """Minimum time of one call of f, compiled, after a first call that does not count."""
    import jax

    f = jax.jit(f, donate_argnums=donate)
    times = []
    for _ in range(repeats + 1):
        fresh = [
            jax.block_until_ready(jax.tree.map(lambda x: x + 0, a)) if i in donate else a
            for i, a in enumerate(args)
        ]
        began = time.perf_counter()
        out = jax.block_until_ready(f(*fresh))
        times.append(time.perf_counter() - began)
        del out, fresh
    return min(times[1:])


def measure_machine():
    """A core's rates of matrix products and of copying an array too large for the cache."""
    import jax.numpy as jnp

    a, x = jnp.ones((2048, 2048)), jnp.ones(2**27)
    return {
        "gflops": 2 * 2048**3 / seconds(lambda a: a @ a, a) / 1e9,
        "copy_gbs": 2 * x.nbytes / seconds(lambda x: x + 1, x) / 1e9,
    }


def measure_env(name, form="scatter uint8", num_envs=512, num_steps=20):
    """Environment steps per second under random actions; observations are kept, as in a
    rollout."""
    import jax
    import jax.numpy as jnp

    import gridworld

    observe = gridworld.grid_observe
    if form == "scatter float32":
        gridworld.grid_observe = lambda state, grid: observe(state, grid).astype(jnp.float32)
    if form == "compare uint8":

        def compare(state, grid):
            height, width = grid.rows + 2, grid.cols + 2
            cells = jnp.append(state.agent, state.objects)
            padded = (cells // grid.cols + 1) * width + cells % grid.cols + 1
            seen = jnp.where(jnp.append(True, state.present), padded, -1)
            return (
                (jnp.arange(height * width)[:, None] == seen)
                .astype(jnp.uint8)
                .reshape(height, width, -1)
            )

        gridworld.grid_observe = compare
    env = gridworld.make(name)

    def run(key, state):
        def step(state, key):
            key_action, key_step = jax.random.split(key)
            actions = jax.random.randint(key_action, (num_envs,), 0, env.num_actions)
            state, *kept = jax.vmap(env.step)(jax.random.split(key_step, num_envs), state, actions)
            return state, kept

        return jax.lax.scan(step, state, jax.random.split(key, num_steps))

    state, _ = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), num_envs))
    return {
        "steps_per_s": num_envs * num_steps / seconds(run, jax.random.key(1), state, repeats=20)
    }


def a2c_flops(env, size):
    """Floating-point operations of A2C per environment step: acting, and the loss forward and
    backward (T + 1 of T steps). Backward a layer costs twice as much, the first one once: nothing
    is before it."""
    height, width, planes = env.obs_shape
    layers = [2 * height * width * 4 * planes * size.conv_filters] if size.conv_filters else []
    layers.append(2 * size.hidden_size * height * width * (size.conv_filters or planes))
    layers.append(2 * size.hidden_size * (env.num_actions + 1))
    backward = layers[0] + 2 * sum(layers[1:])
    share = (size.rollout_steps + 1) / size.rollout_steps
    return sum(layers) + share * (sum(layers) + backward)


def measure_a2c(name):
    import jax

    import a2c
    import gridworld
    import optimizers
    import tasks

    env, args = gridworld.make(name), tasks.agent_args(name)
    agent, optimizer = a2c.make_agent(env, args), optimizers.make_optimizer("adam", 1e-3)
    state = jax.jit(lambda key: agent.init(key, optimizer))(jax.random.key(0))
    rate = a2c.steps_per_update(args) / seconds(
        lambda key, state: agent.learn(key, state, optimizer)[0], jax.random.key(1), state
    )
    return {"steps_per_s": rate, "gflops": rate * a2c_flops(env, args) / 1e9}


def measure_meta(name, units, way, devices=1, inner_updates=4, repeats=3):
    """One meta-iteration. way: "ours", "usual", or "usual, checkpoint"."""
    import baseline_meta_gradient
    import jax

    import pipeline_train
    import train_optimizer
    from devices import choose_devices

    flags = {
        "env_name": (name,),
        "num_units": units,
        "inner_updates": inner_updates,
        "num_devices": devices,
    }
    args = train_optimizer.fill_in(pipeline_train.Args(pipeline=False, num_iterations=1, **flags))
    mesh = choose_devices(args.num_units, args.num_devices)
    (task,), learned, _ = train_optimizer.set_up(args)
    key = jax.random.key(0)
    if way == "ours":
        init, step = pipeline_train.jit_meta_step(args, [task], learned, mesh)
        state = init(key)
    else:
        theta = learned.init_theta(key)
        keys = jax.random.split(key, units)
        optimizer = baseline_meta_gradient.optim4rl(theta, task.learning_rate)
        state = jax.jit(jax.vmap(lambda key: task.agent.init(key, optimizer)))(keys)

        def step(key, units):
            flags = {
                "agent": task.agent,
                "learning_rate": task.learning_rate,
                "inner_updates": inner_updates,
            }
            gradient, units = baseline_meta_gradient.meta_gradient(
                theta, keys, units, checkpoint="checkpoint" in way, **flags
            )
            return units, gradient

        step = jax.jit(step, donate_argnums=1)
    began = time.perf_counter()
    step = step.lower(key, state).compile()
    compiled, times = time.perf_counter() - began, []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, out = jax.block_until_ready(step(key, state))
        times.append(time.perf_counter() - began)
    num_params = (
        sum(
            x.size
            for x in jax.tree.leaves(state.units[0].params if way == "ours" else state.params)
        )
        // units
    )
    return {"seconds": min(times[1:]), "compile_s": compiled, "params": num_params}


def measure_optimizer(name, num_params):
    """One update of a pytree of three leaves, state donated."""
    import jax
    import jax.numpy as jnp

    import optimizers

    half = num_params // 2
    params = {
        "a": jnp.ones((half // 8, 8)),
        "b": jnp.ones(num_params - half // 8 * 8 - 1),
        "c": jnp.float32(1.0),
    }
    grads = jax.tree.map(lambda x: 0.01 * x, params)
    optimizer = optimizers.make_optimizer(name, 1e-3)
    state = jax.jit(optimizer.init)(params)
    return {
        "seconds": seconds(
            lambda state, grads: optimizer.update(grads, state),
            state,
            grads,
            donate=(0,),
            repeats=3,
        )
    }


# The settings of both PPOs. Those of the double pendulum are the paper's, with fewer minibatches.
PPO = {
    "inverted_double_pendulum": {
        "num_envs": 2048,
        "batch_size": 1024,
        "num_minibatches": 8,
        "num_epochs": 4,
    },
    "ant": {"num_envs": 256, "batch_size": 256, "num_minibatches": 8, "num_epochs": 4},
}


def measure_ppo(name):
    """A whole update: acting and learning."""
    import jax
    import optax

    import ppo
    import tasks

    learner = tasks.make_learner(name, "ppo", "spring", rollout_steps=5, **PPO[name])
    agent, optimizer = ppo.make_agent(learner.env, learner.args), optax.adam(3e-4)
    state = jax.jit(lambda key: agent.init(key, optimizer))(jax.random.key(0))

    def learn(key, state):
        return agent.learn(key, state, optimizer)[0]

    return {
        "steps_per_s": ppo.steps_per_update(learner.args)
        / seconds(learn, jax.random.key(1), state, donate=(1,), repeats=6)
    }


def measure_brax_stepping(name):
    """Brax's environments alone, with the wrappers of its PPO, under random actions."""
    import brax.envs
    import jax

    num_envs, env = PPO[name]["num_envs"], brax.envs.get_environment(name, backend="spring")
    env = brax.envs.training.wrap(env)

    def run(key, state):
        def step(state, key):
            actions = jax.random.uniform(key, (num_envs, env.action_size), minval=-1)
            state = env.step(state, actions)
            return state, (state.obs, state.reward, state.done)

        return jax.lax.scan(step, state, jax.random.split(key, 20))

    state = jax.jit(env.reset)(jax.random.split(jax.random.PRNGKey(0), num_envs))
    return {"steps_per_s": num_envs * 20 / seconds(run, jax.random.key(1), state, repeats=3)}


def measure_brax_ppo(name):
    """Brax's own PPO, by its own clock; the first stretch, which compiles, does not count."""
    import brax.envs
    from brax.training.agents.ppo import train

    setting, rates = PPO[name], []
    update = setting["batch_size"] * setting["num_minibatches"] * 5
    flags = {key: setting[key] for key in ("num_envs", "batch_size", "num_minibatches")}
    flags |= {
        "num_updates_per_batch": setting["num_epochs"],
        "num_eval_envs": 2,
        "num_evals": 5,
        "num_timesteps": 4 * update,
    }
    flags |= {
        "unroll_length": 5,
        "episode_length": 1000,
        "normalize_observations": True,
        "learning_rate": 3e-4,
    }
    env = brax.envs.get_environment(name, backend="spring")
    train.train(
        env, progress_fn=lambda _, metrics: rates.append(metrics.get("training/sps", 0)), **flags
    )
    return {"steps_per_s": float(max(rates))}


def work(task: dict) -> None:
    result = globals()[f"measure_{task['measure']}"](**task["flags"])
    print(
        json.dumps(result | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6})
    )


# --- In the parent ---


def measure(kind: str, cores: int = 1, may_die: bool = False, **flags) -> dict:
    """Run a worker on `cores` cores. -> its numbers; {} if it died, e.g. for lack of memory, and
    may; else that ends the program."""
    task = json.dumps({"measure": kind, "flags": flags})
    pinned = sorted(os.sched_getaffinity(0))[:cores]
    done = subprocess.run(
        [sys.executable, __file__, "--worker", task],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, pinned),
    )
    result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    print(f"# {kind} {flags} on {cores} core(s): {result or 'died'}", file=sys.stderr)
    if not (result or may_die):
        sys.exit(1)
    return result


def table_of_everything(quick: bool) -> tuple[list[tuple], dict]:
    """-> rows (what, value, compared with), raw results"""
    machine, rows, raw = measure("machine"), [], {}
    raw["machine"] = machine
    rows.append(("matrix product, one core", f"{machine['gflops']:.0f} GFLOP/s", ""))
    rows.append(("copy, one core", f"{machine['copy_gbs']:.1f} GB/s read and written", ""))
    for name in ("big_dense_long",) if quick else ("big_dense_long", "small_dense_long"):
        forms = (
            ["scatter uint8"] if quick else ["scatter uint8", "compare uint8", "scatter float32"]
        )
        rates = {form: measure("env", name=name, form=form)["steps_per_s"] for form in forms}
        others = ", ".join(f"{form} {rate:,.0f}" for form, rate in list(rates.items())[1:])
        rows.append(
            (
                f"stepping {name}, 512 envs, one core",
                f"{rates['scatter uint8']:,.0f} steps/s",
                others,
            )
        )
        result = raw[f"a2c {name}"] = measure("a2c", name=name)
        share = (
            f"{result['gflops']:.0f} GFLOP/s useful, "
            f"{100 * result['gflops'] / machine['gflops']:.0f} % of the matrix rate"
        )
        rows.append(
            (f"A2C {name}, 512 envs, one core", f"{result['steps_per_s']:,.0f} steps/s", share)
        )
        raw[f"env {name}"] = rates
    rows += meta_rows(quick, raw)
    for num_params in (40_000,) if quick else (40_000, 1_000_000, 20_000_000):
        rows.append(optimizer_row(num_params, machine, raw))
    return rows, raw


def meta_rows(quick: bool, raw: dict) -> list[tuple]:
    name, rows = "big_dense_long", []
    # With 64 units the usual way does not fit in 24 GiB; there its checkpointed form is measured.
    for units, way in ((16, "usual"),) if quick else ((32, "usual"), (64, "usual, checkpoint")):
        for cores in (2,) if quick else (1, 2):
            ours = measure("meta", cores=cores, name=name, units=units, way="ours", devices=cores)
            raw[f"meta {units} ours {cores}"] = ours
            text = (
                f"{ours['seconds']:.2f} s, {ours['peak_gb']:.2f} GB, "
                f"compiled in {ours['compile_s']:.1f} s"
            )
            theirs = raw[f"meta {units} {way} {cores}"] = measure(
                "meta", cores=cores, may_die=True, name=name, units=units, way=way
            )
            beside = f"{way}: more memory than there is"
            if theirs:
                ratio = theirs["seconds"] / ours["seconds"]
                beside = (
                    f"{way}: {theirs['seconds']:.2f} s, {theirs['peak_gb']:.2f} GB, "
                    f"**{ratio:.1f} times**"
                )
            rows.append((f"meta-iteration {name}, {units} units, {cores} core(s)", text, beside))
    few, many = (
        measure("meta", name=name, units=units, way="ours", repeats=1) for units in (8, 40)
    )
    per = (many["peak_gb"] - few["peak_gb"]) * 1e9 / 32 / few["params"]
    rows.append(
        ("memory per unit and agent parameter", f"{per:.0f} bytes", "the LSTM states alone: 128")
    )
    return rows


def optimizer_row(num_params: int, machine: dict, raw: dict) -> tuple:
    """Optim4RL's update compared with Adam's, and with the minimum time for its memory traffic and
    its operations."""
    ours, adam = (
        measure("optimizer", name=name, num_params=num_params)["seconds"]
        for name in ("untrained", "adam")
    )
    raw[f"optimizer {num_params}"] = {"optim4rl": ours, "adam": adam}
    ns = [1e9 * s / num_params for s in (ours, adam)]
    bytes_moved, flops = 2 * 128 + 2 * 4, 2 * (2 * 32 * 10 + 2 * 8)
    least = f"{bytes_moved} B at the copy rate {bytes_moved / machine['copy_gbs']:.0f} ns"
    least += (
        f", {flops} operations of its products at the matrix rate "
        f"{flops / machine['gflops']:.0f} ns, and 80 tanh"
    )
    return (
        f"Optim4RL update, {num_params:,} parameters, one core",
        f"{ns[0]:.1f} ns a parameter",
        f"Adam {ns[1]:.1f} ns; {least}",
    )


def ppo_rows() -> list[tuple]:
    rows = []
    for name in PPO:
        for cores in (1, 2):
            kinds = ("ppo", "brax_stepping", "brax_ppo")
            ours, stepping, theirs = (
                measure(kind, cores=cores, may_die=True, name=name).get("steps_per_s", math.nan)
                for kind in kinds
            )
            beside = (
                f"Brax's PPO {theirs:,.0f}, **{ours / theirs:.1f} times**; "
                f"Brax's stepping alone {stepping:,.0f}"
            )
            rows.append(
                (
                    f"PPO {name}, {PPO[name]['num_envs']} envs, {cores} core(s)",
                    f"{ours:,.0f} steps/s",
                    beside,
                )
            )
    return rows


def growth() -> None:
    """Time and memory of a meta-iteration against units, for several inner updates, on
    small_dense_long with all cores."""
    import matplotlib

    matplotlib.use("Agg")  # needs no screen
    import matplotlib.pyplot as plt

    cores, units = len(os.sched_getaffinity(0)), (8, 16, 32, 64, 128, 256, 512)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    raw = {}
    for inner_updates, marker in ((4, "o"), (16, "s"), (64, "^")):
        flags = {"name": "small_dense_long", "way": "ours", "devices": cores, "repeats": 1}
        flags |= {"inner_updates": inner_updates, "cores": cores, "may_die": True}
        results = [measure("meta", units=n, **flags) for n in units]
        raw[inner_updates] = dict(zip(units, results, strict=True))
        for axis, figures in zip(axes, ("seconds", "peak_gb"), strict=True):
            values = [result.get(figures, math.nan) for result in results]
            axis.plot(units, values, marker=marker, label=f"K = {inner_updates}")
    axes[0].set(xlabel="units", ylabel="seconds per meta-iteration", xscale="log", yscale="log")
    axes[1].set(xlabel="units", ylabel="peak memory of the process (GB)", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
        axis.legend(title="inner updates", fontsize="small")
    figure.suptitle(f"small_dense_long, {cores} cores")
    figure.savefig(HERE / "growth.png", dpi=120)
    (HERE / "growth.json").write_text(json.dumps(raw, indent=1) + "\n")


def print_table(rows: list[tuple]) -> None:
    print("| what | value | compared with |\n|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.worker:
        work(json.loads(args.worker))
    elif args.growth:
        growth()
    elif args.ppo:
        print_table(ppo_rows())
    else:
        rows, raw = table_of_everything(args.quick)
        print_table(rows)
        raw["python"] = platform.python_version()
        raw["cpu"] = platform.processor() or platform.machine()
        if not args.quick:
            (HERE / "bench.json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
