"""Likelihoods: probabilities sum to one, tails are finite, units are the user's, and the wrong data is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import own_part, release_but

import probdiff
from probdiff.likelihoods import DiscretizedNormal
from probdiff.likelihoods.discretized import _log_fraction


def all_log_probs(levels, loc, scale, dtype):
    loc, scale = (jnp.asarray(v, dtype) for v in np.broadcast_arrays(loc, scale))
    return np.asarray(DiscretizedNormal(loc[None], scale[None], levels).log_prob(jnp.arange(levels)[:, None]))


LOCS, SCALES = np.meshgrid([-40.0, -1.0, -0.97, -0.3, 0.0, 1e-3, 0.5, 1.0, 3.0], [1e-3, 0.02, 0.3, 2.0, 50.0])


@pytest.mark.long
@pytest.mark.parametrize("levels", release_but([2, 17], [2, 3, 17, 256]))
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-5), (jnp.float64, 1e-12)])
def test_probabilities_sum_to_one(levels, dtype, tolerance, float64):
    log_p = all_log_probs(levels, LOCS.ravel(), SCALES.ravel(), dtype)
    np.testing.assert_allclose(np.exp(log_p.astype(np.float64)).sum(0), 1, atol=tolerance)


@pytest.mark.long
def test_probabilities_are_the_normals_bins(float64):
    levels, edges = 17, np.concatenate([[-np.inf], (np.arange(1, 17) - 0.5) / 8 - 1, [np.inf]])
    for loc, scale in ((0.1, 0.2), (-0.8, 0.05), (1.2, 0.7)):
        log_p = all_log_probs(levels, [loc], [scale], jnp.float64)[:, 0]
        normal = scipy.stats.norm(loc, scale)
        mirrored = normal.sf(edges[:-1]) - normal.sf(edges[1:])  # accurate in the upper tail, where cdf is not
        expected = np.where(edges[:-1] > loc, mirrored, normal.cdf(edges[1:]) - normal.cdf(edges[:-1]))
        np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-8, atol=1e-290)  # JAX: log_ndtr is good to 2e-9


@pytest.mark.long
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_far_tails_and_their_gradients_are_finite_in_float32(levels):
    loc = jnp.array([-1e6, -1e3, -30.0, 0.0, 30.0, 1e3, 1e6], jnp.float32)
    for scale in (1e-4, 1e-2, 1.0, 1e3):
        for level in (0, levels // 2, levels - 1):

            def log_prob(loc, scale, level=level):
                return DiscretizedNormal(loc, scale, levels).log_prob(jnp.full(loc.shape, level)).sum()

            value, grads = jax.value_and_grad(log_prob, (0, 1))(loc, jnp.float32(scale))
            assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads), (scale, level)


@pytest.mark.long
def test_tail_asymptotics_in_float32():
    """Where the difference of two log Φ is all rounding: log P ≈ log φ at the near edge − log(distance)."""
    loc, scale, levels = 1e4, 1.0, 256
    distance = loc - (100 + 0.5) * 2 / 255 + 1
    expected = scipy.stats.norm.logpdf(distance) - np.log(distance)
    # The bin is 78 decay lengths wide, so that the mass beyond its far edge is nothing.
    np.testing.assert_allclose(all_log_probs(levels, [loc], [scale], jnp.float32)[100, 0], expected, rtol=1e-5)


@pytest.mark.long
def test_samples_have_the_probabilities():
    distribution = DiscretizedNormal(jnp.float32(0.8), jnp.float32(0.3), 9)
    counts = np.bincount(distribution.sample(jax.random.key(0), (40_000,)), minlength=9)
    p = np.exp(np.asarray(distribution.log_prob(jnp.arange(9)), np.float64))
    assert scipy.stats.chisquare(counts, 40_000 * p / p.sum()).pvalue > 1e-6
    other = DiscretizedNormal(jnp.float32(0.8), jnp.float32(0.32), 9)
    wrong = np.exp(np.asarray(other.log_prob(jnp.arange(9)), np.float64))
    assert scipy.stats.chisquare(counts, 40_000 * wrong / wrong.sum()).pvalue < 1e-6


def test_encode_puts_levels_on_the_grid():
    x0 = probdiff.DiscretizedNormalLikelihood(levels=17).encode(jnp.array([[0, 8, 16]]))
    np.testing.assert_allclose(x0, [[-1, 0, 1]])


def test_normal_density_is_in_the_users_units(float64):
    x = np.random.default_rng(0).normal([5.0, -2.0], [10.0, 0.1], (50, 2))
    likelihood = probdiff.NormalLikelihood.standardized(x)
    encoded = likelihood.encode(x)
    np.testing.assert_allclose(encoded.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(encoded.std(0), 1, rtol=1e-12)
    loc, scale = jnp.array([0.3, -0.1]), jnp.array(0.2)
    expected = scipy.stats.norm(x.mean(0) + x.std(0) * loc, x.std(0) * 0.2).logpdf(x[:3]).sum(1)
    np.testing.assert_allclose(likelihood(loc, scale).log_prob(x[:3]), expected, rtol=1e-10)


def test_a_narrow_bin_far_in_the_tail_in_float32():
    """A bin too narrow for float32 to tell its edges apart: its share of the tail is 1 − exp(−width · distance)."""
    share = _log_fraction(jnp.float32(-1e3), jnp.float32(7.8e-6))
    np.testing.assert_allclose(share, np.log(-np.expm1(-7.8e-3)), rtol=1e-4)


# Each likelihood of one coordinate, a user's among them, with the points at which its density or probability is summed, and their distance.
LIKELIHOODS = {
    "normal": (probdiff.NormalLikelihood([1.0], [2.0]), np.linspace(-40, 40, 20_001), 80 / 20_000),
    "levels": (probdiff.DiscretizedNormalLikelihood(17), np.arange(17), 1),
    "Student-t": (own_part("likelihood").StudentTLikelihood(jnp.log(4.0), 1.5), np.linspace(-400, 400, 200_001), 800 / 200_000),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_it_is_a_distribution_around_the_decoded_x0(name, float64):
    """Of total mass 1, largest where x_0 is in the user's units; what it draws are data, and encoding them is undone by decoding."""
    likelihood, points, distance = LIKELIHOODS[name]
    x0, scale = jnp.array([0.25]), jnp.array([0.1])
    mass = np.exp(likelihood(x0, scale).log_prob(jnp.asarray(points)[:, None])) * distance
    assert mass.sum() == pytest.approx(1, rel=1e-6)
    assert points[np.argmax(mass)] == pytest.approx(likelihood.decode(x0)[0], abs=distance)
    x = np.asarray(likelihood(x0, scale).sample(jax.random.key(0), (5,)))
    likelihood.check_data(x)
    np.testing.assert_allclose(likelihood.decode(likelihood.encode(x)), x, rtol=1e-12, atol=1e-12)
