"""ArviZ's functions on the README's objects, as people type them: one test per call."""

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
import xarray as xr
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO

import probdiff
from probdiff.likelihoods import CategoricalLikelihood, ColumnLikelihood

# isort: split
import arviz as az

pytestmark = pytest.mark.filterwarnings("error:invalid value", "error:num_samples is larger")
TERMS = ["prior_kl", *(f"step_kl[{n}-{n + 4}]" for n in range(2, 43, 5)), "step_kl[47-50]", "reconstruction", "elbo"]
SAMPLE = ["chain", "draw", "datum"]


@pytest.fixture(scope="module")
def x():
    return probdiff.datasets.load("moons").train[:32]


def exact_for(covariance):
    """A model with the README's schedule and likelihood, and the network that is exact for normal data."""
    schedule = probdiff.cosine_schedule(num_steps=50)
    network = probdiff.oracles.GaussianOracle([0.5, 0.25], covariance).network(schedule)
    return probdiff.Diffusion(schedule, network, likelihood=probdiff.NormalLikelihood())


@pytest.fixture(scope="module")
def fitted(x):
    return exact_for(np.cov(x.T))


@pytest.fixture(scope="module")
def terms(fitted, x):
    return probdiff.elbo_terms(fitted, x, key=jax.random.key(2), num_draws=100)


@pytest.fixture(scope="module")
def tree(terms):
    return probdiff.to_datatree(terms)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def size(plot):
    """Width and height of a figure in pixels: of a screen, at most."""
    figure = plot.viz["figure"].item()
    width, height = figure.get_size_inches() * figure.dpi
    assert width <= 1920 and height <= 1200
    return width, height


@pytest.mark.long
def test_summary(tree, terms):
    summary = az.summary(tree, round_to="none")
    assert list(summary.index) == TERMS and not summary.isna().any(axis=None)
    per_item = np.asarray(terms.elbo, np.float64).mean(0)
    row = summary.loc["elbo"]
    assert row["mean"] == pytest.approx(per_item.mean(), rel=1e-5) and row["sd"] == pytest.approx(per_item.std(), rel=0.05)
    error = per_item.std(ddof=1) / np.sqrt(32)
    assert row["mcse_mean"] == pytest.approx(error, rel=0.5)  # ArviZ estimates how many of the draws count
    rows = summary["mean"]
    assert rows["reconstruction"] - rows["prior_kl"] - rows[TERMS[1:11]].sum() == pytest.approx(rows["elbo"], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("num_draws", [1, 4])
def test_summary_of_few_draws_of_noise(fitted, x, num_draws):
    """As few as ``probdiff fit`` has, or as ``elbo_terms`` draws if not told."""
    terms = probdiff.elbo_terms(fitted, x, key=jax.random.key(2), num_draws=num_draws)
    assert not az.summary(probdiff.to_datatree(terms)).isna().any(axis=None)


@pytest.mark.long
def test_summary_of_the_noise(tree, terms):
    summary = az.summary(tree["per_datum"].to_dataset().mean("datum"), round_to="none")
    assert list(summary.index) == TERMS[1:] and not summary.isna().any(axis=None)
    over_data = np.asarray(terms.elbo, np.float64).mean(1)
    assert summary.loc["elbo", "mean"] == pytest.approx(over_data.mean(), rel=1e-5)
    assert summary.loc["elbo", "mcse_mean"] == pytest.approx(over_data.std(ddof=1) / 10, rel=0.5)


def test_summary_without_steps(x):
    one = probdiff.Diffusion(probdiff.cosine_schedule(num_steps=1), lambda z, n: 0 * z)
    tree = probdiff.to_datatree(probdiff.elbo_terms(one, x, key=jax.random.key(2), num_draws=4))
    assert list(az.summary(tree).index) == ["prior_kl", "reconstruction", "elbo"]


def test_plot_forest(tree):
    size(az.plot_forest(tree))
    size(az.plot_forest(tree, var_names="step_kl", coords={"steps": ["2-6", "47-50"]}, combined=True))


def test_plot_dist(tree):
    size(az.plot_dist(tree))


def test_from_numpyro(fitted, x):
    mcmc = MCMC(NUTS(fitted.model, max_tree_depth=1), num_warmup=1, num_samples=4, progress_bar=False)
    mcmc.run(jax.random.key(0), x)
    posterior = az.from_numpyro(mcmc, **probdiff.diagnostics.arviz_dims(fitted))["posterior"]
    assert posterior["z"].dims == ("chain", "draw", "step", "datum", "dim") and posterior["z"].shape == (1, 4, 50, 32, 2)
    assert posterior["step"].values.tolist() == list(range(50, 0, -1))
    np.testing.assert_array_equal(posterior["z"].sel(step=1)[0], mcmc.get_samples()["z"][:, -1])


@pytest.mark.long
def test_from_numpyro_svi(fitted, x):
    network = probdiff.MLP(dim=2, key=jax.random.key(0), hidden=8, num_blocks=1)
    diffusion = probdiff.Diffusion(fitted.schedule, network, fitted.likelihood)
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), Trace_ELBO())
    result = svi.run(jax.random.key(1), 2, x, progress_bar=False)
    dims = probdiff.diagnostics.arviz_dims(diffusion)
    tree = az.from_numpyro_svi(svi, svi_result=result, model_args=(x,), num_samples=3, **dims)
    assert tree["posterior"]["z"].dims == ("sample", "step", "datum", "dim")
    assert tree["observed_data"]["x"].dims == ("datum", "dim")


def test_compare_and_plot_compare(fitted, x):
    comparison = probdiff.compare_models({"a": fitted, "b": exact_for(np.eye(2))}, x, key=jax.random.key(3))
    ranking, table = az.compare(comparison.to_elpd(), round_to="none"), comparison.table
    assert list(ranking.index) == list(table.index) and list(ranking["rank"]) == list(table["rank"])
    # ArviZ's are sums over data, and differences from the best.
    np.testing.assert_allclose(ranking["elpd"] / 32, table["elbo"])
    np.testing.assert_allclose(ranking["elpd_diff"] / 32, -table["elbo_diff"])
    np.testing.assert_allclose(ranking["se"] / 32, table["se"], rtol=0.05)
    np.testing.assert_allclose(ranking["dse"] / 32, table["dse"], rtol=0.05)
    size(az.plot_compare(ranking))


def test_loo_is_refused(tree):
    """What the README says instead: the data are held out, and no factor of the tree is a likelihood."""
    with pytest.raises(TypeError, match="log likelihood not found"):
        az.loo(tree)


@pytest.mark.long
def test_plot_khat(fitted, x):
    log_weights = probdiff.diagnostics.compute_both_ways(fitted, x, key=jax.random.key(4), num_draws=100).path
    khat = probdiff.pareto_khat(log_weights)
    line = {"hline_values": [min(1 - 1 / np.log10(100), 0.7)], "visuals": {"hlines": True}}
    plot = az.plot_khat(xr.Dataset({"pareto_k": ("datum", khat)}), **line)
    size(plot)
    assert 0.5 in [line.get_ydata()[0] for line in plot.viz["figure"].item().axes[0].lines]


@pytest.mark.long
def test_plot_ppc_dist(fitted, x):
    sets = Predictive(fitted.model, num_samples=100)(jax.random.key(5), None, num_data=len(x))["x"]
    tree = az.from_dict({"posterior_predictive": {"x": sets[None]}, "observed_data": {"x": x}}, dims={"x": ["datum", "dim"]})
    size(az.plot_ppc_dist(tree))


def test_plot_lm(tree):
    kl = tree["per_step"].to_dataset()
    groups = {"posterior_predictive": kl, "constant_data": xr.Dataset({"n": kl["step"]}), "observed_data": kl.mean(SAMPLE)}
    hidden = {"observed_scatter": False}
    size(az.plot_lm(xr.DataTree.from_dict(groups), plot_dim="step", sample_dims=SAMPLE, smooth=False, visuals=hidden))


def test_the_columns_of_a_table_have_their_names():
    """In what is drawn from a model of a table, whose chain has more dimensions than the table has columns."""
    table = ColumnLikelihood({"size": probdiff.NormalLikelihood(), "kind": CategoricalLikelihood(["oak", "elm"])})
    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(3), lambda z, n: z, table, dim=3)
    drawn = Predictive(diffusion.model, num_samples=2)(jax.random.key(0), None, num_data=4)
    named = az.from_numpyro(posterior_predictive=drawn, sample_dims=["draw"], **probdiff.diagnostics.arviz_dims(diffusion))["posterior_predictive"]
    assert named["x"].sel(column="kind").shape == (2, 4) and named["z"].sizes["dim"] == 3
    assert set(np.unique(named["x"].sel(column="kind"))) <= {0, 1}
