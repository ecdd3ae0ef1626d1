"""Data frames of pandas, polars, pyarrow and others as arrays, by narwhals; arrays pass through."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Real

from probdiff._checks import require

if TYPE_CHECKING:
    import narwhals


def is_frame(x: object) -> bool:
    """Whether ``x`` is a data frame of a library that narwhals knows."""
    if hasattr(x, "dtype"):
        return False
    import narwhals

    return narwhals.dependencies.is_into_dataframe(x)


def columns_of(frame: Any) -> dict[str, "narwhals.Series"]:
    """The columns of a data frame by name."""
    import narwhals

    columns = narwhals.from_native(frame, eager_only=True).iter_columns()
    return {str(column.name): column for column in columns}


def as_array(x: Any, name: str = "x") -> Any:
    """An array as it is; a data frame, whose columns must be numbers, as an array of shape ``(row, column)``."""
    if not is_frame(x):
        return x
    columns = columns_of(x)
    require(columns, name, "a data frame with columns", "none")
    return np.column_stack([numbers(column, name) for column in columns.values()])


def numbers(column: "narwhals.Series", name: str = "x") -> Real[np.ndarray, "row"]:
    """The numbers of a column, truth values as 0 and 1.

    Raises:
        TypeError: If the cells are not numbers; ValueError for one that is missing or not finite, by column and row.
    """
    of_numbers = column.dtype.is_numeric() or column.dtype == "Boolean"
    remedy = "; leave the column out, or make it categorical for a ColumnLikelihood, as probdiff.datasets.split does"
    require(of_numbers, name, "columns of numbers", f"{column.dtype} in column {column.name!r}{remedy}", TypeError)
    require_complete(column, name)
    values = column.to_numpy()
    values = values.astype(np.int8) if values.dtype == bool else values
    require_finite_column(values, str(column.name), name)
    return values


def require_complete(column: "narwhals.Series", name: str = "x") -> None:
    """Refuse a column with a missing cell."""
    missing = np.flatnonzero(column.is_null().to_numpy())
    require(missing.size == 0, name, "a value in every cell", f"none in {place(missing, str(column.name))}")


def require_finite_column(values: np.ndarray, column: str, name: str = "x") -> None:
    """Refuse NaN and infinity in the values of a column."""
    bad = np.flatnonzero(~np.isfinite(values))
    require(bad.size == 0, name, "finite values", f"{values[bad[:1]]} in {place(bad, column)}")


def place(rows: np.ndarray, column: str) -> str:
    """The first of some rows, and the column, in words."""
    return f"row {rows[0]} (counted from 0) of column {column!r}" if rows.size else ""
