"""The analytic bound: its draws, chunks, precision, objective, and what it refuses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

import probdiff
from probdiff import elbo as elbo_module


def make(num_steps=6, dim=2, **kwargs):
    network = probdiff.MLP(dim, key=jax.random.key(0), hidden=16, num_blocks=1)
    network = eqx.tree_at(lambda m: m.write.weight, network, jnp.full((dim, 16), 0.05))
    return probdiff.Diffusion(probdiff.log_snr_schedule(num_steps, 5.0, -4.0), network, **kwargs)


X = jax.random.normal(jax.random.key(1), (7, 2))


@pytest.mark.parametrize("num_steps", [1, 2, 6, 10_000])
def test_shapes_at_any_length(num_steps):
    terms = probdiff.elbo_terms(make(num_steps), {}, X, key=jax.random.key(0), num_draws=3)
    assert terms.prior_kl.shape == (7,) and terms.step_kl.shape == (3, num_steps - 1, 7)
    assert terms.reconstruction.shape == terms.elbo.shape == (3, 7)
    assert np.all(np.isfinite(terms.elbo)) and np.all(terms.step_kl >= 0)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_chunks_change_nothing(rows, num_steps, monkeypatch):
    diffusion = make(num_steps)

    def results():
        fresh = probdiff.Diffusion(diffusion.schedule, lambda z, n: diffusion.network(z, n))  # compiled anew
        terms = probdiff.elbo_terms(fresh, {}, X, key=jax.random.key(0), num_draws=5)
        objective = probdiff.AnalyticELBO(diffusion)
        params = {"diffusion$params": diffusion.trainable()}
        loss = jax.value_and_grad(lambda p: objective.loss(jax.random.key(3), p, diffusion.model, diffusion.guide, X))
        return terms, loss(params)

    expected = results()
    monkeypatch.setattr(elbo_module, "ROWS", rows)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(results())):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_noise_is_at_the_documented_place(float64):
    """Noise given by the user: step n of draw s sees sqrt(alpha_bar_n) x0 + sqrt(1 - alpha_bar_n) noise[s, n - 1]."""
    schedule = probdiff.cosine_schedule(4)
    diffusion = probdiff.Diffusion(schedule, lambda z, n: 0.3 * z * n[..., None])
    x, noise = np.asarray(X, np.float64), np.asarray(jax.random.normal(jax.random.key(5), (3, 4, 7, 2)))
    terms = probdiff.elbo_terms(diffusion, {}, x, noise=noise)
    for n in range(1, 5):
        z = np.sqrt(schedule.alpha_bar[n - 1]) * x + np.sqrt(schedule.one_minus_alpha_bar[n - 1]) * noise[:, n - 1]
        if n == 1:
            np.testing.assert_allclose(terms.reconstruction, diffusion.reverse_kernel(z, 1).log_prob(x), rtol=1e-9)
        else:
            posterior = probdiff.forward_posterior(schedule, z, x, n)
            kl = numpyro.distributions.kl_divergence(posterior, diffusion.reverse_kernel(z, n))
            np.testing.assert_allclose(terms.step_kl[:, n - 2], kl, rtol=1e-9)


def test_same_key_is_common_noise_whatever_the_draws_and_blocks():
    few = probdiff.elbo_terms(make(), {}, X, key=jax.random.key(0), num_draws=2)
    many = probdiff.elbo_terms(make(), {}, X, key=jax.random.key(0), num_draws=9)
    np.testing.assert_allclose(few.step_kl, many.step_kl[:2], rtol=1e-5)
    assert len(np.unique(np.asarray(many.reconstruction))) == many.reconstruction.size


@pytest.mark.parametrize("num_steps", [1, 6])
def test_reduced_form_is_the_moments_of_the_full_one(num_steps, float64):
    arguments = make(num_steps), {}, jnp.asarray(X, jnp.float64)
    full = probdiff.elbo_terms(*arguments, key=jax.random.key(0), num_draws=11)
    reduced = probdiff.elbo_terms(*arguments, key=jax.random.key(0), num_draws=11, reduce=True)
    np.testing.assert_allclose(reduced.prior_kl, full.prior_kl, rtol=1e-12)
    for name in ("step_kl", "reconstruction", "elbo"):
        np.testing.assert_allclose(getattr(reduced, name).mean, getattr(full, name).mean(0), rtol=1e-10)
        np.testing.assert_allclose(getattr(reduced, name).variance, getattr(full, name).var(0, ddof=1), rtol=1e-8)


def test_working_memory_does_not_grow_with_steps_or_draws():
    def working_memory(num_steps, num_draws):
        diffusion = make(num_steps).bind({})
        static = eqx.filter_jit(elbo_module._evaluate.__wrapped__)
        compiled = static.lower(diffusion, X, jax.random.key(0), jnp.arange(num_draws), None).compile()
        return compiled.compiled.memory_analysis().temp_size_in_bytes

    base = working_memory(1000, 10)
    assert working_memory(10_000, 10) <= 1.15 * base and working_memory(1000, 100) <= 1.15 * base


def test_working_memory_of_an_update_does_not_grow_with_steps():
    def working_memory(num_steps):
        diffusion = make(num_steps)
        svi = SVI(diffusion.model, diffusion.guide, optax.sgd(1e-3), probdiff.AnalyticELBO(diffusion))
        compiled = jax.jit(svi.update).lower(svi.init(jax.random.key(0), X), X).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert working_memory(10_000) <= 1.2 * working_memory(2_000)


@pytest.mark.parametrize("schedule", [probdiff.cosine_schedule, probdiff.linear_schedule, probdiff.log_snr_schedule])
@pytest.mark.parametrize("num_steps, gate", [(100, 5e-4), (1000, 3e-3), (10_000, 1.5e-2)])
def test_float32_against_float64(schedule, num_steps, gate):
    """The same noise in both precisions, d = 64, each step's KL paired with its own: the sum of the differences."""
    noise = np.random.default_rng(0).standard_normal((1, num_steps, 1, 64))
    x = np.random.default_rng(1).standard_normal((1, 64))
    results = {}
    for dtype, x64 in ((np.float32, False), (np.float64, True)):
        with jax.enable_x64(x64):
            diffusion = probdiff.Diffusion(schedule(num_steps), lambda z, n: 0.95 * z)
            results[dtype] = probdiff.elbo_terms(diffusion, {}, x.astype(dtype), noise=noise.astype(dtype))
            assert results[dtype].step_kl.dtype == dtype
    low, high = (np.asarray(results[dtype].step_kl, np.float64) for dtype in results)
    assert np.abs(low - high).sum() < gate


@pytest.mark.parametrize("steps", ["all", "uniform", "stratified"])
def test_num_particles_averages_independent_estimates(steps):
    diffusion = make()
    one, many = (probdiff.AnalyticELBO(diffusion, steps=steps, num_particles=k) for k in (1, 50))
    keys = jax.random.split(jax.random.key(0), 400)

    def variance(objective):
        losses = jax.jit(jax.vmap(lambda k: objective.loss(k, {}, diffusion.model, diffusion.guide, X)))(keys)
        return losses.var()

    assert 35 < variance(one) / variance(many) < 70


def test_one_step_estimators_enumerated(float64):
    """Over every n with its probability 1/N, on fixed noise, the estimator's own output is the all-steps value."""
    diffusion = make(5)
    x = jnp.asarray(X[:1], jnp.float64)
    noise = jax.random.normal(jax.random.key(2), (1, 5, 1, 2))

    def forced(n):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "normal", lambda key, shape, dtype: noise[0, n - 1])
            key = jax.random.key(0)
            terms = elbo_module.one_step(lambda key, size, num_steps: jnp.full(size, n), diffusion, x, x, key, None)
        return terms - elbo_module.prior_kl(diffusion.schedule, x).sum()

    total = sum(forced(n) for n in range(1, 6)) / 5
    expected = probdiff.elbo_terms(diffusion, {}, x, noise=noise).elbo.sum()
    np.testing.assert_allclose(total, expected, rtol=1e-12)


@pytest.mark.parametrize("draw", [elbo_module.uniform_n, elbo_module.stratified_n])
@pytest.mark.parametrize("size, num_steps", [(1, 1), (4, 3), (7, 10)])
def test_steps_are_uniform_at_every_place_of_the_batch(draw, size, num_steps):
    keys = jax.random.split(jax.random.key(0), 20_000)
    n = np.asarray(jax.vmap(lambda key: draw(key, size, num_steps))(keys))
    for place in range(size):
        counts = np.bincount(n[:, place], minlength=num_steps + 1)
        assert counts[0] == 0 and len(counts) == num_steps + 1
        assert num_steps == 1 or scipy.stats.chisquare(counts[1:]).pvalue > 1e-6


def test_stratified_steps_cover_the_chain_evenly():
    keys = jax.random.split(jax.random.key(0), 200)
    n = np.asarray(jax.vmap(lambda key: elbo_module.stratified_n(key, 40, 20))(keys))
    assert all(np.bincount(row, minlength=21)[1:].min() >= 1 and np.bincount(row).max() <= 3 for row in n)


def test_the_bound_is_a_program():
    diffusion = make()
    trace = handlers.trace(handlers.seed(probdiff.AnalyticELBO(diffusion).program, 0)).get_trace(X, num_data=70)
    kinds = {name: site["type"] for name, site in trace.items()}
    assert kinds.pop("elbo") == "sample" and kinds.pop("diffusion$params") == "param"
    assert kinds == {"prior_kl": "deterministic", "step_kl": "deterministic", "reconstruction": "deterministic"}
    value = {name: trace[name]["value"] for name in kinds}
    expected = value["reconstruction"] - value["step_kl"] - value["prior_kl"].sum()
    np.testing.assert_allclose(trace["elbo"]["fn"].log_prob(None), expected, rtol=1e-5)
    assert trace["elbo"]["scale"] == 10


@pytest.mark.parametrize("steps", ["importance", "everything", None, 3])
def test_steps_that_are_not_there_are_refused(steps):
    with pytest.raises(ValueError, match=r"steps: Expected one of \['all', 'uniform', 'stratified'\]; got"):
        probdiff.AnalyticELBO(make(), steps=steps)


def test_a_model_or_guide_of_another_diffusion_is_refused():
    diffusion, other = make(), make()
    objective = probdiff.AnalyticELBO(diffusion)

    def loss(model, guide):
        return objective.loss(jax.random.key(0), {}, model, guide, X)

    scaled = handlers.scale(diffusion.model, scale=0.5)
    for model, guide, message in [
        (other.model, diffusion.guide, "model: Expected diffusion.model"),
        (diffusion.model, other.guide, "guide: Expected diffusion.guide or diffusion.posterior_guide"),
        (diffusion.guide, diffusion.guide, "model: Expected"),
        (diffusion.model, diffusion.model, "guide: Expected"),
        (lambda x: diffusion.model(x), diffusion.guide, "model: Expected"),
        (handlers.mask(diffusion.model, mask=True), diffusion.guide, "no handler but handlers.scale"),
        (scaled, diffusion.guide, "the same handlers.scale"),
        (scaled, handlers.scale(diffusion.guide, scale=0.3), "the same handlers.scale"),
        (handlers.scale(diffusion.model, scale=jnp.ones(7)), diffusion.guide, "by a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(model, guide)
    assert np.isfinite(loss(scaled, handlers.scale(diffusion.posterior_guide, scale=0.5)))


def test_gradients_agree_with_trace_elbo(float64):
    """Of one global scale of the network: the three estimators have the same expected gradient."""

    class Scaled(eqx.Module):
        scale: jax.Array

        def __call__(self, z, n):
            return self.scale * z

    diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(5, 3.0, -2.0), Scaled(jnp.array(0.6)))
    x = jnp.asarray(X[:2], jnp.float64)
    objectives = [Trace_ELBO(), *(probdiff.AnalyticELBO(diffusion, steps=s) for s in ("all", "uniform", "stratified"))]
    keys = jax.random.split(jax.random.key(0), 40_000)
    means, errors = [], []
    for objective in objectives:

        def gradient(key, objective=objective):
            def loss(scale):
                params = {"diffusion$params": eqx.tree_at(lambda d: d.network.scale, diffusion.trainable(), scale)}
                return objective.loss(key, params, diffusion.model, diffusion.guide, x)

            return jax.grad(loss)(jnp.array(0.6))

        gradients = np.asarray(jax.jit(jax.vmap(gradient))(keys))
        means.append(gradients.mean())
        errors.append(gradients.std() / np.sqrt(len(keys)))
    for i in (1, 2, 3):
        assert abs(means[0] - means[i]) <= 4.9 * np.hypot(errors[0], errors[i])
    assert 9.7 * max(errors) < 0.15 * abs(means[0])


def test_discretised_data_both_ways():
    likelihood = probdiff.DiscretizedNormalLikelihood(levels=5)
    x = jnp.array([[0, 4], [2, 1], [3, 3]])
    diffusion = make(8, likelihood=likelihood)
    both = probdiff.compute_both_ways(diffusion.bind({}), x, key=jax.random.key(0), num_draws=4000)
    assert both.agree and abs(both.z) < 4.9
    assert 9.7 * both.difference[1] < 0.05 * abs(both.analytic.mean)
