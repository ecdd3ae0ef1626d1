"""A fit warns of data that its chain cannot take to noise, and of columns that have no density, by name; and of nothing else."""

import warnings

import jax
import numpy as np
import pandas as pd
import pytest

import probdiff
from probdiff.likelihoods import CategoricalLikelihood, ColumnLikelihood, NormalLikelihood
from probdiff.training.suitability import warn_of_raw_context, warn_of_unsuited

RNG = np.random.default_rng(0)
FRAME = pd.DataFrame({"hue": RNG.normal(1, 0.2, 50), "proline": RNG.normal(750, 300, 50), "wine": RNG.integers(0, 3, 50) + 0.5})


def warned(likelihood, x, columns=None):
    """The words of warning before a fit of a network that knows any dimension."""
    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: z, likelihood)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_unsuited(diffusion, np.asarray(x), columns)
    return [str(each.message) for each in caught]


def test_raw_data_are_warned_of_by_name():
    (words,) = warned(NormalLikelihood(), FRAME[["hue", "proline"]], ["hue", "proline"])
    mean, sd = FRAME["proline"].mean(), FRAME["proline"].std(ddof=0)
    assert f"got mean {mean:.3g} and standard deviation {sd:.3g} in column proline" in words and "NormalLikelihood.standardized(x)" in words
    (words,) = warned(NormalLikelihood(), 0.001 * FRAME[["hue"]])
    assert "in column 0" in words
    assert "and the like in 1 more" in warned(NormalLikelihood(), 1000 * FRAME[["hue", "proline"]])[0]


def test_a_column_of_few_values_is_warned_of_by_name():
    x = FRAME[["hue", "wine"]]
    (words,) = warned(NormalLikelihood.standardized(x), x, ["hue", "wine"])
    assert "3 distinct values in 50 rows of column wine" in words and "ColumnLikelihood" in words


def test_ties_are_warned_of_by_name():
    """A tenth of the rows at one value, though others are all different."""
    x = FRAME[["hue", "proline"]].to_numpy()
    tied = np.where(np.arange(50)[:, None] % 8 == 0, [[1.2, 0]], x)
    tied[:, 1] = x[:, 1]
    (words,) = warned(NormalLikelihood.standardized(tied), tied, ["hue", "proline"])
    assert "the same value in 14% of the rows of column hue" in words


def test_a_column_of_a_mixed_table_is_named_by_its_place_in_the_table():
    likelihood = ColumnLikelihood({"wine": CategoricalLikelihood([0.5, 1.5, 2.5]), ("proline", "hue"): NormalLikelihood()}, list(FRAME))
    (words,) = warned(likelihood, FRAME, list(FRAME))
    assert "in column proline." in words


@pytest.mark.parametrize("likelihood, x", [
    (NormalLikelihood.standardized(FRAME[["hue", "proline"]]), FRAME[["hue", "proline"]]),
    (NormalLikelihood(), RNG.normal(0.5, 2, (50, 2))),
    (probdiff.DiscretizedNormalLikelihood(200), RNG.integers(0, 3, (50, 2))),
    (ColumnLikelihood({0: CategoricalLikelihood([0.5, 1.5, 2.5])}), FRAME[["wine"]]),
])  # fmt: skip
def test_suitable_data_pass_without_a_word(likelihood, x):
    scaled = NormalLikelihood.standardized(x) if isinstance(likelihood, NormalLikelihood) and np.ndim(likelihood.loc) else likelihood
    assert warned(scaled, x) == []


def test_a_fit_warns_before_it_begins():
    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(dim=2, key=jax.random.key(0)), NormalLikelihood())
    with pytest.warns(UserWarning, match="in column proline"), pytest.raises(TypeError, match="key"):
        probdiff.fit(diffusion, FRAME[["hue", "proline"]], key=0)


def test_raw_covariates_are_warned_of_and_labels_are_not():
    raw = np.stack([RNG.normal(0, 1, 50), RNG.normal(40, 10, 50)], 1)
    with pytest.warns(UserWarning, match=f"got mean {raw[:, 1].mean():.3g} and standard deviation {raw[:, 1].std():.3g} in column 1"):
        warn_of_raw_context({"label": np.arange(50), "age": raw})
    with warnings.catch_warnings(action="error"):
        for each in (None, np.arange(50), (raw - raw.mean(0)) / raw.std(0), np.full((50, 3), 40)):
            warn_of_raw_context(each)
    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(1, key=jax.random.key(0), context_dim=2))
    with pytest.warns(UserWarning, match="context: Expected covariates"), pytest.raises(TypeError, match="key"):
        probdiff.fit(diffusion, RNG.normal(size=(50, 1)), context=raw, key=3)
