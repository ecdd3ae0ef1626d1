"""A fitted diffusion as a prior in programs of one's own: densities, samples and posteriors against closed forms."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from conftest import Z_MAX, assert_mean, release_but
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.reparam import TransformReparam
from scipy import stats

import probdiff
from probdiff.inference import ChainPrior, FlowPrior
from probdiff.oracles import GaussianMixture, GaussianOracle, exact_moments

KEY = jax.random.key(0)
LIKELIHOOD = probdiff.NormalLikelihood([1.0, -2.0], [2.0, 0.5])
MEAN, COVARIANCE = np.array([0.3, -0.2]), np.array([[0.5, 0.2], [0.2, 0.3]])
# One component: the network of a Gaussian that is told the noise level. To the far end of the chain, nothing is left of the data.
MIXTURE = GaussianMixture([1.0], [MEAN], [COVARIANCE])
SCHEDULE = probdiff.log_snr_schedule(30, 8.0, -17.0)
FITTED = probdiff.Diffusion(SCHEDULE, MIXTURE.network(SCHEDULE), LIKELIHOOD).bind({})
# The density of the flow, in the user's units: data with the noise of the first step.
SCALE = np.diag(LIKELIHOOD.scale)
FLOW = stats.multivariate_normal(
    LIKELIHOOD.loc + SCALE @ MEAN, SCALE @ (COVARIANCE + SCHEDULE.sigma[0] ** 2 * np.eye(2)) @ SCALE
)
X = FLOW.rvs(6, np.random.default_rng(0))


def test_the_density_of_the_flow(float64):
    prior = FlowPrior(FITTED, steps=400)
    np.testing.assert_allclose(prior.log_prob(X), FLOW.logpdf(X), atol=5e-4)
    slope = jax.grad(lambda x: prior.log_prob(x))(jnp.asarray(X[0]))
    np.testing.assert_allclose(slope, -np.linalg.solve(FLOW.cov, X[0] - FLOW.mean), rtol=5e-3)


@pytest.mark.long
def test_the_flow_there_and_back(float64):
    """The Jacobian against that of autodiff, both ways."""
    transform = FlowPrior(FITTED, steps=300).transforms[0]
    z = jnp.array([[0.4, -1.0], [1.5, 0.2]])
    x = transform(z)
    back, log_det = transform.inverse_and_log_det(x)
    np.testing.assert_allclose(back, z, atol=1e-4)
    np.testing.assert_allclose(transform.inv(x), back)
    for k in range(2):
        expected = np.linalg.slogdet(jax.jacrev(transform)(z[k]))[1]
        np.testing.assert_allclose(transform.log_abs_det_jacobian(z, x)[k], expected, atol=1e-4)
        np.testing.assert_allclose(log_det[k], -expected, atol=1e-4)


@pytest.mark.long
def test_samples_of_both():
    draws = np.asarray(FlowPrior(FITTED).sample(KEY, (3000,)))
    assert_mean(draws, FLOW.mean)
    np.testing.assert_allclose(np.cov(draws.T), FLOW.cov, rtol=0.15, atol=0.02)
    oracle = GaussianOracle(MEAN, COVARIANCE)
    chain = probdiff.Diffusion(SCHEDULE, oracle.network(SCHEDULE, 0.9), LIKELIHOOD, "forward").bind({})
    mean, covariance = exact_moments(chain)

    def program():
        with handlers.scope(prefix="prior"):
            return ChainPrior(chain)()

    found = Predictive(program, num_samples=3000)(KEY)
    assert set(found) == {"prior/noise", "prior/x"} and found["prior/noise"].shape == (3000, 31, 2)
    assert_mean(found["prior/x"], mean)
    np.testing.assert_allclose(np.cov(found["prior/x"].T), covariance, rtol=0.15, atol=0.02)


def observed(prior):
    """A program with a latent x, of which a noisy combination is observed."""

    def program(y):
        x = prior()
        numpyro.sample("y", dist.Normal(x @ jnp.array([1.0, 2.0]), 0.5), obs=y)

    return program


def exact_posterior(mean, covariance, y):
    a = np.array([1.0, 2.0])
    gain = covariance @ a / (a @ covariance @ a + 0.25)
    return mean + gain * (y - a @ mean), covariance - np.outer(gain, a @ covariance)


def assert_posterior(draws, mean, covariance):
    """Means within 4.9 standard errors by ArviZ's effective sample size, of four chains that agree."""
    for k in range(2):
        error, rhat = float(az.mcse(draws[..., k], method="mean")), float(az.rhat(draws[..., k]))
        assert abs(draws[..., k].mean() - mean[k]) < Z_MAX * error, (k, draws[..., k].mean(), mean[k], error)
        assert rhat < 1.02 and 9.7 * error < np.sqrt(covariance[k, k])
    np.testing.assert_allclose(np.cov(draws.reshape(-1, 2).T), covariance, rtol=0.25, atol=0.03)


@pytest.mark.long
@pytest.mark.parametrize("which", release_but(["flow in the space of z_N"], ["flow", "flow in the space of z_N", "chain"]))
def test_nuts_under_both_priors(which):
    y, mean, covariance = -3.0, FLOW.mean, FLOW.cov
    if which == "chain":
        schedule = probdiff.log_snr_schedule(8, 5.0, -4.0)
        chain = probdiff.Diffusion(schedule, GaussianOracle(MEAN, COVARIANCE).network(schedule), LIKELIHOOD, "forward").bind({})
        mean, covariance = exact_moments(chain)
        program = observed(lambda: ChainPrior(chain)())
    else:
        program = observed(lambda: numpyro.sample("x", FlowPrior(FITTED)))
        program = program if which == "flow" else handlers.reparam(program, {"x": TransformReparam()})
    mcmc = MCMC(NUTS(program), num_warmup=300, num_samples=1000, num_chains=4, chain_method="vectorized", progress_bar=False)
    mcmc.run(KEY, y=y)
    samples = mcmc.get_samples(group_by_chain=True)
    if "x" not in samples:
        samples = {"x": Predictive(program, samples, batch_ndims=2)(KEY, y=y)["x"]}
    assert_posterior(np.asarray(samples["x"], float), *exact_posterior(mean, covariance, y))


# Three components that overlap, in the user's units, and one coordinate of x, observed with noise.
PLANE = GaussianMixture([0.4, 0.35, 0.25], [[-0.5, -2.2], [1.1, -1.7], [2.4, -2.3]], [[[0.5, 0.1], [0.1, 0.08]], [[0.6, -0.1], [-0.1, 0.05]], [[0.3, -0.1], [-0.1, 0.1]]])
Y = 1.1


def of_plane(y):
    network = PLANE.standardized(LIKELIHOOD.loc, LIKELIHOOD.scale).network(SCHEDULE)
    x = numpyro.sample("x", FlowPrior(probdiff.Diffusion(SCHEDULE, network, LIKELIHOOD), steps=40))
    numpyro.sample("y", dist.Normal(x @ jnp.array([0.6, -0.8]), 0.6), obs=y)


def on_a_grid():
    """Means and variances of x given y, and the probability of each component, by quadrature: data with the noise of the first step."""
    first, second = np.linspace(-5, 7, 400), np.linspace(-5, 1, 400)
    x = np.stack(np.meshgrid(first, second, indexing="ij"), -1).reshape(-1, 2)
    weight = np.exp(-np.square((Y - x @ [0.6, -0.8]) / 0.6) / 2) * np.stack(of_each(x)).sum(0)
    weight /= weight.sum()
    mean = weight @ x
    return [*mean, *(weight @ (x - mean) ** 2), *shares(x) @ weight]


def of_each(x):
    """The density of each component, times its weight."""
    noise = SCHEDULE.sigma[0] ** 2 * np.diag(np.square(LIKELIHOOD.scale))
    parts = zip(PLANE.weights, PLANE.means, PLANE.covariances)
    return [weight * stats.multivariate_normal(mean, covariance + noise).pdf(x) for weight, mean, covariance in parts]


def shares(x):
    density = np.stack(of_each(x))
    return density / density.sum(0)


@pytest.mark.release
@pytest.mark.parametrize("space", ["x", "z_N"])
def test_nuts_on_a_mixture(space):
    """Means, variances and probabilities of the components within their Monte Carlo error of quadrature; chains that agree."""
    program = of_plane if space == "x" else handlers.reparam(of_plane, {"x": TransformReparam()})
    mcmc = MCMC(NUTS(program), num_warmup=400, num_samples=2000, num_chains=4, chain_method="vectorized", progress_bar=False)
    mcmc.run(KEY, y=Y)
    samples = mcmc.get_samples(group_by_chain=True)
    if "x" not in samples:
        samples = {"x": Predictive(program, samples, batch_ndims=2, return_sites=["x"])(KEY, y=Y)["x"]}
    x, exact = np.asarray(samples["x"], float), on_a_grid()
    quantities = [x[..., 0], x[..., 1], *np.moveaxis((x - exact[:2]) ** 2, -1, 0), *shares(x.reshape(-1, 2)).reshape(3, *x.shape[:2])]
    for k, (values, expected) in enumerate(zip(quantities, exact)):
        error = float(az.mcse(values, method="mean"))
        assert abs(values.mean() - expected) <= Z_MAX * error, (k, values.mean(), expected, error)
        assert error < 0.1 * values.std() and float(az.rhat(values)) <= 1.01, (k, error, values.std(), float(az.rhat(values)))


def of_three(y=None):
    with numpyro.plate("units", 3):
        x = numpyro.sample("x", FlowPrior(FITTED, steps=10))
        numpyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)


def test_under_plates():
    """One independent x for each of a plate."""
    assert handlers.trace(handlers.seed(of_three, 0)).get_trace()["x"]["value"].shape == (3, 2)
    assert FlowPrior(FITTED, steps=10).expand([4]).sample(KEY).shape == (4, 2)
    chain = ChainPrior(probdiff.Diffusion(probdiff.log_snr_schedule(4, 5.0, -4.0), lambda z, n: 0.5 * z, LIKELIHOOD, dim=2))

    def of_many():
        with numpyro.plate("columns", 3, dim=-1), numpyro.plate("rows", 4, dim=-2):
            return chain()

    trace = handlers.trace(handlers.seed(of_many, 0)).get_trace()
    noise, x = trace["noise"]["value"], trace["x"]["value"]
    assert noise.shape == (4, 3, 5, 2) and x.shape == (4, 3, 2)
    alone = handlers.substitute(handlers.seed(chain, 0), {"noise": noise[2, 1]})()
    np.testing.assert_allclose(alone, x[2, 1], rtol=1e-5)


@pytest.mark.release
def test_an_autoguide_trains():
    svi = SVI(of_three, AutoNormal(of_three), numpyro.optim.Adam(3e-2), Trace_ELBO())
    losses = svi.run(KEY, 60, y=jnp.ones(3), progress_bar=False).losses
    assert losses[-10:].mean() < losses[:10].mean() - 1
