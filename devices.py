"""The devices and processes of a run: which there are, and how units are split over them."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from orbax.checkpoint import multihost

COMPILER_OPTIONS = {
    # A fifth less time in an iteration, on a CPU with such registers.
    "xla_cpu_prefer_vector_width": 512,
    # Each core has its own units, so threads need not share the work of one.
    "xla_disable_hlo_passes": "cpu-parallel-task-assigner",
}


def mean_over_units(train: Callable, theta: Any, schedule: Any, units: Any, mesh: Mesh) -> tuple:
    """Apply `train` to all units, split over the devices of the mesh and, on each device, into
    groups.

    train(theta, schedule, units) -> sum of meta-gradients, units, metrics. schedule, units:
    [N, ...] -> mean meta-gradient, units, metrics [N]
    """
    num_units = jax.tree.leaves(schedule)[0].shape[0]
    per_device = num_units // mesh.size
    # On a CPU one unit at a time, which stays in the cache; on an accelerator many, but within its
    # memory.
    most = 1 if jax.default_backend() == "cpu" else 64
    group = max(size for size in range(1, most + 1) if per_device % size == 0)

    def on_device(theta, schedule, units):
        def on_group(carry, start):
            total, units = carry
            some = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, start, group), (schedule, units)
            )
            # A copy of this group, so that XLA does not copy all units.
            some = jax.lax.optimization_barrier(some)
            gradient, some, metrics = train(theta, *some)
            units = jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0), units, some
            )
            return (jax.tree.map(jnp.add, total, gradient), units), metrics

        # The units, most of the memory, are the loop's carry: it is updated in place.
        start = (jax.tree.map(jnp.zeros_like, theta), units)
        (total, units), metrics = jax.lax.scan(on_group, start, jnp.arange(0, per_device, group))
        metrics = jax.tree.map(jnp.ravel, metrics)
        return jax.lax.psum(total, "units"), units, metrics

    split, whole = PartitionSpec("units"), PartitionSpec()
    on_devices = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(whole, split, split),
        out_specs=(whole, split, split),
        check_vma=False,
    )
    total, units, metrics = on_devices(theta, schedule, units)
    return jax.tree.map(lambda g: g / num_units, total), units, metrics


def choose_devices(
    num_units: int, num_devices: int | None, num_processes=1, process_id=0, coordinator=""
) -> Mesh:
    """The mesh that units are split over, of one axis "units": num_devices of each process, by
    default the most that divide the units.

    Makes each core of a CPU a device, so it must be called before anything runs on one. Raises a
    one-line ValueError if the units cannot be split like this, or the processes cannot meet.
    """
    if num_units % ((num_devices or 1) * num_processes):
        asked = f"--num-devices {num_devices}" if num_devices else ""
        asked += f" --num-processes {num_processes}" if num_processes > 1 else ""
        raise ValueError(
            f"--num-units {num_units} must be a multiple of the number of devices ({asked.strip()})"
        )
    connect(num_processes, process_id, coordinator)
    here = start_devices(num_devices or len(cores()))
    if num_devices and num_devices > here:
        raise ValueError(f"--num-devices {num_devices}: there are {here}")
    fewest = -largest_of_processes(-here)  # all processes must choose the same number
    num_devices = num_devices or max(
        n for n in range(1, fewest + 1) if num_units % (n * num_processes) == 0
    )
    devices = [
        [d for d in jax.devices() if d.process_index == i][:num_devices]
        for i in range(num_processes)
    ]
    return Mesh(sum(devices, []), "units")


def connect(num_processes: int, process_id: int, coordinator: str) -> None:
    """Join the other processes, if there are others. Raises a one-line ValueError if they cannot
    meet."""
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process-id must be from 0 to {num_processes - 1}, got {process_id}")
    if num_processes > 1:
        try:
            # jax aborts without an address
            socket.getaddrinfo(coordinator.rpartition(":")[0].strip("[]"), None)
            jax.distributed.initialize(coordinator, num_processes, process_id)
        except (OSError, UnicodeError, RuntimeError) as error:
            raise ValueError(f"--coordinator {coordinator}: {error}") from None


def cores() -> list[int]:
    """The numbers of the cores of a CPU that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def start_devices(of_a_cpu: int) -> int:
    """Start jax's backend, on a CPU with so many devices. -> the devices of this process"""
    jax.config.update("jax_num_cpu_devices", of_a_cpu)
    # The backend's threads start here and inherit this mask: only the main thread sees interrupts.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    here = jax.local_device_count()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return here


def largest_of_processes(number: int) -> int:
    """The largest of all processes' numbers. All must call it."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def folder_of_all(make: Callable[[], Path]) -> Path:
    """The folder that process 0 makes with make(), in all processes."""
    if jax.process_count() == 1:
        return make()
    name = np.zeros(4096, np.uint8)
    if jax.process_index() == 0:
        folder = make()
        text = os.fsencode(folder.resolve())
        name[: len(text)] = list(text)
    name = multihost_utils.broadcast_one_to_all(name)
    return folder if jax.process_index() == 0 else Path(os.fsdecode(name.tobytes().rstrip(b"\0")))


def wait_for_all(key: str) -> None:
    """Wait until all processes are here. A collective would fail if one is 30 s late."""
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=3_600_000)
