"""Whether a column of numbers can have a density, judged by its values."""

import numpy as np
from jaxtyping import Real

FEW = 10  # distinct values, and at most half as many as rows
ATOM, ATOM_ROWS = 0.1, 5  # the smallest fraction and the smallest number of rows that must have the same value


def has_few_values(values: Real[np.ndarray, "row"]) -> bool:
    """Whether there are so few distinct values that they are categories."""
    return len(np.unique(values)) <= min(FEW, len(values) // 2)


def atom(values: Real[np.ndarray, "row"]) -> tuple[float, float] | None:
    """The most frequent value and its fraction of the rows, if it is so frequent that a density could be made arbitrarily large there; otherwise None."""
    distinct, counts = np.unique(values, return_counts=True)
    k = counts.argmax()
    share = counts[k] / len(values)
    return (float(distinct[k]), float(share)) if share >= ATOM and counts[k] >= ATOM_ROWS else None
