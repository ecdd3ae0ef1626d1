"""Words of warning before a fit: data with a density that the chain cannot take to noise, or that have none."""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Real

from probdiff._checks import AnyArray
from probdiff.diffusion import Diffusion

ROWS = 1000  # that are looked at
LARGEST_SQUARE, SMALLEST_SD = 10.0, 0.1  # of encoded data, about 1 where they are standardised
FEW = 10  # distinct values


def warn_of_unsuited(diffusion: Diffusion, x: Real[AnyArray, "datum column"], columns: Sequence[str] | None = None) -> None:
    """Warn of columns with a density whose scale is far from that of the noise, and of columns of few values taken for a density.

    Args:
        diffusion: The model that is to be fitted.
        x: The training data, shape ``(datum, column)``.
        columns: Names of the columns, for the message.
    """
    x0 = np.asarray(diffusion.likelihood.encode(np.asarray(x)[:ROWS]), np.float64)
    start, dense = 0, []
    for dim, points in diffusion.likelihood.pieces(x0.shape[1]):
        dense += [] if points is not None else list(range(start, start + dim))
        start += dim
    if not dense:
        return
    names = columns if columns is not None and len(columns) == x0.shape[1] else [f"{j}" for j in range(x0.shape[1])]
    square, sd = np.square(x0[:, dense]).mean(0), x0[:, dense].std(0)
    odd = np.flatnonzero((square > LARGEST_SQUARE) | (sd < SMALLEST_SD))
    if odd.size:
        worst = odd[np.argmax(square[odd])]
        warnings.warn(
            f"x: Expected data of about mean 0 and standard deviation 1 for the chain; got mean {x0[:, dense[worst]].mean():.3g} "
            f"and standard deviation {sd[worst]:.3g} in column {names[dense[worst]]}"
            f"{f' and the like in {odd.size - 1} more' if odd.size > 1 else ''}. Noise of unit variance does not hide that, or hides it at once: "
            "NormalLikelihood.standardized(x) takes shift and scale from the data",
            stacklevel=3,
        )
    few = [j for j in dense if len(np.unique(x0[:, j])) <= min(FEW, len(x0) // 2)]
    if few:
        warnings.warn(
            f"x: Expected continuous data for a density; got {len(np.unique(x0[:, few[0]]))} distinct values in {len(x0)} rows of column "
            f"{names[few[0]]}{f', and few in {len(few) - 1} more' if len(few) > 1 else ''}. The bound of such a column can be made as large as "
            "one likes, and means nothing: give it a CategoricalLikelihood in a ColumnLikelihood, as probdiff.datasets.split does",
            stacklevel=3,
        )
