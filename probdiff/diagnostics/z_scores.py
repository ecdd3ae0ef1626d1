"""z-scores of the differences of means of draws, as standard normal scores."""

from typing import Any

import numpy as np
from scipy import special

ROUNDING = 2.0**-20


def pairwise_z(draws: dict[str, np.ndarray]) -> Any:
    """z-scores of the differences of means, as standard normal scores.

    Where two estimators were drawn equally often, the differences are paired draw by draw.

    Args:
        draws: From estimator to draws of shape ``(draw, direction)``; of the directions, the largest score is given.
    """
    import pandas as pd

    scores = pd.DataFrame(np.nan, index=list(draws), columns=list(draws))
    for a, first in draws.items():
        for b, second in draws.items():
            if a != b:
                z = _z(first, second)
                scores.loc[a, b] = z[np.abs(z).argmax()]
    return scores


def _z(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Student's t of the difference of two means, turned into the normal score of the same tail probability."""
    if len(first) == len(second):
        error = _error(first - second)
    else:
        error = np.hypot(_error(first), _error(second))
    rounding = ROUNDING * max(np.abs(first).max(), np.abs(second).max())
    t = (first.mean(0) - second.mean(0)) / np.hypot(error, rounding + np.finfo(float).tiny)
    return -np.sign(t) * special.ndtri(special.stdtr(min(len(first), len(second)) - 1, -np.abs(t)))


def _error(draws: np.ndarray) -> np.ndarray:
    return draws.std(0, ddof=1) / np.sqrt(len(draws))
