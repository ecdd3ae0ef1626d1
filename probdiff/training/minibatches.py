"""The minibatches of a fit: rows drawn with replacement, by weight."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._checks import Numbers, Whole, require, require_finite


def read_weights(weights: Numbers, num_data: int) -> Float[np.ndarray, "datum"]:
    """Checked weights of the data, shape ``(datum,)``, float64.

    Raises:
        ValueError, TypeError: If they are not ``num_data`` finite numbers of at least 0, with one of them positive.
    """
    found = np.asarray(weights)
    require(found.dtype.kind in "iuf", "weights", "numbers", f"dtype {found.dtype}", TypeError)
    require(found.shape == (num_data,), "weights", f"shape ({num_data},), one for each datum", f"shape {found.shape}")
    require_finite("weights", found)
    require(found.min() >= 0 and found.max() > 0, "weights", "numbers of at least 0, one of them positive", f"from {found.min()} to {found.max()}")
    return found.astype(np.float64)


class Minibatches:
    """The rows of each minibatch.

    With weights, a minibatch is a sample from the weighted distribution of the data, so that the objective needs no weights; this also holds for an objective
    that uses the minibatch as a set (``points="batch"``). Rows of weight 0 are in no minibatch.

    Args:
        num_data: Number of data.
        size: Number of rows.
        weights: Weights as returned by :func:`read_weights`; None for equal weights.

    Attributes:
        num_counted: Number of data whose weight is not 0.
    """

    def __init__(self, num_data: int, size: int, weights: Float[np.ndarray, "datum"] | None) -> None:
        self.num_data: int = num_data
        self.size: int = size
        self._counted = None if weights is None else np.flatnonzero(weights)
        self.num_counted: int = num_data if self._counted is None else len(self._counted)
        if weights is not None:
            # A row is drawn by 32 random bits; these are the upper ends of the intervals of the rows.
            share = np.cumsum(weights[self._counted] / weights.max())
            self._ends = np.minimum(np.round(share[:-1] / share[-1] * 2**32), 2**32 - 1).astype(np.uint32)

    def rows(self, key: PRNGKeyArray, iteration: Any) -> Int[Array, "row"]:
        """The rows of the minibatch of an iteration."""
        key = jax.random.fold_in(key, iteration)
        return jax.random.randint(key, (self.size,), 0, self.num_data) if self._counted is None else self._weighted(key, self.size)

    def sample(self, key: PRNGKeyArray, size: Whole) -> Int[Array, "row"]:
        """Rows for an estimate: without replacement if the data have equal weights."""
        if self._counted is None:
            return jax.random.choice(key, self.num_data, (int(size),), replace=False)
        return self._weighted(key, size)

    def _weighted(self, key: PRNGKeyArray, size: Whole) -> Int[Array, "row"]:
        bits = jax.random.bits(key, (int(size),), jnp.uint32)
        return jnp.asarray(self._counted)[jnp.searchsorted(jnp.asarray(self._ends), bits, side="right")]
