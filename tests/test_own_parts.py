"""Parts that a user wrote, those of docs/own_parts among them: a schedule, a likelihood, kernels, a reverse variance, networks, a head and an estimator, in
everything that takes a model."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import own_part, release_but
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

import probdiff
from probdiff.chain.schedules import at_step
from probdiff.chain.variances import PosteriorVariance

KEY = jax.random.key(3)
N = 4
X = np.exp(np.random.default_rng(0).normal(size=(6, 2))).astype(np.float32)


Straight, StudentTLikelihood = own_part("schedule").Straight, own_part("likelihood").StudentTLikelihood
Shrink, TwoHeadedKernel = own_part("network").Shrink, own_part("kernel").TwoHeadedKernel
OWN = own_part("estimator").added
pytestmark = pytest.mark.usefixtures("own_estimator")


class Halfway(probdiff.chain.AbstractReverseVariance):
    """Half-way between the posterior's variance and β, in logarithms, by a trained share; the entry for n = 1, which is not used, is far from 0."""

    share: jax.Array

    def __call__(self, schedule):
        noise = jnp.log(jnp.asarray(schedule.one_minus_alpha_bar))
        return self.share * jnp.concatenate([jnp.full(1, 9.0), noise[1:] - noise[:-1]])


class LaplaceKernel(probdiff.chain.AbstractKernel):
    """Reverse steps with heavier tails: Laplace, of the Gaussian's mean and variance. Its KL is sampled."""

    closed_form: ClassVar[bool] = False
    prediction: ClassVar[str] = "noise"

    def prior(self, shape):
        return dist.Laplace(jnp.zeros(shape), jnp.ones(shape[-1:])).to_event(1)

    def __call__(self, schedule, z, prediction, n):
        per_eps, per_z = (at_step(t, n, z.dtype) for t in (schedule.beta / schedule.noise_scale, schedule.alpha**-0.5))
        loc = per_z[..., None] * (z - per_eps[..., None] * prediction)
        scale = at_step((schedule.beta / 2) ** 0.5, n, z.dtype)[..., None]
        return dist.Laplace(loc, jnp.broadcast_to(scale, (*scale.shape[:-1], z.shape[-1]))).to_event(1)

    def observation(self, likelihood, last):
        return likelihood(last.base_dist.loc, last.base_dist.scale)

    def noise_free_reconstruction(self, schedule, likelihood, x, x0):
        return jnp.zeros(len(x0), x0.dtype)

    def excess(self, schedule, step):
        n = jnp.maximum(step.n, 2)
        q = probdiff.forward_posterior(schedule, step.z, step.x0, n)
        value = q.mean + jnp.sqrt(q.variance) * step.extra_noise()
        return q.log_prob(value) - self(schedule, step.z, step.prediction, n).log_prob(value)

    def constants(self, schedule, dim):
        return np.zeros(schedule.num_steps)

    def kl_weight(self, schedule):
        return np.ones(schedule.num_steps)


class TwoHeads(Shrink):
    """The same, and a trained log-variance that grows with the noise level and differs by dimension."""

    ratio: jax.Array

    def noise_and_log_ratio(self, z, log_snr):
        ratio = self.ratio * jax.nn.sigmoid(-log_snr)[..., None]
        return jnp.stack([self(z, log_snr), jnp.broadcast_to(ratio, z.shape)], -1)


class DoubleHead(probdiff.networks.AbstractHead):
    """A network that predicts twice the noise."""

    def noise(self, prediction, z, log_snr):
        return prediction / 2


def shrink():
    return Shrink(2, jnp.asarray(0.8), lambda share: jnp.sin(share))


def two_heads():
    return TwoHeads(2, jnp.asarray(0.8), jnp.sin, jnp.array([0.5, -0.3]))


SCHEDULE = probdiff.log_snr_schedule(N, 4.0, -3.0)
NETWORKS = {"network": shrink, "head": lambda: DoubleHead(shrink()), "callable": lambda: lambda z, n: 0.5 * z}
# In one model, all parts that go together; a kernel of one's own has no reverse variance.
TOGETHER = "schedule, head, network, likelihood and reverse variance"
MODELS = {
    TOGETHER: lambda: probdiff.Diffusion(
        Straight(jnp.array([4.0, -3.0]), N), DoubleHead(shrink()), StudentTLikelihood(jnp.log(4.0), 1.5), Halfway(jnp.asarray(0.5))
    ),
    **{name: lambda make=make: probdiff.Diffusion(SCHEDULE, make(), dim=2) for name, make in NETWORKS.items()},
    "schedule": lambda: probdiff.Diffusion(Straight(jnp.array([4.0, -3.0]), N), shrink()),
    "likelihood": lambda: probdiff.Diffusion(SCHEDULE, shrink(), StudentTLikelihood(jnp.log(4.0), 1.5)),
    "reverse variance": lambda: probdiff.Diffusion(SCHEDULE, shrink(), reverse_variance=Halfway(jnp.asarray(0.5))),
    "kernel": lambda: probdiff.Diffusion(SCHEDULE, shrink(), kernel=LaplaceKernel()),
    "two-headed kernel": lambda: probdiff.Diffusion(SCHEDULE, two_heads(), kernel=TwoHeadedKernel("posterior")),
}
BOTH = [TOGETHER, "kernel"]
KERNELS = release_but(["kernel"], [*BOTH, "two-headed kernel"])


def test_the_constants_are_the_kls_of_a_network_that_knows_the_noise(float64):
    """The first entry of a reverse variance is not used: 0."""
    schedule, eps = probdiff.log_snr_schedule(N, 4.0, -3.0), np.random.default_rng(1).normal(size=(3, 2))
    kernel = probdiff.chain.GaussianKernel(Halfway(jnp.asarray(0.5)))
    kls = [np.zeros(3)]
    for n in range(2, N + 1):
        z = schedule.signal_scale[n - 1] * X[:3] + schedule.noise_scale[n - 1] * eps
        kls.append(dist.kl_divergence(probdiff.forward_posterior(schedule, z, X[:3], n), kernel(schedule, z, eps, n)))
    np.testing.assert_allclose(kernel.constants(schedule, 2)[:, None] + np.zeros(3), kls, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_every_function_takes_it(name):
    model = MODELS[name]()
    two = probdiff.diagnostics.compute_both_ways(model, X, key=KEY, num_draws=400)
    assert two.agree, (two.difference, two.z)
    for sampler in probdiff.samplers.SAMPLERS.values():
        assert np.isfinite(sampler(model, key=KEY, num_samples=3)).all()
    assert np.isfinite(probdiff.sandwich(model, key=KEY, num_data=3, num_particles=2).upper[2]).all()
    assert np.isfinite(probdiff.flow_likelihood(model, X[:2], key=KEY).log_prob).all()
    assert np.isfinite(probdiff.chain.score.score(model, X, 2)).all()


EVERY = [*(name for name in probdiff.ESTIMATORS if name != "mean_field"), *OWN]
# Paths, all steps, and one with a control variate; the others put the same things together in other ways.
DISTINCT = ["trace", "kl_marginal", "kl_combined"]
ESTIMATORS = {"distinct": DISTINCT, "others": ["kl_marginal", *(name for name in EVERY if name not in DISTINCT)]}


@pytest.mark.long
@pytest.mark.parametrize("which", release_but(["distinct"], ESTIMATORS))
@pytest.mark.parametrize("name", release_but(["kernel"], [*BOTH, "two-headed kernel"]))
def test_every_estimator_agrees_on_it(name, which):
    model = MODELS[name]()
    estimators = [e for e in ESTIMATORS[which] if model.kernel.closed_form or e != "kl_posterior_target"]
    comparison = probdiff.compare_estimators(model, X, key=KEY, num_draws=100, estimators=estimators)
    assert comparison.agree, str(comparison)
    if which == "others" and model.kernel.closed_form:
        elbo = TraceMeanField_ELBO()
        bound = model.bind({})
        losses = jax.jit(jax.vmap(lambda key: elbo.loss(key, {}, bound.model, bound.posterior_guide, X)))
        draws = -losses(jax.random.split(jax.random.key(5), 30)) / len(X)
        reference = comparison.table.loc["kl_marginal"]
        assert abs(np.mean(draws) - reference["elbo"]) < 4.9 * np.hypot(np.std(draws) / np.sqrt(30), reference["se"]) + 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_svi_and_fit_train_it(name):
    model = MODELS[name]()
    result = SVI(model.model, model.guide, optax.adam(1e-2), Trace_ELBO()).run(KEY, 5, X, progress_bar=False)
    fit = probdiff.fit(model, X, iterations=5, batch_size=4, learning_rate=1e-2, progress=False)
    for fitted in (model.bind(result.params), fit.diffusion):
        moved = [np.any(a != b) for a, b in zip(jax.tree.leaves(fitted.trainable()), jax.tree.leaves(model.trainable()), strict=True)]
        assert all(moved), moved


@pytest.mark.long
@pytest.mark.parametrize("name", release_but(BOTH, MODELS))
def test_jit_takes_a_model(name):
    """Its leaves are JAX arrays alone: functions and tables are static, and two models of equal parts compile one program."""
    model, compiled = MODELS[name](), []
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))

    @jax.jit
    def bound(model):
        compiled.append(1)
        return probdiff.elbo_terms(model, X, key=KEY).elbo

    np.testing.assert_allclose(bound(model), probdiff.elbo_terms(model, X, key=KEY).elbo, rtol=1e-4)
    bound(jax.tree.map(lambda leaf: leaf + 0, model))
    assert len(compiled) == 1


def test_tables_stay_double_and_constant_under_jit():
    network = probdiff.oracles.GaussianOracle([0.0, 0.0], np.eye(2)).network(SCHEDULE)
    model = probdiff.Diffusion(SCHEDULE, network)

    @jax.jit
    def tables(model):
        assert all(isinstance(each, np.ndarray) and each.dtype == np.float64 for each in (model.schedule.beta, model.network.weight))
        assert not jax.tree.leaves(model.trainable())
        return model.predict_noise(jnp.ones((1, 2)), 2)

    np.testing.assert_allclose(tables(model), model.predict_noise(jnp.ones((1, 2)), 2), rtol=1e-6)


def test_the_posterior_variance_as_an_object_is_that_of_its_name():
    named, own = (probdiff.Diffusion(SCHEDULE, shrink(), reverse_variance=v) for v in ("posterior", PosteriorVariance()))
    assert named.kernel == own.kernel and named.kernel.name == "posterior"
