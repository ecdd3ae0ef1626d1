"""Checks of arguments, made before any long computation, with messages of one form; and types of arguments."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Integer

GAPS = (
    "fit to the complete rows; for the others, probdiff.inference.observed_log_prob(fitted, x, …) estimates the density of the observed values, and "
    "probdiff.inference.smc(fitted, Inpainting(mask, values), …) draws the missing ones"
)
AnyArray = jax.Array | np.ndarray
Whole = int | np.integer
Number = float | int | np.floating | np.integer
Numbers = npt.ArrayLike | Sequence[Any] | float | int  # a number, a sequence (NumPy's ArrayLike has no tuples at run time) or an array
Step = Whole | Integer[AnyArray, "*#batch"]
type PyTree = Any  # any tree of arrays: jaxtyping's PyTree, which type checkers cannot read


def require(condition: object, name: str, expected: str, got: object, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` with the message ``name: Expected …; got …`` unless ``condition`` holds."""
    if not condition:
        raise error(f"{name}: Expected {expected}; got {got}")


def require_type(name: str, value: object, kind: type) -> None:
    """Refuse anything but an instance of ``kind``."""
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    require(isinstance(value, kind), name, f"{article} {kind.__name__}", type(value).__name__, TypeError)


def require_count(name: str, value: object) -> None:
    """Refuse anything but a positive integer."""
    require(isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1, name, "a positive integer", repr(value))


def require_key(key: object) -> None:
    """Refuse anything but one JAX key, typed or an array of two uint32."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    raw = dtype == jnp.uint32 and shape == (2,)
    require(typed or raw, "key", "a JAX key, such as jax.random.key(0)", f"{key!r:.60}", TypeError)


def is_concrete(value: object) -> bool:
    """Whether the values of ``value`` can be read now (it is not being traced by JAX)."""
    return not isinstance(value, jax.core.Tracer)


def is_trainable(leaf: object) -> bool:
    """Whether a leaf of a module is a parameter: a floating-point JAX array. (NumPy arrays are constants.)"""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def require_finite(name: str, x: Numbers) -> None:
    """Refuse NaN and infinity, naming the first place; traced values are not checked."""
    if is_concrete(x):
        bad = ~np.isfinite(np.asarray(x))
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            require(False, name, "finite values", f"{np.asarray(x)[first]} at index {list(first)}")


def require_step(n: Numbers, lowest: int, num_steps: int) -> None:
    """Refuse a step that is not an integer in ``lowest`` … N; traced values are not checked."""
    dtype = jnp.result_type(n)
    require(jnp.issubdtype(dtype, jnp.integer), "n", "an integer step", f"dtype {dtype}", TypeError)
    if is_concrete(n):
        values = np.asarray(n)
        bad = values[(values < lowest) | (values > num_steps)]
        require(bad.size == 0, "n", f"{lowest} <= n <= {num_steps}", bad.flat[0] if bad.size else None)
