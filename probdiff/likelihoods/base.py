r"""Likelihoods :math:`p_\theta(x | z_1)`: from the last reverse step to the data in the user's units.

The last reverse step is a Gaussian over :math:`x_0`, N(loc, scale²). A likelihood defines how :math:`x_0` and x are
related: ``encode`` maps data to the chain, and calling the likelihood with loc and scale returns the distribution of
x, so that all figures are in the user's units. A likelihood with a density refuses integers, and a likelihood for a grid refuses floats: the
density of data on a grid can be made arbitrarily large, and has no meaning.
"""

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Real
from numpyro import distributions as dist

from probdiff._checks import AnyArray
from probdiff._frames import as_array

Scale = Float[Array, "*#batch #dim"] | Float[Array, ""]


class AbstractLikelihood(eqx.Module):
    """The relation between the data in the user's units and the :math:`x_0` of the chain.

    To write your own, define ``levels`` and the five methods. JAX arrays of the module are trained along with the network.

    Attributes:
        levels: Number of levels of data on a grid, that many consecutive integers, so that bits/dim are defined; otherwise None.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, probdiff
        >>> from numpyro import distributions as dist
        >>> class HeavyTailed(probdiff.likelihoods.AbstractLikelihood):  # x = x_0, and Student's t in the last step
        ...     levels = None
        ...     def check_data(self, x):
        ...         assert np.issubdtype(x.dtype, np.floating), "x: Expected floats"
        ...     def encode(self, x):
        ...         return jnp.asarray(x)
        ...     def decode(self, x0):
        ...         return x0
        ...     def log_jacobian(self, dim):
        ...         return 0.0
        ...     def __call__(self, loc, scale):
        ...         return dist.StudentT(5.0, loc, scale).to_event(1)
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0 * z, HeavyTailed())
        >>> probdiff.elbo_terms(diffusion, jnp.zeros((3, 2)), key=jax.random.key(0)).elbo.shape
        (1, 3)
    """

    if TYPE_CHECKING:  # for type checkers a property: subclasses may define it as one, and it is no argument of ``__init__``

        @property
        def levels(self) -> int | None:
            """Number of levels."""
    else:
        levels: eqx.AbstractVar[int | None]

    @property
    def words(self) -> str:
        """The kind of data that this likelihood is for, as a short text."""
        return type(self).__name__

    @property
    def points(self) -> Float[np.ndarray, "point dim"] | None:
        """The encoded values that a column of data can have, points of shape ``(point, dim)``; None for data with a density."""
        return None

    def encoded_dim(self, columns: int) -> int:
        """Number of dimensions of the chain for data with ``columns`` columns: by default, the same number."""
        return columns

    def pieces(self, dim: int) -> list[tuple[int, Float[np.ndarray, "point dim"] | None]]:
        """The ``dim`` dimensions of the chain in groups of one kind: the number of dimensions of each group, and its :attr:`points`."""
        return [(dim, self.points)]

    def discrete(self, columns: int) -> tuple[bool, ...]:
        """For each column of data, whether its values have probabilities; otherwise they have a density, whose logarithm has no upper limit."""
        of = {j: part.points is not None for part, at in self.placed(columns) for j in at}
        return tuple(of[j] for j in range(columns))

    def placed(self, columns: int) -> list[tuple["AbstractLikelihood", tuple[int, ...]]]:
        """The likelihoods of the columns of data, each with the positions of its columns: by default, this likelihood with all of them."""
        return [(self, tuple(range(columns)))]

    def read(self, x: Any) -> Any:
        """Data as an array: arrays unchanged, a data frame (pandas, polars, pyarrow) by its columns of numbers.

        Raises:
            TypeError: If a column does not hold numbers; ValueError for a missing cell, by column and row.
        """
        return as_array(x)

    @abc.abstractmethod
    def check_data(self, x: Real[AnyArray, "*batch dim"]) -> None:
        """Refuse data, shape ``(*batch, column)``, that do not suit this likelihood."""

    @abc.abstractmethod
    def encode(self, x: Real[AnyArray, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Encode data for the chain: floats of shape ``(*batch, encoded_dim(column))``, with variance of about 1 if possible."""

    @abc.abstractmethod
    def decode(self, x0: Float[Array, "*batch dim"]) -> Real[Array, "*batch dim"]:
        """Map the chain's :math:`x_0` to the user's units; the inverse of :meth:`encode`."""

    def unrounded(self, x0: Float[Array, "*batch dim"]) -> Real[Array, "*batch column"]:
        """:meth:`decode` without rounding to possible data; :meth:`decode` itself for a likelihood that does not override this method."""
        return self.decode(x0)

    @abc.abstractmethod
    def log_jacobian(self, dim: int) -> float:
        r"""The log of :math:`|dx_0/dx|`, summed over the dimensions, in nats."""

    @abc.abstractmethod
    def __call__(self, loc: Float[Array, "*batch dim"], scale: Scale) -> dist.Distribution:
        r"""Distribution of x when :math:`x_0` is N(loc, scale²), independent over the last axis (an event of one dimension)."""
