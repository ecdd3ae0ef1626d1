"""The probability flow: its density against the mixture's, and each of its errors against what it is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_mean, long_but, release_but

import probdiff
from probdiff.flow import Interpolated, velocity
from probdiff.oracles import GaussianMixture

WEIGHTS = np.array([0.5, 0.2, 0.3])
MEANS = np.array([[1.0, 0.5], [-1.2, 0.3], [0.2, -1.5]])
COVARIANCES = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.05, -0.02], [-0.02, 0.4]], [[0.5, 0.45], [0.45, 0.6]]])
ORACLE = GaussianMixture(WEIGHTS, MEANS, COVARIANCES)
SCHEDULE = probdiff.log_snr_schedule(30, 6.0, -3.0)


def marginal(schedule, n):
    """The mixture that z_n is from."""
    alpha_bar = np.prod(1 - schedule.beta[:n])
    return GaussianMixture(WEIGHTS, np.sqrt(alpha_bar) * MEANS, alpha_bar * COVARIANCES + (1 - alpha_bar) * np.eye(2))


def exact(schedule=SCHEDULE):
    return probdiff.Diffusion(schedule, ORACLE.network(schedule), reverse_variance="forward")


def by_step(schedule=SCHEDULE):
    """The same model, whose network is told the step."""
    return probdiff.Diffusion(schedule, exact(schedule).predict_noise, reverse_variance="forward", dim=2)


def points(size=40):
    return marginal(SCHEDULE, 1).sample(np.random.default_rng(1), size)


def exact_flow(**options):
    """The flow with nothing approximated: exact ε in continuous time, and base q(z_N)."""
    diffusion = exact()
    options = {"base": marginal(SCHEDULE, 30).log_prob, "rtol": 1e-6, "atol": 1e-6} | options
    return probdiff.flow.flow_log_prob(diffusion, points(), **options)


def test_the_exact_flow_gives_the_density_of_z_1(float64):
    np.testing.assert_allclose(exact_flow(), marginal(SCHEDULE, 1).log_prob(points()), atol=1e-4)


BUGS = {
    "sign": lambda eps, z, log_snr: -velocity(eps, z, log_snr),
    "twice as fast": lambda eps, z, log_snr: 2 * velocity(eps, z, log_snr),
    "variance for its root": lambda eps, z, log_snr: jax.nn.sigmoid(-log_snr) / 2 * (z - eps(z, log_snr)),
    "signal for noise": lambda eps, z, log_snr: velocity(eps, z, -log_snr),
}


@pytest.mark.long
@pytest.mark.parametrize("bug", long_but(list(BUGS)[:2], BUGS))
def test_a_wrong_velocity_is_found(bug, compiled_anew, patched, float64):
    patched(velocity, BUGS[bug])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(exact_flow(), marginal(SCHEDULE, 1).log_prob(points()), atol=1e-3)


@pytest.mark.release
def test_hutchinsons_estimator_has_the_exact_mean(float64):
    z = jnp.repeat(points(2), 600, 0)
    exactly = probdiff.flow.flow_log_prob(exact(), z[::600])
    estimates = probdiff.flow.flow_log_prob(exact(), z, num_probes=1, key=jax.random.key(0))
    draws = estimates.reshape(2, 600).T
    assert draws.std(0).min() > 1e-3
    assert_mean(draws, exactly, power=1.0)
    fewer = probdiff.flow.flow_log_prob(exact(), z[:200], num_probes=16, key=jax.random.key(0))
    assert fewer.std() < draws[:, 0].std() / 2


@pytest.mark.release
def test_the_error_from_the_base_is_the_difference_of_the_bases(float64):
    wrong = exact_flow(base=None) - exact_flow()
    assert np.abs(wrong).max() > 0.1
    x = ORACLE.sample(np.random.default_rng(2), 2000)
    reported = probdiff.elbo_terms(exact(), x, key=jax.random.key(0)).prior_kl.mean()
    end = marginal(SCHEDULE, 30)
    z = end.sample(np.random.default_rng(3), 20_000)
    kl = np.mean(end.log_prob(z) + np.square(z).sum(1) / 2 + np.log(2 * np.pi))
    assert 0 < kl < reported  # "at most"
    np.testing.assert_allclose(probdiff.flow_likelihood(exact(), x[:4], key=jax.random.key(0)).base.shape, (4,))


@pytest.mark.release
def test_the_error_from_interpolation_is_estimated(float64):
    schedule = probdiff.log_snr_schedule(16, 6.0, -3.0)
    x = ORACLE.sample(np.random.default_rng(2), 100)
    report = probdiff.flow_likelihood(by_step(schedule), x, key=jax.random.key(0))
    z = np.sqrt(schedule.alpha_bar[0]) * x + np.sqrt(schedule.beta[0]) * jax.random.normal(
        jax.random.split(jax.random.key(0))[0], (1, *x.shape)
    )
    true = probdiff.flow.flow_log_prob(exact(schedule), z[0])
    error = report.log_q[0] - true
    assert np.abs(error).mean() > 1e-3
    assert np.abs(report.interpolation[0] - error).mean() < 0.5 * np.abs(error).mean()
    assert not probdiff.flow_likelihood(exact(schedule), x[:2], key=jax.random.key(0)).interpolation.any()


def test_the_error_from_the_solver_is_estimated(float64):
    """Against tolerances a thousand times tighter: never by much too small, and not a mere bound."""
    x = ORACLE.sample(np.random.default_rng(2), 30)
    options = {"key": jax.random.key(0), "rtol": 1e-4, "atol": 1e-4}
    report = probdiff.flow_likelihood(by_step(), x, **options)
    tight = probdiff.flow_likelihood(by_step(), x, **options | {"rtol": 1e-8, "atol": 1e-8})
    error, estimate = np.abs(report.log_q - tight.log_q), np.abs(report.solver)
    assert 1e-6 < error.mean() < estimate.mean() < 30 * error.mean() and error.max() < 2 * estimate.max()
    assert np.abs(tight.solver).max() < estimate.mean() / 10
    assert re.search(rf"solver, estimated, absolute value +{estimate.mean():.5f} ", str(report))


@pytest.mark.parametrize("every", [1, 4])
def test_interpolation_is_linear_in_log_snr(every, float64):
    """Of a network that is log-SNR itself, it is log-SNR; in between and at the ends."""
    table = jnp.asarray(SCHEDULE.log_snr)
    diffusion = probdiff.Diffusion(SCHEDULE, lambda z, n: jnp.broadcast_to(table[n - 1][..., None], z.shape), dim=2)
    eps = Interpolated(diffusion, every)
    for log_snr in np.linspace(-3, 6, 23):
        np.testing.assert_allclose(eps(jnp.zeros(2), jnp.asarray(log_snr)), log_snr, rtol=1e-10, atol=1e-12)


@pytest.mark.long
def test_the_likelihood_of_the_data_and_the_error_from_sigma_1(float64):
    """In the user's units: the bound comes near the density of the data, and smoothing is what z_1's own density lacks."""
    scaled = ORACLE.standardized(0.0, 0.25)  # the data, four times as large
    likelihood = probdiff.NormalLikelihood(loc=0.0, scale=4.0)
    schedule = probdiff.log_snr_schedule(60, 7.0, -9.0)
    diffusion = probdiff.Diffusion(schedule, ORACLE.network(schedule), likelihood, "forward")
    x = scaled.sample(np.random.default_rng(4), 1500)
    report = probdiff.flow_likelihood(diffusion, x, key=jax.random.key(0))
    gap = report.log_prob[0] - scaled.log_prob(x)
    assert_mean(gap, 0.0, power=0.02)
    change = np.log(schedule.alpha_bar[0]) - 2 * np.log(4)
    np.testing.assert_allclose(report.log_prob - report.smoothing, report.log_q + change, rtol=1e-10)
    assert "another model" in str(report)


@pytest.mark.long
def test_on_a_grid_it_bounds_the_probability_of_each_level(float64):
    """x in {0, 1, 2, 3, 4}: as an oracle a mixture of five points; here the bound is nearly tight."""
    probability = np.array([0.3, 0.2, 0.3, 0.1, 0.1])
    oracle = GaussianMixture(probability, np.linspace(-1, 1, 5)[:, None], np.full((1, 1), 1e-10))
    schedule = probdiff.log_snr_schedule(400, 7.0, -8.0)
    diffusion = probdiff.Diffusion(schedule, oracle.network(schedule), probdiff.DiscretizedNormalLikelihood(5))
    x = np.arange(5)[:, None]
    report = probdiff.flow_likelihood(diffusion, x, key=jax.random.key(0), num_draws=200)
    np.testing.assert_allclose(report.log_prob.mean(0), np.log(probability), atol=0.01)
    per_level = report.log_q + np.log(schedule.alpha_bar[0]) / 2 + np.log(2 / 4)  # a level is 1 wide in x, 2/(L−1) in x_0
    np.testing.assert_allclose(report.log_prob - report.smoothing, per_level, rtol=1e-10)


@pytest.mark.long
@pytest.mark.parametrize("num_steps", release_but([1], [1, 2, 3]))
def test_few_steps(num_steps):
    schedule = probdiff.log_snr_schedule(num_steps, 4.0, -4.0)
    x = ORACLE.sample(np.random.default_rng(5), 3)
    report = probdiff.flow_likelihood(by_step(schedule), x.astype(np.float32), key=jax.random.key(0), num_draws=2)
    assert report.log_prob.shape == (2, 3) and np.isfinite(report.log_prob).all()
    assert np.isfinite(report.interpolation).all() == (num_steps > 2)
