"""The errors of ratios of variances: against their spread over repetitions; and ties."""

import numpy as np
import pandas as pd
import pytest

from probdiff.diagnostics.cost_ratios import Variance, ratio_error, ratio_errors, tied_with_best, time_error

RNG = np.random.default_rng(0)
SPREAD = np.exp(0.5 * RNG.standard_normal(64))  # standard deviations of the items of a batch


def draws(rng, count, items):
    """Heavy-tailed draws of a few random items out of the batch, independent: Laplace of variance 1 times the item's."""
    return rng.choice(SPREAD, items, replace=False) * rng.laplace(size=(count, items)) / np.sqrt(2)


def test_the_variance_of_a_batch_is_that_of_a_few_items_by_addition():
    """Directly: of the means of all 64, drawn often."""
    direct = (SPREAD * RNG.laplace(size=(20_000, 64)) / np.sqrt(2)).mean(1).var()
    found = np.mean([Variance.of_values(draws(RNG, 16, 8), 64).value for _ in range(2000)])
    assert found == pytest.approx(direct, rel=0.05) and direct == pytest.approx(np.square(SPREAD).mean() / 64, rel=0.05)
    whole = SPREAD * RNG.laplace(size=(4000, 64)) / np.sqrt(2)
    assert Variance.of_means(whole).value == pytest.approx(whole.mean(1).var(ddof=1), rel=1e-12)
    assert Variance.of_values(whole, 64).value == pytest.approx(whole.var(0, ddof=1).mean() / 64, rel=1e-12)


def of_items(rng, count=16, items=16):
    return Variance.of_values(draws(rng, count, items), 64)


def of_all_items(rng):
    return Variance.of_values(SPREAD * rng.laplace(size=(16, 64)), 64)


def of_batch(rng):
    return Variance.of_means(rng.laplace(size=(200, 1)) + np.zeros((1, 64)))


def correlated(rng):
    """Two variances of draws that share most of their noise."""
    common = rng.standard_normal((200, 1))
    return [Variance.of_means(scale * common + 0.3 * rng.standard_normal((200, 1))) for scale in (1, 2)]


@pytest.mark.parametrize("pair", [
    lambda rng: (of_items(rng), of_batch(rng)),
    lambda rng: (of_all_items(rng), of_batch(rng)),
    correlated,
])  # fmt: skip
def test_the_error_of_a_ratio_is_its_spread(pair):
    """Over 1000 repetitions; within a tenth, where items that are left out, or shared draws, make a factor of two and more."""
    pairs = [pair(np.random.default_rng(seed)) for seed in range(1000)]
    ratios = np.array([first.value / second.value for first, second in pairs])
    errors = np.array([ratio_error(*each) for each in pairs])
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(np.log(ratios).std(), rel=0.12)


def test_what_too_few_draws_do_not_tell_is_not_known():
    few = Variance.of_values(RNG.standard_normal((2, 5)), 5)
    batch = of_batch(RNG)
    assert np.isnan(ratio_error(few, batch)) and ratio_error(batch, batch) == 0
    assert np.isfinite(ratio_error(Variance.of_values(RNG.standard_normal((2, 5)), 64), batch))
    assert np.isnan(time_error(np.array([1.0]))) and time_error(np.array([1.0, 3.0])) == pytest.approx(0.5)


def test_errors_of_the_time_are_added():
    variances = {"a": of_batch(RNG), "b": of_batch(RNG)}
    seconds = {"a": np.array([1.0, 3.0]), "b": np.array([2.0, 2.0])}
    exact, timed = ratio_errors(variances), ratio_errors(variances, seconds)
    assert timed.loc["a", "b"] == pytest.approx(np.hypot(exact.loc["a", "b"], 0.5)) and timed.loc["b", "b"] == 0


def test_a_tie_is_called_a_tie():
    names = ["best", "near", "far", "unknown", "none"]
    costs = pd.Series([1.0, 1.15, 1.3, 5.0, np.nan], names)
    errors = pd.DataFrame(0.1, names, names)
    errors.loc["unknown", "best"] = np.nan
    assert tied_with_best(costs, errors) == ["best", "near", "unknown"]
    assert tied_with_best(costs, errors / 2) == ["best", "unknown"]
    assert tied_with_best(costs[["none"]], errors) == []
    exact = pd.Series([0.0, 0.0, 1.0], ["a", "b", "c"])
    assert tied_with_best(exact, pd.DataFrame(0.1, exact.index, exact.index)) == ["a", "b"]
