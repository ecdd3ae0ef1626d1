"""The terms of the bound: their draws, chunks and precision."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from conftest import long_but, release_but

import probdiff
from probdiff._chunks import inputs_at_once
from probdiff.elbo import terms as elbo_module


def make(num_steps=6, dim=2, **kwargs):
    network = probdiff.MLP(dim, key=jax.random.key(0), hidden=16, num_blocks=1)
    network = eqx.tree_at(lambda m: m.write.weight, network, jnp.full((dim, 16), 0.05))
    return probdiff.Diffusion(probdiff.log_snr_schedule(num_steps, 5.0, -4.0), network, **kwargs)


X = jax.random.normal(jax.random.key(1), (7, 2))


@pytest.mark.long
@pytest.mark.parametrize("num_steps", long_but([1, 2], [1, 2, 6, 10_000]))
def test_shapes_at_any_length(num_steps):
    terms = probdiff.elbo_terms(make(num_steps), X, key=jax.random.key(0), num_draws=3)
    assert terms.prior_kl.shape == (7,) and terms.step_kl.shape == (3, num_steps - 1, 7)
    assert terms.reconstruction.shape == terms.elbo.shape == (3, 7)
    assert np.all(np.isfinite(terms.elbo)) and np.all(terms.step_kl >= 0)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("rows", release_but([20], [1, 20]))
@pytest.mark.parametrize("num_steps", release_but([1, 6], [1, 2, 6]))
def test_chunks_change_nothing(rows, num_steps, reduce, patched):
    diffusion = make(num_steps)

    def results():
        fresh = probdiff.Diffusion(diffusion.schedule, lambda z, n: diffusion.predict_noise(z, n))  # compiled anew
        return probdiff.elbo_terms(fresh, X, key=jax.random.key(0), num_draws=5, reduce=reduce)

    expected = results()
    patched(inputs_at_once, lambda network: rows)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(results())):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.long
def test_noise_is_at_the_documented_place(float64):
    """Noise given by the user: step n of draw s sees sqrt(alpha_bar_n) x0 + sqrt(1 - alpha_bar_n) noise[s, n - 1]."""
    schedule = probdiff.cosine_schedule(4)
    diffusion = probdiff.Diffusion(schedule, lambda z, n: 0.3 * z * n[..., None])
    x, noise = np.asarray(X, np.float64), np.asarray(jax.random.normal(jax.random.key(5), (3, 4, 7, 2)))
    terms = probdiff.elbo_terms(diffusion, x, noise=noise)
    for n in range(1, 5):
        z = np.sqrt(schedule.alpha_bar[n - 1]) * x + np.sqrt(schedule.one_minus_alpha_bar[n - 1]) * noise[:, n - 1]
        if n == 1:
            np.testing.assert_allclose(terms.reconstruction, diffusion.reverse_kernel(z, 1).log_prob(x), rtol=1e-9)
        else:
            posterior = probdiff.forward_posterior(schedule, z, x, n)
            kl = numpyro.distributions.kl_divergence(posterior, diffusion.reverse_kernel(z, n))
            np.testing.assert_allclose(terms.step_kl[:, n - 2], kl, rtol=1e-9)


@pytest.mark.long
def test_same_key_is_common_noise_whatever_the_draws_and_blocks():
    few = probdiff.elbo_terms(make(), X, key=jax.random.key(0), num_draws=2)
    many = probdiff.elbo_terms(make(), X, key=jax.random.key(0), num_draws=9)
    np.testing.assert_allclose(few.step_kl, many.step_kl[:2], rtol=1e-5)
    assert len(np.unique(np.asarray(many.reconstruction))) == many.reconstruction.size


@pytest.mark.long
@pytest.mark.parametrize("num_steps", [1, 6])
def test_reduced_form_is_the_moments_of_the_full_one(num_steps, float64):
    arguments = make(num_steps), jnp.asarray(X, jnp.float64)
    full = probdiff.elbo_terms(*arguments, key=jax.random.key(0), num_draws=11)
    reduced = probdiff.elbo_terms(*arguments, key=jax.random.key(0), num_draws=11, reduce=True)
    np.testing.assert_allclose(reduced.prior_kl, full.prior_kl, rtol=1e-12)
    for name in ("step_kl", "reconstruction", "elbo"):
        np.testing.assert_allclose(getattr(reduced, name).mean, getattr(full, name).mean(0), rtol=1e-10)
        np.testing.assert_allclose(getattr(reduced, name).variance, getattr(full, name).var(0, ddof=1), rtol=1e-8)


@pytest.mark.long
def test_working_memory_does_not_grow_with_steps_or_draws():
    def working_memory(num_steps, num_draws):
        diffusion = make(num_steps).bind({})
        static = eqx.filter_jit(elbo_module._evaluate.__wrapped__)
        compiled = static.lower(diffusion, X, jax.random.key(0), jnp.arange(num_draws), jnp.arange(2, num_steps + 1), True, None, None).compile()
        return compiled.compiled.memory_analysis().temp_size_in_bytes

    base = working_memory(1000, 10)
    assert working_memory(10_000, 10) <= 1.15 * base and working_memory(1000, 100) <= 1.15 * base


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("num_steps, largest, num_draws, calls", [(1, 1, 3, 3), (6, 7, 1, 6), (6, 20, 3, 12), (6, 50, 3, 3), (6, 100, 3, 2)])
def test_blocks_of_draws_and_of_steps_change_nothing(num_steps, largest, num_draws, calls, reduce, monkeypatch, float64):
    """One step at a time, two, a draw, two draws: between two calls Ctrl-C is heard."""
    noise = np.random.default_rng(0).normal(size=(num_draws, num_steps, *X.shape))
    of_rows = lambda z, n, context: 0.5 * z + 0.1 * context * n[..., None]  # noqa: E731
    conditional = probdiff.Diffusion(probdiff.log_snr_schedule(num_steps, 5.0, -4.0), of_rows).given(np.asarray(X, np.float64))
    asked = [(make(num_steps), {"key": jax.random.key(0), "num_draws": num_draws}), (conditional, {"noise": noise})]

    def results():
        return [jax.tree.leaves(probdiff.elbo_terms(model, X, reduce=reduce, **options)) for model, options in asked]

    expected, evaluate, counted = results(), elbo_module._evaluate, []
    monkeypatch.setattr(elbo_module, "EVALUATIONS", largest)
    monkeypatch.setattr(elbo_module, "_evaluate", lambda *given: counted.append(given) or evaluate(*given))
    for a, b in zip(sum(expected, []), sum(results(), []), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    assert len(counted) == 2 * calls


def test_a_bar_says_which_draw_and_step(monkeypatch, capfd):
    monkeypatch.setattr(elbo_module, "EVALUATIONS", 7)
    probdiff.elbo_terms(make(), X, key=jax.random.key(0), num_draws=2, progress=True)
    error = capfd.readouterr().err
    assert "draw 1 of 2" in error and "draw 2 of 2" in error and "5/5" in error


def test_the_moments_are_updated_in_place():
    terms = probdiff.elbo_terms(make(), X, key=jax.random.key(0))
    sums = elbo_module._added(terms, None, None)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(sums))
    assert elbo_module._added.lower(terms, sums, None).compile().compiled.memory_analysis().alias_size_in_bytes >= size


def test_a_program_that_contains_the_terms_does_not_grow_with_the_steps(monkeypatch):
    monkeypatch.setattr(elbo_module, "EVALUATIONS", 7)
    program = jax.make_jaxpr(lambda x: probdiff.elbo_terms(make(), x, key=jax.random.key(0), num_draws=2).elbo)(X)
    assert str(program).count("name=_evaluate") == 2  # one for each draw


@pytest.mark.long
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
            results[dtype] = probdiff.elbo_terms(diffusion, x.astype(dtype), noise=noise.astype(dtype))
            assert results[dtype].step_kl.dtype == dtype
    low, high = (np.asarray(results[dtype].step_kl, np.float64) for dtype in results)
    assert np.abs(low - high).sum() < gate


def test_discretised_data_both_ways():
    likelihood = probdiff.DiscretizedNormalLikelihood(levels=5)
    x = jnp.array([[0, 4], [2, 1], [3, 3]])
    diffusion = make(8, likelihood=likelihood)
    both = probdiff.diagnostics.compute_both_ways(diffusion.bind({}), x, key=jax.random.key(0), num_draws=4000)
    assert both.agree and abs(both.z) < 4.9
    assert 9.7 * both.difference[1] < 0.05 * abs(both.analytic.mean)


def simulated_ways(seed, shift=0.0, num_draws=8, num_data=30):
    """Both estimates of bounds that differ by 50 nats between data and by 1 (the path: 2) between draws."""
    rng = np.random.default_rng(seed)
    levels = 50 * rng.standard_normal(num_data)
    kl, reconstruction, path = rng.standard_normal((3, num_draws, num_data)) * np.array([0.6, 0.8, 2.0])[:, None, None]
    terms = probdiff.elbo.ELBOTerms(np.ones(num_data), kl[:, None], levels + shift + 1 + reconstruction)
    return probdiff.diagnostics.TwoWays(terms, levels + path)


def noise_of_the_means(*draws):
    """Standard error of the difference of two means over data, which are the same in both: the data do not matter."""
    return np.sqrt(sum((each.var(0, ddof=1) / len(each)).sum() / each.shape[1] ** 2 for each in draws))


def test_the_error_of_the_difference_is_that_of_the_mean_over_draws():
    both = simulated_ways(0)
    elbo = both.terms.reconstruction - both.terms.step_kl[:, 0] - 1
    difference, error = both.difference
    assert difference == pytest.approx(elbo.mean() - both.path.mean(), rel=1e-9)
    assert error == pytest.approx(noise_of_the_means(elbo, both.path), rel=1e-9)
    for estimate, draws in ((both.analytic, elbo), (both.trace, both.path)):
        assert estimate.monte_carlo_error == pytest.approx(noise_of_the_means(draws), rel=1e-9)
        assert estimate.error == pytest.approx(draws.mean(0).std(ddof=1) / np.sqrt(30), rel=1e-9)
    square = np.mean([simulated_ways(seed).z ** 2 for seed in range(500)])
    assert abs(square - 1) < 4.9 * np.sqrt(2 / 500)


@pytest.mark.parametrize("sign", [1, -1])
def test_two_ways_disagree_beyond_three_monte_carlo_errors_however_much_the_data_differ(sign):
    before = simulated_ways(1)
    elbo = before.terms.reconstruction - before.terms.step_kl[:, 0] - 1
    error = noise_of_the_means(elbo, before.path)
    for size, agree in ((2.9, True), (3.1, False), (30.0, False)):
        shift = sign * size * error - (elbo.mean() - before.path.mean())
        assert abs(shift) < before.path.mean(0).std() / np.sqrt(30)  # that of the population of data
        both = simulated_ways(1, shift)
        assert both.agree is agree and both.z == pytest.approx(sign * size, rel=1e-6)


@pytest.mark.parametrize("shift", [0, 1])
def test_without_any_noise_two_ways_agree_if_they_are_equal(shift):
    levels = np.arange(6.0)[None].repeat(2, 0)
    both = probdiff.diagnostics.TwoWays(probdiff.elbo.ELBOTerms(np.zeros(6), np.zeros((2, 0, 6)), levels + shift), levels)
    assert both.difference == (shift, 0) and both.agree is (shift == 0)
