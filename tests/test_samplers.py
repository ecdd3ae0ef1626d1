"""Samplers: two-sample tests against a mixture with the exact ε-network, formulas against the reverse kernel, what is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import long_but, release_but

import probdiff
from probdiff import samplers as sampling
from probdiff.oracles import GaussianMixture

WEIGHTS = np.array([0.5, 0.2, 0.3])
MEANS = np.array([[1.0, 0.5], [-1.2, 0.3], [0.2, -1.5]])
COVARIANCES = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.05, -0.02], [-0.02, 0.4]], [[0.5, 0.45], [0.45, 0.6]]])
ORACLE = GaussianMixture(WEIGHTS, MEANS, COVARIANCES)
SCHEDULE = probdiff.log_snr_schedule(100, 8.0, -6.0)
DATA = ORACLE.sample(np.random.default_rng(0), 100_000)
ANGLES = np.pi * np.arange(8) / 8
KEY = jax.random.key(1)


def diffusion_with(schedule, likelihood=None):
    """A model on ``schedule`` whose network is exact at every noise level."""
    return probdiff.Diffusion(schedule, ORACLE.network(schedule), likelihood, "forward")


def by_step(schedule):
    """A model on ``schedule`` whose network is told the step, and is exact on SCHEDULE."""
    return probdiff.Diffusion(schedule, diffusion_with(SCHEDULE).predict_noise, reverse_variance="forward", dim=2)


def check_samples(samples):
    """Two-sample Kolmogorov-Smirnov tests of projections on eight directions; a true set fails one time in 10^6."""
    assert samples.shape == (10_000, 2) and np.isfinite(samples).all()
    directions = np.stack([np.cos(ANGLES), np.sin(ANGLES)])
    pairs = zip((samples @ directions).T, (DATA @ directions).T)
    assert min(scipy.stats.ks_2samp(a, b).pvalue for a, b in pairs) > 1e-6 / len(ANGLES)


SETTINGS = {
    "ancestral": ("ancestral", {}),
    "ddim": ("ddim", {}),
    "ddim, η = 1": ("ddim", {"eta": 1.0}),
    "ddim, η = 0.5, chosen steps": ("ddim", {"eta": 0.5, "steps": [*range(1, 100, 2), 100]}),
    "langevin": ("langevin", {}),
    "ode": ("ode", {}),
    "ode, 20 steps": ("ode", {"steps": 20}),
}
FEW = ["ancestral", "ddim, η = 0.5, chosen steps", "langevin", "ode"]


@pytest.mark.parametrize("setting", long_but(FEW, SETTINGS))
def test_samples_are_distributed_as_the_data(setting):
    name, options = SETTINGS[setting]
    check_samples(sampling.SAMPLERS[name](diffusion_with(SCHEDULE), key=KEY, num_samples=10_000, **options))


@pytest.mark.long
@pytest.mark.parametrize("setting", release_but(["ancestral"], SETTINGS))
def test_a_wrong_sigma_is_found(setting):
    name, options = SETTINGS[setting]
    wrong = by_step(probdiff.NoiseSchedule.from_sigmas(0.75 * SCHEDULE.sigma))
    samples = sampling.SAMPLERS[name](wrong, key=KEY, num_samples=10_000, **options)
    with pytest.raises(AssertionError):
        check_samples(samples)


def test_every_sampler_is_tested():
    assert {SETTINGS[setting][0] for setting in FEW} == set(sampling.SAMPLERS)


def test_ddim_at_eta_1_is_the_reverse_chain():
    """With all steps, what multiplies z and ε̂ is the mean of the reverse kernel, and s² = β̃_n (0 at n = 1)."""
    per_z, per_eps, added = sampling._ddim_coefficients(SCHEDULE, np.arange(1, 101), 1.0)
    np.testing.assert_allclose(per_z, 1 / np.sqrt(SCHEDULE.alpha), rtol=1e-10)
    mean = -SCHEDULE.beta / np.sqrt(SCHEDULE.alpha * SCHEDULE.one_minus_alpha_bar)
    np.testing.assert_allclose(per_eps, mean, rtol=1e-9)
    np.testing.assert_allclose(added**2, SCHEDULE.posterior_variance, rtol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_keeps_the_marginals_given_x_0(eta):
    """Song et al., eq. 12 and lemma 1: from N(√ᾱ_n x_0, 1−ᾱ_n) with ε̂ = ε to N(√ᾱ_m x_0, 1−ᾱ_m)."""
    taken = np.array([2, 7, 40, 99])
    per_z, per_eps, added = sampling._ddim_coefficients(SCHEDULE, taken, eta)
    signal, noise = np.sqrt(SCHEDULE.alpha_bar[taken - 1]), np.sqrt(SCHEDULE.one_minus_alpha_bar[taken - 1])
    before = np.concatenate([[1.0], signal[:-1]])
    np.testing.assert_allclose(per_z * signal, before, rtol=1e-12)
    np.testing.assert_allclose((per_z * noise + per_eps) ** 2 + added**2, 1 - before**2, atol=1e-12)
    expected = eta * np.sqrt((1 - before**2) / noise**2) * np.sqrt(1 - signal**2 / before**2)
    np.testing.assert_allclose(added, expected, rtol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("name", long_but(["ancestral", "langevin"], sampling.SAMPLERS))
def test_a_sample_depends_on_the_key_and_its_number_alone(name, constant, float64):
    draw, diffusion = sampling.SAMPLERS[name], diffusion_with(probdiff.log_snr_schedule(5, 4.0, -4.0))
    few = draw(diffusion, key=KEY, num_samples=3)
    constant("EVALUATIONS", 1)  # batches of 64
    many = draw(diffusion, key=KEY, num_samples=70)
    assert many.shape == (70, 2) and len(np.unique(many[:, 0])) == 70
    np.testing.assert_allclose(many[:3], few, rtol=1e-4, atol=1e-5)
    assert np.abs(draw(diffusion, key=jax.random.key(2), num_samples=3) - few).min() > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("name", release_but(["ancestral", "ode"], sampling.SAMPLERS))
def test_samples_are_in_the_units_of_the_data(name):
    """Levels for data on a grid; for continuous data, those of the chain times the scale plus the shift."""
    schedule = probdiff.log_snr_schedule(4, 4.0, -4.0)
    draw, options = sampling.SAMPLERS[name], {"key": KEY, "num_samples": 4}
    grid = draw(diffusion_with(schedule, probdiff.DiscretizedNormalLikelihood(5)), **options)
    assert np.issubdtype(grid.dtype, np.integer) and grid.min() >= 0 and grid.max() <= 4
    plain = draw(diffusion_with(schedule), **options)
    scaled = draw(diffusion_with(schedule, probdiff.NormalLikelihood([7.0, -7.0], [2.0, 3.0])), **options)
    np.testing.assert_allclose(scaled, plain * [2, 3] + [7, -7], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_one_step(name):
    one = diffusion_with(probdiff.log_snr_schedule(1, log_snr_min=-1.0))
    assert np.isfinite(sampling.SAMPLERS[name](one, key=KEY, num_samples=2)).all()


def test_a_number_of_steps_is_spread_evenly_and_ends_at_both_ends():
    diffusion = diffusion_with(SCHEDULE)
    np.testing.assert_array_equal(sampling._subsequence(diffusion, 4), [1, 34, 67, 100])
    np.testing.assert_array_equal(sampling._subsequence(diffusion, 1), [100])
    np.testing.assert_array_equal(sampling._subsequence(diffusion, 100), np.arange(1, 101))
    np.testing.assert_array_equal(sampling._subsequence(diffusion, [3, 50]), [3, 50])


def test_other_steps_of_one_number_compile_nothing_new():
    diffusion, compiled = diffusion_with(SCHEDULE), []

    def network(z, n):
        compiled.append(1)
        return jnp.zeros_like(z)

    diffusion = probdiff.Diffusion(SCHEDULE, network, dim=2)
    for steps in ([1, 5, 9], [2, 50, 100]):
        sampling.ddim(diffusion, key=KEY, num_samples=2, steps=steps)
    assert len(compiled) == 1


@pytest.mark.long
def test_ddim_of_a_learned_schedule_has_the_coefficients_of_its_values():
    """Those of the schedule that is evaluated, to the last bit: in single precision the noise would be off by some percent."""
    learned = probdiff.LearnedSchedule(100, 12.0, -6.0)
    network = ORACLE.network(learned.fixed())
    options = {"key": KEY, "num_samples": 5, "eta": 1.0}
    samples = [probdiff.samplers.ddim(probdiff.Diffusion(s, network), **options) for s in (learned, learned.fixed())]
    np.testing.assert_array_equal(*samples)
