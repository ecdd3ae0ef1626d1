"""A mean over data and its two errors."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A mean over data, in nats per datum.

    Attributes:
        mean: The mean.
        error: Standard error of the mean as an estimate of the mean over the population of data, including the error from the noise.
        monte_carlo_error: Standard error from the noise alone, with the data held fixed.

    Example:
        >>> import probdiff
        >>> probdiff.elbo.Estimate.of_draws([[1.0, 3.0], [2.0, 4.0]])  # two draws of two data
        Estimate(mean=2.5, error=1.0, monte_carlo_error=0.353...)
    """

    mean: float
    error: float
    monte_carlo_error: float

    @classmethod
    def of(cls, mean: ArrayLike, variance: ArrayLike | None = None, num_draws: int = 1) -> "Estimate":
        """From each datum's mean over draws and variance between draws, both of shape ``(datum,)`` (variance None: there is no noise)."""
        mean = np.asarray(mean, np.float64)
        monte_carlo = 0.0 if variance is None else np.sqrt(np.sum(np.asarray(variance, np.float64)) / num_draws)
        error = mean.std(ddof=1) / np.sqrt(len(mean)) if len(mean) > 1 else np.nan
        return cls(float(mean.mean()), float(error), float(monte_carlo / len(mean)))

    @classmethod
    def of_draws(cls, draws: ArrayLike) -> "Estimate":
        """From draws of shape ``(draw, datum)``, at least two of them."""
        draws = np.asarray(draws, np.float64)
        return cls.of(draws.mean(0), draws.var(0, ddof=1), len(draws))
