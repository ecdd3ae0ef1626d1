r"""Noise and score: conversions between the two, in two systems of coordinates.

The chain can be rescaled so that its signal is not shrunk, with :math:`\sigma_n^2 = (1-\bar\alpha_n)/\bar\alpha_n`:

    variance-preserving (VP), the chain of this package    z_n = √ᾱ_n x_0 + √(1−ᾱ_n) ε     q(z_n | x_0) = N(√ᾱ_n x_0, (1−ᾱ_n) I)
    variance-exploding (VE)                                x_n = x_0 + σ_n ε               p(x_n | x_0) = N(x_0, σ_n² I)

with z_n = √ᾱ_n x_n, path by path. A score is the gradient of a log density; given x_0 it is a multiple of the noise, and the
score of the *marginal* is the same multiple of the noise's conditional mean, which is what an ε-network learns:

    VE      ∇ log p(x_n | x_0) = −(x_n − x_0)/σ_n² = −ε/σ_n            ∇ log p(x_n) = −E[ε | x_n]/σ_n  ≈ −ε_θ/σ_n
    VP      ∇ log q(z_n | x_0) = −ε/√(1−ᾱ_n)                           ∇ log q(z_n) ≈ −ε_θ/√(1−ᾱ_n)

The network is always called with z_n; one of your own that takes x_n is given :func:`ve_from_vp` of z_n. Functions without a prefix are in
VE coordinates. Every function raises ValueError if n is outside [1, N], and TypeError if n is not an integer.

Sources: Song and Ermon (2019), arXiv:1907.05600, eqs. 2 and 5; Song et al. (2021), arXiv:2011.13456, section 3.4;
Vincent (2011), doi:10.1162/NECO_a_00142.
"""

import typing
from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist

from probdiff._checks import AnyArray, PyTree, Step, require, require_step
from probdiff.chain.forward import isotropic_normal
from probdiff.chain.schedules import AbstractSchedule, Table, at_step, require_schedule


@typing.runtime_checkable
class _Model(Protocol):
    """The parts of a Diffusion that the score needs (the class itself is not imported here)."""

    schedule: AbstractSchedule

    def evaluated(self) -> "_Model": ...

    def given(self, context: PyTree) -> "_Model": ...

    def predict_noise(self, z: Float[Array, "*batch dim"], n: Step) -> Float[Array, "*batch dim"]: ...


def noising(schedule: AbstractSchedule, x0: Float[AnyArray, "*batch dim"], n: Step) -> dist.Independent:
    r"""Variance-exploding noising, :math:`p(x_n | x_0) = N(x_0, \sigma_n^2 I)`, as a NumPyro distribution.

    Texts that write :math:`N(x_0, \sigma_n I)` mean the same distribution: :math:`\sigma_n` is the standard deviation.

    Args:
        schedule: The noise schedule.
        x0: Encoded data, shape ``(*batch, dim)``.
        n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.

    Raises:
        ValueError: If n is outside [1, N]; TypeError if it is not an integer.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.geometric_schedule(5, sigma_min=0.1, sigma_max=10.0)
        >>> round(probdiff.chain.score.noising(schedule, jnp.zeros(2), n=5).variance[0].item(), 2)  # σ_5²
        100.0
    """
    x0 = jnp.asarray(x0)
    return isotropic_normal(x0, jnp.square(_at(schedule, _sigma, n, x0))[..., 0])


def conditional_score(
    schedule: AbstractSchedule, x_n: Float[AnyArray, "*batch dim"], x0: Float[AnyArray, "*batch dim"], n: Step
) -> Float[Array, "*batch dim"]:
    r"""Score of the noising, :math:`\nabla_{x_n} \log p(x_n | x_0) = -(x_n - x_0) / \sigma_n^2`.

    Args:
        schedule: The noise schedule.
        x_n: Noisy data in VE coordinates, shape ``(*batch, dim)``.
        x0: Encoded data, same shape.
        n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.

    Returns:
        Shape ``(*batch, dim)``, nats per unit of ``x_n``.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.geometric_schedule(5, sigma_min=0.5, sigma_max=8.0)
        >>> s = probdiff.chain.score.conditional_score(schedule, x_n=jnp.ones(2), x0=jnp.zeros(2), n=1)
        >>> s.round(3).tolist()  # −1 / 0.5²
        [-4.0, -4.0]
    """
    x_n, x0 = jnp.asarray(x_n), jnp.asarray(x0)
    return -(x_n - x0) / jnp.square(_at(schedule, _sigma, n, x_n))


def vp_conditional_score(
    schedule: AbstractSchedule, z: Float[AnyArray, "*batch dim"], x0: Float[AnyArray, "*batch dim"], n: Step
) -> Float[Array, "*batch dim"]:
    r"""Score of the chain, :math:`\nabla_{z_n} \log q(z_n | x_0) = -(z_n - \sqrt{\bar\alpha_n} x_0) / (1-\bar\alpha_n)`.

    Arguments as for :func:`conditional_score`, with ``z`` for ``x_n``.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> schedule, z, x0 = probdiff.cosine_schedule(5), jnp.ones(2), jnp.zeros(2)
        >>> s = probdiff.chain.score.vp_conditional_score(schedule, z, x0, n=2)
        >>> bool(jnp.allclose(s, jax.grad(probdiff.forward_marginal(schedule, x0, 2).log_prob)(z), rtol=1e-3))
        True
    """
    z, x0 = jnp.asarray(z), jnp.asarray(x0)
    return -(z - _at(schedule, _signal, n, z) * x0) / jnp.square(_at(schedule, _noise, n, z))


def score_from_eps(schedule: AbstractSchedule, eps_hat: Float[AnyArray, "*batch dim"], n: Step) -> Float[Array, "*batch dim"]:
    r"""The score of the noisy data from a noise prediction, :math:`s = -\hat\epsilon / \sigma_n`.

    Args:
        schedule: The noise schedule.
        eps_hat: Predicted noise, shape ``(*batch, dim)``.
        n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.geometric_schedule(5, sigma_min=0.5, sigma_max=8.0)
        >>> probdiff.chain.score.score_from_eps(schedule, jnp.ones(2), n=1).round(3).tolist()
        [-2.0, -2.0]
    """
    eps_hat = jnp.asarray(eps_hat)
    return -eps_hat / _at(schedule, _sigma, n, eps_hat)


def eps_from_score(schedule: AbstractSchedule, score: Float[AnyArray, "*batch dim"], n: Step) -> Float[Array, "*batch dim"]:
    r"""The noise prediction from a score, :math:`\hat\epsilon = -\sigma_n s`; the inverse of :func:`score_from_eps`.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.geometric_schedule(5, sigma_min=0.5, sigma_max=8.0)
        >>> probdiff.chain.score.eps_from_score(schedule, jnp.array([-2.0, -2.0]), n=1).round(3).tolist()
        [1.0, 1.0]
    """
    score = jnp.asarray(score)
    return -score * _at(schedule, _sigma, n, score)


def vp_score_from_eps(
    schedule: AbstractSchedule, eps_hat: Float[AnyArray, "*batch dim"], n: Step
) -> Float[Array, "*batch dim"]:
    r"""The score of the chain from a noise prediction, :math:`-\hat\epsilon / \sqrt{1-\bar\alpha_n}`.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.NoiseSchedule.from_betas([0.25, 0.5])  # √(1−ᾱ_1) = ½
        >>> probdiff.chain.score.vp_score_from_eps(schedule, jnp.ones(2), n=1).round(3).tolist()
        [-2.0, -2.0]
    """
    eps_hat = jnp.asarray(eps_hat)
    return -eps_hat / _at(schedule, _noise, n, eps_hat)


def eps_from_vp_score(
    schedule: AbstractSchedule, score: Float[AnyArray, "*batch dim"], n: Step
) -> Float[Array, "*batch dim"]:
    r"""The noise prediction from a score of the chain, :math:`-\sqrt{1-\bar\alpha_n}\, s`; the inverse of :func:`vp_score_from_eps`.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.NoiseSchedule.from_betas([0.25, 0.5])  # √(1−ᾱ_1) = ½
        >>> probdiff.chain.score.eps_from_vp_score(schedule, jnp.array([-2.0, -2.0]), n=1).round(3).tolist()
        [1.0, 1.0]
    """
    score = jnp.asarray(score)
    return -score * _at(schedule, _noise, n, score)


def vp_from_ve(schedule: AbstractSchedule, x_n: Float[AnyArray, "*batch dim"], n: Step) -> Float[Array, "*batch dim"]:
    r"""From VE to VP coordinates, :math:`z_n = \sqrt{\bar\alpha_n} x_n`; shape ``(*batch, dim)``, ``n`` broadcasts to ``batch``.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.NoiseSchedule.from_betas([0.75, 0.5])  # √ᾱ_1 = ½
        >>> probdiff.chain.score.vp_from_ve(schedule, jnp.ones(2), n=1).round(3).tolist()
        [0.5, 0.5]
    """
    x_n = jnp.asarray(x_n)
    return _at(schedule, _signal, n, x_n) * x_n


def ve_from_vp(schedule: AbstractSchedule, z: Float[AnyArray, "*batch dim"], n: Step) -> Float[Array, "*batch dim"]:
    r"""From VP to VE coordinates, :math:`x_n = z_n / \sqrt{\bar\alpha_n}`; the inverse of :func:`vp_from_ve`.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.NoiseSchedule.from_betas([0.75, 0.5])  # √ᾱ_1 = ½
        >>> probdiff.chain.score.ve_from_vp(schedule, jnp.ones(2), n=1).round(3).tolist()
        [2.0, 2.0]
    """
    z = jnp.asarray(z)
    return z / _at(schedule, _signal, n, z)


def score(
    diffusion: _Model, x_n: Float[AnyArray, "*batch dim"], n: Step, *, context: PyTree = None
) -> Float[Array, "*batch dim"]:
    r"""The fitted model's score of the noisy data, :math:`\nabla \log p(x_n) \approx -\epsilon_\theta(z_n, n) / \sigma_n`.

    Args:
        diffusion: The model.
        x_n: Noisy encoded data in VE coordinates, shape ``(*batch, dim)``.
        n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.
        context: Of a conditional model, as for :meth:`~probdiff.Diffusion.given`: a row for each datum, the last axis of ``batch``.

    Returns:
        Shape ``(*batch, dim)``. In VP coordinates the score is this divided by :math:`\sqrt{\bar\alpha_n}`.

    Raises:
        ValueError, TypeError: If ``n`` is not a step of the model, or the context does not suit it.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0], [[1.0]])
        >>> exact = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> s = probdiff.chain.score.score(exact, jnp.ones((1, 1)), n=3)
        >>> bool(jnp.allclose(s, -1 / (1 + schedule.sigma[2] ** 2), rtol=1e-3))  # the score of N(0, 1 + σ_3²)
        True
    """
    known = hasattr(diffusion, "evaluated")  # (the class Diffusion is not imported by the chain)
    require(known, "diffusion", "a Diffusion", type(diffusion).__name__, TypeError)
    diffusion = diffusion.evaluated().given(context)
    eps_hat = diffusion.predict_noise(vp_from_ve(diffusion.schedule, x_n, n), n)
    return score_from_eps(diffusion.schedule, eps_hat, n)


def _sigma(schedule: AbstractSchedule) -> Table:
    return schedule.sigma


def _signal(schedule: AbstractSchedule) -> Table:
    return schedule.signal_scale


def _noise(schedule: AbstractSchedule) -> Table:
    return schedule.noise_scale


def _at(
    schedule: AbstractSchedule, table: Callable[[AbstractSchedule], Table], n: Step, like: Float[Array, "*batch dim"]
) -> Float[Array, "*#batch 1"]:
    """Entry n of a table of the schedule, with an axis for the dimension."""
    require_schedule(schedule)
    require_step(n, 1, schedule.num_steps)
    return at_step(table(schedule), n, like.dtype)[..., None]
