"""The density of what was observed of data with gaps, against the exact marginals of the discrete linear-Gaussian chain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Z_MAX, assert_mean, release_but
from scipy import stats

import probdiff
from probdiff.inference import DiagonalTwist, Inpainting, LinearGaussian, TweedieTwist, observed_log_prob
from probdiff.inference.particles import evidence, make_problem
from probdiff.oracles import GaussianOracle, exact_moments

KEY = jax.random.key(0)
SCHEDULE = probdiff.log_snr_schedule(24, 5.0, -4.0)
LIKELIHOOD = probdiff.NormalLikelihood([1.0, 0.0, 2.0], [2.0, 1.0, 0.5])
ORACLE = GaussianOracle([0.3, -0.2, 0.1], [[0.9, 0.4, -0.2], [0.4, 0.7, 0.1], [-0.2, 0.1, 0.5]])
GAPS = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0]], bool)
X = np.where(GAPS, [2.0, -0.4, 2.4], np.nan)


@functools.cache
def make():
    return probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, 0.95), LIKELIHOOD, "forward").bind({})


def exact(x, model=None, context=None):
    """The log density of what there is of one datum."""
    mean, covariance = (np.asarray(each) for each in exact_moments(model or make(), context=context))
    there = ~np.isnan(x)
    return stats.multivariate_normal(mean.ravel()[there], covariance[np.ix_(there, there)]).logpdf(x[there]) if there.any() else 0.0


def test_each_datum_has_the_density_of_what_there_is_of_it(float64):
    """Some of it, all of it and nothing; with more runs than particles, so that the errors can be trusted."""
    found = observed_log_prob(make(), X, key=KEY, num_particles=64, num_runs=16)
    expected = np.array([exact(row) for row in X])
    assert np.all(np.abs(found.log_prob - expected) <= Z_MAX * found.error) and np.all(found.error < 0.1)
    assert found.log_prob[3] == 0 == found.error[3]
    np.testing.assert_array_equal(found.observed, [2, 1, 3, 0, 2])
    assert np.all((found.ess > 1) & (found.ess <= 64)) and "1.6 coordinates were observed" in repr(found)


@pytest.mark.parametrize("twist", release_but(["diagonal"], ["diagonal", "linear"]))
def test_the_diagonal_twist_is_unbiased(twist, float64):
    """With the last step in closed form, and linearised; also where a matrix mixes the coordinates."""
    matrix, y = np.array([[0.5, 1.0, -0.3], [0.2, -0.4, 1.0]]), np.array([1.4, 2.5])
    observation = Inpainting(GAPS[0], X[0]) if twist == "diagonal" else LinearGaussian(matrix, y, 0.8)
    mean, covariance = exact_moments(make())
    of_y = matrix @ covariance @ matrix.T + 0.64 * np.eye(2)
    expected = exact(X[0]) if twist == "diagonal" else stats.multivariate_normal(matrix @ mean, of_y).logpdf(y)
    problem = make_problem(make(), observation, DiagonalTwist(), None)
    run = jax.jit(lambda keys: jax.lax.map(lambda key: evidence(problem, 4, key), keys, batch_size=1000))
    assert_mean(np.exp(np.asarray(run(jax.random.split(KEY, 4000)), float) - expected)[:, None], 1.0, power=0.5)


def test_room_for_more_values_changes_no_twist(float64):
    """But for a constant; nor does the diagonal twist make anything of what is hidden."""
    rows = Inpainting.of_rows(GAPS, X, 3)
    z, n = jnp.array([[0.3, -0.5, 0.9], [1.0, 0.2, -0.4]]), jnp.array(7)
    for k in (0, 1, 4):
        given, row = Inpainting(GAPS[k], X[k]), jax.tree.map(lambda leaf, k=k: leaf[k], rows)
        for twist in (TweedieTwist(), DiagonalTwist()):
            one, other = ([twist(make(), observation, each, n) for each in z] for observation in (given, row))
            np.testing.assert_allclose(other[1].log_prob - other[0].log_prob, one[1].log_prob - one[0].log_prob, rtol=1e-9)
            np.testing.assert_allclose(other[0].gradient, one[0].gradient, rtol=1e-9, atol=1e-12)
        assert np.all((one[0].gradient != 0) == GAPS[k])


@pytest.mark.long
def test_the_diagonal_twist_is_exact_for_independent_coordinates():
    """For standard normal data, of a fine chain: all particles weigh the same, and observed coordinates go to where y is."""
    schedule = probdiff.log_snr_schedule(300, 8.0, -8.0)
    model = probdiff.Diffusion(schedule, GaussianOracle(np.zeros(20), np.eye(20)).network(schedule), reverse_variance="posterior", dim=20).bind({})
    x = np.where(np.arange(20) < 18, 1.5, np.nan)[None]
    found = observed_log_prob(model, x, key=KEY, num_particles=16, num_runs=2)
    assert abs(found.log_prob[0] - 18 * stats.norm.logpdf(1.5)) < 0.5 and found.ess[0] > 3


def test_masks_nan_masked_arrays_and_frames_are_alike():
    import pandas as pd

    given = {"key": KEY, "num_particles": 4, "num_runs": 2}
    found = observed_log_prob(make(), X, **given)
    assert np.all(np.isfinite(found.log_prob))
    for other in (
        observed_log_prob(make(), np.where(GAPS, X, 7.0), mask=GAPS, **given),
        observed_log_prob(make(), np.ma.masked_array(np.where(GAPS, X, np.inf), ~GAPS), **given),
        observed_log_prob(make(), pd.DataFrame(X, columns=list("abc")), **given),
    ):
        np.testing.assert_array_equal(other.log_prob, found.log_prob)


@pytest.mark.long
def test_other_gaps_compile_nothing():
    model, given = make(), {"key": KEY, "num_particles": 4, "num_runs": 2}
    first = observed_log_prob(model, X, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax._src.interpreters.pxla.MeshComputation, "compile", lambda *a, **k: pytest.fail("something was compiled"))
        other = observed_log_prob(model, np.where(GAPS[::-1], [2.0, -0.4, 2.4], np.nan), **given)
    np.testing.assert_allclose(other.observed, first.observed[::-1])


def test_each_datum_has_its_context(float64):
    oracle = GaussianOracle(ORACLE.mean, ORACLE.covariance, [[1.0], [-0.5], [0.2]])
    model = probdiff.Diffusion(SCHEDULE, oracle.network(SCHEDULE), LIKELIHOOD, "forward").bind({})
    context = np.array([[-1.0], [4.0]])
    found = observed_log_prob(model, X[:2], context=context, key=KEY, num_particles=64, num_runs=8)
    expected = [exact(row, model, c[None]) for row, c in zip(X, context)]
    assert np.all(np.abs(found.log_prob - expected) <= Z_MAX * found.error) and np.all(found.error < 0.2)


@functools.cache
def grid():
    """Two coordinates on a grid of three levels that begins at 3."""
    head = probdiff.networks.CategoricalHead(lambda z, n: jnp.stack([z[..., ::-1], 0 * z, -z], -1), 3)
    return probdiff.Diffusion(probdiff.log_snr_schedule(6, 4.0, -3.0), head, probdiff.DiscretizedNormalLikelihood(3, 3), dim=2).bind({})


def test_the_diagonal_twist_of_levels_is_their_probability(float64):
    """And moves z as if x_0 were the level that was observed."""
    z, n, model = jnp.array([0.4, -0.3]), jnp.array(4), grid()
    twisted = DiagonalTwist()(model, Inpainting(np.array([False, True]), np.array([3, 5])), z, n)
    log_p = model.log_probabilities(z, n)
    np.testing.assert_allclose(twisted.log_prob, log_p[1, 2])
    alpha_bar = float(model.schedule.alpha_bar[3])
    np.testing.assert_allclose(twisted.gradient, [0, alpha_bar**0.5 / (1 - alpha_bar) * (1 - jnp.exp(log_p[1]) @ jnp.array([-1, 0, 1]))])


def test_on_a_grid_it_is_a_probability(float64):
    """One coordinate takes each level in turn: probabilities add up to 1."""
    model = grid()
    x = np.array([[3, np.nan], [4, np.nan], [5, np.nan]])
    found = observed_log_prob(model, x, key=KEY, num_particles=64, num_runs=16, twist=DiagonalTwist())
    probability = np.exp(found.log_prob)
    error = np.sqrt(np.square(probability * found.error).sum())
    assert error < 0.03 and abs(probability.sum() - 1) < Z_MAX * error


@pytest.mark.long
def test_collapsed_particles_are_reported():
    with pytest.warns(UserWarning, match="observed_log_prob: the particles of 1 of 1 data have collapsed"):
        observed_log_prob(make(), np.array([[40.0, np.nan, 2.0]]), key=KEY, num_particles=256, num_runs=2, twist="none")
