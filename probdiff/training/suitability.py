"""Warnings before a fit: of data on a scale that the chain does not turn into noise, of discrete data modelled by a density, and of unscaled covariates."""

import warnings
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Real

from probdiff._checks import AnyArray, PyTree
from probdiff.diffusion import Diffusion
from probdiff.likelihoods.density import atom, has_few_values

ROWS = 1000  # rows that are inspected
LARGEST_SQUARE, SMALLEST_SD = 10.0, 0.1  # of encoded data; both are about 1 for standardised data


def warn_of_unsuited(diffusion: Diffusion, x: Real[AnyArray, "datum column"], columns: Sequence[str] | None = None) -> None:
    """Warn of columns with a density whose encoded mean square is above 10 or standard deviation below 0.1, and of the first column with few distinct values or one frequent value.

    Args:
        diffusion: The model that is to be fitted.
        x: The training data, shape ``(datum, column)``.
        columns: Names of the columns, for the message.
    """
    rows, likelihood = np.asarray(x)[:ROWS], diffusion.likelihood
    names = [str(j) for j in range(rows.shape[1])] if columns is None else columns
    # Columns with a density, encoded for the chain.
    x0 = {
        names[j]: np.asarray(encoded, np.float64)
        for part, at in likelihood.placed(rows.shape[1])
        if part.points is None and part.levels is None
        for j, encoded in zip(at, np.asarray(part.encode(rows[:, list(at)].astype(np.float64))).T)
    }
    odd = {name: np.square(each).mean() for name, each in x0.items() if np.square(each).mean() > LARGEST_SQUARE or each.std() < SMALLEST_SD}
    if odd:
        worst = max(odd, key=lambda name: odd[name])
        warnings.warn(
            f"x: Expected data of about mean 0 and standard deviation 1 for the chain; got mean {x0[worst].mean():.3g} "
            f"and standard deviation {x0[worst].std():.3g} in column {worst}"
            f"{f' and the like in {len(odd) - 1} more' if len(odd) > 1 else ''}. Noise of unit variance never hides such data, or hides them at once: "
            "NormalLikelihood.standardized(x) takes shift and scale from the data",
            stacklevel=3,
        )
    for name, each in x0.items():
        if has_few_values(each):
            got = f"{len(np.unique(each))} distinct values in {len(rows)} rows"
            remedy = ": give it a CategoricalLikelihood in a ColumnLikelihood, as probdiff.datasets.split does"
        elif found := atom(each):
            got, remedy = f"the same value in {found[1]:.0%} of the rows", ""
        else:
            continue
        warnings.warn(
            f"x: Expected continuous data for a density; got {got} of column {name}. The bound of such a column can be made "
            f"arbitrarily large, and has no meaning{remedy}",
            stacklevel=3,
        )
        return


def warn_of_raw_context(context: PyTree) -> None:
    """Warn of covariates whose scale is far from that of a network's other inputs; labels and images of whole numbers are not reported.

    Args:
        context: The context of the training data, a tree of arrays with a row for each datum; None for none.
    """
    for leaf in jax.tree.leaves(context):
        rows = np.asarray(leaf)[:ROWS]
        if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.floating):
            continue
        square = np.square(rows, dtype=np.float64).mean(0)
        if square.max(initial=0) > LARGEST_SQUARE:
            worst = int(square.argmax())
            warnings.warn(
                f"context: Expected covariates of about mean 0 and standard deviation 1; got mean {rows[:, worst].mean():.3g} and standard deviation "
                f"{rows[:, worst].std():.3g} in column {worst}. probdiff.datasets.split(frame, context=[…]) standardises them",
                stacklevel=3,
            )
            return
