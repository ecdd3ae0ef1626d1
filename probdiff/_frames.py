"""Data frames of pandas, polars, pyarrow and others as arrays, by narwhals; arrays pass through."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Real

from probdiff._checks import GAPS, require

if TYPE_CHECKING:
    import narwhals


def is_frame(x: object) -> bool:
    """Whether ``x`` is a data frame of a library that narwhals knows."""
    if hasattr(x, "dtype") or isinstance(x, str):
        return False  # without the import of narwhals
    import narwhals

    return narwhals.dependencies.is_into_dataframe(x)


def columns_of(frame: Any) -> dict[str, "narwhals.Series[Any]"]:
    """The columns of a data frame by name."""
    import narwhals

    return {str(column.name): column for column in narwhals.from_native(frame, eager_only=True).iter_columns()}


def column_names(x: Any) -> list[str] | None:
    """The names of the columns of a data frame; None for anything else."""
    return list(columns_of(x)) if is_frame(x) else None


def as_array(x: Any, name: str = "x") -> Any:
    """An array unchanged; a data frame, whose columns must be numbers, as an array of shape ``(row, column)``."""
    if not is_frame(x):
        return x
    columns = columns_of(x)
    require(columns, name, "a data frame with columns", "none")
    return np.column_stack([numbers(column, name) for column in columns.values()])


def with_gaps(frame: Any) -> Float[np.ndarray, "row column"]:
    """A data frame, whose columns must be numbers, as an array of shape ``(row, column)``, NaN where a cell is missing."""
    found = []
    for column in columns_of(frame).values():
        require_numbers(column)
        there, cells = ~column.is_null().to_numpy(), np.full(len(column), np.nan)
        cells[there] = column.drop_nulls().to_numpy()
        found.append(cells)
    return np.column_stack(found)


def numbers(column: "narwhals.Series[Any]", name: str = "x") -> Real[np.ndarray, "row"]:
    """The numbers of a column, truth values as 0 and 1.

    Raises:
        TypeError: If the cells are not numbers; ValueError for one that is missing or not finite, by column and row.
    """
    require_numbers(column, name)
    require_complete(column, name)
    values = column.to_numpy()
    values = values.astype(np.int32) if values.dtype == bool else values
    require_finite_column(values, str(column.name), name)
    return values


def require_numbers(column: "narwhals.Series[Any]", name: str = "x") -> None:
    """Refuse a column of anything but numbers and truth values."""
    of_numbers = column.dtype.is_numeric() or is_boolean(column)
    remedy = "; leave the column out, or make categories of it (in pandas, x.astype({column: 'category'})) for a ColumnLikelihood"
    require(of_numbers, name, "columns of numbers", f"{column.dtype} in column {column.name!r}{remedy}", TypeError)


def is_boolean(column: "narwhals.Series[Any]") -> bool:
    """Whether a column holds truth values."""
    import narwhals

    return bool(column.dtype == narwhals.Boolean)


def is_text(column: "narwhals.Series[Any]") -> bool:
    """Whether a column holds text."""
    import narwhals

    return bool(column.dtype == narwhals.String)


def labels(column: "narwhals.Series[Any]") -> tuple[str, ...] | None:
    """The labels that occur in a column of categories, in order; False and True for truth values; None for any other column."""
    import narwhals

    if is_boolean(column):
        return ("False", "True")
    if isinstance(column.dtype, narwhals.Enum):
        there = set(column.unique().to_list())
        return tuple(str(label) for label in column.dtype.categories if label in there)
    return tuple(sorted(map(str, column.unique().to_list()))) if column.dtype == narwhals.Categorical else None


def codes(column: "narwhals.Series[Any]", labels: tuple[str, ...], name: str = "x") -> Int[np.ndarray, "row"]:
    """The place of each cell in ``labels``.

    Raises:
        ValueError: If a cell is missing, or is not one of the labels.
    """
    require_complete(column, name)
    number = {label: code for code, label in enumerate(labels)}
    words = [str(label) for label in column.to_list()]
    unknown = np.array([row for row, word in enumerate(words) if word not in number], int)
    got = f"{words[unknown[0]]!r} in {place(unknown, str(column.name))}" if unknown.size else ""
    require(unknown.size == 0, name, f"one of the labels {', '.join(labels)}", got)
    return np.array([number[word] for word in words])


def require_complete(column: "narwhals.Series[Any]", name: str = "x") -> None:
    """Refuse a column with a missing cell."""
    missing = np.flatnonzero(column.is_null().to_numpy())
    remedy = f": {GAPS}" if name == "x" else ""
    require(missing.size == 0, name, "a value in every cell", f"none in {place(missing, str(column.name))}{remedy}")


def require_finite_column(values: np.ndarray, column: str, name: str = "x") -> None:
    """Refuse NaN and infinity in the values of a column."""
    bad = np.flatnonzero(~np.isfinite(values))
    require(bad.size == 0, name, "finite values", f"{values[bad[:1]]} in {place(bad, column)}")


def place(rows: np.ndarray, column: str) -> str:
    """The first of some rows, and the column, as text for a message."""
    return f"row {rows[0]} (counted from 0) of column {column!r}" if rows.size else ""
