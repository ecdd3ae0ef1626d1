"""Heads, and the mixture kernel that reads one of them, against enumeration and automatic differentiation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from conftest import assert_mean, long_but, release_but
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.util import log_density

import probdiff
from probdiff.chain.reverse import SampledStep
from probdiff.oracles import GaussianOracle

N, LEVELS = 5, 4
SCHEDULE = probdiff.log_snr_schedule(N, 4.0, -3.0)
ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
GRID = np.linspace(-1, 1, LEVELS)
PRIOR = np.array([[0.5, 0.1, 0.1, 0.3], [0.05, 0.05, 0.2, 0.7]])  # two independent dimensions
X = np.array([[0, 3], [1, 2], [3, 0]])


def independent(z, n):
    """Logits of independent dimensions: the truth is known."""
    return jnp.broadcast_to(jnp.asarray(np.log(PRIOR), z.dtype), (*z.shape, LEVELS))


def tilted(z, n):
    """Wrong logits that depend on everything."""
    return independent(z, n) + jnp.sin(z[..., ::-1, None] + 0.3 * n[..., None, None]) * jnp.arange(LEVELS)


def categorical(logits=independent, kernel=None, **kwargs):
    head = probdiff.networks.CategoricalHead(logits, LEVELS)
    return probdiff.Diffusion(SCHEDULE, head, probdiff.DiscretizedNormalLikelihood(LEVELS), dim=2, kernel=kernel, **kwargs)


def mixture(logits=independent):
    return categorical(logits, probdiff.chain.MixtureKernel(LEVELS))


@pytest.mark.parametrize("n", [1, 3, N])
def test_a_head_gives_back_the_noise(n, float64):
    z, steps = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2))), jnp.full(4, n)
    eps_hat = ORACLE.network(SCHEDULE, 0.9)(z, steps)
    signal, noise = np.sqrt(SCHEDULE.alpha_bar[n - 1]), np.sqrt(1 - SCHEDULE.alpha_bar[n - 1])
    x0_hat = (z - noise * eps_hat) / signal
    outputs = {
        probdiff.networks.X0Head: x0_hat,
        probdiff.networks.VHead: signal * eps_hat - noise * x0_hat,
        probdiff.networks.DensityHead: eps_hat / (1 - SCHEDULE.alpha_bar[n - 1]) ** 0.25,
    }
    for head, output in outputs.items():
        diffusion = probdiff.Diffusion(SCHEDULE, head(lambda z, n, output=output: output))
        np.testing.assert_allclose(diffusion.predict_noise(z, n), eps_hat, rtol=1e-9, atol=1e-12, err_msg=head.__name__)


@pytest.mark.parametrize("n", [1, 3, N])
def test_the_categorical_head_is_the_score_of_the_mixture(n, float64):
    """−√(1−ᾱ) ∇ log q(z_n), with q(z_n) added up over all data."""
    signal, variance = np.sqrt(SCHEDULE.alpha_bar[n - 1]), 1 - SCHEDULE.alpha_bar[n - 1]

    def log_q(z):
        terms = [
            np.log(PRIOR[0, i] * PRIOR[1, j]) - jnp.square(z - signal * GRID[np.array([i, j])]).sum() / (2 * variance)
            for i, j in itertools.product(range(LEVELS), repeat=2)
        ]
        return jax.nn.logsumexp(jnp.stack(terms))

    z = jnp.asarray(np.random.default_rng(n).normal(size=(6, 2)))
    expected = -np.sqrt(variance) * jax.vmap(jax.grad(log_q))(z)
    np.testing.assert_allclose(categorical().predict_noise(z, n), expected, rtol=1e-9, atol=1e-10)


HEADS = [probdiff.networks.X0Head, probdiff.networks.VHead, probdiff.networks.DensityHead, probdiff.networks.CategoricalHead]


@pytest.mark.release
@pytest.mark.parametrize("head", release_but(HEADS[2:], HEADS))
def test_a_head_is_trained(head):
    outputs = LEVELS if head is probdiff.networks.CategoricalHead else None
    network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1, dropout=0.5, outputs=outputs)
    head = head(network, LEVELS) if outputs else head(network)
    diffusion = probdiff.Diffusion(SCHEDULE, head, probdiff.DiscretizedNormalLikelihood(LEVELS))
    assert diffusion.dim == 2 and not diffusion.is_told_step
    result = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), Trace_ELBO()).run(jax.random.key(0), 150, X, progress_bar=False)
    assert result.losses[-20:].mean() < 0.9 * result.losses[:5].mean()
    fitted = diffusion.bind(result.params)
    z = jnp.ones((3, 2))
    np.testing.assert_array_equal(fitted.predict(z, 2), fitted.predict(z, 2))
    assert not np.array_equal(fitted.predict(z, 2, jax.random.key(0)), fitted.predict(z, 2))


def predicted(logits=tilted):
    """A variance for each datum and dimension, on the same grid."""
    head = probdiff.networks.VarianceHead(lambda z, n: jnp.stack([0.6 * z, jnp.sin(2 * z[..., ::-1] + n[..., None])], -1))
    return probdiff.Diffusion(SCHEDULE, head, probdiff.DiscretizedNormalLikelihood(LEVELS), dim=2, reverse_variance="predicted")


WAYS = {"paths": ("guide", Trace_ELBO()), "after Bayes": ("posterior_guide", Trace_ELBO()), "mean field": ("posterior_guide", TraceMeanField_ELBO())}


@pytest.mark.parametrize("make", long_but([categorical, mixture], [categorical, mixture, predicted]))
def test_two_ways(make, float64):
    """Trace_ELBO's paths against the analytic terms (sampled ones, with the mixture kernel), on a wrong network."""
    diffusion = make(tilted).bind({})

    def draw(key):
        return jnp.stack([-elbo.loss(key, {}, diffusion.model, getattr(diffusion, guide), X) for guide, elbo in WAYS.values()])

    paths = np.asarray(jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=1000))(jax.random.split(jax.random.key(0), 30_000)))
    terms = probdiff.elbo_terms(diffusion, X, key=jax.random.key(1), num_draws=30_000)
    assert terms.closed_form == (make is not mixture)
    assert_mean(paths - np.asarray(terms.elbo).sum(1)[:, None], 0.0, power=1.0)


@pytest.mark.long
def test_analytic_elbo_with_the_mixture_kernel(float64):
    diffusion = mixture(tilted)
    expected = np.asarray(probdiff.elbo_terms(diffusion, X, key=jax.random.key(1), num_draws=100_000).elbo)
    for steps in ("all", "stratified_importance"):
        elbo = probdiff.AnalyticELBO(diffusion, steps)
        draw = jax.jit(lambda keys, elbo=elbo: jax.lax.map(lambda key: elbo.per_datum(key, X), keys, batch_size=1000))
        found = np.asarray(draw(jax.random.split(jax.random.key(2), 26_000)))
        error = np.hypot(found.std(0) / np.sqrt(len(found)), expected.std(0) / np.sqrt(len(expected)))
        assert np.all(9.7 * error < 0.5)
        assert np.all(np.abs(found.mean(0) - expected.mean(0)) <= 4.9 * error)


@pytest.mark.long
@pytest.mark.parametrize("n", [2, N])
def test_mixture_density_by_enumeration(n, float64):
    diffusion, rng = mixture(tilted), np.random.default_rng(n)
    z, previous = jnp.asarray(rng.normal(size=(3, 2))), rng.normal(size=(3, 2))
    log_p = np.asarray(diffusion.predict(z, n))
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-12)
    density = 0
    for level in range(LEVELS):
        q = probdiff.forward_posterior(SCHEDULE, z, jnp.full((3, 2), GRID[level]), n)
        density += np.exp(log_p[..., level]) * scipy.stats.norm.pdf(previous, q.mean, np.sqrt(q.variance))
    np.testing.assert_allclose(diffusion.reverse_kernel(z, n).log_prob(previous), np.log(density).sum(-1), rtol=1e-10)


@pytest.mark.long
def test_the_mixture_kernel_is_exact_for_independent_dimensions(float64):
    """Then log p(x, z) − log q(z | x) = log p(x) + log N(z_N; 0, I) − log q(z_N) on every path, however few the steps."""
    diffusion = mixture()
    paths = Predictive(diffusion.posterior_guide, num_samples=5)(jax.random.key(0), X)["z"]
    log_prior = np.log(PRIOR)[np.arange(2), X].sum(1)
    variance = SCHEDULE.one_minus_alpha_bar[-1]

    @jax.jit
    def log_ratio(path):
        programs = diffusion.model, diffusion.posterior_guide
        log_p, log_q = (log_density(program, (X,), {}, {"z": path})[0] for program in programs)
        return log_p - log_q

    for path in paths:
        last = np.asarray(path[0])
        marginal = np.zeros((len(X), 2))
        for dim in range(2):
            parts = PRIOR[dim] * scipy.stats.norm.pdf(last[:, dim, None], SCHEDULE.signal_scale[-1] * GRID, np.sqrt(variance))
            marginal[:, dim] = np.log(parts.sum(1))
        expected = (log_prior + scipy.stats.norm.logpdf(last).sum(1) - marginal.sum(1)).sum()
        np.testing.assert_allclose(log_ratio(path), expected, rtol=1e-9)


@pytest.mark.long
def test_the_sampled_kl_has_the_mean_of_the_integral(float64):
    diffusion, n = mixture(tilted), 3
    x0, z = jnp.asarray([[GRID[1], GRID[2]]]), jnp.asarray([[0.4, -0.1]])
    log_p = diffusion.predict(z, n)
    q, p = probdiff.forward_posterior(SCHEDULE, z, x0, n), diffusion.reverse_kernel(z, n)
    mean, deviation = np.asarray(q.mean)[0], float(np.sqrt(q.variance[0, 0]))
    grid = np.linspace(-9, 9, 2001)
    expected = 0.0
    for dim in range(2):
        density = scipy.stats.norm.pdf(grid)
        value = np.zeros((2001, 2))
        value[:, dim] = mean[dim] + deviation * grid
        log_mix = np.asarray(p.base_dist.log_prob(value))[:, dim]
        expected += scipy.integrate.simpson(density * (scipy.stats.norm.logpdf(value[:, dim], mean[dim], deviation) - log_mix), x=grid)
    xi = jax.random.normal(jax.random.key(0), (200_000, 1, 2))
    step = SampledStep(None, x0, jnp.asarray(n), z, None, log_p, None)
    draws = jax.vmap(lambda xi: diffusion.kernel.excess(SCHEDULE, step._replace(extra_noise=lambda: xi)))(xi)
    assert_mean(draws[:, 0], expected, power=0.05)


@pytest.mark.long
def test_mixture_samples_are_levels():
    drawn = Predictive(mixture().model, num_samples=1)(jax.random.key(0), None, num_data=20_000)["x"][0]
    counts = np.stack([np.bincount(np.asarray(drawn[:, i]), minlength=LEVELS) for i in range(2)])
    # (The chain starts from N(0, I) for q(z_N): a difference of well below 0.02 here.)
    assert np.abs(counts / 20_000 - PRIOR).max() < 0.03
    ancestral = probdiff.samplers.ancestral(mixture(), key=jax.random.key(1), num_samples=100)
    assert ancestral.shape == (100, 2) and set(np.unique(ancestral)) <= set(range(LEVELS))


@pytest.mark.long
def test_mixture_terms_do_not_depend_on_the_chunks():
    one = probdiff.elbo_terms(mixture(tilted), X, key=jax.random.key(0), num_draws=3)
    moments = probdiff.elbo_terms(mixture(tilted), X, key=jax.random.key(0), num_draws=3, reduce=True)
    np.testing.assert_allclose(moments.step_kl.mean, one.step_kl.mean(0), rtol=1e-4, atol=1e-6)
    tree = probdiff.to_datatree(one)
    assert "sampled" in tree["posterior"]["step_kl"].attrs["long_name"]


@pytest.mark.release
def test_conv_net(tmp_path):
    network = probdiff.networks.ConvNet((3, 4), key=jax.random.key(0), channels=6, num_blocks=1, dropout=0.5, outputs=5)
    diffusion = probdiff.Diffusion(SCHEDULE, probdiff.networks.CategoricalHead(network, 5), probdiff.DiscretizedNormalLikelihood(5))
    x = np.tile(np.random.default_rng(0).integers(0, 5, (2, 12)), (16, 1))
    fit = probdiff.fit(diffusion, x, iterations=60, batch_size=16, learning_rate=2e-2, progress=False)
    assert fit.losses[-10:].mean() < 0.8 * fit.losses[:5].mean()
    run = probdiff.storage.create_run(tmp_path / "run", diffusion)
    run.save(fit=fit)
    back = probdiff.open_run(run.path).diffusion
    z = jax.random.normal(jax.random.key(1), (2, 7, 12))
    np.testing.assert_array_equal(back.predict_noise(z, 3), fit.diffusion.predict_noise(z, 3))
    # Many images are taken in parts.
    many, n = jax.random.normal(jax.random.key(3), (3, 100, 12)), 1 + jnp.arange(300).reshape(3, 100) % N
    predict = jax.jit(lambda z, n: back.predict_noise(z, n))
    few = [[predict(many[i, j : j + 50], n[i, j : j + 50]) for j in (0, 50)] for i in range(3)]
    np.testing.assert_allclose(predict(many, n), np.array(few).reshape(3, 100, 12), rtol=1e-4, atol=1e-5)
    # One convolution reaches the neighbours, the whole network two blocks of two: nothing is mixed up between pixels.
    first = probdiff.networks.ConvNet((3, 9), key=jax.random.key(0), channels=6, num_blocks=1)
    first = jax.tree.map(lambda leaf: leaf + 0.1 if isinstance(leaf, jax.Array) else leaf, first)
    moved = jax.jacobian(lambda z: first(z, jnp.ones(())))(jax.random.normal(jax.random.key(2), (27,)))
    reach = np.abs(np.asarray(moved)).reshape(3, 9, 3, 9).max((0, 2)) > 1e-9
    near = np.abs(np.arange(9)[:, None] - np.arange(9)) <= 3
    np.testing.assert_array_equal(reach, near)


@pytest.mark.release
def test_a_run_with_a_mixture_kernel_comes_back(tmp_path):
    network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1, outputs=LEVELS)
    head = probdiff.networks.CategoricalHead(network, LEVELS)
    diffusion = probdiff.Diffusion(SCHEDULE, head, probdiff.DiscretizedNormalLikelihood(LEVELS), kernel=probdiff.chain.MixtureKernel(LEVELS))
    fit = probdiff.fit(diffusion, X, iterations=5, batch_size=4, progress=False)
    run = probdiff.storage.create_run(tmp_path / "run", diffusion)
    run.save(fit=fit)
    terms, back = (probdiff.elbo_terms(d, X, key=jax.random.key(0)) for d in (fit.diffusion, probdiff.open_run(run.path).diffusion))
    np.testing.assert_array_equal(terms.elbo, back.elbo)
