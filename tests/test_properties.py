"""Properties that hold for any schedule, size and data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import probdiff
from probdiff.elbo.importance import log_mean_exp
from probdiff.oracles import LinearNetwork, exact_log_prob, exact_terms
from probdiff.storage import files as storage
from probdiff.storage.checkpoint import load_tree, save_tree


def lists_of(elements, **keywords):
    """Lists of one of a few lengths: of each, something is compiled."""
    return st.sampled_from([1, 2, 5, 64]).flatmap(lambda size: st.lists(elements, min_size=size, max_size=size, **keywords))


betas = lists_of(st.floats(1e-6, 0.999))
seeds = st.integers(0, 2**32 - 1)


def linear_case(beta, dim, seed, reverse_variance):
    rng = np.random.default_rng(seed)
    schedule = probdiff.NoiseSchedule.from_betas(beta)
    # Less in each of many steps, or the covariance of the chain is nearly singular, and its closed form all rounding.
    weight = rng.normal(0, 0.5 / max(1, len(beta) / 5), (len(beta), dim, dim))
    network = LinearNetwork(weight, rng.normal(0, 0.5, (len(beta), dim)))
    return probdiff.Diffusion(schedule, network, reverse_variance=reverse_variance), rng.normal(0, 2, (3, dim))


@pytest.mark.long
@settings(max_examples=8)
@given(betas, st.integers(1, 8), seeds, st.sampled_from(["posterior", "forward"]))
def test_bound_and_terms(beta, dim, seed, reverse_variance):
    """Any linear network: no NaN, every KL at least 0, and the bound below log p(x)."""
    diffusion, x = linear_case(beta, dim, seed, reverse_variance)
    exact = exact_terms(diffusion, x)
    assert all(np.all(np.isfinite(value)) for value in exact.values())
    assert np.all(exact["prior_kl"] >= -1e-12) and np.all(exact["step_kl"] >= -1e-12)
    log_prob = exact_log_prob(diffusion, x)
    assert np.all(exact["elbo"] <= log_prob + 1e-9 * np.maximum(1, np.abs(exact["elbo"])))
    with jax.enable_x64(True):
        terms = probdiff.elbo_terms(diffusion, x, key=jax.random.key(seed))
        assert np.all(np.isfinite(terms.elbo)) and np.all(terms.step_kl >= -1e-12)
        np.testing.assert_allclose(terms.prior_kl, exact["prior_kl"], rtol=1e-9, atol=1e-12)


@pytest.mark.long
@settings(max_examples=6)
@given(st.integers(1, 12), st.integers(1, 5), seeds)
def test_terms_follow_a_permutation_of_the_data(num_steps, dim, seed):
    rng = np.random.default_rng(seed)
    diffusion, _ = linear_case(rng.uniform(0.01, 0.9, num_steps), dim, seed, "forward")
    x, noise = rng.normal(size=(6, dim)), rng.normal(size=(2, num_steps, 6, dim))
    order = rng.permutation(6)
    with jax.enable_x64(True):
        straight = probdiff.elbo_terms(diffusion, x, noise=noise)
        permuted = probdiff.elbo_terms(diffusion, x[order], noise=noise[:, :, order])
    for name in ("prior_kl", "step_kl", "reconstruction", "elbo"):
        np.testing.assert_allclose(getattr(permuted, name), getattr(straight, name)[..., order], rtol=1e-9)


@pytest.mark.long
@settings(max_examples=100)
@given(betas)
def test_schedules(beta):
    schedule = probdiff.NoiseSchedule.from_betas(beta)
    n = np.arange(1, len(beta) + 1)
    assert np.all(np.diff(schedule.log_snr) < 0) and np.all(schedule.posterior_variance <= schedule.beta)
    assert np.all((schedule.one_minus_alpha_bar > 0) & (schedule.one_minus_alpha_bar <= 1))
    with jax.enable_x64(True):
        marginal = probdiff.forward_marginal(schedule, jnp.ones((len(beta), 1)), n)
        np.testing.assert_allclose(marginal.mean[:, 0] ** 2 + marginal.variance[:, 0], 1, rtol=1e-12)


@pytest.mark.long
@settings(max_examples=100)
@given(lists_of(st.floats(-9, 9), unique_by=lambda log: round(log, 4)))
def test_sigmas(log_sigmas):
    """A schedule of sigmas has those, and the score of the noising is minus the noise over them, in both coordinates."""
    sigmas = np.exp(sorted(log_sigmas))
    schedule = probdiff.NoiseSchedule.from_sigmas(sigmas)
    np.testing.assert_allclose(schedule.sigma, sigmas, rtol=1e-8)
    # Of β near 1 the table of α is as exact as float64 allows: relative to α, by half a unit in the last place of 1.
    rounding = np.cumsum(2e-16 / schedule.alpha)
    assert np.all(np.abs(schedule.alpha_bar * (1 + sigmas**2) - 1) <= 1e-12 + rounding)
    n = np.arange(1, len(sigmas) + 1)
    with jax.enable_x64(True):
        x_n = sigmas[:, None] * np.array([1.0, -2.0])
        score = probdiff.chain.score.conditional_score(schedule, x_n, np.zeros_like(x_n), n)
        np.testing.assert_allclose(score * sigmas[:, None], [[-1.0, 2.0]] * len(n), rtol=1e-8)
        in_vp = probdiff.chain.score.vp_conditional_score(schedule, probdiff.chain.score.vp_from_ve(schedule, x_n, n), np.zeros_like(x_n), n)
        np.testing.assert_allclose(in_vp * np.sqrt(schedule.alpha_bar)[:, None], score, rtol=1e-8)


@pytest.mark.long
@settings(max_examples=100)
@given(st.lists(arrays.arrays(
    st.sampled_from([np.float32, np.float64, np.int32, np.uint8, np.bool_]), arrays.array_shapes(min_dims=0, min_side=0)
), max_size=4), st.integers(0, 2**32), st.integers(0, 7))  # fmt: skip
def test_arrays_come_back_from_a_file_or_not_at_all(tmp_path_factory, contents, place, bit):
    path = tmp_path_factory.getbasetemp() / "arrays.eqx"
    save_tree(path, contents, words="a few")
    back, about = load_tree(path, contents)
    assert about == {"words": "a few"}
    for found, value in zip(back, contents, strict=True):
        assert found.dtype == value.dtype and np.array_equal(found, value, equal_nan=value.dtype.kind == "f")
    spoiled = bytearray(path.read_bytes())
    spoiled[place % len(spoiled)] ^= 1 << bit
    path.write_bytes(spoiled)
    assert not storage.is_intact(path)


@pytest.mark.long
@settings(max_examples=100)
@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 20), st.integers(1, 3)), elements=st.floats(-1e4, 1e4)))
def test_importance_weighted_bounds_lie_between_mean_and_maximum(log_weights):
    bound = log_mean_exp(log_weights, 0)
    margin = 1e-9 * (1 + np.abs(log_weights).max(0))
    assert np.all(log_weights.mean(0) <= bound + margin) and np.all(bound <= log_weights.max(0) + margin)


@pytest.mark.long
@settings(max_examples=25)
@given(st.sampled_from([2, 3, 17, 256]), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), seeds)
def test_discretised_probabilities(levels, loc, scale, seed):
    likelihood = probdiff.DiscretizedNormalLikelihood(levels)
    loc, scale = jnp.float32(loc), jnp.float32(scale)
    log_p = likelihood(loc[None], scale[None]).log_prob(jnp.arange(levels)[:, None])
    assert np.all(np.isfinite(log_p)) and np.all(log_p <= 1e-6)
    np.testing.assert_allclose(np.exp(np.asarray(log_p, np.float64)).sum(), 1, atol=1e-4)
