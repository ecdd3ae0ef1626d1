"""The schedules that have a name in the literature."""

import operator

import numpy as np

from probdiff._checks import Number, Whole, require
from probdiff.chain.schedules import NoiseSchedule


def _num_steps(num_steps: Whole) -> int:
    try:
        count = operator.index(num_steps)
    except TypeError:
        raise TypeError(f"num_steps: Expected an integer; got {num_steps!r}") from None
    require(count >= 1, "num_steps", "at least 1", count)
    return count


def linear_schedule(num_steps: Whole, beta_min: Number = 1e-4, beta_max: Number = 0.02) -> NoiseSchedule:
    r"""The linear schedule of Ho et al. (2020), arXiv:2006.11239, section 4, at any number of steps.

    At N = 1000 :math:`\beta_n` rises linearly from ``beta_min`` to ``beta_max``, as published. At other N the
    *rate* :math:`-\log(1-\beta_n)` is scaled by 1000/N, so that the chain ends about equally noisy and every
    :math:`\beta_n` stays below 1.

    Args:
        num_steps: N, at least 1.
        beta_min: First variance, at N = 1000.
        beta_max: Last variance, at N = 1000.

    Raises:
        ValueError, TypeError: If ``num_steps`` is not a positive integer, or not 0 < ``beta_min`` ≤ ``beta_max`` < 1.

    Example:
        >>> import probdiff
        >>> schedule = probdiff.linear_schedule(num_steps=1000)
        >>> schedule.beta[[0, -1]]
        array([0.0001, 0.02  ])
    """
    num_steps = _num_steps(num_steps)
    require(
        0 < beta_min <= beta_max < 1, "beta_min, beta_max", "0 < beta_min <= beta_max < 1", f"{beta_min}, {beta_max}"
    )
    middle = (beta_min + beta_max) / 2
    beta = np.linspace(beta_min, beta_max, num_steps) if num_steps > 1 else np.array([middle])
    if num_steps != 1000:
        beta = -np.expm1(1000 / num_steps * np.log1p(-beta))
    return NoiseSchedule.from_betas(beta)


def cosine_schedule(num_steps: Whole) -> NoiseSchedule:
    r"""The cosine schedule of Nichol and Dhariwal (2021), arXiv:2102.09672, eq. 17, offset s = 0.008.

    :math:`\bar\alpha` follows a squared cosine; as published, :math:`\beta_n` is clipped at 0.999.

    Args:
        num_steps: N, at least 1.

    Raises:
        ValueError, TypeError: If ``num_steps`` is not a positive integer.

    Example:
        >>> import probdiff
        >>> probdiff.cosine_schedule(num_steps=4).alpha_bar.round(2)
        array([0.85, 0.49, 0.14, 0.  ])
    """
    num_steps = _num_steps(num_steps)
    time = np.arange(num_steps + 1) / num_steps
    log_f = 2 * np.log(np.cos((time + 0.008) / 1.008 * np.pi / 2))
    return NoiseSchedule.from_betas(np.minimum(-np.expm1(np.diff(log_f)), 0.999))


def log_snr_schedule(num_steps: Whole, log_snr_max: Number = 10.0, log_snr_min: Number = -8.0) -> NoiseSchedule:
    r"""Log-SNR falling linearly from ``log_snr_max`` at n = 1 to ``log_snr_min`` at n = N.

    Of the three fixed schedules in fig. 4b of Kingma et al. (2021), arXiv:2107.00630, this one has the least variance of a one-step
    estimate of the bound. At N = 1 the only step is at ``log_snr_min``.

    Args:
        num_steps: N, at least 1.
        log_snr_max: Log-SNR after the first step; :math:`\beta_1` = sigmoid(−``log_snr_max``).
        log_snr_min: Log-SNR after the last step.

    Raises:
        ValueError, TypeError: If ``num_steps`` is not a positive integer, or the log-SNR does not decrease.

    Example:
        >>> import probdiff
        >>> probdiff.log_snr_schedule(num_steps=4, log_snr_max=6.0, log_snr_min=-6.0).log_snr.round(6)
        array([ 6.,  2., -2., -6.])
    """
    num_steps = _num_steps(num_steps)
    require(
        np.isfinite(log_snr_min) and np.isfinite(log_snr_max) and log_snr_min < log_snr_max,
        "log_snr_max, log_snr_min",
        "finite, log_snr_min < log_snr_max",
        f"{log_snr_max}, {log_snr_min}",
    )
    return NoiseSchedule.from_log_snr(np.linspace(log_snr_min, log_snr_max, num_steps)[::-1])


def geometric_schedule(num_steps: Whole, sigma_min: Number = 0.01, sigma_max: Number = 50.0) -> NoiseSchedule:
    r"""Noise levels :math:`\sigma_n` in geometric progression from ``sigma_min`` to ``sigma_max``.

    As :math:`\log \sigma_n^2` is minus the log-SNR, this is :func:`log_snr_schedule` with other arguments: the same chain in
    variance-exploding coordinates. Source: Song and Ermon (2019), arXiv:1907.05600, section 4; with ``sigma_max`` about the
    largest distance between two data, Song and Ermon (2020), arXiv:2006.09011, technique 1.

    Args:
        num_steps: N, at least 1; at N = 1 the only level is ``sigma_max``.
        sigma_min: :math:`\sigma_1`, the standard deviation of the least noise, in units of the encoded data.
        sigma_max: :math:`\sigma_N`.

    Raises:
        ValueError, TypeError: If ``num_steps`` is not a positive integer, or the noise levels do not increase.

    Example:
        >>> import probdiff
        >>> probdiff.geometric_schedule(num_steps=3, sigma_min=0.1, sigma_max=10.0).sigma.round(6)
        array([ 0.1,  1. , 10. ])
    """
    require(
        0 < sigma_min < sigma_max < np.inf,
        "sigma_min, sigma_max",
        "0 < sigma_min < sigma_max, finite",
        f"{sigma_min}, {sigma_max}",
    )
    return log_snr_schedule(num_steps, -2 * np.log(sigma_min), -2 * np.log(sigma_max))
