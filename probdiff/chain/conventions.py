r"""Noise schedules of other libraries and papers.

Their time t and their symbols, and the same quantities in the notation of this package:

    diffusers, improved-diffusion     t = 0 … N−1 is step n = t + 1;  alphas_cumprod[t] = ᾱ_n
    VDM                               γ(t) = −log SNR, so ᾱ = sigmoid(−γ); T steps from t = 0 to 1 are N = T + 1 noise levels, the first at t = 0
    EDM, variance-exploding           x = x_0 + σ ε is z_n / √ᾱ_n, with σ_n² = (1−ᾱ_n)/ᾱ_n and log SNR = −2 log σ

Networks of these conventions are adapted by :mod:`probdiff.networks.conventions`.

Sources: the published code of diffusers and improved-diffusion; Kingma et al. (2021), arXiv:2107.00630; Karras et al. (2022), arXiv:2206.00364.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from probdiff._checks import Number, Whole, require, require_count
from probdiff.chain.named_schedules import cosine_schedule
from probdiff.chain.schedules import NoiseSchedule

Betas = Float64[np.ndarray, "num_steps"]


def diffusers_schedule(config: Any) -> NoiseSchedule:
    r"""The noise schedule of a diffusers scheduler, in float64 where diffusers has float32.

    Step n is the timestep t = n − 1 of diffusers. ``trained_betas`` are used unchanged; otherwise ``beta_schedule`` is ``"linear"``, ``"scaled_linear"``,
    ``"sigmoid"`` (each of ``beta_start`` and ``beta_end``) or ``"squaredcos_cap_v2"``, at ``num_train_timesteps``. Other entries are
    ignored, such as ``timestep_spacing`` and ``steps_offset`` for samplers of fewer steps.

    Args:
        config: The configuration, a dict such as that of a scheduler_config.json, or the scheduler itself (anything with ``.config``).

    Raises:
        ValueError, TypeError: If an entry is missing or has another value than these; if ``rescale_betas_zero_snr`` is set: with
            :math:`\bar\alpha_N = 0` there is no log-SNR at step N, and a prediction of the noise says nothing about the data; or if ``config`` is a
            scheduler whose ``alphas_cumprod`` are not those of its betas, as where ``snr_shift_scale`` is not 1.

    Example:
        >>> import probdiff
        >>> config = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
        >>> probdiff.chain.diffusers_schedule(config) == probdiff.linear_schedule(1000)
        True
    """
    settings = settings_of(config)
    rescaled = settings.get("rescale_betas_zero_snr")
    require(not rescaled, "rescale_betas_zero_snr", "False: the chain has no step without any signal, ᾱ_N = 0", rescaled)
    betas = settings.get("trained_betas")
    if betas is None:
        name: Any = settings.get("beta_schedule")
        known = isinstance(name, str) and name in BETAS
        require(known, "beta_schedule", f"one of {list(BETAS)}, or trained_betas", repr(name))
        betas = BETAS[name](settings)
    shift = settings.get("snr_shift_scale")
    require(shift in (None, 1), "snr_shift_scale", "1, or none: the schedule is read from the betas alone", shift)
    schedule, own = NoiseSchedule.from_betas(betas), getattr(config, "alphas_cumprod", None)
    same = own is None or (np.shape(own) == (schedule.num_steps,) and np.allclose(np.asarray(own), schedule.alpha_bar, rtol=1e-3, atol=1e-6))
    require(same, "config", "a scheduler whose alphas_cumprod are the products of 1 − beta", f"other alphas_cumprod in the {type(config).__name__}")
    return schedule


def improved_diffusion_schedule(name: str, num_steps: Whole) -> NoiseSchedule:
    r"""The noise schedule that has this name in improved-diffusion and guided-diffusion.

    ``"linear"``: :math:`\beta_n` rises linearly from 1e-4 · 1000/N to 0.02 · 1000/N, which :func:`~probdiff.linear_schedule` does at N = 1000 only.
    ``"cosine"``: :func:`~probdiff.cosine_schedule`. Step n is the timestep t = n − 1 of these libraries.
    Source: Nichol and Dhariwal (2021), arXiv:2102.09672, section 3.2, and the published code.

    Args:
        name: ``"linear"`` or ``"cosine"``.
        num_steps: N, ``diffusion_steps`` in these libraries; more than 20 for ``"linear"``, so that :math:`\beta_N < 1`.

    Raises:
        ValueError: If no schedule has the name, or N is too small for it.

    Example:
        >>> import probdiff
        >>> probdiff.chain.improved_diffusion_schedule("linear", 4000).beta[[0, -1]]
        array([2.5e-05, 5.0e-03])
    """
    require_count("num_steps", num_steps)
    require(name in ("linear", "cosine"), "name", "'linear' or 'cosine'", repr(name))
    if name == "cosine":
        return cosine_schedule(num_steps)
    require(num_steps > 20, "num_steps", "more than 20 for 'linear', whose last beta is 20/N", num_steps)
    return NoiseSchedule.from_betas(np.linspace(0.1 / num_steps, 20 / num_steps, num_steps))


def vdm_schedule(gamma: Callable[[Float[np.ndarray, "num_steps"]], Any], num_steps: Whole) -> NoiseSchedule:
    r"""The noise schedule of a variational diffusion model, by its :math:`\gamma(t) = -\log SNR(t)`, at evenly spread times from 0 to 1.

    :math:`\log SNR_n = -\gamma((n-1)/(N-1))`. The chain of the paper, of T steps, has T + 1 noise levels, so that N = T + 1: :math:`z_1` is its latent at t = 0,
    from which the data are reconstructed. Source: Kingma et al. (2021), arXiv:2107.00630, sections 3.1 and 3.2 and appendix A.

    Args:
        gamma: A function of an array of times, increasing; the times are float64.
        num_steps: N, at least 2.

    Raises:
        ValueError, TypeError: If N is too small, or :math:`\gamma` is not a function, does not increase or is not finite.

    Example:
        >>> import probdiff
        >>> probdiff.chain.vdm_schedule(lambda t: -13.3 + 18.3 * t, 1001)
        NoiseSchedule(num_steps=1001, log_snr=13.30 … -5.00)
    """
    require_count("num_steps", num_steps)
    require(callable(gamma), "gamma", "a function of an array of times", type(gamma).__name__, TypeError)
    require(num_steps >= 2, "num_steps", "at least 2, T + 1 for the T ≥ 1 steps of the paper", num_steps)
    values = np.asarray(gamma(np.linspace(0.0, 1.0, num_steps)), np.float64)
    require(values.shape == (num_steps,), "gamma", f"an array of shape ({num_steps},), as the times have", f"shape {values.shape}")
    return NoiseSchedule.from_log_snr(-values)


def edm_schedule(
    num_steps: Whole, sigma_min: Number = 0.002, sigma_max: Number = 80.0, rho: Number = 7.0
) -> NoiseSchedule:
    r"""The noise levels of EDM, :math:`\sigma_n = (\sigma_{min}^{1/\rho} + \tfrac{n-1}{N-1} (\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho}))^\rho`.

    The index i = 0 of the paper is step N. Source: Karras et al. (2022), arXiv:2206.00364, eq. 5 and table 1.

    Args:
        num_steps: N, at least 1; at N = 1 the only level is ``sigma_max``.
        sigma_min, sigma_max: :math:`\sigma_1` and :math:`\sigma_N`, standard deviations of the noise in units of the encoded data.
        rho: ρ, positive; the larger ρ is, the more levels are small.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import probdiff
        >>> probdiff.chain.edm_schedule(3).sigma.round(3)
        array([2.000e-03, 2.515e+00, 8.000e+01])
    """
    require_count("num_steps", num_steps)
    good = 0 < sigma_min < sigma_max < np.inf and 0 < rho < np.inf
    require(good, "sigma_min, sigma_max, rho", "0 < sigma_min < sigma_max and rho > 0, finite", f"{sigma_min}, {sigma_max}, {rho}")
    low, high = float(sigma_min) ** (1 / rho), float(sigma_max) ** (1 / rho)
    return NoiseSchedule.from_sigmas(np.linspace(high, low, num_steps)[::-1] ** float(rho))


def settings_of(config: Any) -> Mapping[str, Any]:
    """The entries of a configuration: a mapping, or an object whose ``.config`` is a mapping."""
    settings = getattr(config, "config", config)
    require(isinstance(settings, Mapping), "config", "a dict, or a scheduler with .config", type(config).__name__, TypeError)
    return settings


def _setting(settings: Mapping[str, Any], name: str, kind: Any, words: str) -> Any:
    value = settings.get(name)
    require(isinstance(value, kind) and not isinstance(value, bool), name, f"{words} in the configuration", repr(value))
    return value


def _num_steps(settings: Mapping[str, Any]) -> int:
    num_steps = _setting(settings, "num_train_timesteps", Whole, "a number of steps")
    require_count("num_train_timesteps", num_steps)
    return int(num_steps)


def _ends(settings: Mapping[str, Any]) -> tuple[float, float]:
    start, end = (float(_setting(settings, name, Number, "a number")) for name in ("beta_start", "beta_end"))
    require(0 < start <= end < 1, "beta_start, beta_end", "0 < beta_start <= beta_end < 1", f"{start}, {end}")
    return start, end


def _linear(settings: Mapping[str, Any]) -> Betas:
    start, end = _ends(settings)
    return np.linspace(start, end, _num_steps(settings))


def _scaled_linear(settings: Mapping[str, Any]) -> Betas:
    start, end = _ends(settings)
    return np.linspace(start**0.5, end**0.5, _num_steps(settings)) ** 2


def _sigmoid(settings: Mapping[str, Any]) -> Betas:
    start, end = _ends(settings)
    return start + (end - start) / (1 + np.exp(-np.linspace(-6.0, 6.0, _num_steps(settings))))


def _squared_cosine(settings: Mapping[str, Any]) -> Betas:
    return np.asarray(cosine_schedule(_num_steps(settings)).beta)


BETAS: dict[str, Callable[[Mapping[str, Any]], Betas]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squared_cosine,
    "sigmoid": _sigmoid,
}
