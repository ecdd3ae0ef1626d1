r"""The reverse kernel :math:`p_\theta(z_{n-1} | z_n)`: what the model makes of the network's prediction.

What a kernel is to the programs: ``prior``, the distribution of :math:`z_N`; ``predict(network, z, n, key)``, what it wants to know of
the network; a call with that, which gives the distribution of :math:`z_{n-1}`; and ``observation``, what the last of these says of
the data. To the analytic bound: the KL of step n is ``constants``, known exactly, plus ``shortfall``, which depends on the
prediction; ``weight`` is about what a squared error of the noise costs.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro import distributions as dist

from probdiff._checks import require, require_step
from probdiff.chain.schedules import array_module, at_dims, at_step
from probdiff.chain.variances import REVERSE_VARIANCES
from probdiff.networks.base import predict_noise


class NoiseMoments(NamedTuple):
    """Conditional mean and variance of the noise in some z_n, shaped like them; the variance may be 0, where the noise is known."""

    mean: jax.Array
    variance: jax.Array | float


def weighted_error(weight, n, noise, eps_hat):
    """The squared error of ``eps_hat`` times entry n of ``weight``, in expectation over what is not known of the noise."""
    squared = jnp.square(noise.mean - eps_hat) + noise.variance
    return (at_dims(weight, n, eps_hat.dtype) * squared).sum(-1)


class GaussianKernel(eqx.Module):
    r"""Gaussian reverse steps.

    :math:`p_\theta(z_{n-1} | z_n) = N(\mu_\theta, v_n I)` with
    :math:`\mu_\theta = (z_n - \beta_n / \sqrt{1-\bar\alpha_n}\, \hat\epsilon) / \sqrt{\alpha_n}`. At n = 1 it is the
    Gaussian that the likelihood reads, with :math:`v_1 = \beta_1` whatever the reverse variance.
    Source: Ho et al. (2020), arXiv:2006.11239, section 3.2 and eq. 11.

    Args:
        reverse_variance: :math:`v_n`, one of the names in :mod:`probdiff.chain.variances`.
        schedule: The noise schedule; ``"learned"`` and ``"optimal"`` start from it.
        dim: Dimension of the data; for ``"learned"``.
    """

    reverse_variance: str
    log_ratio: Callable
    closed_form = True

    def __init__(self, reverse_variance, schedule=None, dim=None):
        known = isinstance(reverse_variance, str) and reverse_variance in REVERSE_VARIANCES
        require(known, "reverse_variance", f"one of {list(REVERSE_VARIANCES)}", repr(reverse_variance))
        self.reverse_variance = reverse_variance
        self.log_ratio = REVERSE_VARIANCES[reverse_variance](schedule, dim)

    def prior(self, shape):
        """N(0, I) as a distribution of the kernel's own kind, for latents of shape ``(*batch, dim)``."""
        return dist.Normal(jnp.zeros(shape), jnp.ones(shape[-1:])).to_event(1)

    def predict(self, network, z, n, key=None):
        r"""What the kernel wants to know of the network: the predicted noise, shaped like ``z``."""
        return predict_noise(network, z, n, key)

    def variance(self, schedule):
        r"""The table :math:`v_n`, shape ``(num_steps,)`` or, by dimension, ``(num_steps, dim)``."""
        xp, log_ratio = self._log_ratio(schedule)
        posterior, beta = (_columns(table, log_ratio) for table in (schedule.posterior_variance, schedule.beta))
        later = posterior[1:] * xp.exp(log_ratio[1:])
        return xp.concatenate([xp.broadcast_to(beta[:1], log_ratio[:1].shape), later])

    def __call__(self, schedule, z, eps_hat, n):
        r"""The distribution of :math:`z_{n-1}` given :math:`z_n` and the predicted noise.

        Args:
            schedule: The noise schedule.
            z: :math:`z_n`, shape ``(*batch, dim)``.
            eps_hat: Predicted noise, same shape.
            n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.
        """
        require_step(n, 1, schedule.num_steps)
        per_eps = at_step(schedule.beta / schedule.noise, n, z.dtype)
        per_z = at_step(schedule.alpha**-0.5, n, z.dtype)
        loc = per_z[..., None] * (z - per_eps[..., None] * eps_hat)
        scale = jnp.sqrt(at_dims(self.variance(schedule), n, z.dtype))
        return dist.Normal(loc, jnp.broadcast_to(scale, (*scale.shape[:-1], z.shape[-1]))).to_event(1)

    def observation(self, likelihood, last):
        """The distribution of the data, given that of the last reverse step."""
        return likelihood(last.base_dist.loc, last.base_dist.scale)

    def ceiling(self, schedule, likelihood, x, x0):
        """The reconstruction if the noise were known, log p(x | x_0, v_1), shape ``(datum,)``."""
        return likelihood(x0, at_step(schedule.beta**0.5, 1, x0.dtype)).log_prob(x)

    def step_kl(self, schedule, eps, eps_hat, n):
        r"""KL of one reverse step, :math:`KL[q(z_{n-1} | z_n, x_0) \| p_\theta(z_{n-1} | z_n)]`, in closed form.

        It equals :math:`w_n \|\epsilon - \hat\epsilon\|^2` with
        :math:`w_n = \beta_n^2 / (2 v_n \alpha_n (1-\bar\alpha_n))`, plus
        :math:`\tfrac{d}{2} (\tilde\beta_n / v_n - 1 - \log \tilde\beta_n / v_n)` where the variances differ; by dimension, if
        :math:`v_n` is. Computed from :math:`\epsilon - \hat\epsilon`: the difference of the two means would cancel in float32.
        Source: Ho et al. (2020), arXiv:2006.11239, eqs. 8 to 12.

        Args:
            schedule: The noise schedule.
            eps: The noise in :math:`z_n`, shape ``(*batch, dim)``.
            eps_hat: Its prediction, same shape.
            n: Step, 2 ≤ n ≤ N; n = 1 is the reconstruction term.

        Returns:
            KL in nats, summed over ``dim``, shape ``batch``.

        Raises:
            ValueError: If n is outside [2, N]; TypeError if it is not an integer.
        """
        require_step(n, 2, schedule.num_steps)
        constant = at_step(self.constants(schedule, eps.shape[-1]), n, eps.dtype)
        return weighted_error(self.weight(schedule), n, NoiseMoments(eps, 0.0), eps_hat) + constant

    def shortfall(self, schedule, x0, noise, z, eps_hat, n, more):
        """What the KL of step n is above :meth:`constants`, shape ``batch``: the error of the noise, weighted.

        Args:
            schedule: The noise schedule.
            x0: Encoded data, shape ``(*batch, dim)`` (not needed here).
            noise: :class:`NoiseMoments` of the noise in ``z``.
            z: :math:`z_n`, same shape (not needed here).
            eps_hat: What :meth:`predict` gave.
            n: Step; what is given for n = 1 is the error in the density of :math:`x_0`.
            more: A function that gives noise shaped like ``x0``, for a kernel that has to sample (not needed here).
        """
        return weighted_error(self.weight(schedule), n, noise, eps_hat)

    def weight(self, schedule):
        r"""The table :math:`w_n`, shape ``(num_steps,)`` or, by dimension, ``(num_steps, dim)``.

        At n = 1 it weighs the squared error in the log-density of x_0: :math:`w_1 = 1 / (2 \alpha_1)`.
        """
        variance = self.variance(schedule)
        factor = schedule.beta**2 / (2 * schedule.alpha * schedule.one_minus_alpha_bar)
        return _columns(factor, variance) / variance

    def constant(self, schedule):
        """The KL per dimension of a step whose noise is predicted exactly (0 at n = 1), shaped like :meth:`weight`."""
        xp, log_ratio = self._log_ratio(schedule)
        return (xp.expm1(-log_ratio) + log_ratio) / 2

    def constants(self, schedule, dim):
        """:meth:`constant`, summed over ``dim`` dimensions, shape ``(num_steps,)``."""
        constant = self.constant(schedule)
        return constant.sum(-1) if constant.ndim == 2 else constant * dim

    def _log_ratio(self, schedule):
        """log(v_n / β̃_n), and the array module for it."""
        log_ratio = self.log_ratio(schedule)
        return array_module(log_ratio, schedule.beta), log_ratio


def _columns(table, like):
    """A table over steps, with an axis for the dimensions if ``like`` has one."""
    return table[:, None] if like.ndim == 2 else table
