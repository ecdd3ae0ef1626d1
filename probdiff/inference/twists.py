r"""Twists: approximations of p(y | z_n), by which particles are guided and weighted before the observation is reached.

The estimate of the evidence is unbiased for every twist; with a good twist the weights vary little. ``"tweedie"`` approximates x_0 given z_n by a normal, with the mean
:math:`\hat x_0` that the network predicts and the covariance from its derivative, by Tweedie's formula of second order,

    Cov[x_0 | z_n] = (1−ᾱ_n)/√ᾱ_n · ∂x̂_0/∂z_n,

which is exact for the exact network of any data. For normal data the twist is then p(y | z_n) itself. Where the derivatives of a fitted network
cannot be right, a variance that is measured on paths of the model replaces them (:mod:`probdiff.inference.uncertainty`).

Sources: twisted proposals, Wu et al. (2023), arXiv:2306.17775, section 3; the covariance in a twist of this form, Boys et al. (2023), arXiv:2310.06721, section 3.
"""

import abc
import contextlib
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpyro import distributions as dist

from probdiff._checks import is_concrete, require
from probdiff.chain.schedules import at_step
from probdiff.diffusion import Diffusion
from probdiff.inference.observations import AbstractObservation
from probdiff.inference.uncertainty import Uncertainty, measure_uncertainty, predicted_x0
from probdiff.likelihoods import Categories

MOST_VALUES = 16  # values of y, for a covariance by as many vector-Jacobian products
TINY = 1e-6  # of the variance of the noise: a covariance of rank less than its size has eigenvalues 0


class Twisted(NamedTuple):
    """The value of a twist at one particle.

    Attributes:
        log_prob: The approximation of log p(y | z_n), nats.
        gradient: The gradient in z_n along which proposals are shifted, shape ``(dim,)``.
    """

    log_prob: Float[Array, ""]
    gradient: Float[Array, "dim"]


class AbstractTwist(eqx.Module):
    """An approximation of p(y | z_n).

    To write your own, define :meth:`__call__`.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> observation = probdiff.inference.LinearGaussian([[1.0, -1.0]], y=[0.4], scale=0.5)
        >>> twist: probdiff.inference.AbstractTwist = probdiff.inference.TweedieTwist()
        >>> twist(diffusion, observation, jnp.zeros(2), 3).gradient.shape
        (2,)
    """

    @abc.abstractmethod
    def __call__(self, diffusion: Diffusion, observation: AbstractObservation, z: Float[Array, "dim"], n: Int[Array, ""]) -> Twisted:
        """The twist at a particle ``z`` after n steps, 1 ≤ n ≤ N."""

    def adapted(self, diffusion: Diffusion, observation: AbstractObservation) -> "AbstractTwist":
        """The twist with its measurements of a model, made once, before any particles are drawn; here the twist itself."""
        return self

    def evaluations(self, observation: AbstractObservation, dim: int) -> int:
        """The approximate cost for one particle in evaluations of the network, gradients included."""
        return 3


class NoTwist(AbstractTwist):
    """The constant 1: particles are weighted by y at the last step only (the bootstrap filter).

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> observation = probdiff.inference.LinearGaussian([[1.0, -1.0]], y=[0.4], scale=0.5)
        >>> probdiff.inference.NoTwist()(diffusion, observation, jnp.zeros(2), 3).log_prob.item()
        0.0
    """

    def __call__(self, diffusion: Diffusion, observation: AbstractObservation, z: Float[Array, "dim"], n: Int[Array, ""]) -> Twisted:
        """0 nats."""
        return Twisted(jnp.zeros((), z.dtype), jnp.zeros_like(z))

    def evaluations(self, observation: AbstractObservation, dim: int) -> int:
        """1."""
        return 1


class PointTwist(AbstractTwist):
    r"""p(y | x) at the predicted mean :math:`\hat x_0(z_n)` in place of x.

    While x_0 is uncertain this is far too narrow. If y is precise the weights can have an infinite variance: the estimate of the evidence is then
    unbiased in theory, and almost always 0 in practice. An observation without noise has no such density.
    Source: Wu et al. (2023), arXiv:2306.17775, eq. 8.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> observation = probdiff.inference.LinearGaussian([[1.0, -1.0]], y=[0.4], scale=0.5)
        >>> found = probdiff.inference.PointTwist()(diffusion, observation, jnp.zeros(2), 3).log_prob  # the mean of x_0 given z_3 = 0 is 0
        >>> round(found.item(), 3) == round(observation.log_prob(jnp.zeros(2)).item(), 3)
        True
    """

    def __call__(self, diffusion: Diffusion, observation: AbstractObservation, z: Float[Array, "dim"], n: Int[Array, ""]) -> Twisted:
        """The log density and its gradient, through the network."""

        def log_prob(z: Float[Array, "dim"]) -> Float[Array, ""]:
            return observation.log_prob(diffusion.likelihood.unrounded(predicted_x0(diffusion, z, n)))

        return Twisted(*jax.value_and_grad(log_prob)(z))


class DiagonalTwist(AbstractTwist):
    r"""p(y | z_n) with the dimensions of x_0 independent given z_n, for long y: one evaluation of the network and no derivative, for any number of values of y.

    Each dimension has the network's mean. With a :class:`~probdiff.networks.CategoricalHead` its distribution is over the levels, otherwise normal with variance
    :math:`1-\bar\alpha_n`, as if the data were standard normal. By Tweedie's formula the derivative of the mean is then diagonal as well: a change of z_n by δ
    multiplies the distribution of x_0 by :math:`\exp(\delta \sqrt{\bar\alpha_n}/(1-\bar\alpha_n)\, x_0)`, and the gradient is that of the twist under such a tilt. For :class:`~probdiff.inference.Inpainting` it shifts
    observed coordinates as if x_0 were y there, which is correct, and the network moves the hidden coordinates, given all of them. The dependence of coordinates given
    z_n is neglected in the weights, whose variance is larger for it; the estimate of the evidence is unbiased nevertheless.

    For Inpainting no matrix is computed.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import probdiff
        >>> from probdiff.inference import DiagonalTwist, Inpainting, smc
        >>> schedule = probdiff.log_snr_schedule(10, 4.0, -4.0)
        >>> diffusion = probdiff.Diffusion(schedule, probdiff.oracles.GaussianOracle([0.0] * 40, np.eye(40)).network(schedule))
        >>> observation = Inpainting(np.arange(40) < 30, np.zeros(40))
        >>> smc(diffusion, observation, key=jax.random.key(0), num_particles=4, twist=DiagonalTwist()).samples.shape
        (4, 40)
    """

    def __call__(self, diffusion: Diffusion, observation: AbstractObservation, z: Float[Array, "dim"], n: Int[Array, ""]) -> Twisted:
        """The log density of y, and the gradient through its mean."""
        log_p = _log_probabilities(diffusion, z, n)
        x0, variance = _moments(diffusion, z, n, log_p)

        def log_prob(tilt: Float[Array, "dim"]) -> Float[Array, ""]:
            """log p(y) with the distribution of x_0 multiplied by exp(tilt · x_0), nats."""
            mean = x0 + variance * tilt
            if log_p is None:
                of_x = diffusion.likelihood(mean, jnp.sqrt(variance + _last_variance(diffusion, z)))
            else:
                of_x = _of_levels(diffusion, log_p + tilt[:, None] * _grid(log_p))
            last = observation.last_step(of_x)
            if last is not None:
                return last.log_prob
            of_y = _linearised(diffusion, observation, mean)
            covariance = jax.lax.stop_gradient(_product(of_y.slope * variance, of_y.slope.T) + of_y.noise)
            return dist.MultivariateNormal(of_y.loc, covariance).log_prob(of_y.value)

        value, gradient = jax.value_and_grad(log_prob)(jnp.zeros_like(z))
        schedule = diffusion.schedule
        return Twisted(value, at_step(schedule.signal_scale / schedule.one_minus_alpha_bar, n, z.dtype) * gradient)

    def evaluations(self, observation: AbstractObservation, dim: int) -> int:
        """2, including the evaluation of the reverse kernel."""
        return 2


class TweedieTwist(AbstractTwist):
    r"""p(y | z_n) with x_0 given z_n normal, by the network's mean and covariance.

    The covariance of A x_0 is :math:`A C A^T`, by as many vector-Jacobian products of the network as y has values, symmetrised. At steps and particles where it cannot be a
    covariance, because the derivative of a fitted network is inaccurate, C is instead diagonal, with variances that :func:`smc` and the other functions measure before they
    draw particles; without a measurement negative eigenvalues are replaced by 0. The gradient is through the mean only. With more than 16 values of y the
    :class:`DiagonalTwist` takes its place.

    Args:
        uncertainty: The measured variances of the model; None in the twist that is passed to :func:`smc`.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> observation = probdiff.inference.LinearGaussian([[1.0, -1.0]], y=[0.4], scale=0.5)
        >>> wide, narrow = (twist()(diffusion, observation, jnp.zeros(2), 5).log_prob for twist in (probdiff.inference.TweedieTwist, probdiff.inference.PointTwist))
        >>> bool(wide < narrow)  # at y near the mean: the uncertainty of x_0 after five steps makes y less certain
        True
    """

    uncertainty: Uncertainty | None = None
    most_values: ClassVar[int] = MOST_VALUES

    def adapted(self, diffusion: Diffusion, observation: AbstractObservation) -> AbstractTwist:
        """The twist with the uncertainty of a model."""
        assert diffusion.dim is not None
        if self._is_long(observation, diffusion.dim):
            return self
        constant = all(map(is_concrete, jax.tree.leaves(diffusion)))
        with jax.ensure_compile_time_eval() if constant else contextlib.nullcontext():  # not again each time that a program is run
            return TweedieTwist(measure_uncertainty(diffusion))

    def __call__(self, diffusion: Diffusion, observation: AbstractObservation, z: Float[Array, "dim"], n: Int[Array, ""]) -> Twisted:
        """The log density of y, and the gradient through its mean."""
        if self._is_long(observation, len(z)):
            return DiagonalTwist()(diffusion, observation, z, n)
        x0, from_z = jax.vjp(lambda z: predicted_x0(diffusion, z, n), z)
        of_y = _linearised(diffusion, observation, x0)
        rows = jax.vmap(lambda row: from_z(row)[0])(of_y.slope)
        ratio = at_step(diffusion.schedule.one_minus_alpha_bar / diffusion.schedule.signal_scale, n, z.dtype)
        covariance = ratio * _product(rows, of_y.slope.T)
        covariance = (covariance + covariance.T) / 2
        if self.uncertainty is None:
            covariance = _positive(covariance)
        else:
            own, positive = at_step(self.uncertainty.variance, n, z.dtype), jnp.linalg.eigvalsh(covariance + TINY * of_y.noise)[0] > 0
            credible = positive & self.uncertainty.credible[n - 1]
            covariance = jnp.where(credible, covariance, _product(of_y.slope * own, of_y.slope.T))
            rows = jnp.where(credible, rows, of_y.slope * own / ratio)
        normal = dist.MultivariateNormal(of_y.loc, covariance + of_y.noise)
        weighted = jax.scipy.linalg.cho_solve((normal.scale_tril, True), of_y.value - of_y.loc)
        return Twisted(normal.log_prob(of_y.value), weighted @ rows)

    def evaluations(self, observation: AbstractObservation, dim: int) -> int:
        """1 for the prediction, and 2 for each vector-Jacobian product."""
        if self._is_long(observation, dim):
            return DiagonalTwist().evaluations(observation, dim)
        return 1 + 2 * jax.eval_shape(observation.mean, jnp.zeros(dim)).shape[0]

    def _is_long(self, observation: AbstractObservation, dim: int) -> bool:
        return jax.eval_shape(observation.mean, jnp.zeros(dim)).shape[0] > self.most_values


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


def _log_probabilities(diffusion: Diffusion, z: Float[Array, "dim"], n: Int[Array, ""]) -> Float[Array, "dim level"] | None:
    """log p(v | z_n) of the levels v of the data; None if the network does not predict their probabilities."""
    log_p = diffusion.log_probabilities(z, n)
    return None if log_p is None or log_p.shape[-1] != diffusion.likelihood.levels else log_p


def _grid(log_p: Float[Array, "dim level"]) -> Float[Array, "level"]:
    """The encoded levels."""
    return jnp.linspace(-1.0, 1.0, log_p.shape[-1], dtype=log_p.dtype)


def _of_levels(diffusion: Diffusion, logits: Float[Array, "dim level"]) -> dist.Distribution:
    """The distribution of x by the probabilities of its levels, independent over the dimensions."""
    with jax.ensure_compile_time_eval():
        values = np.asarray(diffusion.likelihood.decode(jnp.linspace(-1.0, 1.0, logits.shape[-1]))).tolist()
    return Categories(logits, tuple(values)).to_event(1)


def _moments(
    diffusion: Diffusion, z: Float[Array, "dim"], n: Int[Array, ""], log_p: Float[Array, "dim level"] | None
) -> tuple[Float[Array, "dim"], Float[Array, "dim"]]:
    """The mean of x_0 that the network predicts from z_n, and the approximate variance of each dimension."""
    if log_p is None:
        variance = at_step(diffusion.schedule.one_minus_alpha_bar, n, z.dtype)
        return predicted_x0(diffusion, z, n), jnp.broadcast_to(variance, z.shape)
    grid, probability = _grid(log_p), jnp.exp(log_p)
    mean = probability @ grid
    return mean, jnp.maximum((probability * jnp.square(grid - mean[..., None])).sum(-1), 0)


class _Linearised(NamedTuple):
    """y given x_0, linearised at a point: the observed ``value``, the mean there with its ``slope``, and the covariance of the ``noise``."""

    value: Float[Array, "observed"]
    loc: Float[Array, "observed"]
    slope: Float[Array, "observed dim"]
    noise: Float[Array, "observed observed"]


def _linearised(diffusion: Diffusion, observation: AbstractObservation, x0: Float[Array, "dim"]) -> _Linearised:
    """y given x_0, linearised at a point; the noise includes that of the last step, so that no covariance is singular."""

    def mean(x0: Float[Array, "dim"]) -> Float[Array, "observed"]:
        return observation.mean(diffusion.likelihood.unrounded(x0))

    x, slope = diffusion.likelihood.unrounded(x0), jax.jacrev(mean)(x0)
    noise = observation.covariance(x).astype(x0.dtype) + _last_variance(diffusion, x0) * _product(slope, slope.T)
    return _Linearised(observation.observed(x).astype(x0.dtype), mean(x0), slope, noise)


def _last_variance(diffusion: Diffusion, z: Float[Array, "dim"]) -> Float[Array, ""]:
    """The variance of the last step."""
    return at_step(diffusion.schedule.beta, jnp.ones((), jnp.int32), z.dtype)


def _product(a: Float[Array, "i j"], b: Float[Array, "j k"]) -> Float[Array, "i k"]:
    return jnp.matmul(a, b, precision="highest")


def _positive(matrix: Float[Array, "i i"]) -> Float[Array, "i i"]:
    """The nearest symmetric positive semi-definite matrix."""
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return _product(vectors * jnp.maximum(values, 0), vectors.T)
