"""Continuous data: a normal density in the user's units."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real
from numpyro import distributions as dist

from probdiff._checks import AnyArray, Numbers, require, require_finite
from probdiff.likelihoods.base import AbstractLikelihood, Scale


class NormalLikelihood(AbstractLikelihood):
    r"""Continuous data, :math:`x = loc + scale \cdot x_0`, with a normal density.

    Args:
        loc: Shift of the data, a number or one per dimension.
        scale: Positive scale of the data, a number or one per dimension. The Jacobian is part of the density.

    Use :meth:`standardized` to compute both from data.

    Raises:
        ValueError: If ``scale`` is not positive, a number is not finite, or an argument has more than one axis.

    Example:
        >>> import numpy as np, probdiff
        >>> likelihood = probdiff.NormalLikelihood.standardized(np.array([[1.0], [3.0], [5.0]]))
        >>> likelihood.loc, likelihood.encode(np.array([[3.0]])).tolist()
        ((3.0,), [[0.0]])
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

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"loc": self.loc, "scale": self.scale}

    @classmethod
    def standardized(cls, x: Real[AnyArray, "datum dim"]) -> "NormalLikelihood":
        """The likelihood whose ``encode`` gives these data mean 0 and standard deviation 1 in every dimension.

        Args:
            x: Data, shape ``(datum, dim)``, floats; an array or a data frame.

        Raises:
            ValueError: If a column is constant, or the data are not finite; TypeError if they are not floats.
        """
        x = cls().read(x)
        cls().check_data(x)
        x = np.asarray(x, np.float64)
        scale = x.std(0)
        constant = np.flatnonzero(~(scale > 1e-12 * np.abs(x).max(0)))
        if constant.size:
            require(False, "x", "columns that vary", f"a constant column {constant[0]} ({len(x)} rows)")
        return cls(x.mean(0), scale)

    def check_data(self, x: Real[AnyArray, "*batch dim"]) -> None:
        """Refuse data that are not finite floats."""
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
        r"""Encode data for the chain, :math:`x_0 = (x - loc) / scale`, shape ``(*batch, dim)``."""
        self.check_data(x)
        x = jnp.asarray(x, jnp.zeros(()).dtype)
        return (x - jnp.asarray(self.loc, x.dtype)) / jnp.asarray(self.scale, x.dtype)

    def decode(self, x0: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        r"""Map the chain's :math:`x_0` to the user's units, :math:`x = loc + scale \cdot x_0`; the inverse of :meth:`encode`."""
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
