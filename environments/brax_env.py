"""Brax's tasks as environments of ppo.py: `env = make("ant", "spring")`.

Brax is imported only when a name is looked up: training on gridworlds does not wait for it.
"""

import contextlib
import io
import warnings
from typing import get_args

import jax
import jax.numpy as jnp

import settings
from ppo import Env


def names() -> list[str]:
    """Brax's tasks. Raises a one-line ValueError if Brax or a package that it needs is missing."""
    warnings.filterwarnings("ignore", module="brax")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # hides messages of the import
            import brax.envs
    except ImportError as error:
        raise ValueError(
            f"Brax cannot be imported ({error}); pip install -r requirements.txt"
        ) from None
    return list(brax.envs._envs)


def make(name: str, backend: str) -> Env:
    """A Brax task. Raises a one-line ValueError for an unknown task or backend, or a task that the
    backend lacks."""
    if name not in names():
        raise ValueError(f"unknown Brax task {name!r}; choose from {', '.join(names())}")
    if backend not in (known := get_args(settings.Backend)):
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(known)}")
    import brax.envs

    try:
        env = brax.envs.get_environment(name, backend=backend)
        start = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
        jax.eval_shape(env.step, start, jnp.zeros(env.action_size))
    except Exception as error:  # whatever Brax, a missing package, or a newer jax raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} cannot be made with backend {backend} ({reason})") from None

    # By default an Nvidia GPU rounds the factors of a product to 10 bits; that is no physics.
    @jax.default_matmul_precision("highest")
    def reset(key):
        state = env.reset(jax.random.key_data(key))  # Brax takes old-style keys only
        return state, state.obs

    @jax.default_matmul_precision("highest")
    def step(key, state, action):
        del key  # Brax's tasks are deterministic
        state = env.step(state, action)
        return state, state.obs, state.reward, state.done > 0.5

    return Env(reset, step, start.obs.shape[-1], env.action_size)
