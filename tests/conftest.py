"""Four CPU devices, so that one process can test the spreading of units over 1, 2 and 4 of them.

Everything, in the scripts that tests start too, is compiled without LLVM's optimizations: most of the tests' time is compiling.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax  # noqa: E402, after its flags

jax.config.update("jax_num_cpu_devices", 4)
