"""What is measured of x_0 at each step, and the evidence under a network whose derivative is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Z_MAX, set_constant

import probdiff
from probdiff.inference import LinearGaussian, TweedieTwist, smc
from probdiff.inference.uncertainty import measure_uncertainty
from probdiff.oracles import GaussianOracle

N = 60
SCHEDULE = probdiff.log_snr_schedule(N, 6.0, -6.0)
ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
EXACT = ORACLE.network(SCHEDULE)
KEY = jax.random.key(0)


def rippled(z, n):
    """The exact prediction of the noise but for 0.01 at most; its derivative is wrong by 0.4."""
    return EXACT(z, n) + 0.01 * jnp.sin(40 * z)


def model(network):
    return probdiff.Diffusion(SCHEDULE, network, reverse_variance="forward", dim=2)


def test_the_variance_is_that_of_x0_given_z_and_the_exact_derivative_is_believed(monkeypatch, compiled_anew):
    set_constant(monkeypatch, "PATHS", 4000)
    found = measure_uncertainty(model(EXACT).evaluated())
    signal = SCHEDULE.alpha_bar[:, None, None]
    covariance = np.linalg.inv(np.linalg.inv(ORACLE.covariance) + signal / (1 - signal) * np.eye(2))
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    # (At the first steps the prediction from z_1, which stands for x_0, is not x_0. Of 4000 paths the standard error is 2.2 %.)
    np.testing.assert_allclose(found.variance[N // 3 :], variance[N // 3 :], rtol=0.11)
    assert found.credible.all()


def test_a_derivative_that_cannot_be_right_is_not_believed_where_it_matters():
    found = measure_uncertainty(model(rippled).evaluated())
    assert found.credible[: N // 3].all() and not found.credible[-N // 4 :].any()


@pytest.mark.parametrize("y", [0.5, -2.0])
def test_the_evidence_of_a_network_with_a_wrong_derivative(y):
    """Against samples of the same model; if the derivative is believed, the estimate is nats too small beside a small error."""
    diffusion, observation = model(rippled), LinearGaussian([[1.0, 1.0]], y=[y], scale=0.1)
    x = probdiff.samplers.ancestral(diffusion, key=KEY, num_samples=200_000)
    density = np.exp(np.asarray(jax.vmap(observation.log_prob)(x), np.float64))
    expected, error = np.log(density.mean()), density.std() / density.mean() / np.sqrt(len(density))
    found = smc(diffusion, observation, key=KEY, num_particles=256, num_runs=16)
    assert found.log_evidence_error < 0.05 and error < 0.05
    assert abs(found.log_evidence - expected) < Z_MAX * np.hypot(found.log_evidence_error, error)


def test_without_a_measurement_negative_variances_are_zero():
    z, n = jnp.array([0.3, -1.0]), jnp.asarray(N)
    observation = LinearGaussian([[1.0, 0.0]], y=[0.4], scale=0.5)
    network = lambda z, n: 2 * z  # noqa: E731  (x̂_0 falls with z)
    assert jnp.isfinite(TweedieTwist()(model(network), observation, z, n).log_prob)
