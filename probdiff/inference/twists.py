r"""Twists: what is taken for p(y | z_n) on the way, so that particles know of y before they come to it.

Whatever a twist says, the estimate of the evidence is unbiased; a good one has weights that vary little. ``"tweedie"`` takes x_0 given z_n for normal, with the mean
:math:`\hat x_0` that the network predicts and the covariance that its derivative is, by Tweedie's formula of second order,

    Cov[x_0 | z_n] = (1−ᾱ_n)/√ᾱ_n · ∂x̂_0/∂z_n,

which is exact for the best network of any data. For normal data the twist is then p(y | z_n) itself.

Sources: twisted proposals, Wu et al. (2023), arXiv:2306.17775, section 3; the covariance in a twist of this form, Boys et al. (2023), arXiv:2310.06721, section 3.
"""

import abc
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpyro import distributions as dist

from probdiff._checks import require
from probdiff.chain.schedules import at_step
from probdiff.diffusion import Diffusion
from probdiff.inference.observations import AbstractObservation

MOST_VALUES = 16  # of y, for a covariance by as many vector-Jacobian products


class Twisted(NamedTuple):
    """What a twist says of one particle.

    Attributes:
        log_prob: What is taken for log p(y | z_n), nats.
        gradient: The gradient in z_n that proposals are moved along, shape ``(dim,)``.
    """

    log_prob: Float[Array, ""]
    gradient: Float[Array, "dim"]


class AbstractTwist(eqx.Module):
    """What is taken for p(y | z_n).

    To write your own, give :meth:`__call__`.
    """

    @abc.abstractmethod
    def __call__(self, diffusion: Diffusion, observation: AbstractObservation, z: Float[Array, "dim"], n: Int[Array, ""]) -> Twisted:
        """The twist at a particle ``z`` after n steps, 1 ≤ n ≤ N."""

    def evaluations(self, observation: AbstractObservation, dim: int) -> int:
        """About how many evaluations of the network one particle is worth, gradients included."""
        return 3


class NoTwist(AbstractTwist):
    """1 everywhere: particles learn of y at their last step (the bootstrap filter)."""

    def __call__(self, diffusion: Diffusion, observation: AbstractObservation, z: Float[Array, "dim"], n: Int[Array, ""]) -> Twisted:
        """0 nats."""
        return Twisted(jnp.zeros((), z.dtype), jnp.zeros_like(z))

    def evaluations(self, observation: AbstractObservation, dim: int) -> int:
        """1."""
        return 1


class PointTwist(AbstractTwist):
    r"""p(y | x) at :math:`\hat x_0(z_n)`, as if that were x.

    While x_0 is uncertain this is far too narrow. Where y is precise the weights can have an infinite variance: the estimate of the evidence is then
    unbiased on paper, and 0 on a computer. An observation without noise has no such density.
    Source: Wu et al. (2023), arXiv:2306.17775, eq. 8.
    """

    def __call__(self, diffusion: Diffusion, observation: AbstractObservation, z: Float[Array, "dim"], n: Int[Array, ""]) -> Twisted:
        """The log density and its gradient, through the network."""

        def log_prob(z: Float[Array, "dim"]) -> Float[Array, ""]:
            return observation.log_prob(diffusion.likelihood.unrounded(predicted_x0(diffusion, z, n)))

        return Twisted(*jax.value_and_grad(log_prob)(z))


class TweedieTwist(AbstractTwist):
    r"""p(y | z_n) with x_0 given z_n normal, by the network's mean and covariance.

    With few values of y the covariance of A x_0 is :math:`A C A^T`, by as many vector-Jacobian products of the network as y has values; for networks that are not
    exact it is symmetrised, and clipped to be positive semi-definite. With more than 16, C is taken for diagonal: the variances of a
    :class:`~probdiff.networks.CategoricalHead`'s probabilities, or :math:`1-\bar\alpha_n`, as if the dimensions were standard normal and independent;
    that takes one vector-Jacobian product. The gradient is that of the mean.
    """

    most_values: ClassVar[int] = MOST_VALUES

    def __call__(self, diffusion: Diffusion, observation: AbstractObservation, z: Float[Array, "dim"], n: Int[Array, ""]) -> Twisted:
        """The log density of y, and the gradient through its mean."""
        schedule, likelihood = diffusion.schedule, diffusion.likelihood

        def mean(x0: Float[Array, "dim"]) -> Float[Array, "observed"]:
            return observation.mean(likelihood.unrounded(x0))

        x0, from_z = jax.vjp(lambda z: predicted_x0(diffusion, z, n), z)
        x = likelihood.unrounded(x0)
        loc, slope = mean(x0), jax.jacrev(mean)(x0)
        residual = observation.observed(x).astype(z.dtype) - loc
        # (What the last step adds is part of the noise in any case: then nothing is singular.)
        last = at_step(schedule.beta, jnp.ones((), jnp.int32), z.dtype)
        noise = observation.covariance(x).astype(z.dtype) + last * _product(slope, slope.T)
        if len(residual) <= self.most_values:
            rows = jax.vmap(lambda row: from_z(row)[0])(slope)
            covariance = at_step(schedule.one_minus_alpha_bar / schedule.signal_scale, n, z.dtype) * _product(rows, slope.T)
            of_y = dist.MultivariateNormal(loc, _positive(covariance) + noise)
            weighted = jax.scipy.linalg.cho_solve((of_y.scale_tril, True), residual)
            gradient = weighted @ rows
        else:
            covariance = _product(slope * _variances(diffusion, z, n), slope.T)
            of_y = dist.MultivariateNormal(loc, covariance + noise)
            weighted = jax.scipy.linalg.cho_solve((of_y.scale_tril, True), residual)
            gradient = from_z(weighted @ slope)[0]
        return Twisted(of_y.log_prob(loc + residual), gradient)

    def evaluations(self, observation: AbstractObservation, dim: int) -> int:
        """The prediction, and two for each vector-Jacobian product."""
        values = jax.eval_shape(observation.mean, jnp.zeros(dim)).shape[0]
        return 1 + 2 * (values if values <= self.most_values else 1)


TWISTS: dict[str, AbstractTwist] = {"none": NoTwist(), "point": PointTwist(), "tweedie": TweedieTwist()}


def named_twist(twist: AbstractTwist | str) -> AbstractTwist:
    """A twist, given as an object or by its name.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(twist, AbstractTwist):
        return twist
    known = isinstance(twist, str) and twist in TWISTS
    require(known, "twist", f"one of {list(TWISTS)} or an AbstractTwist", repr(twist))
    return TWISTS[twist]


def predicted_x0(diffusion: Diffusion, z: Float[Array, "dim"], n: Int[Array, ""]) -> Float[Array, "dim"]:
    r""":math:`\hat x_0`, the mean of x_0 that the network predicts from z_n, shape ``(dim,)``."""
    signal, noise = (at_step(table, n, z.dtype) for table in (diffusion.schedule.signal_scale, diffusion.schedule.noise_scale))
    return (z - noise * diffusion.predict_noise(z, n)) / signal


def _variances(diffusion: Diffusion, z: Float[Array, "dim"], n: Int[Array, ""]) -> Float[Array, "dim"]:
    """The variance of each dimension of x_0 given z_n, about."""
    log_p = diffusion.log_probabilities(z, n)
    if log_p is None:
        return jnp.broadcast_to(at_step(diffusion.schedule.one_minus_alpha_bar, n, z.dtype), z.shape)
    grid = jnp.linspace(-1.0, 1.0, log_p.shape[-1], dtype=z.dtype)
    probability = jnp.exp(log_p)
    mean = probability @ grid
    return jnp.maximum((probability * jnp.square(grid - mean[..., None])).sum(-1), 0)


def _product(a: Float[Array, "i j"], b: Float[Array, "j k"]) -> Float[Array, "i k"]:
    return jnp.matmul(a, b, precision="highest")


def _positive(matrix: Float[Array, "i i"]) -> Float[Array, "i i"]:
    """The nearest symmetric positive semi-definite matrix."""
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return _product(vectors * jnp.maximum(values, 0), vectors.T)
