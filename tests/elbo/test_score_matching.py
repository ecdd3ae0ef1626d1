"""Denoising score matching: against the step KLs, term by term, and closed forms of the linear-Gaussian chain."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_mean, long_but
from numpyro.infer import SVI

import probdiff
from probdiff.elbo.score_matching import WEIGHTS
from probdiff.oracles import GaussianOracle, exact_terms

SIGMAS = np.array([0.1, 0.4, 1.0, 2.5, 6.0])
SCHEDULE = probdiff.NoiseSchedule.from_sigmas(SIGMAS)
ORACLE = GaussianOracle([0.5, -1.0], [[1.0, 0.3], [0.3, 0.5]])
X = ORACLE.sample(np.random.default_rng(0), 3)


def make(reverse_variance="posterior", scale=0.8):
    return probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, scale), reverse_variance=reverse_variance)


def score_errors(diffusion, noise):
    """‖s_θ + ε/σ_n‖² by the functions of probdiff.chain.score.score, shape (draw, num_steps, datum)."""
    errors = []
    for n, sigma in enumerate(SIGMAS, 1):
        eps = noise[:, n - 1]
        errors.append(jnp.square(probdiff.chain.score.score(diffusion, X + sigma * eps, n) + eps / sigma).sum(-1))
    return np.stack(errors, 1)


def check_equals_step_kl(reverse_variance, weights):
    diffusion = make(reverse_variance)
    noise = jax.random.normal(jax.random.key(0), (4, 5, 3, 2))
    terms = probdiff.elbo_terms(diffusion, X, noise=noise)
    weighted = weights(diffusion)[:, None] * score_errors(diffusion, noise)
    ratio = SCHEDULE.posterior_variance[1:] / diffusion.kernel.variance(SCHEDULE)[1:]
    constant = X.shape[1] * (ratio - 1 - np.log(ratio)) / 2
    np.testing.assert_allclose(weighted[:, 1:], terms.step_kl - constant[:, None], rtol=1e-10, atol=1e-13)
    first = -X.shape[1] / 2 * np.log(2 * np.pi * SCHEDULE.beta[0])
    np.testing.assert_allclose(first - weighted[:, 0], terms.reconstruction, rtol=1e-10)


@pytest.mark.long
@pytest.mark.parametrize("reverse_variance", ["posterior", "forward"])
def test_with_likelihood_weights_each_term_is_the_step_kl(reverse_variance, float64):
    check_equals_step_kl(reverse_variance, probdiff.elbo.likelihood_weights)


def test_likelihood_weights_by_the_formula_in_sigma():
    expected = SIGMAS[1:] ** 2 * (SIGMAS[1:] ** 2 / SIGMAS[:-1] ** 2 - 1) / 2
    np.testing.assert_allclose(probdiff.elbo.likelihood_weights(make())[1:], expected, rtol=1e-10)


WRONG = {
    "those of continuous time": lambda d: SIGMAS * np.gradient(SIGMAS),
    "sigma for its square": lambda d: probdiff.elbo.likelihood_weights(d) / SIGMAS,
    "the usual ones": WEIGHTS["sigma_squared"],
}


@pytest.mark.parametrize("bug", WRONG)
def test_other_weights_are_not_the_bound(bug, float64):
    with pytest.raises(AssertionError):
        check_equals_step_kl("posterior", WRONG[bug])


def exact_losses(diffusion):
    """λ_n E‖s_θ + ε/σ_n‖² with likelihood weights, summed over the data, shape (num_steps,), from the closed forms of the bound."""
    terms = exact_terms(diffusion, X)
    ratio = SCHEDULE.posterior_variance[1:] / diffusion.kernel.variance(SCHEDULE)[1:]
    rest = (terms["step_kl"] - X.shape[1] * (ratio - 1 - np.log(ratio))[:, None] / 2).sum(1)
    first = -X.shape[1] / 2 * np.log(2 * np.pi * SCHEDULE.beta[0]) - terms["reconstruction"]
    return np.concatenate([[first.sum()], rest])


@pytest.mark.parametrize(
    "weights, steps",
    [("likelihood", "all"), ("likelihood", "uniform"), ("sigma_squared", "stratified"), ("own", "importance")],
)
def test_the_loss_has_its_closed_form(weights, steps, float64):
    diffusion = make("forward")
    own = {"own": np.array([3.0, 1.0, 0.5, 2.0, 0.1])}
    table = own[weights] if weights in own else WEIGHTS[weights](diffusion)
    expected = (exact_losses(diffusion) * table / probdiff.elbo.likelihood_weights(diffusion)).sum()
    objective = probdiff.elbo.ScoreMatching(diffusion, own.get(weights, weights), steps=steps)
    guide = objective.guide
    if objective.initial_state:  # what is learned is measured in units of these terms
        np.testing.assert_allclose(objective._learner.kl_weight, table / SIGMAS**2, rtol=1e-10)

    def loss(key):
        return objective.loss(key, {}, diffusion.model, guide, X)

    draws = jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(1), 40_000))
    assert_mean(draws, expected, power=0.12 * expected)
    assert_mean(draws[:10_000] * 2, 2 * expected)

    @jax.jit
    def single_and_doubled(key):
        return loss(key), objective.loss(key, {}, diffusion.model, guide, X, num_data=6)

    single, doubled = single_and_doubled(jax.random.key(2))
    np.testing.assert_allclose(doubled, 2 * single, rtol=1e-12)


class Slope(eqx.Module):
    """ε̂ = a_n z for data N(0, s²): the best a_n is √(1−ᾱ_n) / (ᾱ_n s² + 1 − ᾱ_n)."""

    slope: jax.Array
    dim: int = 1

    def __call__(self, z, n):
        return self.slope[n - 1][..., None] * z


@pytest.mark.long
@pytest.mark.parametrize("weights", long_but(["likelihood"], ["sigma_squared", "likelihood"]))
def test_an_svi_fit_finds_the_score(weights, float64):
    x = 1.7 * np.random.default_rng(0).standard_normal((2000, 1))
    diffusion = probdiff.Diffusion(SCHEDULE, Slope(jnp.zeros(5)))
    optimiser = optax.adam(optax.cosine_decay_schedule(0.03, 1500))
    svi = SVI(diffusion.model, diffusion.guide, optimiser, probdiff.elbo.ScoreMatching(diffusion, weights))
    result = svi.run(jax.random.key(0), 1500, x, progress_bar=False)
    x_n = jnp.array([[-1.0], [0.7]])
    for n, sigma in enumerate(SIGMAS, 1):
        exact = -x_n / (np.mean(x**2) + sigma**2)
        error = probdiff.chain.score.score(diffusion.bind(result.params), x_n, n) - exact
        np.testing.assert_allclose(sigma * error, 0, atol=0.01)  # in units of the noise; a fresh network is off by up to 0.9


@pytest.mark.long
def test_fit_takes_it_as_its_objective():
    data = probdiff.datasets.load("8gaussians").train[:500]
    diffusion = probdiff.Diffusion(
        probdiff.geometric_schedule(10, 0.05, 8.0), probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1)
    )
    fit = probdiff.fit(
        diffusion, data, iterations=200, elbo=probdiff.elbo.ScoreMatching(diffusion), progress=False, learning_rate=1e-2
    )

    @eqx.filter_jit
    def loss(diffusion):
        objective = probdiff.elbo.ScoreMatching(diffusion)
        return objective.loss(jax.random.key(0), {}, diffusion.model, diffusion.guide, data)

    assert loss(fit.diffusion) < 0.8 * loss(diffusion)
