r"""Likelihoods :math:`p_\theta(x | z_1)`: from the last reverse step to the data as the user has it.

The last reverse step is a Gaussian over :math:`x_0`, N(loc, scale²). A likelihood says how :math:`x_0` and x are
related: ``encode`` maps data to the chain, and calling the likelihood with loc and scale gives the distribution of
x, so that every figure is in the user's own units. Each refuses the other's data: a density over data that live on a
grid can be made as large as one likes, and means nothing.
"""

import abc
import operator
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray, Real
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.util import promote_shapes

from probdiff._checks import AnyArray, Numbers, Whole, is_concrete, require, require_finite

MOST_LEVELS = 2**22
Scale = Float[Array, "*#batch #dim"] | Float[Array, ""]


class AbstractLikelihood(eqx.Module):
    """How the data as the user has it and the chain's :math:`x_0` are related.

    To write your own, give ``levels`` and the five methods. JAX arrays of the module are trained along with the network.

    Attributes:
        levels: Number of levels of data on a grid, integers 0 … levels − 1, so that bits/dim mean something; None for data with a
            density.
    """

    if TYPE_CHECKING:  # a property, to a type checker, as it may be overridden by one and is no argument of ``__init__``

        @property
        def levels(self) -> int | None:
            """Number of levels."""
    else:
        levels: eqx.AbstractVar[int | None]

    @abc.abstractmethod
    def check_data(self, x: Real[AnyArray, "*batch dim"]) -> None:
        """Refuse data, shape ``(*batch, dim)``, that this likelihood does not take."""

    @abc.abstractmethod
    def encode(self, x: Real[AnyArray, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Data to the chain, floats of the same shape; about unit variance is best."""

    @abc.abstractmethod
    def decode(self, x0: Float[Array, "*batch dim"]) -> Real[Array, "*batch dim"]:
        """From the chain to the user's units; the inverse of :meth:`encode`."""

    @abc.abstractmethod
    def log_jacobian(self, dim: int) -> float:
        r"""The log of :math:`|dx_0/dx|`, summed over the dimensions, in nats."""

    @abc.abstractmethod
    def __call__(self, loc: Float[Array, "*batch dim"], scale: Scale) -> dist.Distribution:
        r"""Distribution of x when :math:`x_0` is N(loc, scale²), independent over the last axis (an event of one dimension)."""


class NormalLikelihood(AbstractLikelihood):
    r"""Continuous data, :math:`x = loc + scale \cdot x_0`, with a normal density.

    Args:
        loc: Shift of the data, a number or one per dimension.
        scale: Positive scale of the data, a number or one per dimension. The Jacobian is part of the density.

    Use :meth:`standardized` to take both from data.
    """

    loc: tuple[float, ...] | float = eqx.field(static=True)
    scale: tuple[float, ...] | float = eqx.field(static=True)

    def __init__(self, loc: Numbers = 0.0, scale: Numbers = 1.0) -> None:
        self.loc, self.scale = _numbers("loc", loc), _numbers("scale", scale)
        require(np.all(np.asarray(self.scale) > 0), "scale", "positive numbers", self.scale)

    @property
    def levels(self) -> None:
        """None: the data have a density."""
        return None

    @classmethod
    def standardized(cls, x: Real[AnyArray, "datum dim"]) -> "NormalLikelihood":
        """The likelihood whose ``encode`` gives this data mean 0 and standard deviation 1 in every dimension.

        Args:
            x: Data, shape ``(datum, dim)``, floats.

        Raises:
            ValueError: If a column is constant, or the data are not finite; TypeError if they are not floats.
        """
        cls().check_data(x)
        x = np.asarray(x, np.float64)
        scale = x.std(0)
        constant = np.flatnonzero(~(scale > 1e-12 * np.abs(x).max(0)))
        if constant.size:
            require(False, "x", "columns that vary", f"a constant column {constant[0]} ({len(x)} rows)")
        return cls(x.mean(0), scale)

    def check_data(self, x: Real[AnyArray, "*batch dim"]) -> None:
        """Refuse data that this likelihood does not take: anything but finite floats."""
        dtype = np.dtype(x.dtype)
        require(
            jnp.issubdtype(dtype, jnp.floating),
            "x",
            "floats for NormalLikelihood (for integers on a grid use DiscretizedNormalLikelihood)",
            f"dtype {dtype}",
            TypeError,
        )
        require_finite("x", x)
        for name in ("loc", "scale"):
            size = np.size(getattr(self, name))
            require(
                np.ndim(getattr(self, name)) == 0 or size == x.shape[-1],
                "x",
                f"{size} dimensions, as the likelihood's {name} has",
                f"shape {tuple(x.shape)}",
            )

    def encode(self, x: Real[AnyArray, "*batch dim"]) -> Float[Array, "*batch dim"]:
        r"""Data to the chain, :math:`x_0 = (x - loc) / scale`, shape ``(*batch, dim)``."""
        self.check_data(x)
        x = jnp.asarray(x, jnp.zeros(()).dtype)
        return (x - jnp.asarray(self.loc, x.dtype)) / jnp.asarray(self.scale, x.dtype)

    def decode(self, x0: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        r"""From the chain to the user's units, :math:`x = loc + scale \cdot x_0`; the inverse of :meth:`encode`."""
        return jnp.asarray(self.loc, x0.dtype) + jnp.asarray(self.scale, x0.dtype) * x0

    def log_jacobian(self, dim: int) -> float:
        r"""The log of :math:`|dx_0/dx|`, summed over the dimensions, in nats."""
        return -float(np.log(np.broadcast_to(self.scale, dim)).sum())

    def __call__(self, loc: Float[Array, "*batch dim"], scale: Scale) -> dist.Distribution:
        r"""Distribution of x when :math:`x_0` is N(loc, scale²), independent over the last axis."""
        return dist.Normal(self.decode(loc), jnp.asarray(self.scale, loc.dtype) * scale).to_event(1)


def _numbers(name: str, value: Numbers) -> tuple[float, ...] | float:
    array = np.asarray(value, np.float64)
    require(array.ndim <= 1, name, "a number or one number per dimension", f"shape {array.shape}")
    require_finite(name, array)
    return tuple(array.tolist()) if array.ndim else float(array)


class DiscretizedNormalLikelihood(AbstractLikelihood):
    r"""Integers 0 … ``levels`` − 1 on a grid in [−1, 1], with the probabilities of a normal's bins.

    :math:`x_0 = 2x/(L-1) - 1`; each bin has half-width 1/(L−1) and the edge bins take the tails.
    Source: Ho et al. (2020), arXiv:2006.11239, eq. 13.

    Args:
        levels: Number of levels L, at least 2.
    """

    levels: int = eqx.field(static=True)

    def __init__(self, levels: Whole) -> None:
        try:
            self.levels = operator.index(levels)
        except TypeError:
            raise TypeError(f"levels: Expected an integer; got {levels!r}") from None
        require(self.levels >= 2, "levels", "at least 2", self.levels)
        require(self.levels <= MOST_LEVELS, "levels", f"at most {MOST_LEVELS}, as float32 tells apart", self.levels)

    def check_data(self, x: Real[AnyArray, "*batch dim"]) -> None:
        """Refuse data that this likelihood does not take: anything but integers 0 … levels − 1."""
        dtype = np.dtype(x.dtype)
        require(
            jnp.issubdtype(dtype, jnp.integer),
            "x",
            "integers for DiscretizedNormalLikelihood (for floats use NormalLikelihood)",
            f"dtype {dtype}",
            TypeError,
        )
        if is_concrete(x):
            values = np.asarray(x)
            bad = np.argwhere((values < 0) | (values >= self.levels))
            if bad.size:
                first = tuple(int(i) for i in bad[0])
                require(False, "x", f"levels 0 … {self.levels - 1}", f"{values[first]} at index {list(first)}")

    def encode(self, x: Real[AnyArray, "*batch dim"]) -> Float[Array, "*batch dim"]:
        r"""Levels to the chain, :math:`x_0 = 2x/(L-1) - 1`, shape ``(*batch, dim)``."""
        self.check_data(x)
        x = jnp.asarray(x)
        return x.astype(jnp.zeros(()).dtype) * (2 / (self.levels - 1)) - 1

    def decode(self, x0: Float[Array, "*batch dim"]) -> Int[Array, "*batch dim"]:
        """From the chain to the nearest level; the inverse of :meth:`encode`."""
        return _nearest_level(x0, self.levels)

    def log_jacobian(self, dim: int) -> float:
        r"""The log of :math:`|dx_0/dx|`, summed over the dimensions, in nats; bins have width 1 in x."""
        return dim * float(np.log(2 / (self.levels - 1)))

    def __call__(self, loc: Float[Array, "*batch dim"], scale: Scale) -> dist.Distribution:
        r"""Distribution of x when :math:`x_0` is N(loc, scale²), independent over the last axis."""
        return DiscretizedNormal(loc, scale, self.levels).to_event(1)


class DiscretizedNormal(dist.Distribution):
    """A normal on [−1, 1] rounded to one of ``levels`` equidistant points; the edge bins take the tails.

    Args:
        loc: Location of the normal, on the scale of [−1, 1].
        scale: Its standard deviation.
        levels: Number of points.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    pytree_data_fields = ("loc", "scale")
    pytree_aux_fields = ("levels",)

    def __init__(
        self, loc: Float[Array, "*#batch"], scale: Float[Array, "*#batch"], levels: int, *, validate_args: bool | None = None
    ) -> None:
        self.levels = levels
        self.loc, self.scale = promote_shapes(loc, scale)
        super().__init__(jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale)), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The integers 0 … levels − 1."""
        return constraints.integer_interval(0, self.levels - 1)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Int[Array, "..."]:
        """Draw the normal, then round it to its level."""
        shape = sample_shape + self.batch_shape
        value = self.loc + self.scale * jax.random.normal(key, shape, jnp.result_type(self.loc))
        return _nearest_level(value, self.levels)

    def log_prob(self, value: Integer[AnyArray, "..."]) -> Float[Array, "..."]:
        """Log of the probability of a level, in nats; finite for any loc and scale."""
        half_width = 1 / (self.levels - 1)
        centre = value.astype(self.loc.dtype) * (2 * half_width) - 1
        # Mirror the axis where needed, so that the bin's centre lies at or below the mean: log Φ is accurate there.
        offset = centre - self.loc
        sign = jnp.where(offset > 0, -1, 1).astype(offset.dtype)
        lower_tail = value == jnp.where(sign > 0, 0, self.levels - 1)
        upper_tail = value == jnp.where(sign > 0, self.levels - 1, 0)
        upper = (sign * offset + half_width) / self.scale
        width = 2 * half_width / self.scale
        lower = upper - width
        interval = jnp.where(
            upper_tail, jnp.log1p(-ndtr(jnp.minimum(lower, 0))), log_ndtr(upper) + _log_fraction(upper, width)
        )
        return jnp.where(lower_tail, log_ndtr(upper), interval)


def _nearest_level(value: Float[Array, "*batch"], levels: int) -> Int[Array, "*batch"]:
    level = jnp.round((value + 1) * ((levels - 1) / 2))
    return jnp.clip(level, 0, levels - 1).astype(jnp.int32)


def _log_fraction(upper: Float[Array, "*batch"], width: Float[Array, "*#batch"]) -> Float[Array, "*batch"]:
    r"""The log of (Φ(upper) − Φ(upper − width)) / Φ(upper), for a bin whose centre is at or below 0.

    The log-ratio of the two Φ is at most :math:`-\text{width} \cdot |\text{centre}|`, because the hazard φ/Φ is at
    least −x; far in the tail, where the difference of two log Φ is all rounding, that bound is the ratio itself.
    """
    bound = width * (upper - width / 2)
    log_ratio = log_ndtr(upper - width) - log_ndtr(upper)
    return jnp.log(-jnp.expm1(jnp.minimum(jnp.minimum(log_ratio, bound), -jnp.finfo(upper.dtype).tiny)))
