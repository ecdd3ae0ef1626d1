"""Integers on a grid: the probabilities of a normal's bins.

Source: Ho et al. (2020), arXiv:2006.11239, eq. 13.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray, Real
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.util import promote_shapes

from probdiff._checks import AnyArray, Whole, is_concrete, require
from probdiff.likelihoods.base import AbstractLikelihood, Scale

MOST_LEVELS = 2**22


class DiscretizedNormalLikelihood(AbstractLikelihood):
    r"""Integers ``first`` … ``first`` + ``levels`` − 1 on a grid in [−1, 1], each with the probability of its bin under a normal.

    :math:`x_0 = 2(x - first)/(L-1) - 1`; each bin has half-width 1/(L−1) and the edge bins include the tails.
    Source: Ho et al. (2020), arXiv:2006.11239, eq. 13.

    Args:
        levels: Number of levels L, at least 2.
        first: The lowest integer, for data that do not begin at 0, such as years.

    Raises:
        ValueError, TypeError: If ``levels`` or ``first`` is not an integer, or ``levels`` is out of range.

    Example:
        >>> import numpy as np, probdiff
        >>> grey = probdiff.DiscretizedNormalLikelihood(levels=3)
        >>> grey.encode(np.array([[0, 1, 2]])).tolist()
        [[-1.0, 0.0, 1.0]]
    """

    levels: int = eqx.field(static=True)
    first: int = eqx.field(static=True)

    def __init__(self, levels: Whole, first: Whole = 0) -> None:
        for name, value in (("levels", levels), ("first", first)):
            require(isinstance(value, int | np.integer), name, "an integer", repr(value), TypeError)
        self.levels, self.first = int(levels), int(first)
        require(self.levels >= 2, "levels", "at least 2", self.levels)
        require(self.levels <= MOST_LEVELS, "levels", f"at most {MOST_LEVELS}, as float32 tells apart", self.levels)

    def check_data(self, x: Real[AnyArray, "*batch dim"]) -> None:
        """Refuse data that are not integers of the grid."""
        dtype = np.dtype(x.dtype)
        require(
            jnp.issubdtype(dtype, jnp.integer),
            "x",
            "integers for DiscretizedNormalLikelihood (for floats use NormalLikelihood)",
            f"dtype {dtype}",
            TypeError,
        )
        if is_concrete(x):
            values, last = np.asarray(x), self.first + self.levels - 1
            bad = np.argwhere((values < self.first) | (values > last))
            if bad.size:
                place = tuple(int(i) for i in bad[0])
                require(False, "x", f"levels {self.first} … {last}", f"{values[place]} at index {list(place)}")

    def encode(self, x: Real[AnyArray, "*batch dim"]) -> Float[Array, "*batch dim"]:
        r"""Encode levels for the chain, :math:`x_0 = 2(x - first)/(L-1) - 1`, shape ``(*batch, dim)``."""
        self.check_data(x)
        level = jnp.asarray(x) - self.first
        return level.astype(jnp.zeros(()).dtype) * (2 / (self.levels - 1)) - 1

    def decode(self, x0: Float[Array, "*batch dim"]) -> Int[Array, "*batch dim"]:
        """The nearest level to each value of :math:`x_0`; the inverse of :meth:`encode`."""
        return _nearest_level(x0, self.levels) + self.first

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"levels": self.levels, "first": self.first}

    @property
    def words(self) -> str:
        """The levels."""
        return f"whole numbers, {self.first} … {self.first + self.levels - 1}"

    @property
    def points(self) -> Float[np.ndarray, "point dim"]:
        """The encoded levels, from −1 to 1, shape ``(levels, 1)``."""
        return np.linspace(-1.0, 1.0, self.levels)[:, None]

    def unrounded(self, x0: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """:meth:`decode` without rounding, an affine map."""
        return (x0 + 1) * ((self.levels - 1) / 2) + self.first

    def log_jacobian(self, dim: int) -> float:
        r"""The log of :math:`|dx_0/dx|`, summed over the dimensions, in nats; bins have width 1 in x."""
        return dim * float(np.log(2 / (self.levels - 1)))

    def __call__(self, loc: Float[Array, "*batch dim"], scale: Scale) -> dist.Distribution:
        r"""Distribution of x when :math:`x_0` is N(loc, scale²), independent over the last axis."""
        return DiscretizedNormal(loc, scale, self.levels, self.first).to_event(1)


class DiscretizedNormal(dist.Distribution):
    """A normal on [−1, 1] rounded to one of ``levels`` equidistant points; the edge bins include the tails.

    Args:
        loc: Mean of the normal, on the scale of [−1, 1].
        scale: Standard deviation of the normal.
        levels: Number of points.
        first: The value of the first point; the values of the other points are the integers after it.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> d = probdiff.likelihoods.DiscretizedNormal(jnp.array(0.2), jnp.array(0.5), levels=5)
        >>> round(jnp.exp(d.log_prob(jnp.arange(5))).sum().item(), 3)
        1.0
    """

    arg_constraints: dict[str, Any] = {"loc": constraints.real, "scale": constraints.positive}
    pytree_data_fields: tuple[str, ...] = ("loc", "scale")
    pytree_aux_fields: tuple[str, ...] = ("levels", "first")

    def __init__(
        self,
        loc: Float[Array, "*#batch"],
        scale: Float[Array, "*#batch"],
        levels: int,
        first: int = 0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.levels: int = levels
        self.first: int = first
        self.loc: Float[Array, "*#batch"]
        self.scale: Float[Array, "*#batch"]
        self.loc, self.scale = promote_shapes(loc, scale)
        super().__init__(jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale)), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The integers first … first + levels − 1."""
        return constraints.integer_interval(self.first, self.first + self.levels - 1)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Int[Array, "..."]:
        """Draw the normal, then round it to its level."""
        shape = sample_shape + self.batch_shape
        value = self.loc + self.scale * jax.random.normal(key, shape, jnp.result_type(self.loc))
        return _nearest_level(value, self.levels) + self.first

    def log_prob(self, value: Integer[AnyArray, "..."]) -> Float[Array, "..."]:
        """Log of the probability of a level, in nats; finite for any loc and scale."""
        value = value - self.first
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
    least −x; far in the tail, where the difference of two log Φ has no correct digits, the ratio equals that bound.
    """
    bound = width * (upper - width / 2)
    log_ratio = log_ndtr(upper - width) - log_ndtr(upper)
    return jnp.log(-jnp.expm1(jnp.minimum(jnp.minimum(log_ratio, bound), -jnp.finfo(upper.dtype).tiny)))
