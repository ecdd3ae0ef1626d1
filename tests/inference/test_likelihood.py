"""A fitted conditional model as the likelihood of its context, against posteriors on a grid."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from conftest import Z_MAX, assert_mean
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, Predictive

import probdiff
from probdiff.inference import ConditionalBound, ConditionalEstimate, PseudoMarginal
from probdiff.inference.pseudo_marginal import PseudoMarginalState
from probdiff.oracles import GaussianOracle, exact_log_prob, exact_terms

SCHEDULE = probdiff.log_snr_schedule(2, 3.0, -1.0)
ORACLE = GaussianOracle([0.5], [[0.3]], [[2.0]])
# Not the best network: its gap varies with the context.
FITTED = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, 0.7), reverse_variance="forward").bind({})
X = np.array([[1.6], [2.4], [2.0], [3.0]])
GRID = np.linspace(-6, 8, 4001)
KEY = jax.random.key(0)


def program(likelihood, **options):
    """Four data of one context, which has a standard normal prior."""

    def run(key, x):
        c = numpyro.sample("c", dist.Normal(0, 1))
        numpyro.sample("x", likelihood(FITTED, jnp.broadcast_to(c, (4, 1)), key=key, **options), obs=x)

    return run


def on_grid(log_likelihood):
    """Mean and standard deviation of c for a log-likelihood of every datum, a function of data and contexts."""
    terms = [log_likelihood(FITTED, np.full((len(GRID), 1), x), context=GRID[:, None]) for x in X[:, 0]]
    weight = np.exp(sum(terms) - GRID**2 / 2)
    weight /= weight.sum()
    mean = weight @ GRID
    return mean, np.sqrt(weight @ (GRID - mean) ** 2)


POSTERIOR = on_grid(exact_log_prob)
OF_BOUND = on_grid(lambda *args, **options: exact_terms(*args, **options)["elbo"])


def sampled(kernel, *args, num_warmup=500, num_samples=2000):
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(3), *args)
    return np.asarray(mcmc.get_samples()["c"], float), mcmc


def assert_moments(draws, mean, sd):
    """Both within 4.9 standard errors, by ArviZ's effective sample size."""
    for values, expected in ((draws, mean), ((draws - mean) ** 2, sd**2)):
        error = float(az.mcse(values[None], method="mean"))
        assert abs(values.mean() - expected) < Z_MAX * error, f"{values.mean()} ± {error}, expected {expected}"


@pytest.mark.parametrize("num_particles", [1, 4])
def test_the_estimate_is_unbiased(num_particles, float64):
    context = jnp.array([[0.3], [-0.5], [1.0], [0.8]])

    def ratio(key):
        estimate = ConditionalEstimate(FITTED, context, key=key, num_particles=num_particles).log_prob(X)
        return jnp.exp(estimate - exact_log_prob(FITTED, X, context=context))

    draws = jax.jit(lambda keys: jax.lax.map(ratio, keys, batch_size=2000))(jax.random.split(KEY, 40_000))
    assert_mean(draws, 1.0, power=0.2)


@pytest.mark.long
def test_the_bound_is_that_of_the_closed_form_and_has_a_gradient(float64):
    context = jnp.array([[0.3], [-0.5], [1.0], [0.8]])
    key = jax.random.split(KEY, 200)

    def bound(context):
        return jax.vmap(lambda key: ConditionalBound(FITTED, context, key=key, num_draws=50).log_prob(X))(key)

    values, slopes = jax.jit(lambda c: (bound(c), jax.vmap(jax.grad(lambda c, k: ConditionalBound(FITTED, c, key=k).log_prob(X).sum()), (None, 0))(c, key)))(
        context
    )
    assert_mean(values, exact_terms(FITTED, X, context=context)["elbo"])
    h = 1e-4
    up, down = (exact_terms(FITTED, X, context=np.asarray(context) + step)["elbo"] for step in (h, -h))
    assert_mean(slopes[..., 0], (up - down) / (2 * h))


@pytest.mark.long
def test_nuts_on_the_bound_samples_the_bound_and_not_the_posterior(float64):
    draws, _ = sampled(NUTS(program(ConditionalBound, num_draws=1000)), KEY, X, num_warmup=200, num_samples=800)
    assert_moments(draws, *OF_BOUND)
    assert abs(draws.mean() - POSTERIOR[0]) > 3 * float(az.mcse(draws[None], method="mean")), "no difference to measure"


def chain():
    return sampled(PseudoMarginal(program(ConditionalEstimate, num_particles=8)), X, num_warmup=1000, num_samples=8_000)


def test_the_pseudo_marginal_chain_samples_the_posterior(float64):
    draws, mcmc = chain()
    assert_moments(draws, *POSTERIOR)
    assert 0.05 < float(mcmc.last_state.mean_accept_prob) < 0.5


def _estimated_anew(self, state, model_args, model_kwargs):
    """The bug: the estimate of the present state on new random numbers in every iteration."""
    key, state_key = jax.random.split(state.rng_key)
    energy = self._potential(key, *model_args)(state.z)
    return RIGHT(self, PseudoMarginalState(*state)._replace(potential_energy=energy, rng_key=state_key), model_args, model_kwargs)


RIGHT = PseudoMarginal.sample


@pytest.mark.release
def test_an_estimate_that_is_made_anew_is_seen(float64, monkeypatch):
    monkeypatch.setattr(PseudoMarginal, "sample", _estimated_anew)
    draws, _ = chain()
    with pytest.raises(AssertionError, match="expected"):
        assert_moments(draws, *POSTERIOR)


def test_vectorized_chains_are_refused_in_a_line():
    mcmc = MCMC(PseudoMarginal(program(ConditionalEstimate)), num_warmup=2, num_samples=2, num_chains=2, chain_method="vectorized", progress_bar=False)
    with pytest.raises(ValueError, match="chain_method: Expected 'sequential' or 'parallel' with PseudoMarginal; got 'vectorized'"):
        mcmc.run(KEY, X.astype(np.float32))


def test_as_a_distribution():
    """Shapes, draws of each row, and a plate of data in Predictive."""
    context = np.repeat([[-3.0], [3.0]], 200, 0).astype(np.float32)
    likelihood = ConditionalBound(FITTED, context, key=KEY, num_draws=2)
    assert likelihood.batch_shape == (400,) and likelihood.event_shape == (1,)
    draws = likelihood.sample(KEY, (2, 3))
    assert draws.shape == (2, 3, 400, 1) and likelihood.log_prob(draws).shape == (2, 3, 400)
    means = np.asarray(draws).mean((0, 1)).reshape(2, 200).mean(1)
    exact = [float(on_mean(c)) for c in (-3.0, 3.0)]
    np.testing.assert_allclose(means, exact, atol=0.15)

    def rows(c):
        with numpyro.plate("data", 400):
            return numpyro.sample("x", ConditionalEstimate(FITTED, c, key=KEY))

    assert Predictive(rows, num_samples=1)(KEY, context)["x"].shape == (1, 400, 1)
    assert handlers.trace(handlers.seed(rows, 0)).get_trace(context)["x"]["value"].shape == (400, 1)


def test_categories_have_fewer_columns_than_the_chain_has_dimensions():
    categories = probdiff.likelihoods.CategoricalLikelihood(3)
    model = probdiff.Diffusion(SCHEDULE, lambda z, n, context: z + context, categories, dim=6).bind({})
    likelihood = ConditionalEstimate(model, jnp.ones((5, 1)), key=KEY, num_particles=2)
    x = likelihood.sample(KEY)
    assert likelihood.event_shape == (2,) and x.shape == (5, 2) and np.all(np.isfinite(likelihood.log_prob(x)))


def on_mean(c):
    """The mean of the model given c, from its density on a grid."""
    weight = np.exp(exact_log_prob(FITTED, GRID[:, None], context=np.full((len(GRID), 1), c)))
    return weight @ GRID / weight.sum()
