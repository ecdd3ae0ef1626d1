"""Schedules in the words of other libraries and papers, against their formulas."""

import numpy as np
import pytest
from scipy.special import expit

import probdiff
from probdiff.chain.conventions import BETAS

CONFIG = {"num_train_timesteps": 50, "beta_start": 1e-3, "beta_end": 0.1}


def cosine_betas(count):
    """improved-diffusion's: a ratio of the squared cosine at the ends of each step, cut off at 0.999."""
    squared = [np.cos((i / count + 0.008) / 1.008 * np.pi / 2) ** 2 for i in range(count + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in zip(squared, squared[1:])])


EXPECTED = {
    "linear": [1e-3 + (0.1 - 1e-3) * i / 49 for i in range(50)],
    "scaled_linear": [(1e-3**0.5 + (0.1**0.5 - 1e-3**0.5) * i / 49) ** 2 for i in range(50)],
    "squaredcos_cap_v2": cosine_betas(50),
    "sigmoid": [1e-3 + (0.1 - 1e-3) * expit(-6 + 12 * i / 49) for i in range(50)],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_diffusers(name):
    assert set(EXPECTED) == set(BETAS)
    config = CONFIG | {"beta_schedule": name, "trained_betas": None, "rescale_betas_zero_snr": False}
    np.testing.assert_allclose(probdiff.chain.diffusers_schedule(config).beta, EXPECTED[name], rtol=1e-11)


def test_diffusers_scheduler_and_trained_betas():
    class Scheduler:
        config = CONFIG | {"beta_schedule": "linear"}

    assert probdiff.chain.diffusers_schedule(Scheduler()) == probdiff.chain.diffusers_schedule(Scheduler.config)
    betas = [0.1, 0.2, 0.3]
    np.testing.assert_array_equal(probdiff.chain.diffusers_schedule({"trained_betas": betas, "beta_schedule": "own"}).beta, betas)


def test_a_scheduler_whose_signal_is_not_that_of_its_betas_is_refused():
    class Scheduler:
        config = CONFIG | {"beta_schedule": "linear"}
        alphas_cumprod = np.cumprod(1 - np.float32(EXPECTED["linear"]))

    assert probdiff.chain.diffusers_schedule(Scheduler()) == probdiff.chain.diffusers_schedule(Scheduler.config)
    Scheduler.alphas_cumprod = Scheduler.alphas_cumprod / (3 - 2 * Scheduler.alphas_cumprod)
    with pytest.raises(ValueError, match="config: Expected a scheduler whose alphas_cumprod are the products of 1 − beta; got other alphas_cumprod in the Scheduler"):
        probdiff.chain.diffusers_schedule(Scheduler())
    with pytest.raises(ValueError, match="snr_shift_scale: Expected 1, or none: .*; got 3.0"):
        probdiff.chain.diffusers_schedule(Scheduler.config | {"snr_shift_scale": 3.0})
    assert probdiff.chain.diffusers_schedule(Scheduler.config | {"snr_shift_scale": 1.0}).num_steps == 50


def test_improved_diffusion():
    """At N = 1000 the linear one is that of Ho et al.; at other N the rate at each time is the same."""
    assert probdiff.chain.improved_diffusion_schedule("linear", 1000) == probdiff.linear_schedule(1000)
    np.testing.assert_allclose(probdiff.chain.improved_diffusion_schedule("linear", 250).beta, 4 * np.linspace(1e-4, 0.02, 250), rtol=1e-12)
    np.testing.assert_allclose(probdiff.chain.improved_diffusion_schedule("cosine", 40).beta, cosine_betas(40), rtol=1e-10)


def test_vdm():
    """σ² = sigmoid(γ(t)) at t = i/T, i = 0 … T."""
    gamma = lambda t: -5 + 8 * t**2 + t  # noqa: E731
    schedule = probdiff.chain.vdm_schedule(gamma, 9)
    np.testing.assert_allclose(schedule.one_minus_alpha_bar, [expit(gamma(i / 8)) for i in range(9)], rtol=1e-11)


def test_edm():
    schedule = probdiff.chain.edm_schedule(5, 0.01, 20.0, 3.0)
    root = 1 / 3.0
    levels = [(20.0**root + i / 4 * (0.01**root - 20.0**root)) ** 3.0 for i in range(5)]
    np.testing.assert_allclose(schedule.sigma, levels[::-1], rtol=1e-11)
    np.testing.assert_allclose(probdiff.chain.edm_schedule(1).sigma, [80.0])
