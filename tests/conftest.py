"""Four CPU devices, so that one process can test the spreading of units over 1, 2 and 4 of them.

What runs in this process is compiled without LLVM's optimizations: most of the tests' time is
compiling. The scripts that tests start are compiled as a user's are."""

import os

flags = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{flags or ''} --xla_backend_optimization_level=0"

import jax  # noqa: E402, after its flags

jax.config.update("jax_num_cpu_devices", 4)
jax.devices()  # reads the flags

if flags is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = flags
