"""A user's table: the kinds of its columns, and its three splits.

A column with few distinct values has no density, and the bound of a model with a density for it can be made arbitrarily large. Therefore the kind of each
column is found from its values: categories, levels of a grid, or continuous.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Real

from probdiff._checks import Numbers, Whole, require, require_finite
from probdiff._frames import codes, columns_of, is_frame, numbers
from probdiff._frames import labels as labels_of
from probdiff.datasets.covariates import Cells, Covariates, cells_of
from probdiff.datasets.dataset import Dataset
from probdiff.likelihoods import AbstractLikelihood, CategoricalLikelihood, DiscretizedNormalLikelihood
from probdiff.likelihoods.density import has_few_values

WIDEST_GRID = 2**8  # whole numbers in a wider range are treated as continuous
FEWEST_PIXELS = 16  # columns of integers that may be an image
LEAST_SPREAD = 1e3  # standard deviation of a column, in units of the resolution of float32
Columns = str | int | Sequence[str | int]  # one column of a table by name or by number, or several


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns as numbers.

    Attributes:
        array: Shape ``(row, column)``.
        columns: Names of the columns, if they have any.
        labels: The labels of the columns of categories, by position.
        index: Name of a column that was left out because it numbers the rows.
        context: The cells of the columns of the context, by name: numbers, or labels as strings.
        image_shape: Height and width, if the rows are images; otherwise None.
        levels: The number of levels of images of 8 bits; otherwise None.
    """

    array: Real[np.ndarray, "row column"]
    columns: tuple[str, ...] | None = None
    labels: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    index: str | None = None
    context: Mapping[str, Cells] = dataclasses.field(default_factory=dict)
    image_shape: tuple[int, int] | None = None
    levels: int | None = None

    def name(self, position: int) -> str:
        """The name of a column in messages."""
        return f"column {position}" if self.columns is None else f"column {self.columns[position]!r}"


def read_frame(frame: Any, name: str = "data", index: str | None = None, context: Columns = ()) -> Table:
    """A data frame as a :class:`Table`: numbers unchanged, categories and truth values as their indices.

    Args:
        frame: A data frame of pandas, polars or pyarrow.
        name: Name of the table in messages.
        index: Name of a column to leave out, because it numbers the rows.
        context: Columns of the context, which are not part of the data.

    Raises:
        TypeError: If a column holds text, or anything that is neither a number nor a category; ValueError if a cell is missing.
    """
    columns = columns_of(frame)
    require(index is None or index in columns, "index", f"one of the columns {', '.join(columns)}", repr(index))
    given = chosen(listed(context), columns)
    require(index not in given, "context", f"columns other than {index!r}, which numbers the rows", ", ".join(given))
    own = {key: column for key, column in columns.items() if key != index and key not in given}
    require(own or not given, "context", "some of the columns, so that there are others to model", f"all: {', '.join(given)}")
    require(own, name, "a data frame with columns", "none")
    labels: dict[int, tuple[str, ...]] = {}
    arrays = []
    for j, column in enumerate(own.values()):
        found = labels_of(column)
        if found is not None:
            labels[j] = found
        arrays.append(numbers(column, name) if found is None else codes(column, found, name))
    cells = {key: cells_of(columns[key]) for key in given}
    return Table(np.column_stack(arrays), tuple(own), labels, index, cells)


def listed(context: Columns | None) -> list[str | int]:
    """The given columns as a list: one, several or none."""
    return [] if context is None else [context] if isinstance(context, str | int) else list(context)


def chosen(context: list[str | int], columns: Iterable[str]) -> list[str]:
    """The names of some columns, which are given by name or by number from 0.

    Raises:
        ValueError: If a column is missing, or is given twice.
    """
    names = list(columns)
    found = []
    for each in context:
        numbered = str(each) not in names and str(each).isdecimal() and int(each) < len(names)
        found.append(names[int(each)] if numbered else str(each))
        require(found[-1] in names, "context", f"some of the columns {', '.join(names)}, by name or counted from 0", repr(each))
    require(len(set(found)) == len(found), "context", "each column once", ", ".join(found))
    return found


def split_table(table: Table, name: str, seed: Whole, shown: str) -> Dataset:
    """The table shuffled and cut into 80 % training, 10 % validation and 10 % test data.

    Args:
        table: The table.
        name: Name of the data set.
        seed: Seed of the shuffle.
        shown: Name of the data in messages.
    """
    array = check_array(table.array, shown)
    grid = np.issubdtype(array.dtype, np.integer) and not table.labels and not _has_own_ranges(table)
    levels, discrete = None, {}
    if grid:
        require(array.min() >= 0, shown, "integer levels 0, 1, 2, …", f"a negative integer, {array.min()}")
        require(array.max() >= 1, shown, "integers of at least two levels", "zeros only")
        levels = table.levels or int(array.max()) + 1
    else:
        numbers_only = table.columns is None and not table.labels and np.all(array == np.round(array))
        whole = "whole numbers stored as floats: data on a grid has no density; save x.astype(int)"
        require(not numbers_only, shown, "floats for continuous data, or an integer dtype for data on a grid", whole)
        kinds = {j: _kind(table, j, shown) for j in range(array.shape[1])}
        discrete = {j: kind for j, kind in kinds.items() if kind is not None}
    order = np.random.default_rng(seed).permutation(len(array))
    held_out = max(2, len(array) // 10)
    # Images of 8 bits stay as small as they are.
    array = array[order].astype((array.dtype if table.levels else np.int32) if grid else np.float32, copy=False)
    cuts = [len(array) - 2 * held_out, len(array) - held_out]
    rows = dict(zip(("train", "validation", "test"), np.split(order, cuts)))
    train, validation, test = np.split(array, cuts)
    data = Dataset(name, train, validation, test, levels, None, table.image_shape, table.columns, discrete, table.index, rows)
    if not table.context:
        return data
    covariates = Covariates.of(table.context, rows["train"])
    return data.with_context(covariates, np.split(covariates.encode(table.context)[order], cuts))


def _has_own_ranges(table: Table) -> bool:
    """Whether the columns of a table of integers are of different kinds: named, and with a negative value or, unlike pixels, few and with different ranges."""
    highest = table.array.max(0)
    few = table.array.shape[1] < FEWEST_PIXELS
    return table.columns is not None and bool(table.array.min() < 0 or (few and highest.min() < highest.max() / 2))


def _kind(table: Table, position: int, shown: str) -> AbstractLikelihood | None:
    """The likelihood of a column without a density; None for a column with a density."""
    values, name = table.array[:, position], table.name(position)
    distinct = np.unique(values)
    if position in table.labels:
        labels = table.labels[position]
        require(len(labels) > 1, shown, "columns that vary", f"a constant column: {name}")
        return CategoricalLikelihood(labels)
    require(len(distinct) > 1, shown, "columns that vary", f"a constant column: {name}")
    if has_few_values(values):
        return CategoricalLikelihood(distinct.tolist())
    if np.all(distinct == np.round(distinct)) and np.ptp(distinct) < WIDEST_GRID:
        return DiscretizedNormalLikelihood(int(np.ptp(distinct)) + 1, int(distinct[0]))
    resolved = values.std() >= LEAST_SPREAD * np.spacing(np.abs(values).max().astype(np.float32))
    require(resolved, shown, "columns whose spread float32 resolves", f"{name}: subtract its mean")
    return None


def check_array(array: Numbers, name: str = "data") -> Real[np.ndarray, "datum column"]:
    """The array, after a check that it can be data: finite real numbers of shape ``(datum, column)``, at least 10 rows.

    Raises:
        ValueError: For a wrong rank, too few rows, NaN or infinity; TypeError for a wrong dtype.
    """
    array = np.asarray(array)
    real = np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
    require(real, name, "floats or integers", f"dtype {array.dtype}", TypeError)
    hint = ""
    if array.ndim > 2:
        hint = "; flatten each datum first: x.reshape(len(x), -1)"
    elif array.ndim < 2:
        hint = "; one number per datum is x.reshape(-1, 1)"
    require(array.ndim == 2, name, "shape (datum, dim)", f"shape {array.shape}{hint}")
    require(len(array) >= 10 and array.shape[1] > 0, name, "at least 10 rows, for three splits", f"shape {array.shape}")
    require_finite(name, array)
    return array


def read_table(x: Any, name: str, index: str | None = None, context: Any = None) -> Table:
    """An array or a data frame as a :class:`Table`.

    Args:
        x: The array or data frame.
        name: Name of the table in messages.
        index: Name of a column of a data frame to leave out, because it numbers the rows.
        context: Columns of ``x``, or an array or a data frame with a row for each of its rows.
    """
    apart = is_frame(context) or hasattr(context, "dtype")
    columns = [] if apart else listed(context)
    if is_frame(x):
        table = read_frame(x, name, index, columns)
    else:
        require(index is None, "index", "none for an array, whose columns have no names", repr(index))
        array = np.asarray(x)
        if array.ndim == 3 and np.issubdtype(array.dtype, np.integer) and array.size > 0:
            require(not columns, "context", "none, or an array with a row for each image", ", ".join(map(str, columns)))
            images = Table(check_array(array.reshape(len(array), -1), name), image_shape=array.shape[1:], levels=256 if array.dtype == np.uint8 else None)
            return images if not apart else beside(images, read_cells(context))
        array = check_array(array, name)
        given = [int(j) for j in chosen(columns, map(str, range(array.shape[1])))]
        own = [j for j in range(array.shape[1]) if j not in given]
        require(own, "context", "some of the columns, so that there are others to model", f"all: {', '.join(map(str, given))}")
        table = Table(array[:, own], context={str(j): array[:, j] for j in given})
    return table if not apart else beside(table, read_cells(context))


def beside(table: Table, cells: Mapping[str, Cells]) -> Table:
    """The table with a context from outside its columns.

    Raises:
        ValueError: If the context has another number of rows, or a name of a column of the table.
    """
    rows = {len(each) for each in cells.values()}
    require(rows == {len(table.array)}, "context", f"as many rows as there are data, {len(table.array)}", f"{max(rows, default=0)} rows")
    twice = [name for name in cells if name in (table.columns or ())]
    require(not twice, "context", "names of columns that the data do not have", ", ".join(twice))
    return dataclasses.replace(table, context=cells)


def read_cells(context: Any, name: str = "c") -> dict[str, Cells]:
    """The cells of each column of an array, whose name in messages is ``name``, or of a data frame."""
    if is_frame(context):
        return {key: cells_of(column) for key, column in columns_of(context).items()}
    array = np.asarray(context)
    require(array.dtype.kind in "buifU", "context", "numbers or labels", f"dtype {array.dtype}", TypeError)
    require(array.ndim in (1, 2) and array.size > 0, "context", "shape (datum, covariate)", f"shape {array.shape}")
    array = array.astype(np.int32) if array.dtype == bool else array
    if array.dtype.kind != "U":
        require_finite("context", array)
    return {name: array} if array.ndim == 1 else {f"{name}[{j}]": column for j, column in enumerate(array.T)}
