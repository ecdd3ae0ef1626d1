r"""Categories: each is encoded as a point in as many dimensions as there are categories.

Category v of K is the point :math:`c_v = \sqrt K e_v - 1/\sqrt K`, the one-hot vector :math:`e_v` shifted and scaled: mean 0 and
variance 1 in every dimension if the categories are equally frequent, all at the same distance from 0 and from each other.
The probability of v given z_1 is the density of its point under N(loc, scale²), normalised over the K points:

    p(v | z_1) = exp(−‖c_v − loc‖² / (2 scale²)) / Σ_u exp(−‖c_u − loc‖² / (2 scale²)) = softmax_v(√K loc / scale²).

It is a probability, so the bound is at most 0 for a table of categories alone.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real
from numpyro import distributions as dist
from numpyro.distributions import constraints

from probdiff._checks import AnyArray, Number, Whole, is_concrete, require, require_count, require_finite
from probdiff.likelihoods.base import AbstractLikelihood, Scale

MOST_CATEGORIES = 2**10
MOST_SHOWN = 10


class CategoricalLikelihood(AbstractLikelihood):
    r"""Categories without an order; a column of data becomes as many dimensions of the chain as there are categories.

    Args:
        categories: The number K of categories, for data 0 … K − 1; or the categories themselves: numbers, which are the values of the data, or
            labels, for which an array holds 0 … K − 1 (and a data frame the labels). At least two.

    Raises:
        ValueError, TypeError: If there are fewer than two or more than 1024 categories, two are equal, or they are neither numbers nor strings.

    Example:
        >>> import numpy as np, probdiff
        >>> colours = probdiff.likelihoods.CategoricalLikelihood(["red", "green", "blue"])
        >>> x0 = colours.encode(np.array([[2], [0]]))  # three dimensions of the chain for the one column
        >>> x0.shape, colours.decode(x0).tolist()
        ((2, 3), [[2], [0]])
    """

    values: tuple[float, ...] = eqx.field(static=True)
    labels: tuple[str, ...] | None = eqx.field(static=True)

    def __init__(self, categories: Whole | Sequence[Number] | Sequence[str]) -> None:
        if isinstance(categories, int | np.integer):
            require_count("categories", categories)
            categories = range(int(categories))
        categories = categories.tolist() if hasattr(categories, "tolist") else categories  # of an array, or of an index of pandas
        listed = isinstance(categories, Sequence) and not isinstance(categories, str)
        require(listed, "categories", "a number of categories, or a sequence of them", repr(categories), TypeError)
        words = all(isinstance(each, str) for each in categories)
        kind = words or all(isinstance(each, int | float | np.number) for each in categories)
        require(kind, "categories", "numbers, or labels that are strings", repr(tuple(categories)), TypeError)
        self.labels = tuple(map(str, categories)) if words else None
        self.values = tuple(float(v) for v in (range(len(categories)) if words else categories))
        require_finite("categories", self.values)
        size = len(self.values)
        require(2 <= size <= MOST_CATEGORIES, "categories", f"2 to {MOST_CATEGORIES}", size)
        different = len(set(self.labels or self.values)) == size
        require(different, "categories", "different ones", repr(tuple(categories)))

    @property
    def categories(self) -> tuple[str, ...] | tuple[float, ...]:
        """The labels; or the numbers, if these are the values of the data."""
        return self.labels or self.values

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"categories": self.categories}

    @property
    def words(self) -> str:
        """The categories."""
        shown = [each if isinstance(each, str) else f"{each:g}" for each in self.categories]
        few = shown if len(shown) <= MOST_SHOWN else [*shown[: MOST_SHOWN - 1], "…"]
        return f"{len(shown)} categories ({', '.join(few)})"

    @property
    def levels(self) -> None:
        """None: there is no grid, and bits/dim are not defined."""
        return None

    @property
    def points(self) -> Float[np.ndarray, "category dim"]:
        """The point that encodes each category, :math:`c_v`, shape ``(K, K)``."""
        size = len(self.values)
        return np.sqrt(size) * np.eye(size) - size**-0.5

    def encoded_dim(self, columns: int) -> int:
        """Number of dimensions of the chain: K for each column."""
        return columns * len(self.values)

    def check_data(self, x: Real[AnyArray, "*batch column"]) -> None:
        """Refuse data with any value that is not a category."""
        if is_concrete(x):
            values = np.asarray(x)
            precision = values.dtype if jnp.issubdtype(values.dtype, jnp.floating) else np.float64
            bad = np.argwhere(~np.isin(values, np.asarray(self.values, precision)))
            if bad.size:
                first = tuple(int(i) for i in bad[0])
                expected = f"one of {', '.join(f'{value:g}' for value in self.values)}"
                require(False, "x", expected, f"{values[first]} at index {list(first)}")

    def encode(self, x: Real[AnyArray, "*batch column"]) -> Float[Array, "*batch dim"]:
        """Encode categories as their points, shape ``(*batch, column · K)``."""
        self.check_data(x)
        points = jnp.asarray(self.points, jnp.zeros(()).dtype)[_index(jnp.asarray(x), self.values)]
        return points.reshape(*x.shape[:-1], -1)

    def decode(self, x0: Float[Array, "*batch dim"]) -> Real[Array, "*batch column"]:
        """The nearest category to each point; the inverse of :meth:`encode`."""
        return _value(self._by_category(x0).argmax(-1), self.values)

    def log_jacobian(self, dim: int) -> float:
        """0: probabilities have no Jacobian."""
        return 0.0

    def __call__(self, loc: Float[Array, "*batch dim"], scale: Scale) -> dist.Distribution:
        r"""Distribution of x when :math:`x_0` is N(loc, scale²) conditioned on being one of the points, independent over columns."""
        # Up to a term that all v share, ‖c_v − loc‖² is the square in dimension v minus its value without the 1 of e_v.
        size = len(self.values)
        middle = size**0.5 / 2 - size**-0.5
        loc, scale = self._by_category(loc), self._by_category(jnp.broadcast_to(scale, loc.shape))
        logits = size**0.5 * (loc - middle) / scale**2
        return Categories(logits, self.values).to_event(1)

    def _by_category(self, x0: Float[Array, "*batch dim"]) -> Float[Array, "*batch column category"]:
        return x0.reshape(*x0.shape[:-1], -1, len(self.values))


class Categories(dist.Distribution):
    """A categorical distribution over given values, by unnormalised log probabilities.

    Args:
        logits: Shape ``(*batch, category)``.
        values: The value of each category in the data; whole numbers are drawn as integers.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> d = probdiff.likelihoods.Categories(jnp.log(jnp.array([0.5, 0.25, 0.25])), values=(1.0, 2.0, 4.0))
        >>> round(jnp.exp(d.log_prob(jnp.array(4.0))).item(), 3)
        0.25
    """

    arg_constraints: dict[str, Any] = {"logits": constraints.real_vector}
    pytree_data_fields: tuple[str, ...] = ("logits",)
    pytree_aux_fields: tuple[str, ...] = ("values",)

    def __init__(
        self, logits: Float[Array, "*batch category"], values: tuple[float, ...], *, validate_args: bool | None = None
    ) -> None:
        self.logits: Float[Array, "*batch category"] = logits
        self.values: tuple[float, ...] = values
        super().__init__(jnp.shape(logits)[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Real numbers; :meth:`log_prob` does not check that a value is a category."""
        return constraints.real

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Real[Array, "..."]:
        """Draw categories."""
        return _value(jax.random.categorical(key, self.logits, shape=sample_shape + self.batch_shape), self.values)

    def log_prob(self, value: Real[AnyArray, "..."]) -> Float[Array, "..."]:
        """Log of the probability of the category nearest to each value, in nats."""
        log_p = jax.nn.log_softmax(self.logits)
        index = _index(value, self.values)[..., None]
        shape = jnp.broadcast_shapes(index.shape[:-1], log_p.shape[:-1])
        index, log_p = jnp.broadcast_to(index, (*shape, 1)), jnp.broadcast_to(log_p, (*shape, log_p.shape[-1]))
        return jnp.take_along_axis(log_p, index, -1)[..., 0]


def _index(x: Real[AnyArray, "*batch"], values: tuple[float, ...]) -> Int[Array, "*batch"]:
    """The index of the category nearest to each value."""
    distance = jnp.abs(x[..., None] - jnp.asarray(values, jnp.zeros(()).dtype))
    return distance.argmin(-1)


def _value(index: Int[Array, "*batch"], values: tuple[float, ...]) -> Real[Array, "*batch"]:
    whole = all(value == int(value) for value in values)
    return jnp.asarray(values, jnp.int32 if whole else jnp.zeros(()).dtype)[index]
