"""A user's file as a :class:`~probdiff.datasets.tables.Table`: ``.npy``, ``.npz``, ``.csv`` or idx."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probdiff._checks import require
from probdiff.datasets.arrays import MAX_BYTES, read_npy, read_npz
from probdiff.datasets.images import is_idx, read_idx
from probdiff.datasets.tables import Columns, Table, beside, chosen, listed, read_cells, read_frame, read_table

if TYPE_CHECKING:
    import pandas

UNNAMED = ("", "unnamed: 0", "index")  # the name that pandas writes or reads for a column of row numbers


def read_file(path: Path, index: str | None = None, context: Columns | None = None) -> Table:
    """The table in a file.

    Args:
        path: Path of the file.
        index: Name of the column that numbers the rows, for a ``.csv`` file; a first column without a name or named ``index`` whose
            values differ, or with nothing but row numbers, is recognised.
        context: Columns of the context, by name or counted from 0; for an ``.npz`` file, the name of the array with the context.

    Raises:
        FileNotFoundError: If there is no such file; ValueError or TypeError if it is empty, too large, damaged or not a table of numbers.
    """
    _require_file(path, "data")
    if path.suffix == ".csv":
        return _read_csv(path, index, context)
    require(index is None, "index", "none for an array, whose columns have no names", repr(index))
    if is_idx(path):
        return read_table(read_idx(path), str(path), None, context)
    return read_table(read_npy(path), str(path), None, context) if path.suffix == ".npy" else _read_npz(path, listed(context))


def read_rows(path: Path) -> Any:
    """Rows of a ``.csv`` file, as a data frame if it names its columns, or of a ``.npy`` file, as an array; the values are not checked.

    Raises:
        FileNotFoundError: If there is no such file; ValueError if it is empty, too large, damaged or another kind of file.
    """
    _require_file(path, "context")
    require(path.suffix in (".csv", ".npy"), str(path), "a file ending in .csv or .npy", repr(path.suffix))
    if path.suffix == ".npy":
        return read_npy(path)
    frame, header = _parse_csv(path)
    return frame if header else frame.to_numpy()


def _require_file(path: Path, name: str) -> None:
    require(path.is_file(), name, "an existing file", f"{path}, which is not there", FileNotFoundError)
    size = path.stat().st_size
    require(size > 0, str(path), "an array", "an empty file")
    require(size <= MAX_BYTES, str(path), f"a file of at most {MAX_BYTES} bytes", f"{size} bytes")


def _read_npz(path: Path, context: list[str | int]) -> Table:
    """The array of data in an ``.npz`` file, and the array of the context, if its name is given."""
    arrays = read_npz(path)
    there = all(name in arrays for name in context) and len(context) <= 1
    require(there, "context", f"one of the arrays {', '.join(arrays)}", ", ".join(map(str, context)))
    cells = {name: each for given in context for name, each in read_cells(arrays.pop(str(given)), str(given)).items()}
    words = f"one array beside {context[0]}" if context else "one array, or two and the name of the context"
    require(len(arrays) == 1, str(path), words, f"{len(arrays)}: {', '.join(arrays)}")
    (array,) = arrays.values()
    table = read_table(array, str(path))
    return beside(table, cells) if cells else table


def _parse_csv(path: Path) -> tuple["pandas.DataFrame", bool]:
    """The frame in a ``.csv`` file, whose cells are not checked, and whether the first line names the columns (otherwise they are numbered)."""
    import pandas as pd

    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        first = next(csv.reader(file), [])
    require(any(cell.strip() for cell in first), str(path), "rows of numbers", "an empty file or an empty first line")
    other = next((mark for mark in (";", "\t") if any(mark in cell for cell in first)), None)
    require(other is None, str(path), "cells separated by commas, and points in numbers", f"{other!r} in the first line")
    header = not any(map(_is_number, first)) or not first[0].strip()
    names = [name.strip() for name in first]
    twice = next((name for name in names if names.count(name) > 1), None) if header else None
    require(twice is None, str(path), "columns of different names", f"{twice!r} twice")
    try:
        options = {"index_col": False, "encoding": "utf-8-sig", "skipinitialspace": True}
        frame = pd.read_csv(path, header=0 if header else None, **options)
    except (ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path}: Expected a readable .csv file; got: {' '.join(str(error).split())}") from None
    require(len(frame) > 0, str(path), "rows of numbers", "the names of columns alone")
    frame.columns = [str(name).strip() for name in frame.columns]
    if header and not first[0].strip():
        frame = frame.rename(columns={frame.columns[0]: ""})
    require(len(frame.columns) == len(first), str(path), f"rows of {len(first)} cells, as the first has", f"{len(frame.columns)}")
    return frame, header


def _read_csv(path: Path, index: str | None, context: Columns | None) -> Table:
    frame, header = _parse_csv(path)
    given = chosen(listed(context), frame.columns)
    for name in frame.columns:
        _check_cells(frame[name], name, path, 2 if header else 1, is_label=name in given)
        if name in given and frame[name].dtype.kind not in "iufb":
            frame[name] = frame[name].astype(str)
    index = _index_of(frame, header) if index is None and frame.columns[0] not in given else index
    table = read_frame(frame, str(path), index, given)
    return table if header else Table(table.array, None, {}, index, table.context)


def _check_cells(column: "pandas.Series", name: str, path: Path, first_line: int, is_label: bool) -> None:
    """Refuse a column with a missing cell or, unless it holds labels, with text; the message has the line of the first."""
    missing = np.flatnonzero(column.isna().to_numpy())
    where = f"line {missing[0] + first_line}, column {name!r}" if missing.size else ""
    require(missing.size == 0, str(path), "a readable .csv file with a number in every cell", f"none in {where}")
    if column.dtype.kind in "iufb":
        infinite = np.flatnonzero(np.isinf(column.to_numpy(float)))
        where = f"infinity in line {infinite[0] + first_line}, column {name!r}" if infinite.size else ""
        require(infinite.size == 0, str(path), "a readable .csv file of finite numbers", where)
        return
    if is_label:
        return
    text = next((k, cell) for k, cell in enumerate(column) if not _is_number(str(cell)))
    got = f"{text[1]!r} in line {text[0] + first_line}, column {name!r}"
    remedy = "; leave the column out, or number its categories 0, 1, 2, …"
    require(False, str(path), "a readable .csv file of numbers", got + remedy)


def _index_of(frame: "pandas.DataFrame", header: bool) -> str | None:
    """The name of the first column, if it numbers the rows."""
    name = frame.columns[0]
    values = frame[name].to_numpy()
    counts = values.dtype.kind in "iu" and len(frame) > 1 and bool(np.all(np.diff(values) == 1)) and values[0] in (0, 1)
    unnamed = header and name.lower() in UNNAMED and len(np.unique(values)) == len(values)
    return name if len(frame.columns) > 1 and (counts or unnamed) else None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
