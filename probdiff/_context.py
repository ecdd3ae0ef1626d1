"""The context of a conditional model p(x | c): covariates or labels, an array or a tree of arrays with a row for each datum."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from probdiff._checks import PyTree, require, require_finite
from probdiff._frames import as_array, is_frame

EXPECTED = "an array, or a tree of arrays, with a row for each datum"


def read_context(context: Any) -> PyTree:
    """A context as checked JAX arrays; data frames in it become arrays of their columns, which must be numbers.

    Raises:
        ValueError: If it is empty, the numbers of rows differ, or a value is not finite.
        TypeError: If a leaf is no array of numbers.
    """
    is_list = isinstance(context, list | range)
    require(not is_list, "context", f"{EXPECTED}: np.array makes one of a list", f"a {type(context).__name__}", TypeError)
    tree = jax.tree.map(_array, context, is_leaf=is_frame)
    leaves = jax.tree.leaves(tree)
    require(leaves, "context", EXPECTED, "no array")
    for leaf in leaves:
        kind = getattr(getattr(leaf, "dtype", None), "kind", None)
        is_number = kind in ("b", "i", "u", "f") or (kind is not None and jnp.issubdtype(leaf.dtype, jnp.floating))
        require(hasattr(leaf, "shape") and kind is not None, "context", EXPECTED, type(leaf).__name__, TypeError)
        require(is_number, "context", "numbers", f"dtype {leaf.dtype}", TypeError)
        require(np.ndim(leaf) >= 1, "context", EXPECTED, "shape ()")
        require_finite("context", leaf)
    sizes = sorted({len(leaf) for leaf in leaves})
    require(len(sizes) == 1, "context", "arrays of equally many rows", f"{sizes} rows")
    require(sizes[0] > 0, "context", "at least one row", "none")
    return jax.tree.map(jnp.asarray, tree)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Replace the name ``context`` by another one in the messages of errors."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace("context: ", f"{name}: ", 1)) from None


def _array(leaf: Any) -> Any:
    """A data frame or a column of one as an array, whose cells must be numbers; anything else unchanged."""
    try:
        return as_array(leaf.to_frame() if hasattr(leaf, "to_frame") and not hasattr(leaf, "columns") else leaf, "context")
    except TypeError as error:
        remedy = "columns of numbers; probdiff.datasets.split(frame, context=[…]) makes them of labels, and its .covariates.encode(rows) of other rows"
        raise TypeError(f"context: Expected {remedy}; got {str(error).partition('; got ')[2].partition(';')[0]}") from None


def num_rows(context: PyTree) -> int:
    """The number of rows of a context."""
    return len(jax.tree.leaves(context)[0])


def of_batch(context: PyTree, batch: tuple[int, ...]) -> PyTree:
    """A context of shape ``(datum, …)`` with the axes of a batch, the last of which is the datum, in front: ``(*batch, …)``.

    The context of a single datum is broadcast to any batch.
    """

    def leaf_of_batch(leaf: jax.Array) -> jax.Array:
        rows = leaf if batch else leaf[0]
        return jnp.broadcast_to(rows, (*batch, *leaf.shape[1:]))

    return jax.tree.map(leaf_of_batch, context)


def same_rows(context: PyTree) -> Bool[Array, "datum datum"]:
    """Whether two data have the same context, for all pairs: shape ``(datum, datum)``."""
    of_leaves = [(leaf[:, None] == leaf).reshape(len(leaf), len(leaf), -1).all(-1) for leaf in jax.tree.leaves(context)]
    return jnp.stack(of_leaves).all(0)
