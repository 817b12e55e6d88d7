"""Four CPU devices, so that one process can test the spreading of units over 1, 2 and 4 of them."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
