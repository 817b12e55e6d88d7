"""What an accelerator does, by bench.py's measurements and at its own sizes; for bench.py's table
take a CPU:

    python benchmarks/accelerator.py      # minutes, of which most are compiling

Each measurement runs in its own process. Prints a markdown table.
"""

import os
import sys
from functools import partial
from pathlib import Path

# Otherwise this process would take most of the accelerator's memory, and its workers none.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench
import jax

import runs

MANY, PARAMS = 2**16, 20_000_000


def rows() -> list[tuple]:
    measure = partial(bench.measure, cores=len(os.sched_getaffinity(0)))
    machine = measure("machine")
    few, many = (
        measure("env", name="big_dense_long", num_envs=n)["steps_per_s"] for n in (512, MANY)
    )
    a2c = measure("a2c", name="big_dense_long")
    meta = measure("meta", name="big_dense_long", units=512, way="ours")
    learned, adam = (
        1e12 * measure("optimizer", name=name, num_params=PARAMS)["seconds"] / PARAMS
        for name in ("untrained", "adam")
    )
    return [
        ("matrix product", f"{machine['gflops'] / 1e3:.1f} TFLOP/s", ""),
        ("copy", f"{machine['copy_gbs']:,.0f} GB/s read and written", ""),
        ("stepping big_dense_long, 512 envs", f"{few:,.0f} steps/s", f"{MANY} envs {many:,.0f}"),
        ("A2C big_dense_long, 512 envs", f"{a2c['steps_per_s']:,.0f} steps/s", ""),
        (
            "meta-iteration big_dense_long, 512 units",
            f"{meta['seconds']:.3f} s, compiled in {meta['compile_s']:.0f} s",
            "",
        ),
        (
            f"Optim4RL update, {PARAMS:,} parameters",
            f"{learned:.0f} ps a parameter",
            f"Adam {adam:.0f} ps; 264 B at the copy rate {264e3 / machine['copy_gbs']:.0f} ps",
        ),
    ]


def main() -> None:
    if jax.default_backend() == "cpu":
        runs.fail("there is no accelerator; python benchmarks/bench.py measures a CPU")
    bench.print_table(rows())


if __name__ == "__main__":
    main()
