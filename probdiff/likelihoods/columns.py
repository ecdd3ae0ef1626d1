"""Columns of several kinds in one table: each column has its own likelihood, and one chain adds noise to all columns.

The likelihood of a row is the product of the likelihoods of its columns, given :math:`z_1`; the chain models the dependence between
columns. If some columns are discrete and others have a density, the row has a density with respect to the product of counting and
Lebesgue measure: its bound is in nats, log p(continuous | discrete) + log P(discrete).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real
from numpyro import distributions as dist
from numpyro.distributions import constraints

from probdiff._checks import AnyArray, is_concrete, require, require_type
from probdiff._frames import as_array, codes, columns_of, is_frame, numbers, place, require_finite_column
from probdiff.likelihoods.base import AbstractLikelihood, Scale
from probdiff.likelihoods.categorical import CategoricalLikelihood

Key = int | str
Positions = tuple[tuple[int, ...], ...]


class ColumnLikelihood(AbstractLikelihood):
    """The likelihood of a table: one for each column, or for several columns of a kind.

    Data are an array of shape ``(row, column)`` that holds all columns as numbers, or a data frame. The chain has the dimensions
    of the parts, one after the other (:meth:`encoded_dim` in all): one for a column with a density or on a grid, and as
    many as there are categories for a categorical column.

    Args:
        parts: A dict from a column, or a tuple of columns, to a likelihood. Either all columns are named, or all are numbered from 0.
        columns: Names in the order of the array; if not given, the order in ``parts``.

    Raises:
        ValueError: If a column is missing, or occurs twice; TypeError if a part is not the likelihood of a column, or names and numbers are mixed.

    Example:
        >>> import pandas, probdiff
        >>> people = pandas.DataFrame({"height": [1.8, 1.6], "colour": ["blue", "red"]})
        >>> colour = probdiff.likelihoods.CategoricalLikelihood(["red", "green", "blue"])
        >>> likelihood = probdiff.likelihoods.ColumnLikelihood({"height": probdiff.NormalLikelihood(1.7, 0.1), "colour": colour})
        >>> likelihood.encode(likelihood.read(people)).shape  # one dimension for the height, three for the colour
        (2, 4)
    """

    parts: tuple[AbstractLikelihood, ...]
    positions: Positions = eqx.field(static=True)
    columns: tuple[str, ...] | None = eqx.field(static=True)

    def __init__(
        self, parts: Mapping[Key, AbstractLikelihood] | Mapping[tuple[Key, ...], AbstractLikelihood], columns: Sequence[str] | None = None
    ) -> None:
        require(isinstance(parts, Mapping) and parts, "parts", "a dict from columns to likelihoods", repr(parts), TypeError)
        for key, part in parts.items():
            require_type(f"parts[{key!r}]", part, AbstractLikelihood)
            nested = isinstance(part, ColumnLikelihood)
            require(not nested, f"parts[{key!r}]", "the likelihood of a column", "a ColumnLikelihood", TypeError)
        groups = [key if isinstance(key, tuple) else (key,) for key in parts]
        keys = [key for group in groups for key in group]
        named = all(isinstance(key, str) for key in keys)
        whole = all(isinstance(key, int | np.integer) for key in keys)
        require(named or (whole and columns is None), "parts", "columns that are all named, or all numbered", keys, TypeError)
        order: list[Any] = (list(keys) if columns is None else list(columns)) if named else list(range(len(keys)))
        require(sorted(keys) == sorted(order), "parts", f"each of the columns {order} once", keys)
        require(len(set(keys)) == len(keys), "parts", "each column once", keys)
        self.parts = tuple(parts.values())
        self.positions = tuple(tuple(order.index(key) for key in group) for group in groups)
        self.columns = tuple(order) if named else None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        keys = range(self.num_columns) if self.columns is None else self.columns
        return {"parts": {tuple(keys[j] for j in at): part for part, at in self._placed}, "columns": self.columns}

    @property
    def levels(self) -> None:
        """None: bits/dim are not defined for columns of several kinds."""
        return None

    @property
    def num_columns(self) -> int:
        """Number of columns of the data."""
        return sum(map(len, self.positions))

    def encoded_dim(self, columns: int) -> int:
        """Number of dimensions of the chain, summed over the parts; ``columns`` must be the number of columns of this likelihood."""
        require(columns == self.num_columns, "x", f"shape (row, {self.num_columns})", f"{columns} columns")
        return sum(self._sizes)

    def placed(self, columns: int) -> list[tuple[AbstractLikelihood, tuple[int, ...]]]:
        """The parts, each with the positions of its columns."""
        return self._placed

    def pieces(self, dim: int) -> list[tuple[int, Float[np.ndarray, "point dim"] | None]]:
        """The pieces of all parts, one after the other."""
        return [piece for part, size in zip(self.parts, self._sizes) for piece in part.pieces(size)]

    def read(self, x: Any) -> Any:
        """Data as an array of shape ``(row, column)``: a data frame by the names of the columns, labels as their indices.

        A frame may have further columns.

        Raises:
            ValueError: If a column is missing, a cell is missing or a label is unknown; TypeError if a column does not hold numbers.
        """
        if self.columns is None or not is_frame(x):
            return as_array(x)
        given = columns_of(x)
        missing = [name for name in self.columns if name not in given]
        require(not missing, "x", f"a data frame with the columns {', '.join(self.columns)}", f"none named {', '.join(missing)}")
        read: dict[int, np.ndarray] = {}
        for part, positions in zip(self.parts, self.positions):
            labels = part.labels if isinstance(part, CategoricalLikelihood) else None
            for j in positions:
                column = given[self.columns[j]]
                read[j] = numbers(column) if labels is None else codes(column, labels)
        return np.column_stack([read[j] for j in range(len(read))])

    def check_data(self, x: Real[AnyArray, "*batch column"]) -> None:
        """Refuse data that do not suit this likelihood; the message names the column."""
        self.encoded_dim(x.shape[-1])
        if not is_concrete(x):
            return
        values = np.asarray(x)
        for j in range(self.num_columns):
            require_finite_column(values[..., j].reshape(-1), self._name(j))
        for part, positions in zip(self.parts, self.positions):
            # A discrete likelihood is applied to each of its columns; a density may have parameters for each.
            for group in [(j,) for j in positions] if part.points is not None else [positions]:
                names = ", ".join(map(self._name, group))
                found = values[..., group]
                if part.levels is not None:
                    bad = np.flatnonzero(found != np.round(found))
                    require(bad.size == 0, "x", "whole numbers", f"{found.flat[bad[:1]]} in {place(bad, names)}")
                try:
                    part.check_data(_cast(part, found))
                except (ValueError, TypeError) as error:
                    raise type(error)(f"column {names}: {error}") from None

    def encode(self, x: Real[AnyArray, "*batch column"]) -> Float[Array, "*batch dim"]:
        """Encode columns for the chain, shape ``(*batch, dim)``."""
        self.check_data(x)
        return jnp.concatenate([part.encode(_cast(part, x[..., list(at)])) for part, at in self._placed], -1)

    def decode(self, x0: Float[Array, "*batch dim"]) -> Real[Array, "*batch column"]:
        """Map the chain's :math:`x_0` to the columns; the inverse of :meth:`encode`."""
        return _together([part.decode(piece) for part, piece in zip(self.parts, self._split(x0))], self.positions)

    def unrounded(self, x0: Float[Array, "*batch dim"]) -> Real[Array, "*batch column"]:
        """:meth:`decode` without rounding the columns on a grid; categories are still the nearest ones, with derivative 0."""
        return _together([part.unrounded(piece) for part, piece in zip(self.parts, self._split(x0))], self.positions)

    def log_jacobian(self, dim: int) -> float:
        """The sum of the log-Jacobians of the parts, in nats."""
        return sum(part.log_jacobian(size) for part, size in zip(self.parts, self._sizes))

    def __call__(self, loc: Float[Array, "*batch dim"], scale: Scale) -> dist.Distribution:
        """Distribution of a row when :math:`x_0` is N(loc, scale²): the parts are independent."""
        scales = self._split(jnp.broadcast_to(scale, loc.shape))
        rows = tuple(part(*each) for part, *each in zip(self.parts, self._split(loc), scales))
        return Columns(rows, self.positions, tuple(part.levels is not None for part in self.parts))

    def __repr__(self) -> str:
        """The kind of each column, and the dimensions of the chain."""
        kinds = (f"{', '.join(map(self._name, at))}: {part.words}" for part, at in self._placed)
        return f"ColumnLikelihood({'; '.join(kinds)}; {self.num_columns} columns, {sum(self._sizes)} dimensions of the chain)"

    @property
    def _sizes(self) -> list[int]:
        return [part.encoded_dim(len(at)) for part, at in self._placed]

    @property
    def _placed(self) -> list[tuple[AbstractLikelihood, tuple[int, ...]]]:
        return list(zip(self.parts, self.positions))

    def _split(self, x0: Float[Array, "*batch dim"]) -> list[Float[Array, "*batch part"]]:
        return jnp.split(x0, np.cumsum(self._sizes)[:-1], -1)

    def _name(self, position: int) -> str:
        return str(position) if self.columns is None else self.columns[position]


class Columns(dist.Distribution):
    """The distribution of a row whose columns are drawn by independent distributions, each for some of the columns.

    Args:
        parts: Distributions of the same batch shape and one event dimension.
        positions: For each part, the positions of its columns.
        whole: For each part, whether its values are integers.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> from numpyro import distributions as dist
        >>> parts = dist.Normal(jnp.zeros(1), 1.0).to_event(1), dist.Bernoulli(probs=jnp.array([0.5])).to_event(1)
        >>> row = probdiff.likelihoods.Columns(parts, positions=((1,), (0,)), whole=(False, True))
        >>> round(row.log_prob(jnp.array([1.0, 0.0])).item(), 3)  # log 0.5 + log N(0; 0, 1)
        -1.612
    """

    pytree_data_fields: tuple[str, ...] = ("parts",)
    pytree_aux_fields: tuple[str, ...] = ("positions", "whole")

    def __init__(
        self,
        parts: tuple[dist.Distribution, ...],
        positions: Positions,
        whole: tuple[bool, ...],
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.parts: tuple[dist.Distribution, ...] = parts
        self.positions: Positions = positions
        self.whole: tuple[bool, ...] = whole
        super().__init__(parts[0].batch_shape, (sum(map(len, positions)),), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Real vectors; the likelihood checks which of them are possible data."""
        return constraints.real_vector

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Real[Array, "..."]:
        """Draw every part."""
        keys = jax.random.split(key, len(self.parts))
        return _together([part.sample(key, sample_shape) for part, key in zip(self.parts, keys)], self.positions)

    def log_prob(self, value: Real[AnyArray, "..."]) -> Float[Array, "..."]:
        """Log-density of a row, in nats: the sum over the parts."""
        pieces = (jnp.asarray(value)[..., list(at)] for at in self.positions)
        cast = (_as_integers(piece) if whole else piece for piece, whole in zip(pieces, self.whole))
        return sum(part.log_prob(piece) for part, piece in zip(self.parts, cast))


def _cast(part: AbstractLikelihood, x: Any) -> Any:
    """Columns in the dtype for the likelihood of a part: integers for a grid."""
    if part.levels is not None:
        return _as_integers(x)
    # A density accepts floats only; categories accept both.
    return x if jnp.issubdtype(x.dtype, jnp.floating) or part.points is not None else x.astype(jnp.zeros(()).dtype)


def _as_integers(x: Any) -> Any:
    return x if jnp.issubdtype(x.dtype, jnp.integer) else (np if isinstance(x, np.ndarray) else jnp).round(x).astype(np.int32)


def _together(parts: list[jax.Array], positions: Positions) -> Real[Array, "... column"]:
    """The columns of all parts in the order of the data."""
    order = np.argsort([j for at in positions for j in at])
    dtype = jnp.result_type(*parts)
    return jnp.concatenate([part.astype(dtype) for part in parts], -1)[..., order]
