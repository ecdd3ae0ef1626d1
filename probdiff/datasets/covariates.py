"""The context of a conditional model: covariates and labels in the user's units, and their encoding as an array for a network.

A covariate of numbers is standardised by the mean and standard deviation of the training split, for all rows. A covariate of
labels, truth values or few whole numbers has a dimension for each category: the one-hot vector, shifted and scaled to about mean 0 and
variance 1 as in :class:`~probdiff.likelihoods.CategoricalLikelihood`. (With 0 and 1 a network learns more slowly: digits given
their labels cost 0.03 bits/dim more after 300 iterations.)
"""

import contextlib
import csv
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Real, Shaped

from probdiff._checks import AnyArray, require
from probdiff._frames import (
    columns_of,
    is_frame,
    is_text,
    labels,
    numbers,
    place,
    require_complete,
    require_finite_column,
)
from probdiff.likelihoods.categorical import MOST_CATEGORIES, CategoricalLikelihood
from probdiff.likelihoods.density import has_few_values

if TYPE_CHECKING:
    import narwhals

Cells = Shaped[np.ndarray, "row"]  # of one covariate: numbers, or labels as strings


@dataclasses.dataclass(frozen=True)
class Covariate:
    """One covariate, with its encoding.

    Attributes:
        name: Name of the covariate.
        categories: The possible labels or numbers; None for a continuous covariate.
        loc, scale: The number that is encoded as 0, and the difference that is encoded as 1.

    Example:
        >>> import numpy as np, probdiff
        >>> sex = probdiff.datasets.Covariate("sex", categories=("female", "male"))
        >>> print(sex.encode(np.array(["male", "female"])).round(2))
        [[-0.71  0.71]
         [ 0.71 -0.71]]
    """

    name: str
    categories: tuple[str, ...] | tuple[float, ...] | None = None
    loc: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, name: str, cells: Cells, train: Int[np.ndarray, "train"]) -> "Covariate":
        """The covariate whose kind is found from its cells: categories, or a number standardised by the cells at ``train``, the rows of the training split.

        Raises:
            ValueError: If all cells, or all numbers of the training split, are equal, or there are too many labels.
        """
        cells = np.char.strip(cells) if cells.dtype.kind == "U" else cells
        distinct = np.unique(cells)
        require(len(distinct) > 1, "context", "columns that vary", f"a constant column: {name!r}")
        if cells.dtype.kind == "U":
            most = min(MOST_CATEGORIES, len(cells) // 2)
            require(len(distinct) <= most, "context", f"at most {most} different labels in a column of {len(cells)} rows", f"{len(distinct)} in {name!r}")
            return cls(name, tuple(distinct.tolist()))
        if has_few_values(cells) and np.all(distinct == np.round(distinct)):
            return cls(name, tuple(distinct.astype(np.float64).tolist()))
        values = cells[train].astype(np.float64)
        require(values.std() > 0, "context", "columns that vary in the training split", f"a constant column: {name!r}")
        return cls(name, None, float(values.mean()), float(values.std()))

    @property
    def width(self) -> int:
        """Number of dimensions in the network's array."""
        return 1 if self.categories is None else len(self.categories)

    @property
    def words(self) -> str:
        """The kind of the covariate, as text."""
        if self.categories is None:
            return f"{self.name}, a number (mean {self.loc:.4g}, standard deviation {self.scale:.4g})"
        return f"{self.name}, {CategoricalLikelihood(self.categories).words}"

    def encode(self, cells: Cells) -> Float[np.ndarray, "row width"]:
        """The network's array for some cells, shape ``(row, width)``.

        Raises:
            ValueError: If a cell is not finite, not a number, or an unknown label.
        """
        if self.categories is None:
            return (self._numbers(cells)[:, None] - self.loc) / self.scale
        words = isinstance(self.categories[0], str)
        values = np.array([str(cell).strip() for cell in cells]) if words else self._numbers(cells)
        of_category = values[:, None] == np.asarray(self.categories)
        unknown = np.flatnonzero(~of_category.any(1))
        known = ", ".join(each if isinstance(each, str) else f"{each:g}" for each in self.categories)
        got = f"{cells[unknown[0]]} in {place(unknown, self.name)}" if unknown.size else ""
        require(unknown.size == 0, "context", f"one of the labels {known}", got)
        return CategoricalLikelihood(self.categories).points[of_category.argmax(1)]

    def decode(self, array: Real[AnyArray, "row width"]) -> Cells:
        """The inverse of :meth:`encode`: numbers, or labels as strings."""
        array = np.asarray(array)
        if self.categories is None:
            digits = 6 - int(np.floor(np.log10(self.scale)))  # in units of the resolution of float32
            return np.round(array[:, 0] * np.float64(self.scale) + self.loc, digits) + 0.0  # so that −0 becomes 0
        values = np.asarray(self.categories)[array.argmax(1)]
        return values if values.dtype.kind == "U" else values.astype(np.int64)

    def _numbers(self, cells: Cells) -> Float[np.ndarray, "row"]:
        try:
            values = np.asarray(cells, np.float64)
        except (TypeError, ValueError):
            bad = next(cell for cell in cells if not _is_number(cell))
            raise ValueError(f"context: Expected numbers of {self.name!r}; got {str(bad)!r}") from None
        require_finite_column(values, self.name, "context")
        return values


@dataclasses.dataclass(frozen=True)
class Covariates:
    """The covariates of a conditional model, in order.

    Attributes:
        columns: One :class:`Covariate` for each.

    Example:
        >>> import probdiff
        >>> age, sex = probdiff.datasets.Covariate("age", loc=40.0, scale=10.0), probdiff.datasets.Covariate("sex", ("female", "male"))
        >>> covariates = probdiff.datasets.Covariates((age, sex))
        >>> print(covariates.encode({"age": [50.0], "sex": ["male"]}).round(2))
        [[ 1.   -0.71  0.71]]
    """

    columns: tuple[Covariate, ...]

    @classmethod
    def of(cls, cells: Mapping[str, Cells], train: Int[np.ndarray, "train"]) -> "Covariates":
        """Covariates whose kinds are found from their cells, by name; ``train`` are the rows of the training split."""
        return cls(tuple(Covariate.of(name, each, train) for name, each in cells.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the covariates."""
        return tuple(column.name for column in self.columns)

    @property
    def width(self) -> int:
        """Number of dimensions of the network's array, its ``context_dim``."""
        return sum(column.width for column in self.columns)

    def encode(self, rows: Any) -> Float[np.ndarray, "row width"]:
        """Rows in the user's units and labels as the array ``context=`` of a network.

        Args:
            rows: A data frame with these columns among others, a mapping from each name to its cells, or an array of shape
                ``(row, covariate)``, or ``(row,)`` for a single covariate.

        Returns:
            The array, float32, shape ``(row, width)``.

        Raises:
            ValueError: If a covariate is missing, or a cell is not finite, not a number or an unknown label.
        """
        cells = self._cells(rows)
        sizes = {len(each) for each in cells.values()}
        require(len(sizes) == 1 and 0 not in sizes, "context", "as many rows of each covariate, at least one", f"{sorted(sizes)} rows")
        return np.concatenate([column.encode(cells[column.name]) for column in self.columns], 1).astype(np.float32)

    def decode(self, array: Real[AnyArray, "row width"]) -> dict[str, Cells]:
        """The cells of each covariate, by name: the inverse of :meth:`encode`."""
        cuts = np.cumsum([column.width for column in self.columns])[:-1]
        return {column.name: column.decode(part) for column, part in zip(self.columns, np.split(np.asarray(array), cuts, 1))}

    def parse(self, text: str) -> Float[np.ndarray, "1 width"]:
        """Read one row from text, ``"0.3,7"`` in the order of the covariates or ``"age=0.3,label=7"``; encoded as by :meth:`encode`.

        Raises:
            ValueError: If there is not one value for each covariate, or a value is not possible for its covariate.
        """
        values, names = split_words(text), ", ".join(self.names)
        if "=" not in text:
            size = len(self.columns)
            require(len(values) == size, "context", f"{size} value{'s' * (size > 1)}, of {names}", f"{len(values)}: {text}")
            return self.encode({name: [value] for name, value in zip(self.names, values)})
        pairs = [tuple(map(str.strip, value.partition("=")[::2])) for value in values]
        good = sorted(name for name, _ in pairs) == sorted(self.names)
        require(good, "context", f"one value of each of {names}, as NAME=VALUE", text)
        return self.encode({name: [value] for name, value in pairs})

    def _cells(self, rows: Any) -> dict[str, Cells]:
        if is_frame(rows):
            rows = columns_of(rows)
            self._require_all(rows)
            return {name: cells_of(rows[name]) for name in self.names}
        if isinstance(rows, Mapping):
            self._require_all(rows)
            return {name: np.atleast_1d(rows[name]) for name in self.names}
        array = np.asarray(rows)
        array = array[:, None] if array.ndim == 1 and len(self.columns) == 1 else array
        good = array.ndim == 2 and array.shape[1] == len(self.columns)
        require(good, "context", f"shape (row, {len(self.columns)}), of {', '.join(self.names)}", f"shape {array.shape}")
        return dict(zip(self.names, array.T))

    def _require_all(self, rows: Mapping[str, Any]) -> None:
        missing = [name for name in self.names if name not in rows]
        require(not missing, "context", f"the columns {', '.join(self.names)}", f"none named {', '.join(missing)}")


def cells_of(column: "narwhals.Series[Any]") -> Cells:
    """The cells of a column of a data frame: numbers, or labels as strings.

    Raises:
        ValueError: If a cell is missing or not finite; TypeError if cells are neither numbers nor labels.
    """
    if not is_text(column) and labels(column) is None:
        return numbers(column, "context")
    require_complete(column, "context")
    return np.array([str(cell) for cell in column.to_list()])


def split_words(text: str) -> list[str]:
    """Split a text at its commas; a part that contains a comma is in quotation marks."""
    return [word.strip() for word in next(csv.reader([text], skipinitialspace=True), [])]


def _is_number(cell: Any) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        float(cell)
        return True
    return False
