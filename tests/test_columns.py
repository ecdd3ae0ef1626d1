"""Tables of several kinds of columns: probabilities, heads and bounds against enumeration, quadrature and closed forms."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.special
import scipy.stats
from conftest import assert_mean
from numpyro.infer import Predictive

import probdiff
from probdiff.likelihoods import CategoricalLikelihood, ColumnLikelihood, DiscretizedNormalLikelihood, NormalLikelihood
from probdiff.networks import ColumnHead, DensityHead
from probdiff.oracles import GaussianOracle, MixtureNetwork

N = 4
SCHEDULE = probdiff.log_snr_schedule(N, 5.0, -4.0)
DENSITY = NormalLikelihood([2.0, -1.0], [3.0, 0.5])
COLORS = CategoricalLikelihood(["blue", "green", "red"])
YEARS = DiscretizedNormalLikelihood(5, first=1998)
TABLE = ColumnLikelihood({("a", "b"): DENSITY, "color": COLORS, "year": YEARS}, columns=("a", "color", "year", "b"))
X = np.array([[2.5, 0, 1998, -1.2], [-4.0, 2, 2002, -0.1], [1.0, 1, 2001, -2.0]])
FRAME = pd.DataFrame({"year": [1998, 2002, 2001], "b": X[:, 3], "a": X[:, 0], "color": ["blue", "red", "green"], "more": ["x", "y", "z"]})
LOG_PROB = eqx.filter_jit(lambda likelihood, loc, scale, x: likelihood(jnp.asarray(loc), jnp.asarray(scale)).log_prob(jnp.asarray(x)))


def test_the_probability_of_a_category_is_that_of_its_point(float64):
    """Against normal densities at the points, with a scale of each dimension."""
    rng = np.random.default_rng(0)
    loc, scale = rng.normal(size=(6, 3)), rng.uniform(0.3, 2, (6, 3))
    log_p = np.stack([LOG_PROB(COLORS, loc, scale, np.full((6, 1), v)) for v in range(3)], -1)
    points = np.sqrt(3) * np.eye(3) - 1 / np.sqrt(3)
    joint = scipy.stats.norm.logpdf(points, loc[:, None], scale[:, None]).sum(-1)
    np.testing.assert_allclose(log_p, joint - scipy.special.logsumexp(joint, 1, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.asarray(COLORS.encode(np.arange(3)[:, None])), points)


def test_categories_may_be_numbers(float64):
    likelihood = CategoricalLikelihood([1, 2.5, 10])
    assert CategoricalLikelihood(FRAME["color"].astype("category").cat.categories).labels == COLORS.labels
    assert CategoricalLikelihood(np.array([1, 2.5, 10])).values == likelihood.values
    x = np.array([[1.0, 10.0], [2.5, 1.0]])
    x0 = likelihood.encode(x)
    assert x0.shape == (2, 6) and likelihood.encoded_dim(2) == 6
    np.testing.assert_array_equal(likelihood.decode(x0), x)
    draws = np.asarray(jax.jit(lambda: likelihood(x0, 0.8 * jnp.ones(6)).sample(jax.random.key(0), (4000,)))())
    p = np.exp([LOG_PROB(likelihood, x0[:1], 0.8 * np.ones(6), np.array([[v, 10.0]]))[0] for v in (1, 2.5, 10)])
    second_is_right = np.mean(draws[:, 0, 1] == 10)
    frequencies = [np.mean(draws[:, 0, 0] == v) for v in (1, 2.5, 10)]
    np.testing.assert_allclose(np.array(frequencies) * second_is_right, p, atol=0.03)
    assert p[0] > 1.5 * p[1] and p[1] == pytest.approx(p[2])


def test_columns_are_encoded_side_by_side_and_come_back(float64):
    x0 = np.asarray(TABLE.encode(X))
    assert x0.shape == (3, TABLE.encoded_dim(4)) == (3, 6)
    np.testing.assert_allclose(x0[:, :2], (X[:, [0, 3]] - [2, -1]) / [3, 0.5])
    np.testing.assert_allclose(x0[:, 2:5], np.asarray(COLORS.encode(X[:, [1]])))
    np.testing.assert_allclose(x0[:, 5], (X[:, 2] - 2000) / 2)
    np.testing.assert_allclose(TABLE.decode(jnp.asarray(x0)), X)
    np.testing.assert_allclose(TABLE.unrounded(jnp.asarray(x0 + 0.1)), X + [0.3, 0, 0.2, 0.05])
    assert "3 categories (blue, green, red)" in repr(TABLE) and "4 columns, 6 dimensions of the chain" in repr(TABLE)


def test_a_row_has_the_sum_of_the_log_densities_of_its_columns(float64):
    rng = np.random.default_rng(1)
    loc, scale = jnp.asarray(rng.normal(size=(3, 6))), jnp.asarray(rng.uniform(0.3, 1, 6))
    whole = X.astype(int)
    expected = (
        LOG_PROB(DENSITY, loc[:, :2], scale[:2], X[:, [0, 3]])
        + LOG_PROB(COLORS, loc[:, 2:5], scale[2:5], whole[:, [1]])
        + LOG_PROB(DiscretizedNormalLikelihood(5), loc[:, 5:], scale[5:], whole[:, [2]] - 1998)
    )
    np.testing.assert_allclose(LOG_PROB(TABLE, loc, scale, X), expected, rtol=1e-12)
    draws = np.asarray(jax.jit(lambda: TABLE(loc, scale).sample(jax.random.key(0), (2000,)))())
    assert draws.shape == (2000, 3, 4)
    assert_mean(draws[:, :, 0], 2 + 3 * np.asarray(loc[:, 0]), power=1.0)
    assert set(np.unique(draws[:, :, 1])) == {0, 1, 2} and set(np.unique(draws[:, :, 2])) <= set(range(1998, 2003))
    np.testing.assert_allclose(TABLE.log_jacobian(6), -np.log(3 * 0.5) + np.log(2 / 4))


def test_frames_are_read_by_name_and_label():
    np.testing.assert_array_equal(TABLE.read(FRAME), X)
    np.testing.assert_array_equal(TABLE.read(pl.DataFrame(FRAME.to_dict("list"))), X)
    np.testing.assert_array_equal(TABLE.read(FRAME.astype({"color": "category"})), X)
    plain = NormalLikelihood()
    np.testing.assert_array_equal(plain.read(FRAME[["a", "b"]]), X[:, [0, 3]])
    assert plain.read(X) is X
    standard = NormalLikelihood.standardized(FRAME[["a", "b"]])
    np.testing.assert_allclose(standard.loc, X[:, [0, 3]].mean(0))


@pytest.mark.parametrize("change, message", [
    (dict(color=["blue", "red", "pink"]), "one of the labels blue, green, red; got 'pink' in row 2 .* of column 'color'"),
    (dict(color=["blue", None, "red"]), "a value in every cell; got none in row 1 .* of column 'color'"),
    (dict(a=[1.0, np.nan, 2.0]), "got none in row 1|finite values; got .* in row 1 .* of column 'a'"),
    (dict(a=["1", "2", "3"]), "columns of numbers; got String in column 'a'; leave the column out"),
    (dict(b=[1.0, np.inf, 2.0]), "finite values; got .*inf.* in row 1 .* of column 'b'"),
])  # fmt: skip
def test_what_cannot_be_read_is_named_by_column_and_row(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TABLE.read(FRAME.assign(**change))
    with pytest.raises(ValueError, match="none named a"):
        TABLE.read(FRAME.drop(columns="a"))


@pytest.mark.parametrize("column, value, message", [
    (1, 3.0, "column color: x: Expected one of 0, 1, 2; got 3.0"),
    (2, 1997.0, "column year: x: Expected levels 1998 … 2002; got 1997"),
    (2, 1998.5, "whole numbers; got .*1998.5.* in row 1 .* of column 'year'"),
    (3, np.nan, "finite values; got .*nan.* in row 1 .* of column 'b'"),
])  # fmt: skip
def test_cells_that_are_no_data_are_named(column, value, message):
    bad = X.copy()
    bad[1, column] = value
    with pytest.raises(ValueError, match=message):
        TABLE.check_data(bad)


@pytest.mark.parametrize("build, error, message", [
    (lambda: ColumnLikelihood({}), TypeError, "a dict from columns"),
    (lambda: ColumnLikelihood({"a": 3}), TypeError, r"parts\['a'\]: Expected an AbstractLikelihood"),
    (lambda: ColumnLikelihood({"a": DENSITY, 1: YEARS}), TypeError, "all named, or all numbered"),
    (lambda: ColumnLikelihood({0: YEARS, 2: YEARS}), ValueError, r"each of the columns \[0, 1\] once"),
    (lambda: ColumnLikelihood({"a": YEARS, ("a", "b"): YEARS}), ValueError, "once"),
    (lambda: ColumnLikelihood({"a": YEARS}, columns=("a", "b")), ValueError, "once"),
    (lambda: ColumnLikelihood({"a": TABLE}), TypeError, "a ColumnLikelihood"),
    (lambda: CategoricalLikelihood(1), ValueError, "2 to 1024; got 1"),
    (lambda: CategoricalLikelihood(["a", "a"]), ValueError, "different ones"),
    (lambda: CategoricalLikelihood([1.5, 2.5]).encode(np.array([[1]])), ValueError, r"one of 1.5, 2.5; got 1 at index \[0, 0\]"),
    (lambda: CategoricalLikelihood("abc"), TypeError, "a number of categories, or a sequence"),
    (lambda: CategoricalLikelihood(["a", 2]), TypeError, "numbers, or labels"),
    (lambda: probdiff.Diffusion(SCHEDULE, lambda z, n: z, TABLE, dim=4).check_data(X), ValueError, "which the likelihood encodes in 6"),
    (lambda: probdiff.Diffusion(SCHEDULE, ColumnHead(lambda z, n: z, TABLE), SMALL), ValueError, "likelihood: Expected that of the ColumnHead, ColumnLikelihood"),
    (lambda: TABLE.check_data(X[:, :3]), ValueError, r"shape \(row, 4\); got 3 columns"),
])  # fmt: skip
def test_a_table_that_cannot_be_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_part_of_the_model_of_a_table_is_replaced():
    """As the audit does, by the likelihood of other units; and with arrays that are not the same objects as those of the head."""
    model = probdiff.Diffusion(SCHEDULE, ColumnHead(lambda z, n: z, SMALL), SMALL, dim=4)
    assert isinstance(model.with_likelihood(NormalLikelihood()).likelihood, NormalLikelihood)
    copied = jax.tree.map(lambda leaf: leaf + 0, model)
    assert copied.with_kernel(probdiff.chain.GaussianKernel("forward")).kernel.name == "forward"


# Bounds. Two independent columns, of which the exact network is known; and two that have to do with each other.

PRIOR = np.array([0.2, 0.7, 0.1])
LEVEL_PRIOR = np.array([0.5, 0.1, 0.1, 0.3])
SMALL = ColumnLikelihood({0: CategoricalLikelihood(3), 1: DiscretizedNormalLikelihood(4)})
CELLS = np.array(list(itertools.product(range(3), range(4))))


def correlated(z, n):
    """Parameters of a wrong model, in which each column depends on the other."""
    tilt = jnp.stack([z[..., 3] > 0, z[..., 0] > 0.5, z[..., 3] < 0.3, 2 * z[..., 1] + z[..., 2]], -1)
    return jnp.asarray(tilt, z.dtype) * (1 + 0.1 * n[..., None])


DEPENDENT = probdiff.Diffusion(probdiff.log_snr_schedule(8, 1.0, -3.0), ColumnHead(correlated, SMALL), SMALL, dim=4)


def test_a_column_head_enumerates(float64):
    """The noise that it predicts for categories of a known prior is the mean of the noise over them, given z."""
    z, log_snr = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6))), jnp.full(5, 0.7)
    logits = np.log(PRIOR) / np.sqrt(3)  # a · c_v = √3 a_v − const
    head = ColumnHead(lambda z, n: jnp.concatenate([z[..., :2], jnp.broadcast_to(logits, (5, 3)), 0.4 + 0 * z[..., :1]], -1), TABLE)
    found = np.asarray(head(z, log_snr, n=jnp.ones(5, int)))
    signal, noise = np.sqrt(scipy.special.expit(0.7)), np.sqrt(scipy.special.expit(-0.7))
    np.testing.assert_allclose(found[:, :2], np.sqrt(noise) * np.asarray(z)[:, :2], rtol=1e-9)
    for dims, points, log_prior in (
        (slice(2, 5), np.sqrt(3) * np.eye(3) - 1 / np.sqrt(3), np.log(PRIOR)),
        (slice(5, 6), np.linspace(-1, 1, 5)[:, None], 0.4 * np.linspace(-1, 1, 5)),
    ):
        own = np.asarray(z)[:, None, dims]
        joint = log_prior + scipy.stats.norm.logpdf(own, signal * points, noise).sum(-1)
        eps = (own - signal * points) / noise
        np.testing.assert_allclose(found[:, dims], (scipy.special.softmax(joint, 1)[..., None] * eps).sum(1), rtol=1e-8)


@pytest.mark.long
def test_the_bound_of_independent_columns_against_quadrature(float64):
    """A Gaussian column by its closed form, one of two categories by quadrature over the one direction in which they differ."""
    p, schedule = np.array([0.3, 0.7]), probdiff.log_snr_schedule(40, 5.0, -4.0)
    table = ColumnLikelihood({0: NormalLikelihood(1.0, 2.0), 1: CategoricalLikelihood(2)})
    gaussian = GaussianOracle([0.2], [[0.5]])
    exact = gaussian.network(schedule)

    def network(z, n):
        parameter = jnp.broadcast_to(jnp.log(p) / np.sqrt(2), (*z.shape[:-1], 2))
        density = exact(z[..., :1], n) / jnp.asarray((1 - schedule.alpha_bar) ** 0.25)[n - 1][..., None]
        return jnp.concatenate([density, parameter], -1)

    diffusion = probdiff.Diffusion(schedule, ColumnHead(network, table), table, dim=3)
    alone = probdiff.Diffusion(schedule, exact, NormalLikelihood(1.0, 2.0), dim=1)
    x = np.array([[1.7, 0.0], [1.7, 1.0], [-0.4, 1.0]])
    terms = probdiff.elbo_terms(diffusion, x, key=jax.random.key(0), num_draws=3000)
    closed = probdiff.oracles.exact_terms(alone, x[:, :1])["elbo"]

    node, weight = np.polynomial.hermite_e.hermegauss(200)
    weight = weight / weight.sum()
    alpha_bar, beta = schedule.alpha_bar, schedule.beta
    signal, noise = np.sqrt(alpha_bar)[:, None], np.sqrt(1 - alpha_bar)[:, None]
    posterior = beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    kl_weight = beta[1:] ** 2 / (2 * posterior * (1 - beta[1:]) * (1 - alpha_bar[1:]))
    discrete = []
    for category in (0, 1):
        # The points are ±1 along (1, −1)/√2, and at 0 across it, where the noise is predicted exactly.
        sign = 1 - 2 * category
        z = signal * sign + noise * node
        mean = np.tanh(signal * z / noise**2 + np.log(p[0] / p[1]) / 2)
        squared = (weight * (node - (z - signal * mean) / noise) ** 2).sum(1)
        prior_kl = (2 * (-alpha_bar[-1] - np.log1p(-alpha_bar[-1])) + alpha_bar[-1]) / 2
        eps_hat = (z[0] - signal[0] * mean[0]) / noise[0]
        loc = (z[0] - beta[0] / noise[0] * eps_hat) / np.sqrt(1 - beta[0])
        log_lik = (weight * scipy.special.log_expit(2 * sign * loc / beta[0])).sum()
        discrete.append(log_lik - prior_kl - (kl_weight * squared[1:]).sum())
    expected = closed + np.array(discrete)[[0, 1, 1]]
    assert_mean(terms.elbo, expected, power=0.4)


@pytest.mark.long
def test_the_probabilities_of_all_cells_sum_to_one_and_are_those_of_the_samples(float64):
    """Two small columns that depend on each other, by brute force: p(x) of every cell by importance weighting."""
    log_p = probdiff.iwae(DEPENDENT, CELLS, key=jax.random.key(0), num_particles=4000, num_draws=8)
    total = np.exp(log_p).sum(1)
    assert_mean(total, 1.0, power=0.1)
    drawn = np.asarray(Predictive(DEPENDENT.model, num_samples=1)(jax.random.key(1), None, num_data=20_000)["x"][0])
    counts = np.zeros((3, 4))
    np.add.at(counts, tuple(drawn.astype(int).T), 1)
    p = np.exp(log_p).mean(0)
    error = np.sqrt(p * (1 - p) / 20_000 + np.exp(log_p).var(0, ddof=1) / 8)
    assert np.all(np.abs(counts.ravel() / 20_000 - p) <= 4.9 * error) and np.all(error < 0.01)
    independent = np.outer(p.reshape(3, 4).sum(1), p.reshape(3, 4).sum(0)).ravel()
    assert np.abs(p - independent).max() > 0.03  # the columns do depend on each other


@pytest.mark.long
def test_both_ways_agree_for_a_mixed_table(float64):
    both = probdiff.diagnostics.compute_both_ways(DEPENDENT, CELLS, key=jax.random.key(0), num_draws=400)
    assert both.agree and both.common.largest < 1e-10 and both.detectable < 0.5


@pytest.mark.long
def test_a_class_column_costs_its_surprise_and_raises_no_bound(float64):
    """At exact networks log p(x, c) = log p(x | c) + log p(c), and no more than log p(x)."""
    schedule = probdiff.log_snr_schedule(400, 10.0, -8.0)
    p, means, sd = np.array([0.4, 0.6]), np.array([-1.0, 1.0]), 0.5
    table = ColumnLikelihood({0: NormalLikelihood(), 1: CategoricalLikelihood(2)})
    points = np.asarray(CategoricalLikelihood(2).points)
    joint = MixtureNetwork(np.log(p), np.column_stack([means, points]), np.array([[sd**2, 0, 0]]), np.eye(3)[None], 1.0)
    alone = MixtureNetwork(np.log(p), means[:, None], np.array([[sd**2]]), np.eye(1)[None], 1.0)
    rng = np.random.default_rng(0)
    c = rng.choice(2, 60, p=p)
    x = np.column_stack([rng.normal(means[c], sd), c])
    estimate = {}
    for name, network, likelihood, data in (("joint", joint, table, x), ("alone", alone, NormalLikelihood(), x[:, :1])):
        diffusion = probdiff.Diffusion(schedule, network, likelihood)
        estimate[name] = np.asarray(probdiff.elbo_terms(diffusion, data, key=jax.random.key(0), num_draws=40).elbo)
    log_joint = scipy.stats.norm.logpdf(x[:, 0], means[c], sd) + np.log(p)[c]
    log_alone = np.log(scipy.stats.norm.pdf(x[:, :1], means, sd) @ p)
    for name, truth, most in (("joint", log_joint, 0.05), ("alone", log_alone, 0.03)):
        error = estimate[name].mean(1).std(ddof=1) / np.sqrt(40)
        gap = truth.mean() - estimate[name].mean()
        assert -4.9 * error < gap < most + 4.9 * error and error < 0.05, (name, gap, error)
    assert estimate["joint"].mean() < estimate["alone"].mean()


def test_a_density_head_and_a_column_head_of_a_density_are_one():
    z, log_snr, n = np.random.default_rng(0).normal(size=(4, 2)), np.linspace(-3, 5, 4), np.arange(1, 5)
    heads = ColumnHead(lambda z, n: jnp.sin(z), NormalLikelihood()), DensityHead(lambda z, n: jnp.sin(z))
    a, b = (head(jnp.asarray(z), jnp.asarray(log_snr), n=jnp.asarray(n)) for head in heads)
    np.testing.assert_allclose(a, b)


@pytest.mark.release
def test_frames_go_where_arrays_go():
    """The terms of a bound, a comparison and a fit: the same numbers, bit for bit."""
    diffusion = probdiff.Diffusion(SCHEDULE, ColumnHead(probdiff.MLP(dim=6, key=jax.random.key(0), hidden=8, num_blocks=1), TABLE), TABLE)
    array = np.concatenate([X] * 4) + np.outer(np.arange(12), [0.1, 0, 0, 0.01])
    frame = pd.concat([FRAME] * 4).assign(a=array[:, 0], b=array[:, 3])
    a, b = (probdiff.elbo_terms(diffusion, x, key=jax.random.key(1)).elbo for x in (frame, array))
    np.testing.assert_array_equal(a, b)
    a, b = (probdiff.elbo.data_set_elbo(diffusion, x, key=jax.random.key(1)).elbo for x in (frame, array))
    np.testing.assert_array_equal(a, b)
    options = {"iterations": 2, "batch_size": 4, "progress": False}
    a, b = (probdiff.fit(diffusion, x, validation=x, **options).validation for x in (frame, array))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(TypeError, match="an array; got DataFrame; probdiff.datasets.split makes arrays"):
        diffusion.model(frame)


def test_models_of_a_density_and_of_a_probability_are_not_compared():
    density = probdiff.Diffusion(SCHEDULE, lambda z, n: z, NormalLikelihood(), dim=2)
    mixed = ColumnLikelihood({0: NormalLikelihood(), 1: DiscretizedNormalLikelihood(4)})
    models = {"density": density, "mixed": probdiff.Diffusion(SCHEDULE, lambda z, n: z, mixed, dim=2)}
    with pytest.raises(ValueError, match="the same discrete columns; got other columns with a density in mixed"):
        probdiff.compare_models(models, CELLS.astype(float), key=jax.random.key(0))


@pytest.mark.long
def test_a_run_keeps_what_each_column_is(tmp_path):
    head = ColumnHead(probdiff.MLP(dim=6, key=jax.random.key(0), hidden=8, num_blocks=1), TABLE)
    diffusion = probdiff.Diffusion(SCHEDULE, head, TABLE, "learned")
    run = probdiff.storage.create_run(tmp_path / "run", diffusion)
    back = probdiff.open_run(tmp_path / "run").untrained
    assert back.is_like(diffusion) and repr(back.likelihood) == repr(TABLE) and run.path == tmp_path / "run"
    np.testing.assert_array_equal(back.likelihood.read(FRAME), X)
    z, n = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32), jnp.full(3, 2)
    np.testing.assert_array_equal(back.predict_noise(z, n), diffusion.predict_noise(z, n))
