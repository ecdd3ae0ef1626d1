"""The handlers that a user may wrap around the programs of an objective: ``handlers.scale`` and ``handlers.mask``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.primitives import Messenger

from probdiff._checks import is_concrete, require


def same(a: Any, b: Any) -> bool:
    """Whether two factors are the same; the values of traced arrays are not compared."""
    if a is None or b is None:
        return a is b
    if not (is_concrete(a) and is_concrete(b)):
        return jnp.shape(a) == jnp.shape(b)
    return bool(np.all(np.asarray(a) == np.asarray(b)))


def unwrapped(program: Callable[..., Any], name: str) -> tuple[Callable[..., Any], Any, jax.Array | None]:
    """The program inside of ``handlers.scale`` and ``handlers.mask``, the number by which they multiply its log density, and
    the factors by which they multiply the log density of each datum (None for 1)."""
    scale, weight = 1.0, None
    while isinstance(program, Messenger):
        kinds = {handlers.scale: "scale", handlers.mask: "mask"}
        wrapper = f"handlers.{type(program).__name__}"
        require(type(program) in kinds, name, "no handlers but scale and mask around it", wrapper)
        factor = getattr(program, kinds[type(program)])
        require(
            jnp.ndim(factor) <= 1, name, f"{wrapper} by a number, or one for each datum", f"shape {jnp.shape(factor)}"
        )
        if jnp.ndim(factor) == 0 and isinstance(program, handlers.scale):
            scale = scale * factor
        else:
            # In NumPy while that is possible: in a compiled function a product of JAX arrays has no values to compare.
            array: Any = np.asarray(factor) if is_concrete(factor) else jnp.asarray(factor)
            weight = array.astype(jnp.zeros(()).dtype) * (1 if weight is None else weight)
        program = program.fn
    return program, scale, weight
