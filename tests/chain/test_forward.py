"""The closed-form facts of the chain against recursions, samples and Bayes' rule on a dense joint Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import own_part, sampled_step
from numpyro.distributions import Independent, Normal, kl_divergence

import probdiff

STRAIGHT = own_part("schedule").Straight(jnp.array([5.0, -4.0]), 7).fixed()  # a user's
SCHEDULES = [probdiff.linear_schedule(7), probdiff.cosine_schedule(7), probdiff.log_snr_schedule(7), STRAIGHT]


def moments(distribution):
    return np.asarray(distribution.mean), np.asarray(distribution.variance)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_marginal_is_the_recursion_of_steps(schedule, float64):
    x0 = jnp.array([[0.3, -1.2], [2.0, 0.5]])
    mean, variance = x0, np.zeros((2, 2))
    for n in range(1, 8):
        step = probdiff.forward_step(schedule, mean, n)
        signal = np.asarray(probdiff.forward_step(schedule, jnp.ones((2, 2)), n).mean)
        mean, variance = step.mean, signal**2 * variance + np.asarray(step.variance)
        marginal = probdiff.forward_marginal(schedule, x0, n)
        np.testing.assert_allclose(marginal.mean, mean, rtol=1e-10)
        np.testing.assert_allclose(marginal.variance, variance, rtol=1e-10)
        assert marginal.batch_shape == (2,) and marginal.event_shape == (2,)


@pytest.mark.long
def test_sampled_chain_has_the_marginal_distribution(float64):
    schedule, x0 = probdiff.cosine_schedule(5), 1.3
    z = jnp.full((50_000, 1), x0)
    for n, key in enumerate(jax.random.split(jax.random.key(0), 5), start=1):
        z = probdiff.forward_step(schedule, z, n).sample(key)
        marginal = probdiff.forward_marginal(schedule, jnp.array([x0]), n)
        standardised = (np.asarray(z[:, 0]) - marginal.mean[0]) / np.sqrt(marginal.variance[0])
        assert scipy.stats.kstest(standardised, "norm").pvalue > 1e-6
        assert scipy.stats.kstest(standardised * 1.06, "norm").pvalue < 1e-6


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [2, 5, 7])
def test_posterior_conditions_the_dense_joint(schedule, n, float64):
    x0, z = np.array([0.7]), np.array([-0.4])
    marginal_mean, marginal_variance = moments(probdiff.forward_marginal(schedule, x0, n - 1))
    gain = np.asarray(probdiff.forward_step(schedule, np.ones(1), n).mean)
    step_variance = np.asarray(probdiff.forward_step(schedule, x0, n).variance)
    joint_mean = np.concatenate([marginal_mean, gain * marginal_mean])
    cross = gain * marginal_variance
    final = gain * cross + step_variance
    posterior = probdiff.forward_posterior(schedule, z, x0, n)
    np.testing.assert_allclose(posterior.mean, joint_mean[0] + cross / final * (z - joint_mean[1]), rtol=1e-10)
    np.testing.assert_allclose(posterior.variance, marginal_variance - cross**2 / final, rtol=1e-9)


@pytest.mark.parametrize("reverse_variance", ["posterior", "forward"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_step_kl_is_numpyros_kl_of_posterior_and_reverse_kernel(schedule, reverse_variance, float64):
    x0, eps, eps_hat = jax.random.normal(jax.random.key(0), (3, 6, 4))
    diffusion = probdiff.Diffusion(schedule, lambda z, n: eps_hat, reverse_variance=reverse_variance)
    for n in range(2, 8):
        marginal = probdiff.forward_marginal(schedule, x0, n)
        z = marginal.mean + jnp.sqrt(marginal.variance) * eps
        posterior, reverse = probdiff.forward_posterior(schedule, z, x0, n), diffusion.reverse_kernel(z, n)
        assert isinstance(reverse, Independent) and isinstance(reverse.base_dist, Normal)
        kl = diffusion.kernel.step_kl(schedule, sampled_step(eps, eps_hat, n))
        np.testing.assert_allclose(kl, kl_divergence(posterior, reverse), rtol=1e-9)


def test_first_reverse_step_has_variance_beta_whatever_the_kernel():
    schedule = probdiff.cosine_schedule(4)
    for reverse_variance in ("posterior", "forward"):
        diffusion = probdiff.Diffusion(schedule, lambda z, n: z, reverse_variance=reverse_variance)
        np.testing.assert_allclose(diffusion.reverse_kernel(jnp.ones((1, 2)), 1).variance, schedule.beta[0], rtol=1e-6)


@pytest.mark.long
def test_steps_may_be_arrays():
    schedule, x0 = probdiff.cosine_schedule(6), jax.random.normal(jax.random.key(0), (4, 3))
    n = jnp.array([2, 3, 6, 5])
    together = probdiff.forward_posterior(schedule, 2 * x0, x0, n)
    for i in range(4):
        alone = probdiff.forward_posterior(schedule, 2 * x0[i], x0[i], int(n[i]))
        np.testing.assert_allclose(together.mean[i], alone.mean, rtol=1e-5)
        np.testing.assert_allclose(together.variance[i], alone.variance, rtol=1e-5)


@pytest.mark.parametrize("n, error", [(0, ValueError), (7, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_steps_outside_the_chain_are_refused(n, error):
    schedule, x = probdiff.cosine_schedule(6), jnp.ones((2, 3))
    for function in (probdiff.forward_step, probdiff.forward_marginal):
        with pytest.raises(error, match="n: Expected"):
            function(schedule, x, n)
    with pytest.raises(ValueError, match="2 <= n <= 6; got 1"):
        probdiff.forward_posterior(schedule, x, x, 1)
