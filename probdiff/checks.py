"""Checks of what a user gave: one form of message, before any long work starts."""

import jax
import jax.numpy as jnp
import numpy as np


def require(condition, name, expected, got, error=ValueError):
    """Raise ``error`` with the message ``name: Expected …; got …`` unless ``condition`` holds."""
    if not condition:
        raise error(f"{name}: Expected {expected}; got {got}")


def is_concrete(value):
    """Whether the values of ``value`` can be read now (it is not being traced by JAX)."""
    return not isinstance(value, jax.core.Tracer)


def require_finite(name, x):
    """Refuse NaN and infinity, naming the first place; values that JAX is tracing are not looked at."""
    if is_concrete(x):
        bad = ~np.isfinite(np.asarray(x))
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            require(False, name, "finite values", f"{np.asarray(x)[first]} at index {list(first)}")


def require_step(n, lowest, num_steps):
    """Refuse a step that is not an integer in ``lowest`` … N; traced values are not looked at."""
    dtype = jnp.result_type(n)
    require(jnp.issubdtype(dtype, jnp.integer), "n", "an integer step", f"dtype {dtype}", TypeError)
    if is_concrete(n):
        values = np.asarray(n)
        bad = values[(values < lowest) | (values > num_steps)]
        require(bad.size == 0, "n", f"{lowest} <= n <= {num_steps}", bad.flat[0] if bad.size else None)
