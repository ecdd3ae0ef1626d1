"""Whether a column of numbers can have a density, as far as its values tell."""

import numpy as np
from jaxtyping import Real

FEW = 10  # distinct values, and at most half as many as rows
ATOM, ATOM_ROWS = 0.1, 5  # the least share of the rows, and the fewest rows, that have one and the same value


def has_few_values(values: Real[np.ndarray, "row"]) -> bool:
    """Whether there are so few distinct values that they are categories."""
    return len(np.unique(values)) <= min(FEW, len(values) // 2)


def atom(values: Real[np.ndarray, "row"]) -> tuple[float, float] | None:
    """The commonest value and its share of the rows, if that is so large that a density of it can be made as large as one likes; otherwise None."""
    distinct, counts = np.unique(values, return_counts=True)
    k = counts.argmax()
    share = counts[k] / len(values)
    return (float(distinct[k]), float(share)) if share >= ATOM and counts[k] >= ATOM_ROWS else None
