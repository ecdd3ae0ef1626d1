"""Noise and score: against autodiff of the log densities and quadrature over the data, in both systems of coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probdiff
from probdiff.chain.score import _noise, _sigma, _signal
from probdiff.oracles import GaussianMixture

SIGMAS = [0.05, 0.2, 0.7, 3.0]
SCHEDULE = probdiff.NoiseSchedule.from_sigmas(SIGMAS)
STEPS = range(1, 5)
RNG = np.random.default_rng(0)
X0, NOISE = RNG.normal(size=(2, 5, 3))
LINE = GaussianMixture([0.3, 0.7], [[-1.0], [0.5]], [[[0.04]], [[0.25]]])


def gradient(log_prob, x):
    return jax.vmap(jax.grad(log_prob))(jnp.asarray(x))


def check_conditional_score(n):
    sigma = SIGMAS[n - 1]
    x_n = X0 + sigma * NOISE
    expected = jnp.stack([jax.grad(probdiff.chain.score.noising(SCHEDULE, x0, n).log_prob)(x) for x0, x in zip(X0, x_n)])
    np.testing.assert_allclose(probdiff.chain.score.conditional_score(SCHEDULE, x_n, X0, n), expected, rtol=1e-10)
    np.testing.assert_allclose(expected, -NOISE / sigma, rtol=1e-10)


def check_vp_conditional_score(n):
    z = np.sqrt(1 / (1 + SIGMAS[n - 1] ** 2)) * (X0 + SIGMAS[n - 1] * NOISE)
    expected = jnp.stack([jax.grad(probdiff.forward_marginal(SCHEDULE, x0, n).log_prob)(one) for x0, one in zip(X0, z)])
    np.testing.assert_allclose(probdiff.chain.score.vp_conditional_score(SCHEDULE, z, X0, n), expected, rtol=1e-10)


def quadrature(n, x):
    """Score of p(x_n) in one dimension: the density of the data is integrated over, on 400 Gauss-Legendre nodes."""
    node, weight = np.polynomial.legendre.leggauss(400)
    log_weight = np.log(4 * weight) + LINE.log_prob(4 * node[:, None])
    variance = SIGMAS[n - 1] ** 2

    def log_p(x):
        return jax.scipy.special.logsumexp(log_weight - (x[0] - 4 * node) ** 2 / (2 * variance))

    return gradient(log_p, x)


def check_marginal_score(n):
    """The exact ε-network, read as a score, against quadrature; in VE and, by the chain rule, in VP coordinates."""
    x = np.linspace(-2, 2, 9)[:, None]
    expected = quadrature(n, x)
    exact = probdiff.Diffusion(SCHEDULE, LINE.network(SCHEDULE))
    np.testing.assert_allclose(probdiff.chain.score.score(exact, x, n), expected, rtol=1e-10, atol=1e-12)
    z = probdiff.chain.score.vp_from_ve(SCHEDULE, x, n)
    eps_hat = exact.predict_noise(z, n)
    signal = 1 / np.sqrt(1 + SIGMAS[n - 1] ** 2)
    np.testing.assert_allclose(probdiff.chain.score.vp_score_from_eps(SCHEDULE, eps_hat, n), expected / signal, rtol=1e-10, atol=1e-12)


def check_inverses(n):
    for there, back in (
        (probdiff.chain.score.score_from_eps, probdiff.chain.score.eps_from_score),
        (probdiff.chain.score.vp_score_from_eps, probdiff.chain.score.eps_from_vp_score),
        (probdiff.chain.score.vp_from_ve, probdiff.chain.score.ve_from_vp),
    ):
        np.testing.assert_allclose(back(SCHEDULE, there(SCHEDULE, NOISE, n), n), NOISE, rtol=1e-13)


def check_coordinates(n):
    """A path of the chain is a path of the noising, in other coordinates."""
    z = np.sqrt(SCHEDULE.alpha_bar[n - 1]) * X0 + np.sqrt(SCHEDULE.one_minus_alpha_bar[n - 1]) * NOISE
    np.testing.assert_allclose(probdiff.chain.score.vp_from_ve(SCHEDULE, X0 + SIGMAS[n - 1] * NOISE, n), z, rtol=1e-10)


CHECKS = {
    "conditional": check_conditional_score,
    "vp_conditional": check_vp_conditional_score,
    "marginal": check_marginal_score,
    "inverses": check_inverses,
    "coordinates": check_coordinates,
}


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("check", CHECKS)
def test_identities(check, n, float64):
    CHECKS[check](n)


BUGS = {
    "sigma for its square": (_sigma, lambda s: np.sqrt(s.sigma), {"conditional", "marginal"}),
    "alpha_bar for its root": (_signal, lambda s: s.alpha_bar, {"vp_conditional", "marginal", "coordinates"}),
    "1 - alpha_bar for its root": (_noise, lambda s: s.one_minus_alpha_bar, {"vp_conditional", "marginal"}),
    "sigma of the step before": (_sigma, lambda s: np.roll(s.sigma, 1), {"conditional", "marginal"}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_table_is_found(bug, patched, float64):
    right, wrong, finders = BUGS[bug]
    patched(right, wrong)
    for check in finders:
        with pytest.raises(AssertionError):
            CHECKS[check](3)


@pytest.mark.parametrize("name", ["conditional_score", "vp_conditional_score", "score_from_eps", "vp_score_from_eps"])
def test_a_wrong_sign_is_found(name, patched, float64):
    right = getattr(probdiff.chain.score, name)
    patched(right, lambda *arguments: -right(*arguments))
    check = name.removesuffix("_score") if name.endswith("_score") else "marginal"
    with pytest.raises(AssertionError):
        CHECKS[check](2)


def test_noising_is_a_distribution_of_the_data_plus_noise(float64):
    p = probdiff.chain.score.noising(SCHEDULE, X0, jnp.array([1, 2, 3, 4, 4]))
    assert (p.batch_shape, p.event_shape) == ((5,), (3,))
    np.testing.assert_allclose(p.mean, X0, rtol=1e-14)
    np.testing.assert_allclose(p.variance, np.broadcast_to(np.square([*SIGMAS, 3.0])[:, None], (5, 3)), rtol=1e-10)


def test_steps_may_differ_over_the_batch(float64):
    n = jnp.array([4, 1, 2, 3, 1])
    for function in (probdiff.chain.score.score_from_eps, probdiff.chain.score.eps_from_score, probdiff.chain.score.vp_from_ve, probdiff.chain.score.vp_score_from_eps):
        one_by_one = jnp.concatenate([function(SCHEDULE, x[None], int(k)) for x, k in zip(NOISE, n)])
        np.testing.assert_allclose(jax.jit(lambda x, f=function: f(SCHEDULE, x, n))(NOISE), one_by_one, rtol=1e-14)


def test_a_schedule_of_sigmas_has_those_sigmas():
    sigmas = np.array([1e-4, 0.3, 0.30001, 7.0, 5e3])
    schedule = probdiff.NoiseSchedule.from_sigmas(sigmas)
    np.testing.assert_allclose(schedule.sigma, sigmas, rtol=1e-10)
    np.testing.assert_allclose(schedule.alpha_bar, 1 / (1 + sigmas**2), rtol=1e-10)
    np.testing.assert_allclose(schedule.one_minus_alpha_bar, sigmas**2 / (1 + sigmas**2), rtol=1e-10)
    cosine = probdiff.cosine_schedule(50)
    again = probdiff.NoiseSchedule.from_sigmas(cosine.sigma)
    np.testing.assert_allclose(again.beta, cosine.beta, rtol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 40])
def test_geometric_levels_are_linear_in_log_snr(num_steps):
    schedule = probdiff.geometric_schedule(num_steps, 0.02, 30.0)
    expected = np.geomspace(0.02, 30.0, num_steps) if num_steps > 1 else [30.0]
    np.testing.assert_allclose(schedule.sigma, expected, rtol=1e-10)
