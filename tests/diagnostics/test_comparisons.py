"""The comparison of estimators and of models: statistics by another route, verdicts that can be wrong, outputs."""

import dataclasses
import json
import shutil
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import long_but, set_constant

import probdiff
from probdiff import cli
from probdiff.diagnostics import compare_estimators, z_scores
from probdiff.diagnostics.compare_models import ModelComparison
from probdiff.diagnostics.cost_ratios import Variance, ratio_error
from probdiff.elbo.estimators import ESTIMATORS
from probdiff.oracles import GaussianOracle, LinearNetwork, exact_terms

pytestmark = pytest.mark.xdist_group("comparison")  # its tests share what is costly to make

ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
SCHEDULE = probdiff.log_snr_schedule(6, 4.0, -1.0)
NAMES = ["trace", "kl_marginal", "kl_uniform", "kl_controlled", "kl_combined"]
X = ORACLE.sample(np.random.default_rng(0), 5).astype(np.float32)


class Scaled(eqx.Module):
    scale: jax.Array
    network: LinearNetwork

    def __call__(self, z, n):
        return self.scale * self.network(z, n)


def make(scale=0.9):
    return probdiff.Diffusion(SCHEDULE, Scaled(jnp.array(scale), ORACLE.network(SCHEDULE)), dim=2)


@pytest.fixture(scope="module")
def result():
    return probdiff.compare_estimators(make(), X, key=jax.random.key(0), num_draws=64, estimators=NAMES)


@pytest.mark.long
def test_every_estimator_has_a_row_and_they_agree(result):
    assert list(result.table.index) == NAMES
    assert result.draws.shape == (len(NAMES), 64, 5)
    assert result.agree and result.largest_z < result.z_limit
    closed = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, 0.9))
    exact = exact_terms(closed, X)["elbo"].mean()
    assert np.all(np.abs(result.table["elbo"] - exact) < 4.9 * result.table["se"])
    assert 9.7 * result.table["se"].max() < 2
    assert "bits_per_dim" not in result.table and "bits" not in str(result)


@pytest.mark.parametrize("minutes, all_of_them", [(1e-9, False), (0.2, True)])
def test_gradients_of_estimators_of_all_steps_are_drawn_if_there_is_time(minutes, all_of_them):
    """What is not drawn is told; everything else is there however little time there is."""
    names = ["kl_marginal", "kl_uniform"]
    found = probdiff.compare_estimators(make(), X, key=jax.random.key(0), minutes=minutes, estimators=names)
    assert found.table["gradient_variance"].notna().to_dict() == {"kl_marginal": all_of_them, "kl_uniform": True}
    assert found.table["value_by_seconds_error"].notna().all() and np.all(found.table["draws"] >= 4)
    assert ("no time for gradients" in str(found)) is not all_of_them
    row = json.loads(json.dumps(found.to_dict()))["estimators"]["kl_marginal"]
    assert (row["gradient_variance"] is not None) is all_of_them


@pytest.mark.long
def test_every_step_comes_up_several_times_however_little_time_there_is():
    """A step that is drawn once in a thousand rows may cost most: without it, the mean is wrong and its error too small."""
    schedule = probdiff.log_snr_schedule(200, 4.0, -1.0)
    diffusion = probdiff.Diffusion(schedule, ORACLE.network(schedule, 0.9), dim=2)
    found = probdiff.compare_estimators(diffusion, X, key=jax.random.key(0), minutes=1e-9, estimators=["kl_uniform", "kl_stratified"])
    assert np.all(found.table["draws"] * len(X) >= 32 * 200 - 50)
    exact = exact_terms(diffusion, X)["elbo"].mean()
    assert np.all(np.abs(found.table["elbo"] - exact) < 4.9 * found.table["se"])


def test_costs_by_another_route(result):
    """Variance of the value and of the one gradient, drawn directly; cost relative to kl_uniform."""
    table, diffusion = result.table, make()
    for name in ("trace", "kl_uniform", "kl_marginal"):
        guide, elbo = ESTIMATORS[name](diffusion)

        def one(scale, key, elbo=elbo, guide=guide):
            params = {"diffusion$params": eqx.tree_at(lambda d: d.network.scale, diffusion.trainable(), scale)}
            return -elbo.loss(key, params, diffusion.model, guide, jnp.asarray(X)) / 5

        keys = jax.random.split(jax.random.key(1), 4000)
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(one), (None, 0)))(jnp.array(0.9), keys)
        draws = 64 * 6 // table.loc[name, "evaluations"]
        for variance, ours, count in (
            (values.var(), table.loc[name, "sd"] ** 2, draws),
            (gradients.var(), table.loc[name, "gradient_variance"], table.loc[name, "gradient_draws"]),
        ):
            assert ours == pytest.approx(float(variance), rel=4.9 * np.sqrt(5 / count))
    assert list(table["evaluations"]) == [6, 6, 1, 1, 1]
    cost = table["sd"] ** 2 * table["evaluations"]
    np.testing.assert_allclose(table["value_by_evaluations"], cost / cost["kl_uniform"], rtol=1e-9)
    cost = table["gradient_variance"] * table["gradient_seconds"]
    np.testing.assert_allclose(table["gradient_by_seconds"], cost / cost["kl_uniform"], rtol=1e-9)
    assert result.best("value_by_evaluations") == table["value_by_evaluations"].idxmin()


def test_each_cost_is_that_of_its_own_variance_and_time(result):
    table = result.table
    for cost, variance, unit in (
        ("value_by_evaluations", table["sd"] ** 2, "evaluations"),
        ("value_by_seconds", table["sd"] ** 2, "seconds"),
        ("gradient_by_evaluations", table["gradient_variance"], "evaluations"),
        ("gradient_by_seconds", table["gradient_variance"], "gradient_seconds"),
    ):
        product = variance * table[unit]
        np.testing.assert_allclose(table[cost], product / product["kl_uniform"], rtol=1e-9)
        errors = result.cost_errors[cost]
        assert result.best(cost) == product.idxmin() == result.tied(cost)[0]
        np.testing.assert_allclose(table[f"{cost}_error"], table[cost] * errors["kl_uniform"], rtol=1e-12)
        assert (table[f"{cost}_error"].drop("kl_uniform") > 0).sum() >= 3 and table.loc["kl_uniform", f"{cost}_error"] == 0


def test_the_verdict_comes_first_in_80_columns_and_names_ties(result):
    table, lines = result.table, str(result).splitlines()
    assert lines[0].startswith("The 5 estimators agree") and max(map(len, lines)) <= 80
    verdict = " ".join(" ".join(lines[: lines.index("")]).split())
    rows = {line.split()[0]: line for line in lines[lines.index("") : lines.index("", lines.index("") + 1)] if line}
    for kind in ("value", "gradient"):
        best, *tied = result.tied(f"{kind}_by_evaluations")
        words = f"best for {kind}s: {best}" + (f", tied with {', '.join(tied)}" if tied else "") + "; its variance"
        assert words in verdict and f"By seconds: {result.best(f'{kind}_by_seconds')}" in verdict
    shown = rows["trace"].replace("±", " ").split()[1:]
    for number, error, cost in zip(shown[::2], shown[1::2], ("value_by_evaluations", "value_by_seconds", "gradient_by_evaluations", "gradient_by_seconds"), strict=True):
        wanted = table.loc["trace", f"{cost}_error"]
        assert float(number) == pytest.approx(table.loc["trace", cost], abs=wanted)
        assert float(error) == pytest.approx(wanted, rel=0.5)
    wide = table * 1.0
    wide[[f"{kind}_by_{unit}{end}" for kind in ("value", "gradient") for unit in ("evaluations", "seconds") for end in ("", "_error")]] = 12345678.9
    assert max(map(len, str(dataclasses.replace(result, table=wide, iwae=None)).splitlines()[-14:])) <= 80


def test_errors_are_those_of_the_draws(result):
    """An estimator with one evaluation a datum is drawn six times as often as those with six, of which all are kept."""
    lines = str(result).splitlines()
    for name, draws in zip(NAMES, result.draws):
        row, printed = result.table.loc[name], [line for line in lines if line.startswith(f"{name} ")][1]
        assert row["draws"] == 64 * 6 // int(row["evaluations"])
        if row["draws"] == 64:
            assert row["se"] == pytest.approx(draws.mean(1).std(ddof=1) / 8, rel=1e-9)
        assert printed.split()[4:6] == [f"{row['elbo']:.3f}", f"{row['se']:.3f}"]


def test_bits_are_given_for_data_on_a_grid():
    likelihood = probdiff.DiscretizedNormalLikelihood(levels=5)
    diffusion = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE), likelihood, dim=2)
    options = {"key": jax.random.key(0), "num_draws": 4, "estimators": ["kl_marginal", "kl_uniform"]}
    result = probdiff.compare_estimators(diffusion, np.array([[0, 4], [2, 3], [1, 1]]), **options)
    table = result.table
    np.testing.assert_allclose(table["bits_per_dim"], -table["elbo"] / (2 * np.log(2)), rtol=1e-12)
    np.testing.assert_allclose(table["bits_se"], table["se"] / (2 * np.log(2)), rtol=1e-12)
    assert result.to_dict()["estimators"]["kl_uniform"]["bits_se"] == table.loc["kl_uniform", "bits_se"] > 0
    row = next(line for line in reversed(str(result).splitlines()) if line.startswith("kl_uniform"))
    assert row.split()[6:8] == [f"{table.loc['kl_uniform', key]:.4f}" for key in ("bits_per_dim", "bits_se")]


def test_the_importance_weighted_bound_is_that_of_the_paths_of_trace(result):
    weights = result.draws[0]
    per_item = scipy.special.logsumexp(weights, 0) - np.log(64)
    assert result.iwae.mean == pytest.approx(per_item.mean(), rel=1e-9)
    assert result.iwae.error == pytest.approx(per_item.std(ddof=1) / np.sqrt(5), rel=1e-9)
    line = " ".join(str(result).split())
    assert "64 paths" in line and f"{per_item.mean():.4f} nats" in line
    assert f"{per_item.mean() - weights.mean():.4f} above the ELBO" in line
    khat = [0.2, 0.69, 0.71, 0.9, 0.5]
    text = " ".join(str(dataclasses.replace(result, khat=np.array(khat))).split())
    assert f"median 0.69, its own error about {1.69 / np.sqrt(64 / 5):.2f} an item" in text
    assert f"limit for 64 draws is {1 - 1 / np.log10(64):.2f}; above it: item 1, 2, 3 and 1 more" in text


def test_the_limit_of_z_is_for_all_pairs_and_directions_together(result):
    """Three standard errors' tail probability, 0.27 %, for all scores in one."""
    directions = result.projections["trace"].shape[1]
    assert directions > 1
    assert result.z_limit == pytest.approx(scipy.stats.norm.isf(0.0027 / 2 / (10 * (1 + directions))), rel=1e-9)
    diffusion = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE))
    names = ["kl_marginal", "kl_uniform"]
    without = probdiff.compare_estimators(diffusion, X, key=jax.random.key(0), num_draws=2, estimators=names)
    assert not without.projections and without.z_limit == pytest.approx(scipy.stats.norm.isf(0.0027 / 2), rel=1e-9)


@pytest.mark.parametrize("kind", ["value_z", "gradient_z"])
def test_the_verdict_is_the_largest_score_against_its_limit(result, kind):
    for factor, words in ((0.99, "5 estimators agree"), (1.01, "5 estimators DO NOT AGREE")):
        scores = getattr(result, kind).copy()
        scores.loc["kl_uniform", "trace"] = factor * result.z_limit
        scores.loc["trace", "kl_uniform"] = -factor * result.z_limit
        other = dataclasses.replace(result, **{kind: scores})
        assert other.largest_z == pytest.approx(factor * result.z_limit, rel=1e-9)
        assert other.agree is (factor < 1) is other.to_dict()["agree"] and words in str(other)
        words = " ".join(str(other).split())
        assert f"|z| is {factor * result.z_limit:.1f}, and {result.z_limit:.1f} is" in words


class Offsets(eqx.Module):
    """A prediction of its own at each step, whatever z is."""

    offset: jax.Array

    def __call__(self, z, n):
        return self.offset[n - 1] + 0 * z


def test_what_learns_is_adapted_to_the_value_for_values_and_to_the_gradient_for_gradients():
    """Against the closed form: with ε̂ = b_n, the term of step n is w_n ‖ε − b_n‖² and its gradient 2 w_n (b_n − ε)."""
    schedule = probdiff.log_snr_schedule(16, 4.0, -1.0)
    offset = np.zeros((16, 2), np.float32)
    offset[11] = 9, -9
    diffusion = probdiff.Diffusion(schedule, Offsets(jnp.asarray(offset)), dim=2)
    result = probdiff.compare_estimators(
        diffusion, X[:4], key=jax.random.key(0), num_draws=64, estimators=["kl_importance"]
    )
    weight, square = diffusion.kernel.kl_weight(schedule), (offset**2.0).sum(1)
    mean_square = {
        "value": weight**2 * (2 * (2 + 2 * square) + (2 + square) ** 2),
        "gradient": 4 * weight**2 * (2 + square),
    }
    square_of_mean = {"value": (weight * (2 + square)).sum() ** 2, "gradient": (4 * weight**2 * square).sum()}

    def variance(kind, adapted_to):
        """That of the mean over four data: the probabilities are as the root mean squares, a twentieth is uniform."""
        size = np.sqrt(mean_square[adapted_to])
        probability = 0.95 * size / size.sum() + 0.05 / 16
        return ((mean_square[kind] / probability).sum() - square_of_mean[kind]) / 4

    row = result.table.loc["kl_importance"]
    for kind, other, ours, count in (
        ("value", "gradient", row["sd"] ** 2, 64 * 16),
        ("gradient", "value", row["gradient_variance"], row["gradient_draws"]),
    ):
        tolerance = 4.9 * np.sqrt(5 / count)
        assert ours == pytest.approx(variance(kind, kind), rel=tolerance)
        assert variance(kind, other) > (1 + 2 * tolerance) * variance(kind, kind)


@pytest.fixture(scope="module")
def of_few(result):
    """The same, with the estimators that evaluate all steps drawn for four of twelve items; three repetitions of X among them."""
    with pytest.MonkeyPatch.context() as patch:
        set_constant(patch, "ALL_STEPS_ROWS", 24)
        x = np.concatenate([X[:4]] * 3)
        names = ["kl_marginal", "kl_uniform", "kl_posterior_target"]
        return probdiff.compare_estimators(make(), x, key=jax.random.key(2), num_draws=64, estimators=names)


@pytest.mark.release
def test_variances_of_a_few_items_tell_that_of_the_batch(of_few):
    """Against a direct measurement of the means of all twelve, and of their gradient."""
    row, diffusion = of_few.table.loc["kl_marginal"], make()
    x = jnp.asarray(np.concatenate([X[:4]] * 3))
    guide, elbo = ESTIMATORS["kl_marginal"](diffusion)

    def one(scale, key):
        params = {"diffusion$params": eqx.tree_at(lambda d: d.network.scale, diffusion.trainable(), scale)}
        return -elbo.loss(key, params, diffusion.model, guide, x) / 12

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(one), (None, 0)))(jnp.array(0.9), jax.random.split(jax.random.key(1), 2000))
    assert row["items"] == 4 and list(of_few.table["items"]) == [4, 12, 12]
    assert row["value_variance"] == pytest.approx(float(values.var()), rel=4.9 * np.sqrt(5 / 64 / 4))
    assert row["gradient_variance"] == pytest.approx(float(gradients.var()), rel=4.9 * np.sqrt(5 / row["gradient_draws"] / 4))
    assert np.all(np.isnan(of_few.draws[0, :, 4:])) and np.isfinite(of_few.draws[0, :, :4]).all()


@pytest.mark.long
def test_means_are_compared_of_the_same_items_only(of_few):
    """kl_posterior_target has none but that of the batch, and so has a gradient of the batch."""
    values, gradients = of_few.value_z, of_few.gradient_z
    for scores, known in ((values, "kl_uniform"), (gradients, None)):
        found = {name for name, z in scores.loc["kl_marginal"].items() if np.isfinite(z)}
        assert found == ({known} if known else set())
        assert np.isfinite(scores.loc["kl_posterior_target", "kl_uniform"])
    assert of_few.z_limit == pytest.approx(scipy.stats.norm.isf(0.0027 / 2 / (2 + 8)), rel=1e-9)
    assert of_few.agree and list(of_few.to_dict()["estimators"]) == list(of_few.table.index)


@pytest.mark.long
def test_the_error_of_a_ratio_is_its_spread():
    """Over 100 parts of 40 draws. Without parameters, so that values alone are drawn."""
    diffusion = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, 0.9), dim=2)
    names = ["kl_marginal", "kl_uniform"]
    result = probdiff.compare_estimators(diffusion, X, key=jax.random.key(0), num_draws=4000, estimators=names)
    marginal, uniform = result.draws.reshape(2, 100, 40, 5)
    pairs = [(Variance.of_values(a, 5), Variance.of_means(b)) for a, b in zip(marginal, uniform)]
    ratio = np.array([a.value / b.value for a, b in pairs])
    error = np.array([ratio_error(a, b) for a, b in pairs])
    assert np.sqrt(np.mean(error**2)) == pytest.approx(np.log(ratio).std(), rel=0.3)


@pytest.mark.long
def test_common_random_numbers(result):
    """Estimators that share their parts share their draws."""
    draws = dict(zip(result.table.index, result.draws))
    uniform, controlled = (result.projections[name] for name in ("kl_uniform", "kl_controlled"))
    np.testing.assert_allclose(uniform, controlled, rtol=1e-4)  # the control variate has no gradient
    again = probdiff.compare_estimators(
        make(), X, key=jax.random.key(0), num_draws=8, estimators=["kl_marginal", "trace"]
    )
    np.testing.assert_allclose(again.draws[0], draws["kl_marginal"][:8], rtol=1e-4)
    np.testing.assert_allclose(again.draws[1], draws["trace"][:8], rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("biased", long_but(["gradient"], ["value", "gradient"]))
def test_a_biased_estimator_is_found_out(biased, monkeypatch):
    class Biased(probdiff.AnalyticELBO):
        def per_datum(self, key, x, learned=None):
            return super().per_datum(key, x, learned) + (0.5 if biased == "value" else 0.0)

        def loss_with_mutable_state(self, *arguments):
            result = super().loss_with_mutable_state(*arguments)
            return result | {"loss": result["loss"] * (1.3 if biased == "gradient" else 1)}

    monkeypatch.setitem(
        ESTIMATORS, "kl_marginal", lambda diffusion: (lambda elbo: (elbo.guide, elbo))(Biased(diffusion))
    )
    result = probdiff.compare_estimators(
        make(0.5), X, key=jax.random.key(0), num_draws=400, estimators=["trace_posterior", "kl_marginal"]
    )
    assert not result.agree and "DO NOT AGREE" in str(result)


def test_z_scores_are_standard_normal_when_all_is_well():
    """By simulation, equal and unequal counts; and exactly the t-test's tail."""
    rng = np.random.default_rng(0)
    for counts in ((8, 8), (8, 40)):
        z = [z_scores._z(*(rng.standard_normal((count, 1)) for count in counts))[0] for _ in range(4000)]
        assert np.mean(np.abs(z) > 1.96) < 0.07
    first, second = rng.standard_normal((2, 12, 1))
    z = z_scores._z(first, second)[0]
    assert 2 * scipy.stats.norm.sf(abs(z)) == pytest.approx(scipy.stats.ttest_rel(first, second).pvalue[0], rel=1e-4)
    assert z_scores._z(np.ones((5, 1)), np.ones((5, 1)) + 1e-7)[0] == pytest.approx(0, abs=0.2)


def test_outputs(result):
    text = str(result)
    assert all(f"\n{name} " in text for name in NAMES)
    assert f"best for values: {result.best('value_by_evaluations')}" in text and "does not measure the gap" in " ".join(text.split())
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["agree"] is True and len(document["khat"]) == 5
    assert document["estimators"]["trace"]["evaluations"] == 6
    tree = result.to_datatree()
    elbo = tree["posterior"]["elbo"]
    assert elbo.dims == ("chain", "draw", "estimator", "datum") and elbo.attrs["units"] == "nats"
    np.testing.assert_array_equal(elbo.sel(estimator="kl_marginal", chain=0), result.draws[1])
    assert float(tree["table"]["se"].sel(estimator="trace")) == result.table.loc["trace", "se"]
    figure = result.plot()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == NAMES and "nats" in figure.axes[0].get_xlabel()


def test_a_model_without_parameters_and_one_estimator():
    diffusion = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE))
    result = probdiff.compare_estimators(diffusion, X, key=jax.random.key(0), num_draws=2, estimators="kl_marginal")
    assert np.isnan(result.table.loc["kl_marginal", "gradient_variance"]) and result.best("gradient_by_evaluations") is None
    assert "nan" not in str(result) and json.dumps(result.to_dict(), allow_nan=False)


def test_without_names_those_that_suit_the_kernel_are_compared(monkeypatch):
    """A mixture kernel has no KL in closed form, from which the noise could be averaged out."""
    head = probdiff.networks.CategoricalHead(lambda z, n: jnp.zeros((*z.shape, 4)), 4)
    levels = probdiff.DiscretizedNormalLikelihood(4)
    diffusion = probdiff.Diffusion(SCHEDULE, head, levels, dim=2, kernel=probdiff.chain.MixtureKernel(4))
    asked = []
    monkeypatch.setattr(compare_estimators, "draw_estimators", lambda names, *_, **__: asked.extend(names) or {})
    monkeypatch.setattr(compare_estimators, "_summarise", lambda *_: None)
    for model, x, missing in ((diffusion, np.zeros((2, 2), int), {"kl_posterior_target"}), (make(), X, set())):
        asked.clear()
        probdiff.compare_estimators(model, x, key=jax.random.key(0))
        assert set(ESTIMATORS) - set(asked) == missing
        for name in asked:
            ESTIMATORS[name](model)  # which none of them refuses


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_draws": 1}, "num_draws: Expected at least 2"),
        ({"minutes": 0}, "minutes: Expected a positive number; got 0"),
        ({"num_draws": 2.5}, "num_draws: Expected a positive integer; got 2.5"),
        ({"estimators": ["trase"]}, "estimators: Expected names out of trace, .*; got 'trase'"),
        ({"estimators": []}, "estimators: Expected at least one name"),
        ({"x": np.zeros((3, 4), np.float32)}, r"x: Expected shape \(datum, 2\)"),
        ({"diffusion": "digits"}, "diffusion: Expected a Diffusion; got str"),
    ],
)
def test_what_is_not_usable_is_refused(options, message):
    arguments = {"diffusion": make(), "x": X, "num_draws": 4} | options
    with pytest.raises((ValueError, TypeError), match=message):
        probdiff.compare_estimators(key=jax.random.key(0), **arguments)


@pytest.mark.long
def test_models_are_ranked_with_paired_differences():
    """Against the closed form; the paired error is far below that of the two bounds apart."""
    x = ORACLE.sample(np.random.default_rng(1), 300).astype(np.float32)
    models = {name: make(scale) for name, scale in (("worse", 0.7), ("best", 1.0), ("good", 0.95))}
    result = probdiff.compare_models(models, x, key=jax.random.key(0), num_draws=50)
    table = result.table
    assert list(table.index) == ["best", "good", "worse"] and list(table["rank"]) == [0, 1, 2]
    exact = {
        name: exact_terms(probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, scale)), x)["elbo"]
        for name, scale in (("worse", 0.7), ("best", 1.0))
    }
    difference = exact["best"] - exact["worse"]
    row = table.loc["worse"]
    assert row["elbo_diff"] == pytest.approx(difference.mean(), abs=4.9 * row["dse"])
    assert 9.7 * row["dse"] < difference.mean() and row["dse"] < 0.9 * row["se"]
    assert table.loc["best", "elbo_diff"] == 0 and "paired item by item" in str(result)
    with pytest.raises(TypeError, match="models: Expected a dict from name to Diffusion; got list"):
        probdiff.compare_models([make(), make()], x, key=jax.random.key(0))
    with pytest.raises(ValueError, match="models: Expected at least two; got 1"):
        probdiff.compare_models({"one": make()}, x, key=jax.random.key(0))


@pytest.mark.long
def test_the_errors_of_the_ranking_are_those_of_the_draws():
    """``se`` over data, ``dse`` over data and paired, ``mc_error`` over draws, the data being given."""
    models, key = {"worse": make(0.3), "best": make(1.0)}, jax.random.key(3)
    table = probdiff.compare_models(models, X, key=key, num_draws=6).table
    draws = {
        name: np.asarray(probdiff.elbo_terms(model, X, key=key, num_draws=6).elbo, np.float64)
        for name, model in models.items()
    }
    for name, each in draws.items():
        row, per_item = table.loc[name], each.mean(0)
        less = draws["best"].mean(0) - per_item
        assert row["elbo"] == pytest.approx(per_item.mean(), rel=1e-4)
        assert row["se"] == pytest.approx(per_item.std(ddof=1) / np.sqrt(5), rel=1e-4)
        assert row["mc_error"] == pytest.approx(np.sqrt((each.var(0, ddof=1) / 6).sum()) / 5, rel=1e-4)
        assert row["elbo_diff"] == pytest.approx(less.mean(), rel=1e-4)
        assert row["dse"] == pytest.approx(less.std(ddof=1) / np.sqrt(5), rel=1e-4)


@pytest.mark.parametrize("levels", [True, False])
def test_the_ranking_prints_each_number_in_its_column(levels):
    columns = ["rank", "elbo", "se", "elbo_diff", "dse", "mc_error"]
    rows = {"good": [0, -20.5, 0.7, 0.0, 0.0, 0.11], "bad": [1, -33.25, 0.9, 12.75, 0.35, 0.13]}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    ranking = ModelComparison(table, {name: np.zeros(17) for name in rows}, 5, levels, 6)
    title, header, *lines, _ = str(ranking).splitlines()
    assert "17 items" in title and "5 draws" in title and ("bits/dim" in header) is levels
    assert header.split()[:2] == ["rank", "ELBO"] and header.index("difference") < header.index("MC error")
    for (name, row), line in zip(rows.items(), lines, strict=True):
        bits = [-row[1] / (6 * np.log(2))] if levels else []
        assert line.split()[0] == name
        assert [float(word) for word in line.split()[1:]] == pytest.approx(row + bits, abs=1e-4)
    document = ranking.to_dict()
    assert document["num_items"] == 17 and document["num_draws"] == 5
    assert {name: list(row.values()) for name, row in document["models"].items()} == rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small runs on the moons, of different N."""
    folder = tmp_path_factory.mktemp("compare")
    paths = []
    for num_steps in (8, 12):
        path = folder / f"N{num_steps}"
        dataset = probdiff.datasets.load("moons")
        network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1)
        diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(num_steps), network, dataset.likelihood())
        run = probdiff.storage.create_run(path, diffusion, {"data": "moons", "seed": 0})
        run.save(fit=probdiff.fit(diffusion, dataset.train, iterations=20, batch_size=16, progress=False))
        paths.append(str(path))
    return paths


@pytest.mark.release
def test_the_command(runs, capsys):
    arguments = ["compare", runs[0], "--num-draws", "4", "--estimators", "kl_uniform,kl_combined,trace"]
    assert cli.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert list(document["estimators"]) == ["kl_uniform", "kl_combined", "trace"] and "6/6" in captured.err
    opened = probdiff.open_run(runs[0])
    assert (opened.figures / "estimators.png").exists() and (opened.path / "estimators.nc").exists()
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("The 3 estimators agree") and "not from so few draws" in text


@pytest.mark.long
def test_what_cannot_be_written_is_shown(runs, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    shutil.rmtree(copy / "figures", ignore_errors=True)
    (copy / "figures").write_text("a file in the way")
    assert cli.main(["compare", str(copy), "--num-draws", "2", "--estimators", "kl_uniform, kl_marginal"]) == 2
    captured = capsys.readouterr()
    assert "best for values" in captured.out and "figures" in captured.err.splitlines()[-1]


@pytest.mark.long
def test_the_command_for_models(runs, capsys):
    assert cli.main(["compare", *runs, "--num-draws", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["models"]) == set(runs) and document["num_draws"] == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "options, message",
    [
        (["--estimators", "trase"], "estimators: Expected names out of"),
        (["--num-draws", "1"], "--num-draws: Expected an integer of at least 2; got 1"),
        (["--num-items", "1"], "--num-items: Expected 2 to 20000, the items of the test split; got 1"),
        (["--num-items", "20001"], "--num-items: Expected 2 to 20000, the items of the test split; got 20001"),
        (["--minutes", "0"], "--minutes: Expected a positive number; got 0"),
        (["--minutes", "1", "--num-draws", "4"], "--minutes: Expected either --minutes or --num-draws; got both"),
        (["--num-draws", "0"], "--num-draws: Expected an integer of at least 2; got 0"),
    ],
)
def test_the_command_refuses(runs, options, message, capsys, monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda *a, **k: pytest.fail("something was compiled"))
    assert cli.main(["compare", runs[0], *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.long
def test_the_command_refuses_runs_that_cannot_be_compared(runs, tmp_path, capsys):
    assert cli.main(["compare", runs[0], f"{runs[0]}/"]) == 2
    assert "Expected different runs" in capsys.readouterr().err
    for option, value in (("--estimators", "trace"), ("--num-items", "8"), ("--minutes", "1")):
        assert cli.main(["compare", *runs, option, value]) == 2
        assert f"{option}: Expected one run; got 2" in capsys.readouterr().err
    other = tmp_path / "other"
    dataset = probdiff.datasets.load("circles")
    diffusion = probdiff.Diffusion(SCHEDULE, probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1), dataset.likelihood())
    run = probdiff.storage.create_run(other, diffusion, {"data": "circles", "seed": 0})
    run.save(fit=probdiff.fit(diffusion, dataset.train, iterations=1, batch_size=4, progress=False))
    assert cli.main(["compare", runs[0], str(other)]) == 2
    assert "Expected the test data of" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "parameters.npz").write_bytes(b"")
    assert cli.main(["compare", str(tmp_path / "empty")]) == 2
    assert "a config.json without 'model'" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "none")]) == 2
    assert "run: Expected a run folder" in capsys.readouterr().err


@pytest.mark.long
def test_arviz_may_be_imported_first():
    """ArviZ leaves a half-loaded NumPyro behind, which ``import numpyro.distributions`` would load a second time."""
    code = "import arviz, probdiff, numpyro; numpyro.distributions.distribution"
    subprocess.run([sys.executable, "-c", code], check=True)
