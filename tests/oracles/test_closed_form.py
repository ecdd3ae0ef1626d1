"""Every estimate of the bound against the closed form of a linear-Gaussian reverse chain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from conftest import assert_mean, release_but, sampled_step
from numpyro import handlers
from numpyro.distributions import kl_divergence
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO

import probdiff
from probdiff.oracles import GaussianOracle, exact_log_prob, exact_terms

pytestmark = pytest.mark.xdist_group("oracle")  # its tests share what is costly to make

ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
X = np.array([[0.1, -0.2], [1.5, 0.4], [-0.7, -1.0]])
CASES = [(variance, scale) for variance in ("posterior", "forward") for scale in (1.0, 0.9, 0.0)]
# Where draws decide: each variance, a network that is not the best, and a conditional model.
DRAWN = [("posterior", 0.9, None), ("forward", 1.0, None), ("posterior", 0.9, "given")]
SLOPE = np.array([[0.9, -0.2, 0.0], [0.3, 0.5, -0.8]])
GIVEN = GaussianOracle(ORACLE.mean, ORACLE.covariance, SLOPE)
CONTEXT = np.array([[1.0, 0.0, -1.0], [-0.5, 2.0, 0.3], [0.2, -1.1, 1.5]])


def make(reverse_variance, scale, schedule=None, oracle=ORACLE, **kwargs):
    schedule = schedule or probdiff.log_snr_schedule(8, 4.0, -1.0)
    return probdiff.Diffusion(schedule, oracle.network(schedule, scale), reverse_variance=reverse_variance, **kwargs)


def make_drawn(reverse_variance, scale, given):
    """A model out of DRAWN, and what is given beside the data."""
    return (make(reverse_variance, scale), {}) if given is None else (make(reverse_variance, scale, oracle=GIVEN), {"context": CONTEXT})


def test_best_network_is_the_conditional_mean(float64):
    """E[eps | z] by conditioning the dense joint Gaussian of (eps, z)."""
    schedule = probdiff.cosine_schedule(6)
    network = ORACLE.network(schedule)
    for n in range(1, 7):
        signal, noise = np.sqrt(schedule.alpha_bar[n - 1]), np.sqrt(schedule.one_minus_alpha_bar[n - 1])
        lift = np.hstack([signal * np.linalg.cholesky(ORACLE.covariance), noise * np.eye(2)])
        z = np.array([0.3, 0.9])
        expected = noise * np.linalg.solve(lift @ lift.T, z - signal * ORACLE.mean)
        np.testing.assert_allclose(network(jnp.asarray(z), jnp.array(n)), expected, rtol=1e-10)


def test_exact_log_prob_by_quadrature(float64):
    """log p of one-dimensional data, N = 2: integrate the reverse chain over z_2 and z_1 on a grid."""
    oracle = GaussianOracle([0.4], [[0.5]])
    schedule = probdiff.log_snr_schedule(2, 1.0, -1.5)
    diffusion = probdiff.Diffusion(schedule, oracle.network(schedule, 0.9))
    grid = np.linspace(-9, 9, 2001)[:, None]
    step = grid[1, 0] - grid[0, 0]
    p_z2 = np.exp(dist.Normal(0, 1).log_prob(grid[:, 0]))
    p_z1 = np.exp(diffusion.reverse_kernel(jnp.asarray(grid), 2).log_prob(grid[:, None])) @ p_z2 * step
    x = np.array([[0.2], [1.4]])
    p_x = np.exp(diffusion.reverse_kernel(jnp.asarray(grid), 1).log_prob(x[:, None])) @ p_z1 * step
    np.testing.assert_allclose(exact_log_prob(diffusion, x), np.log(p_x), rtol=1e-8)


@pytest.mark.long
def test_closed_forms_of_a_conditional_model_are_those_of_each_row_by_itself():
    """Data given c are Gaussian data of the mean m + B c."""
    diffusion = make("forward", 0.9, oracle=GIVEN)
    terms, log_prob = exact_terms(diffusion, X, context=CONTEXT), exact_log_prob(diffusion, X, context=CONTEXT)
    for k, c in enumerate(CONTEXT):
        own = make("forward", 0.9, oracle=GaussianOracle(ORACLE.mean + SLOPE @ c, ORACLE.covariance))
        for name, expected in exact_terms(own, X[k : k + 1]).items():
            np.testing.assert_allclose(terms[name][..., k], expected[..., 0], rtol=1e-10, err_msg=name)
        np.testing.assert_allclose(log_prob[k], exact_log_prob(own, X[k : k + 1])[0], rtol=1e-10)
        np.testing.assert_allclose(GIVEN.log_prob(X[k], c), dist.MultivariateNormal(ORACLE.mean + SLOPE @ c, ORACLE.covariance).log_prob(X[k]), rtol=1e-5)


@pytest.mark.parametrize("reverse_variance, scale", CASES)
def test_elbo_is_below_the_log_likelihood(reverse_variance, scale):
    diffusion = make(reverse_variance, scale)
    assert np.all(exact_terms(diffusion, X)["elbo"] < exact_log_prob(diffusion, X))


@pytest.mark.parametrize("reverse_variance", ["posterior", "forward"])
def test_expected_bound_is_largest_at_the_best_network(reverse_variance):
    x = ORACLE.sample(np.random.default_rng(0), 4000)
    bounds = [exact_terms(make(reverse_variance, scale), x)["elbo"].mean() for scale in (0.9, 1.0, 1.1)]
    assert bounds[1] > max(bounds[0], bounds[2])


def path_estimates(diffusion, guide, num_draws, given):
    """Trace_ELBO of each datum by itself, shape (draw, datum)."""

    def one(key, x, given):
        return -Trace_ELBO().loss(key, {}, diffusion.model, getattr(diffusion, guide), x[None], **jax.tree.map(lambda c: c[None], given))

    keys = jax.random.split(jax.random.key(7), (num_draws, len(X)))
    return jax.jit(jax.vmap(jax.vmap(one), (0, None, None)))(keys, jnp.asarray(X), given)


@pytest.mark.long
@pytest.mark.parametrize("case", DRAWN)
@pytest.mark.parametrize("guide", release_but(["guide"], ["guide", "posterior_guide"]))
def test_trace_elbo(guide, case, float64):
    diffusion, given = make_drawn(*case)
    exact = exact_terms(diffusion, X, **given)["elbo"]
    # Dropping any one KL, or shifting the network by a step, moves the bound of a datum by more than this.
    assert_mean(path_estimates(diffusion, guide, 60_000, given), exact, power=0.15)


@pytest.mark.long
@pytest.mark.parametrize("case", DRAWN)
def test_trace_mean_field_elbo(case, float64):
    diffusion, given = make_drawn(*case)

    def one(key):
        loss = TraceMeanField_ELBO().loss(key, {}, diffusion.model, diffusion.posterior_guide, jnp.asarray(X), **given)
        return -loss

    draws = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(8), 40_000))
    assert_mean(draws, exact_terms(diffusion, X, **given)["elbo"].sum(), power=0.5)


@functools.cache
def drawn_terms(*case):
    diffusion, given = make_drawn(*case)
    return probdiff.elbo_terms(diffusion, X, **given, key=jax.random.key(9), num_draws=50_000)


@pytest.mark.parametrize("case", DRAWN)
def test_elbo_terms(case, float64):
    diffusion, given = make_drawn(*case)
    terms = drawn_terms(*case)
    exact = exact_terms(diffusion, X, **given)
    np.testing.assert_allclose(terms.prior_kl, exact["prior_kl"], rtol=1e-10)
    assert terms.step_kl.shape == (50_000, 7, 3)
    assert_mean(terms.step_kl, exact["step_kl"])
    assert_mean(terms.reconstruction, exact["reconstruction"])
    assert_mean(terms.elbo, exact["elbo"], power=0.15)


@pytest.mark.parametrize("case", DRAWN)
def test_each_step_kl_is_seen_by_the_test_above(case, float64):
    """Power: 9.7 standard errors of every step's KL are below a tenth of it, or below 0.005 nats."""
    diffusion, given = make_drawn(*case)
    terms = drawn_terms(*case)
    error = np.asarray(terms.step_kl).std(0) / np.sqrt(len(terms.step_kl))
    exact = exact_terms(diffusion, X, **given)["step_kl"]
    assert np.all(9.7 * error < np.maximum(0.1 * exact, 0.005))


@pytest.mark.long
@pytest.mark.parametrize("steps", ["all", "uniform", "stratified"])
@pytest.mark.parametrize("reverse_variance, scale", [("forward", 1.0)])
def test_analytic_elbo(steps, reverse_variance, scale, float64):
    diffusion = make(reverse_variance, scale)
    objective = probdiff.AnalyticELBO(diffusion, steps=steps)

    def one(key):
        return -objective.loss(key, {}, diffusion.model, diffusion.guide, jnp.asarray(X))

    draws = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(10), 150_000))
    assert_mean(draws, exact_terms(diffusion, X)["elbo"].sum(), power=0.5)


@pytest.mark.long
def test_derivation_line_by_line(float64):
    """On one sampled path, each line of the proof gives the same number, to rounding."""
    diffusion, x0 = make("posterior", 0.9), jnp.asarray(X[:1])
    s, steps = diffusion.schedule, range(2, 9)
    trace = handlers.trace(handlers.seed(diffusion.guide, 1)).get_trace(x0)
    z = {8 - k: value for k, value in enumerate(trace["z"]["value"])} | {0: x0}
    log_lik = diffusion.reverse_kernel(z[1], 1).log_prob(x0)
    log_prior = dist.Normal(jnp.zeros(2), 1).to_event(1).log_prob(z[8])
    log_p = {n: diffusion.reverse_kernel(z[n], n).log_prob(z[n - 1]) for n in steps}
    forward = {n: probdiff.forward_step(s, z[n - 1], n).log_prob(z[n]) for n in range(1, 9)}
    posterior = {n: probdiff.forward_posterior(s, z[n], x0, n).log_prob(z[n - 1]) for n in steps}
    marginal = {n: probdiff.forward_marginal(s, x0, n).log_prob(z[n]) for n in range(1, 9)}

    lines = {
        "log p(x, z) - log q(z), Markov": log_prior + sum(log_p.values()) + log_lik - sum(forward.values()),
        "steps of q and p matched": log_prior + log_lik - forward[1] + sum(log_p[n] - forward[n] for n in steps),
        "after Bayes' rule": log_prior + log_lik - forward[1]
        + sum(log_p[n] - (posterior[n] + marginal[n] - marginal[n - 1]) for n in steps),
        "after the telescoping sum": log_prior + log_lik - marginal[8] + sum(log_p[n] - posterior[n] for n in steps),
    }  # fmt: skip
    for line, value in lines.items():
        np.testing.assert_allclose(value, lines["log p(x, z) - log q(z), Markov"], rtol=1e-9, err_msg=line)
    # The last line takes expectations: E[log q - log p] of each step given z_n is a KL.
    q, p = probdiff.forward_posterior(s, z[5], x0, 5), diffusion.reverse_kernel(z[5], 5)
    sample = q.sample(jax.random.key(2), (200_000,))
    assert_mean(q.log_prob(sample) - p.log_prob(sample), kl_divergence(q, p))
    eps = (z[5] - np.sqrt(s.alpha_bar[4]) * x0) / np.sqrt(s.one_minus_alpha_bar[4])
    kl = diffusion.kernel.step_kl(s, sampled_step(eps, diffusion.predict(z[5], 5), 5))
    np.testing.assert_allclose(kl[0], kl_divergence(q, p)[0], rtol=1e-9)


@pytest.mark.long
def test_bits_per_dim_and_units(float64):
    """Data in other units, x -> a x + b: every log-density moves by -d ln a, exactly; the KLs stay."""
    schedule = probdiff.cosine_schedule(6)
    scaled = probdiff.NormalLikelihood(loc=[3.0, -1.0], scale=[10.0, 0.1])
    base, moved = make("posterior", 0.9, schedule), make("posterior", 0.9, schedule, likelihood=scaled)
    y = X * np.array([10.0, 0.1]) + np.array([3.0, -1.0])
    key = jax.random.key(0)
    before, after = (probdiff.elbo_terms(d, v, key=key, num_draws=3) for d, v in ((base, X), (moved, y)))
    np.testing.assert_allclose(after.reconstruction, before.reconstruction - np.log(10) - np.log(0.1), rtol=1e-10)
    np.testing.assert_allclose(after.step_kl, before.step_kl, rtol=1e-8)
    exact = exact_terms(moved, y)["elbo"]
    np.testing.assert_allclose(exact, exact_terms(base, X)["elbo"] - np.log(10) - np.log(0.1), rtol=1e-10)
    assert probdiff.elbo.bits_per_dim(-64 * np.log(2) * 2.5, 64) == pytest.approx(2.5, rel=1e-12)
