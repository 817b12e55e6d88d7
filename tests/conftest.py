"""Four CPU devices, so that one process can test the spreading of units over 1, 2 and 4 of them.
With JAX_PLATFORMS=cuda the tests run on a GPU, where some fail; the cause is not known.

What runs in this process is compiled without LLVM's optimizations: most of the tests' time is
compiling. The scripts that tests start are compiled as a user's are."""

import os
import sys

flags = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{flags or ''} --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests run in several processes, which share the memory of an accelerator.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.devices()  # reads the flags

if flags is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = flags


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """call(main, flags) runs a script's main in this process, in the folder tmp_path. -> exit code,
    stdout, stderr. It takes seconds less than a new process. (capfd: a signal is told to the file
    descriptor.)"""
    change = jax.config.update  # but not the number of devices, which are there already

    def update(key, value):
        if key != "jax_num_cpu_devices":
            change(key, value)

    def run(main, *flags):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, flags)])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(jax.config, "update", update)
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        return code or 0, *capfd.readouterr()

    return run
