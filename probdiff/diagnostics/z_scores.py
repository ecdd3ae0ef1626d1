"""z-scores of the differences of means of draws, as standard normal scores."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

ROUNDING = 2.0**-20


def pairwise_z(names: Sequence[str], pair: Callable[[str, str], tuple[np.ndarray, ...] | None]) -> Any:
    """z-scores of the differences of means, as standard normal scores, a pandas DataFrame.

    Where two estimators were drawn equally often, the differences are paired draw by draw.

    Args:
        names: Names of the estimators.
        pair: A function that returns, for two estimators, draws with the same expectation, each of shape ``(draw, direction)``; None if there are
            no such draws: the score is then NaN. The score is the largest over the directions.
    """
    import pandas as pd

    scores = pd.DataFrame(np.nan, index=list(names), columns=list(names))
    for i, a in enumerate(names):
        for b in names[:i]:
            if (draws := pair(a, b)) is not None:
                z = _z(*draws)
                scores.loc[a, b] = z[np.abs(z).argmax()]
                scores.loc[b, a] = -scores.loc[a, b]
    return scores


def _z(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Student's t of the difference of two means, converted to the normal score of the same tail probability."""
    if len(first) == len(second):
        error = _error(first - second)
    else:
        error = np.hypot(_error(first), _error(second))
    rounding = ROUNDING * max(np.abs(first).max(), np.abs(second).max())
    t = (first.mean(0) - second.mean(0)) / np.hypot(error, rounding + np.finfo(float).tiny)
    return -np.sign(t) * special.ndtri(special.stdtr(min(len(first), len(second)) - 1, -np.abs(t)))


def _error(draws: np.ndarray) -> np.ndarray:
    return draws.std(0, ddof=1) / np.sqrt(len(draws))
