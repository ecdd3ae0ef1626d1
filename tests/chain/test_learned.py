"""What is learned beside the network: the noise schedule and the reverse variances."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from conftest import assert_mean, long_but, release_but, sampled_step
from numpyro.distributions.kl import kl_divergence
from numpyro.infer import SVI, Trace_ELBO

import probdiff
from probdiff.chain.schedules import NoiseSchedule
from probdiff.oracles import GaussianMixture, GaussianOracle, exact_terms
from probdiff.programs.sites import PARAMS

N = 6
ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05 * np.eye(2), 0.02 * np.eye(2)])
X = np.array([[0.1, -0.2], [1.5, 0.4], [-0.7, -1.0]])


def learned(start=3.0, log_range=1.6094379124341003, shape=(0.3, -0.2, 0.5, 0.0, -0.4)):
    schedule = probdiff.LearnedSchedule(N, 3.0, -2.0)
    values = jnp.asarray(start), jnp.asarray(log_range), jnp.asarray(shape)
    return eqx.tree_at(lambda s: (s.start, s.log_range, s.logits), schedule, values)


def network():
    return ORACLE.network(probdiff.log_snr_schedule(N, 3.0, -2.0), 0.9)


@pytest.mark.long
def test_tables_are_those_of_the_fixed_schedule(float64):
    schedule = learned()
    fixed = schedule.fixed()
    for name in ("beta", "alpha", "alpha_bar", "one_minus_alpha_bar", "signal_scale", "noise_scale", "log_snr", "sigma", "posterior_variance"):
        np.testing.assert_allclose(getattr(schedule, name), getattr(fixed, name), rtol=1e-11, atol=1e-16, err_msg=name)
    np.testing.assert_allclose(schedule.log_snr[jnp.array([0, -1])], [3, -2], rtol=1e-12)
    start = probdiff.LearnedSchedule(1000, 8.0, -6.0)
    np.testing.assert_allclose(start.log_snr, probdiff.log_snr_schedule(1000, 8.0, -6.0).log_snr, rtol=1e-10, atol=1e-12)


def test_single_precision_tables():
    schedule = probdiff.LearnedSchedule(1000, 13.0, -8.0)
    fixed = probdiff.log_snr_schedule(1000, 13.0, -8.0)
    for name in ("beta", "alpha", "posterior_variance", "noise_scale", "signal_scale"):
        np.testing.assert_allclose(getattr(schedule, name), getattr(fixed, name), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("estimator", release_but(["trace", "kl_combined"], ["trace", "trace_posterior", "kl_marginal", "kl_uniform", "kl_path", "kl_combined"]))
def test_gradient_with_respect_to_the_schedule(estimator, float64):
    """Against differences of the closed form: the guide's parameters, too."""

    def exact(values):
        diffusion = probdiff.Diffusion(learned(values[0], values[1], values[2:]).fixed(), network())
        return exact_terms(diffusion, X)["elbo"].sum()

    values = np.concatenate([[3.0, np.log(5.0)], learned().logits])
    step = 1e-4
    slopes = [(exact(values + step * e) - exact(values - step * e)) / (2 * step) for e in np.eye(len(values))]
    diffusion = probdiff.Diffusion(learned(), network())
    guide, elbo = probdiff.ESTIMATORS[estimator](diffusion)
    own = diffusion.trainable()
    assert len(jax.tree.leaves(own)) == 3

    def draw(key):
        found = jax.grad(lambda own: -elbo.loss(key, {PARAMS: own, **getattr(elbo, "initial_state", {})}, diffusion.model, guide, X))(own)
        return jnp.concatenate([found.schedule.start[None], found.schedule.log_range[None], found.schedule.logits])

    draws = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=1000))(jax.random.split(jax.random.key(0), 20_000))
    assert_mean(draws, np.array(slopes), power=2.0)


@pytest.mark.release
def test_a_fit_moves_it_and_it_is_evaluated_as_a_fixed_schedule():
    diffusion = probdiff.Diffusion(probdiff.LearnedSchedule(N, 3.0, -2.0), probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1))
    size = sum(leaf.size for leaf in jax.tree.leaves(diffusion.trainable()))
    plain = probdiff.Diffusion(probdiff.log_snr_schedule(N), diffusion.network)
    assert size == sum(leaf.size for leaf in jax.tree.leaves(plain.trainable())) + 2 + 5
    result = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), Trace_ELBO()).run(
        jax.random.key(1), 30, jnp.asarray(X), progress_bar=False
    )
    fitted = diffusion.bind(result.params)
    assert isinstance(fitted.evaluated().schedule, NoiseSchedule)
    moved = result.params[PARAMS].schedule
    assert abs(float(moved.start) - 3) > 1e-3 and float(jnp.abs(moved.logits).max()) > 1e-3
    np.testing.assert_allclose(fitted.schedule.log_snr[0], moved.start, rtol=1e-6)
    assert fitted.evaluated().schedule == fitted.schedule.fixed()
    terms = probdiff.elbo_terms(diffusion.bind(result.params), X, key=jax.random.key(2), num_draws=5)
    np.testing.assert_array_equal(terms.elbo, probdiff.elbo_terms(fitted, X, key=jax.random.key(2), num_draws=5).elbo)


@pytest.mark.release
def test_a_run_comes_back_with_what_was_learned(tmp_path):
    diffusion = probdiff.Diffusion(
        probdiff.LearnedSchedule(N, 3.0, -2.0),
        probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1),
        reverse_variance="learned",
    )
    fit = probdiff.fit(diffusion, np.asarray(X, np.float32), iterations=20, batch_size=8, learning_rate=1e-2, progress=False)
    run = probdiff.storage.create_run(tmp_path / "run", diffusion)
    run.save(fit=fit)
    back = probdiff.open_run(run.path).diffusion
    assert back.schedule.fixed() == fit.diffusion.schedule.fixed() != diffusion.schedule.fixed()
    np.testing.assert_array_equal(back.kernel.reverse_variance.logit, fit.diffusion.kernel.reverse_variance.logit)
    assert float(jnp.abs(back.kernel.reverse_variance.logit).max()) > 0


def one_step_variance(diffusion, x, draws=4000):
    elbo = probdiff.AnalyticELBO(diffusion, "uniform")
    keys = jax.random.split(jax.random.key(5), draws)
    return float(jax.jit(lambda keys: jax.lax.map(lambda key: elbo.per_datum(key, x), keys))(keys).var(0).mean())


def test_the_shape_can_be_trained_for_less_variance():
    """Of the exact network in continuous time, from a bad shape, between fixed ends: the variance falls."""
    class Known(probdiff.networks.AbstractNetwork):
        dim = 2

        def __call__(self, z, log_snr):
            snr = jnp.exp(log_snr)[..., None]
            noise = jax.lax.rsqrt(1 + snr)
            return noise * z * (1 + snr) / (1 + 0.05 * snr)  # data are N(0, 0.05 I)

    steps = 50
    schedule = probdiff.LearnedSchedule(steps, 6.0, -4.0)
    ends = np.asarray(schedule.start), np.asarray(schedule.log_range)
    values = (*ends, jnp.linspace(2.0, -2.0, 32))
    schedule = eqx.tree_at(lambda s: (s.start, s.log_range, s.logits), schedule, values)
    diffusion = probdiff.Diffusion(schedule, Known())
    x = jnp.asarray(np.random.default_rng(0).normal(0, np.sqrt(0.05), (64, 2)), jnp.float32)
    before = one_step_variance(diffusion, x)
    elbo = probdiff.AnalyticELBO(diffusion, "uniform", schedule_loss="variance")
    result = SVI(diffusion.model, elbo.guide, optax.adam(3e-2), elbo).run(jax.random.key(0), 400, x, progress_bar=False)
    after = one_step_variance(diffusion.bind(result.params), x)
    found = diffusion.bind(result.params).schedule.log_snr
    np.testing.assert_allclose(np.asarray(found)[[0, -1]], [6, -4], rtol=1e-6)
    assert after < 0.75 * before, (before, after)


def best_variance(posterior, beta, gain, mean_square):
    """By minimising the expected KL of a step, in units of d / 2, numerically."""

    def expected_kl(log_v):
        ratio = posterior / np.exp(log_v)
        return ratio - 1 - np.log(ratio) + gain * mean_square / np.exp(log_v)

    return np.exp(scipy.optimize.minimize_scalar(expected_kl, (np.log(posterior), np.log(beta)), options={"xtol": 1e-12}).x)


@pytest.mark.parametrize("num_steps", long_but([10], [10, 50]))
def test_optimal_variance(num_steps, float64):
    """Given E‖ε − ε̂‖², the v_n with the least expected KL; estimated, within its error; and never worse than β̃."""
    schedule = probdiff.log_snr_schedule(num_steps, 4.0, -3.0)
    diffusion = probdiff.Diffusion(schedule, MIXTURE.network(schedule), reverse_variance="optimal", dim=2)
    np.testing.assert_allclose(diffusion.kernel.variance(schedule), schedule.beta, rtol=1e-12)  # before anything is known
    x = MIXTURE.sample(np.random.default_rng(0), 4000)
    found = probdiff.elbo.optimal_variance(diffusion, x, key=jax.random.key(0))
    variance = found.kernel.variance(schedule)
    assert variance[0] == schedule.beta[0]
    # E‖ε − ε̂‖² by other draws, with their error.
    rng = np.random.default_rng(1)
    other = MIXTURE.sample(rng, 40_000)
    for n in (2, num_steps // 2, num_steps):
        eps = rng.standard_normal(other.shape)
        z = schedule.signal_scale[n - 1] * other + schedule.noise_scale[n - 1] * eps
        squares = np.square(eps - np.asarray(diffusion.predict_noise(jnp.asarray(z), n))).sum(1)
        error = squares.std() / np.sqrt(len(squares))
        posterior, beta, alpha = schedule.posterior_variance[n - 1], schedule.beta[n - 1], schedule.alpha[n - 1]
        gain = beta**2 / (alpha * schedule.one_minus_alpha_bar[n - 1])
        best = best_variance(posterior, beta, gain, squares.mean() / 2)
        np.testing.assert_allclose(best, posterior + gain * squares.mean() / 2, rtol=1e-6)
        assert abs(variance[n - 1] - best) < 4.9 * gain / 2 * error * np.sqrt(1 + 40_000 / 4000)
    bounds = {}
    posterior = probdiff.Diffusion(schedule, MIXTURE.network(schedule), reverse_variance="posterior", dim=2)
    for name, model in (("optimal", found), ("posterior", posterior)):
        bounds[name] = probdiff.elbo_terms(model, x, key=jax.random.key(3)).elbo[0]
    gain = np.asarray(bounds["optimal"] - bounds["posterior"])
    assert gain.mean() > 4.9 * gain.std() / np.sqrt(len(gain))


@pytest.mark.release
def test_a_fit_sets_the_optimal_variances():
    diffusion = probdiff.Diffusion(
        probdiff.log_snr_schedule(N, 3.0, -2.0), probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1), reverse_variance="optimal"
    )
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), Trace_ELBO())
    result = svi.run(jax.random.key(0), 5, jnp.asarray(X), progress_bar=False)  # no gradient moves them
    np.testing.assert_allclose(diffusion.bind(result.params).kernel.variance(diffusion.schedule), diffusion.schedule.beta, rtol=1e-5)
    fit = probdiff.fit(diffusion, np.asarray(X, np.float32), iterations=5, batch_size=8, progress=False)
    variance = fit.diffusion.kernel.variance(diffusion.schedule)
    assert np.all(variance[1:] != diffusion.schedule.beta[1:]) and np.all(variance[1:] > diffusion.schedule.posterior_variance[1:])


@pytest.mark.long
def test_learned_variance_lies_between_by_dimension(float64):
    schedule = probdiff.log_snr_schedule(40, 4.0, -3.0)
    diffusion = probdiff.Diffusion(schedule, lambda z, n: 0.5 * z, reverse_variance="learned", dim=3)
    kernel = eqx.tree_at(lambda k: k.reverse_variance.logit, diffusion.kernel, jnp.linspace(-30, 30, 96).reshape(32, 3))
    variance = np.asarray(kernel.variance(schedule))
    assert variance.shape == (40, 3) and np.all(variance[0] == schedule.beta[0])
    share = np.log(variance[1:] / schedule.posterior_variance[1:, None]) / np.log(schedule.beta / np.where(schedule.posterior_variance, schedule.posterior_variance, 1))[1:, None]
    knots = np.linspace(-30, 30, 96).reshape(32, 3)
    expected = [np.interp(np.linspace(0, 31, 40), np.arange(32), knots[:, i]) for i in range(3)]
    np.testing.assert_allclose(share, 1 / (1 + np.exp(-np.array(expected).T[1:])), rtol=1e-8, atol=1e-10)
    n, rng = np.array([2, 7, 40]), np.random.default_rng(0)
    x0, eps = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    z = probdiff.forward_marginal(schedule, x0, n).mean + schedule.noise_scale[n - 1][:, None] * eps
    kl = kl_divergence(probdiff.forward_posterior(schedule, z, x0, n), kernel(schedule, z, 0.5 * z, n))
    np.testing.assert_allclose(kernel.step_kl(schedule, sampled_step(eps, 0.5 * z, n)), kl, rtol=1e-9)


@pytest.mark.long
def test_learned_variance_agrees_two_ways_and_is_trained(float64):
    diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(N, 3.0, -2.0), network(), reverse_variance="learned", dim=2)
    own = diffusion.trainable()
    assert [leaf.shape for leaf in jax.tree.leaves(own)] == [(6, 2)]

    def draws(name):
        guide, elbo = probdiff.ESTIMATORS[name](diffusion)

        def one(key):
            given = getattr(elbo, "initial_state", {})
            value, grad = jax.value_and_grad(lambda own: -elbo.loss(key, {PARAMS: own, **given}, diffusion.model, guide, X))(own)
            return jnp.concatenate([value[None], grad.kernel.reverse_variance.logit.ravel()])

        return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=1000))(jax.random.split(jax.random.key(0), 20_000)))

    reference = draws("kl_marginal")
    assert np.all(np.abs(reference.mean(0)[3:]) > 1e-4)  # (the first knot is step 1, which has no KL)
    for name in ("trace", "kl_combined"):
        found = draws(name)
        error = np.hypot(found.std(0), reference.std(0)) / np.sqrt(len(found))
        difference = found.mean(0) - reference.mean(0)
        assert np.all(np.abs(difference) <= 4.9 * error + 1e-12), (name, difference / error)
