r"""Ratios of costs, variance × time or variance × evaluations, with their errors.

A variance is the mean of its parts: squared deviations of draws, or half the squared distances of two draws of a gradient. To
first order, the relative error of a ratio of two variances is the error of the mean difference of their parts, each part divided by the mean;
estimators with the same draws are compared part by part, so that shared variation cancels.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

TIE = 2.0  # standard errors
FEWEST_DRAWS = 4  # the fewest squared deviations from which their own variance is estimated


class Variance(NamedTuple):
    """The variance of one draw of the mean over a batch of data, measured.

    Attributes:
        parts: Unbiased estimates of the variance, shape ``(part, item)``; one item if the batch was measured as a whole.
        share: The fraction of the batch that was measured.
    """

    parts: Float[np.ndarray, "part item"]
    share: float

    @classmethod
    def of_values(cls, values: Float[np.ndarray, "draw item"], num_items: int) -> "Variance":
        """From draws of the bound of some items out of ``num_items``, which are independent: their variances add."""
        count = len(values)
        parts = np.square(values - values.mean(0)) * count / (count - 1)
        if count < FEWEST_DRAWS:
            parts = parts.mean(0, keepdims=True)
        return cls(parts / num_items, values.shape[1] / num_items)

    @classmethod
    def of_means(cls, values: Float[np.ndarray, "draw item"]) -> "Variance":
        """From draws of the bound of the whole batch, whose items may depend on each other."""
        return cls(cls.of_values(values.mean(1)[:, None], 1).parts, 1.0)

    @property
    def value(self) -> float:
        """The variance."""
        return float(self.parts.mean())


def ratio_error(first: Variance, second: Variance) -> float:
    """Relative standard error of the ratio of two variances, from draws and, if some were left out, from items; NaN if unknown."""
    parts = [each.parts / each.parts.mean() if each.value > 0 else np.zeros_like(each.parts) for each in (first, second)]
    if parts[0].shape == parts[1].shape:
        return _error_of_mean(parts[0] - parts[1], first.share)
    return float(np.hypot(_error_of_mean(parts[0], first.share), _error_of_mean(parts[1], second.share)))


def _error_of_mean(parts: Float[np.ndarray, "part item"], share: float) -> float:
    """Standard error of the mean of all parts, as an estimate for the whole batch, of which a fraction was measured.

    Its square is ``share`` times the squared error over draws plus (1 − ``share``) times the squared error over items.
    """
    num_parts, num_items = parts.shape
    of_draws = parts.var(0, ddof=1).sum() / num_parts / num_items**2 if num_parts > 1 else np.nan
    of_items = parts.mean(0).var(ddof=1) / num_items if num_items > 1 else np.nan
    if np.isnan(of_items) or share == 1:
        return float(np.sqrt(of_draws))
    return float(np.sqrt(of_items if np.isnan(of_draws) else share * of_draws + (1 - share) * of_items))


def time_error(seconds: Float[np.ndarray, "call"]) -> float:
    """Relative standard error of the mean time of several calls; NaN for a single call."""
    return float(seconds.std(ddof=1) / np.sqrt(len(seconds)) / seconds.mean()) if len(seconds) > 1 else np.nan


def ratio_errors(variances: Mapping[str, Variance], seconds: Mapping[str, np.ndarray] | None = None) -> Any:
    """Relative standard errors of the ratios of all pairs of costs, a pandas DataFrame; 0 on the diagonal.

    Args:
        variances: From estimator to :class:`Variance`.
        seconds: From estimator to the seconds of several calls; None if the cost of an evaluation is exact.
    """
    import pandas as pd

    errors = pd.DataFrame(0.0, index=list(variances), columns=list(variances))
    clock = {name: 0.0 if seconds is None else time_error(seconds[name]) for name in variances}
    for a, first in variances.items():
        for b, second in variances.items():
            if a != b:
                errors.loc[a, b] = np.sqrt(ratio_error(first, second) ** 2 + clock[a] ** 2 + clock[b] ** 2)
    return errors


def tied_with_best(costs: Any, errors: Any) -> list[str]:
    """The estimators whose costs are within two standard errors of the least cost; the best comes first.

    Args:
        costs: From estimator to cost, a pandas Series; estimators with unknown cost are left out.
        errors: The result of :func:`ratio_errors`.
    """
    known = costs.dropna().sort_values()
    if known.empty:
        return []
    best = known.index[0]
    clear = known > known[best] * np.exp(TIE * errors.loc[known.index, best])  # (not if the error is not known)
    return list(known.index[~clear])
