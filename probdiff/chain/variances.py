r"""Reverse variances :math:`v_n` of a Gaussian kernel, as a factor on the least of them.

Each is a function of the schedule that gives :math:`\log(v_n / \tilde\beta_n)`, shape ``(num_steps,)`` or, by dimension,
``(num_steps, dim)``; at n = 1, where :math:`v_1 = \beta_1`, it is 0 and not looked at. The bound needs the factor rather than
:math:`v_n`: the constant of a step KL is :math:`\tfrac12 (e^{-r} - 1 + r)`, which would cancel otherwise.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from probdiff._checks import require, require_count
from probdiff.chain.schedules import array_module

KNOTS = 32


@dataclasses.dataclass(frozen=True)
class PosteriorVariance:
    r""":math:`v_n = \tilde\beta_n`: the best if the data were one point. Ho et al. (2020), arXiv:2006.11239, section 3.2."""

    def __call__(self, schedule):
        """Zeros."""
        return np.zeros(schedule.num_steps)


@dataclasses.dataclass(frozen=True)
class ForwardVariance:
    r""":math:`v_n = \beta_n`: the best for standard normal data. Ho et al. (2020), arXiv:2006.11239, section 3.2."""

    def __call__(self, schedule):
        r"""log((1−ᾱ_n)/(1−ᾱ_{n−1}))."""
        log_noise = 2 * array_module(schedule.noise_scale).log(schedule.noise_scale)
        return array_module(log_noise).concatenate([0 * log_noise[:1], log_noise[1:] - log_noise[:-1]])


class LearnedVariance(eqx.Module):
    r"""Between the two in log space, by dimension: :math:`\log v_n = s \log \beta_n + (1-s) \log \tilde\beta_n`.

    s is the sigmoid of a parameter, interpolated linearly over the steps; it starts at ½. Source of the form: Nichol and Dhariwal
    (2021), arXiv:2102.09672, eq. 15 (where the network gives s).

    Attributes:
        logit: Shape ``(knot, dim)``.
    """

    logit: jax.Array

    def __init__(self, schedule, dim):
        require(dim is not None, "dim", "Diffusion(…, dim=…) or a network with .dim, for the variances to be learned", "neither")
        require_count("dim", dim)
        self.logit = jnp.zeros((min(KNOTS, schedule.num_steps), dim))

    def __call__(self, schedule):
        """Shape ``(num_steps, dim)``."""
        share = jax.nn.sigmoid(interpolation(schedule.num_steps, len(self.logit)) @ self.logit)
        return share * jnp.asarray(ForwardVariance()(schedule), share.dtype)[:, None]


class OptimalVariance(eqx.Module):
    r"""The best for a given network: :math:`v_n = \tilde\beta_n + \frac{\beta_n^2}{\alpha_n (1-\bar\alpha_n)} m_n`.

    :math:`m_n = E\|\epsilon - \hat\epsilon\|^2 / d` over the data minimises the expected KL of step n. It is not trained by gradient
    but computed: by ``probdiff.fit`` at its end, or by :func:`probdiff.optimal_variance`. Until then it is that of standard
    normal data, :math:`m_n = \bar\alpha_n`, which gives :math:`v_n = \beta_n`.
    Source: Bao et al. (2022), arXiv:2201.06503, theorem 1, here for any network rather than the best.

    Attributes:
        squared_error: :math:`m_n`, shape ``(num_steps,)``.
    """

    squared_error: jax.Array

    def __init__(self, schedule):
        self.squared_error = jnp.asarray(schedule.alpha_bar, jnp.zeros(()).dtype)

    def __call__(self, schedule):
        """Shape ``(num_steps,)``."""
        factor = schedule.beta[1:] / (schedule.alpha[1:] * schedule.noise_scale[:-1] ** 2)
        known = jax.lax.stop_gradient(self.squared_error)
        return jnp.concatenate([jnp.zeros_like(known[:1]), jnp.log1p(jnp.asarray(factor, known.dtype) * known[1:])])


def interpolation(num_steps, knots):
    """The matrix that takes values at evenly spread knots to values at steps 1 … N, linearly: ``(num_steps, knots)``."""
    place = np.linspace(0, knots - 1, num_steps)
    return np.maximum(0.0, 1 - np.abs(place[:, None] - np.arange(knots)))


# Made from the schedule and the dimension of a model.
REVERSE_VARIANCES = {
    "posterior": lambda schedule, dim: PosteriorVariance(),
    "forward": lambda schedule, dim: ForwardVariance(),
    "learned": LearnedVariance,
    "optimal": lambda schedule, dim: OptimalVariance(schedule),
}
