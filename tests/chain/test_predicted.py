"""The kernel whose variance the network predicts: against the table kernels, NumPyro's KL, and itself in everything that takes a model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Z_MAX, assert_mean, sampled_step
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence

import probdiff
from probdiff.chain.variances import ForwardVariance
from probdiff.oracles import GaussianOracle, exact_terms

N = 6
KEY = jax.random.key(0)
SCHEDULE = probdiff.log_snr_schedule(N, 3.0, -2.0)
ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
EXACT = ORACLE.network(SCHEDULE, 0.9)
PREDICT = probdiff.Diffusion(SCHEDULE, EXACT).predict_noise
X = np.array([[0.1, -0.2], [1.5, 0.4], [-0.7, -1.0]])


def predicted(second, **kwargs):
    """A model whose noise is that of a linear network, and whose second output is ``second(z, n)``."""
    network = lambda z, n: jnp.concatenate([PREDICT(z, n), jnp.broadcast_to(second(z, n), z.shape)], -1)  # noqa: E731
    return probdiff.Diffusion(SCHEDULE, probdiff.networks.VarianceHead(network), dim=2, reverse_variance="predicted", **kwargs)


def varied(z, n):
    """A variance for each datum and dimension, also outside of the two."""
    return 1.5 * jnp.sin(2 * z[..., ::-1] + n[..., None])


class Given(probdiff.chain.AbstractReverseVariance):
    """Variances by a table of shares."""

    share: np.ndarray

    def __call__(self, schedule):
        return self.share * ForwardVariance()(schedule)[:, None]


SHARE = np.concatenate([[[1.0, 1.0]], np.random.default_rng(0).uniform(-0.3, 1.3, (N - 1, 2))])  # v_1 = β_1, as in a table


def test_outputs_without_the_data_give_the_kernel_of_a_table(float64):
    """The terms, the programs and the gradient of the bound in the network, on common noise."""
    own = predicted(lambda z, n: jnp.asarray(2 * SHARE - 1)[n - 1])
    table = probdiff.Diffusion(SCHEDULE, PREDICT, dim=2, reverse_variance=Given(SHARE))
    found, expected = (probdiff.elbo_terms(model, X, key=KEY, num_draws=3) for model in (own, table))
    for name in ("prior_kl", "step_kl", "reconstruction"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-11, atol=1e-12, err_msg=name)
    assert found.closed_form and own.kernel.name == "predicted"
    for name in ("trace", "kl_path"):
        losses = []
        for model in (own, table):
            guide, elbo = probdiff.ESTIMATORS[name](model)
            losses.append(jax.jit(lambda key, given=(model.model, guide), elbo=elbo: elbo.loss(key, {}, *given, X))(KEY))
        np.testing.assert_allclose(*losses, rtol=1e-11, err_msg=name)
    samples = [probdiff.samplers.ancestral(model, key=KEY, num_samples=3) for model in (own, table)]
    np.testing.assert_allclose(*samples, rtol=1e-11)


@pytest.mark.long
@pytest.mark.parametrize("name", ["posterior", "forward"])
def test_the_closed_form_of_the_linear_gaussian_chain(name, float64):
    """At the ends of the range the chain is that of the named variances, but for v_1, which is β_1 at the upper end only."""
    own = predicted(lambda z, n: jnp.where(n[..., None] == 1, 1.0, 1.0 if name == "forward" else -1.0))
    expected = exact_terms(probdiff.Diffusion(SCHEDULE, EXACT, reverse_variance=name), X)
    terms = probdiff.elbo_terms(own, X, key=KEY, num_draws=4000)
    assert_mean(terms.step_kl, expected["step_kl"])
    assert_mean(terms.elbo, expected["elbo"], power=0.5)


@pytest.mark.long
def test_a_step_is_normal_with_the_predicted_variance(float64):
    """Against the formula, and its KL against NumPyro's."""
    own, n = predicted(varied), np.array([2, 4, N])
    rng = np.random.default_rng(1)
    x0, eps = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
    z = SCHEDULE.signal_scale[n - 1][:, None] * x0 + SCHEDULE.noise_scale[n - 1][:, None] * eps
    share = (1 + np.asarray(varied(jnp.asarray(z), n))) / 2
    assert share.min() < 0 and share.max() > 1
    log_v = share * np.log(SCHEDULE.beta[n - 1])[:, None] + (1 - share) * np.log(SCHEDULE.posterior_variance[n - 1])[:, None]
    step = own.reverse_kernel(z, n)
    np.testing.assert_allclose(step.variance, np.exp(log_v), rtol=1e-11)
    np.testing.assert_allclose(step.mean, probdiff.Diffusion(SCHEDULE, PREDICT).reverse_kernel(z, n).mean, rtol=1e-11)
    kl = kl_divergence(probdiff.forward_posterior(SCHEDULE, z, x0, n), step)
    np.testing.assert_allclose(own.step_kl(sampled_step(eps, own.predict(z, n), n)), kl, rtol=1e-9)


def test_the_first_variance_is_between_that_of_the_second_step_and_beta(float64):
    z = jnp.ones((1, 2))
    for second, expected in ((-1.0, SCHEDULE.posterior_variance[1]), (1.0, SCHEDULE.beta[0])):
        np.testing.assert_allclose(predicted(lambda z, n: second).reverse_kernel(z, 1).variance, np.full((1, 2), expected), rtol=1e-11)  # noqa: B023
    head = probdiff.networks.VarianceHead(lambda z, n: jnp.zeros((*z.shape, 2)))
    alone = probdiff.Diffusion(probdiff.NoiseSchedule.from_betas([0.3]), head, dim=2, reverse_variance="predicted")
    np.testing.assert_allclose(alone.reverse_kernel(z, 1).variance, 0.3, rtol=1e-12)
    assert np.isfinite(probdiff.elbo_terms(alone, X, key=KEY).elbo).all()


@pytest.mark.long
def test_it_is_read_the_same_way_twice():
    """Each term on common paths."""
    common = probdiff.diagnostics.compare_on_common_paths(predicted(varied), X, key=KEY)
    assert common.agree, common.wrong


@pytest.mark.release
def test_every_function_takes_it():
    model = predicted(varied)
    two = probdiff.diagnostics.compute_both_ways(model, X.astype(np.float32), key=KEY, num_draws=400)
    assert two.agree, (two.difference, two.z)
    data = ORACLE.sample(np.random.default_rng(0), 100).astype(np.float32)
    random_steps, all_steps = probdiff.elbo.data_set_elbo(model, data, key=KEY), probdiff.elbo_terms(model, data, key=KEY, num_draws=200).elbo.mean(0)
    difference = random_steps.elbo - np.asarray(all_steps)
    assert abs(difference.mean()) < Z_MAX * difference.std() / 10
    for sampler in probdiff.samplers.SAMPLERS.values():
        assert np.isfinite(sampler(model, key=KEY, num_samples=3)).all()
    assert np.isfinite(probdiff.sandwich(model, key=KEY, num_data=3, num_particles=2).upper[2]).all()
    assert np.isfinite(probdiff.flow_likelihood(model, X[:2].astype(np.float32), key=KEY).log_prob).all()


DISTINCT = ["trace", "kl_combined", "kl_posterior_target"]
ESTIMATORS = {"distinct": DISTINCT, "others": ["kl_marginal", *(name for name in probdiff.ESTIMATORS if name not in [*DISTINCT, "mean_field"])]}


class Tilted(eqx.Module):
    """Both outputs, of which a parameter each is trained."""

    parts: jax.Array

    def __call__(self, z, n):
        return jnp.stack([self.parts[0] * PREDICT(z, n), self.parts[1] * varied(z, n)], -1)


@pytest.mark.release
@pytest.mark.parametrize("which", ESTIMATORS)
def test_every_estimator_agrees(which):
    """In the value and in the gradient of both outputs."""
    head = probdiff.networks.VarianceHead(Tilted(jnp.array([0.9, 1.1])))
    model = probdiff.Diffusion(SCHEDULE, head, dim=2, reverse_variance="predicted")
    comparison = probdiff.compare_estimators(model, X.astype(np.float32), key=KEY, num_draws=300, estimators=ESTIMATORS[which])
    assert comparison.agree, str(comparison)


@pytest.mark.long
def test_it_is_trained_and_saved(tmp_path):
    """Both outputs of a network, through heads inside; a run comes back with it."""
    mlp = probdiff.MLP(2, key=KEY, hidden=16, num_blocks=1, outputs=2)
    head = probdiff.networks.VarianceHead(probdiff.networks.ClipHead(probdiff.networks.VHead(mlp), 4))
    model = probdiff.Diffusion(SCHEDULE, head, reverse_variance="predicted")
    assert model.dim == 2 and not model.is_told_step
    x = ORACLE.sample(np.random.default_rng(0), 64).astype(np.float32)
    run = probdiff.storage.create_run(tmp_path / "run", model)
    fit = probdiff.fit(model, x, iterations=50, batch_size=16, learning_rate=1e-2, progress=False)
    assert fit.losses[-10:].mean() < fit.losses[:5].mean() and np.abs(fit.diffusion.predict(x, 2)[..., 1] - 0.5).max() > 0.01
    run.save(fit=fit)
    back = probdiff.open_run(run.path).diffusion
    np.testing.assert_array_equal(back.predict(x, 2), fit.diffusion.predict(x, 2))
    assert isinstance(back.kernel, probdiff.chain.PredictedVarianceKernel)


@pytest.mark.long
def test_the_evidence_of_a_part_of_x(float64):
    """Particles with a twist against many without."""
    model = predicted(lambda z, n: varied(z, n) / 3).bind({})
    half = probdiff.inference.Inpainting(np.array([True, False]), np.array([0.4, 0.0]))
    found = [probdiff.inference.smc(model, half, key=KEY, num_particles=k, num_runs=8, twist=twist) for k, twist in ((128, "tweedie"), (512, "none"))]
    difference = found[0].log_evidence - found[1].log_evidence
    assert abs(difference) < Z_MAX * np.hypot(*(each.log_evidence_error for each in found))


@pytest.mark.long
def test_the_chain_as_a_prior():
    model = predicted(varied)
    draws = np.asarray(probdiff.samplers.ancestral(model, key=KEY, num_samples=4000))
    prior = probdiff.inference.ChainPrior(model)
    own = jax.vmap(lambda key: handlers.seed(prior, key)())(jax.random.split(jax.random.key(1), 4000))
    error = np.hypot(draws.std(0), own.std(0)) / np.sqrt(4000)
    assert np.all(np.abs(draws.mean(0) - own.mean(0)) < Z_MAX * error)
    np.testing.assert_allclose(draws.std(0), own.std(0), rtol=0.1)
