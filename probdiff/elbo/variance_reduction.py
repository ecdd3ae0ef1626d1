r"""Variance reduction for the analytic bound: how the noise is drawn, its conditional mean and variance given z_n, and a control variate.

Noise is drawn row by row, in pairs ε and −ε, or along one path of the forward chain; for a finite data set the mean and variance of the noise given
z_n are known. The control variate is the excess of the best linear prediction of the noise, whose expectation has a closed form.
For data of mean m and covariance :math:`S = U \mathrm{diag}(\lambda) U^T` the best linear :math:`\hat\epsilon` is, in the
basis U, :math:`a_n (z_n - \sqrt{\bar\alpha_n} m)` with
:math:`a_n = \sqrt{1-\bar\alpha_n} / (\bar\alpha_n \lambda + 1 - \bar\alpha_n)`. With that prediction

    E[w_n ‖ε − ε̂‖² | x_0] = w_n Σ_j [ (ᾱ_n λ_j / (ᾱ_n λ_j + 1 − ᾱ_n))² + a_nj² ᾱ_n (Uᵀ(x_0 − m))_j² ],

exact for *any* x_0, whether or not the data are Gaussian. So the moments may be taken from the batch at hand.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._chunks import MOST_NUMBERS
from probdiff.chain.reverse import NoiseMoments
from probdiff.chain.schedules import AbstractSchedule, at_step, per_step
from probdiff.diffusion import Diffusion

# Accelerators would round the factors to fewer bits, and the mean of the values would differ from its closed form.
_product = functools.partial(jnp.matmul, precision="highest")


class RowNoise(eqx.Module):
    """Independent noise for every row; with ``copies`` = 2, every second row has minus the noise of the row before."""

    key: jax.Array
    like: jax.Array
    copies: int = eqx.field(static=True)

    def __call__(self, rows: Int[Array, "row"]) -> Float[Array, "row datum dim"]:
        """Noise of some rows, shape ``(row, datum, dim)``."""

        def one(row: Int[Array, ""]) -> Float[Array, "datum dim"]:
            eps = jax.random.normal(jax.random.fold_in(self.key, row // self.copies), self.like.shape, self.like.dtype)
            return eps * (1 - 2 * (row % self.copies)).astype(eps.dtype)

        return jax.vmap(one)(rows)


class PathNoise(eqx.Module):
    """The noise in z_1 … z_N of one path of the forward chain: row r is step r + 1."""

    eps: jax.Array

    def __call__(self, rows: Int[Array, "row"]) -> Float[Array, "row datum dim"]:
        """Noise of some rows, shape ``(row, datum, dim)``."""
        return self.eps[rows]


class AbstractNoise(eqx.Module):
    """How the noise of the sampled terms is drawn.

    To write your own, define ``copies`` and :meth:`draw`.

    Attributes:
        copies: The number of consecutive rows with the same step.
        needs_all_steps: Whether the noise is drawn for all steps at once, in their order.

    Example:
        >>> import jax, probdiff
        >>> class MirroredNoise(probdiff.elbo.AbstractNoise):  # the second half of the data has the noise of the first, negated
        ...     copies = 1
        ...     def draw(self, key, schedule, x0):
        ...         half = lambda row: jax.random.normal(jax.random.fold_in(key, row), (len(x0) // 2, x0.shape[1]))
        ...         return jax.vmap(lambda row: jax.numpy.concatenate([half(row), -half(row)]))
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0 * z)
        >>> elbo = probdiff.AnalyticELBO(diffusion, noise=MirroredNoise())
        >>> elbo.loss(jax.random.key(1), {}, diffusion.model, diffusion.guide, jax.numpy.zeros((4, 2))).shape
        ()
    """

    copies: eqx.AbstractClassVar[int]
    needs_all_steps: ClassVar[bool] = False

    @abc.abstractmethod
    def draw(self, key: jax.Array, schedule: AbstractSchedule, x0: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """The noise of encoded data of shape ``(datum, dim)``: a function of row numbers, which gives shape ``(row, datum, dim)``."""


class IndependentNoise(AbstractNoise):
    """Independent noise for every term."""

    copies: ClassVar[int] = 1

    def draw(
        self, key: PRNGKeyArray, schedule: AbstractSchedule, x0: Float[Array, "datum dim"]
    ) -> Callable[[jax.Array], jax.Array]:
        """A :class:`RowNoise`."""
        return RowNoise(key, x0, self.copies)


class AntitheticNoise(IndependentNoise):
    """Each term twice, with ε and with −ε."""

    copies: ClassVar[int] = 2


class ForwardPathNoise(AbstractNoise):
    """The noise along one path z_1 … z_N of the forward chain."""

    copies: ClassVar[int] = 1
    needs_all_steps: ClassVar[bool] = True

    def draw(
        self, key: PRNGKeyArray, schedule: AbstractSchedule, x0: Float[Array, "datum dim"]
    ) -> Callable[[jax.Array], jax.Array]:
        """The chain z_n = √α_n z_{n−1} + √β_n ξ_n as a recursion for the noise: z_n = √ᾱ_n x_0 + √(1−ᾱ_n) ε_n."""
        # (Whatever the schedule, the noise of each step is standard normal: it has no gradient in expectation.)
        tables = (
            schedule.alpha * schedule.posterior_variance / schedule.beta,
            schedule.beta / schedule.one_minus_alpha_bar,
        )
        kept, added = (jax.lax.stop_gradient(jnp.asarray(table**0.5, x0.dtype)) for table in tables)

        def step(eps: jax.Array, each: Any) -> tuple[jax.Array, jax.Array]:
            kept, added, key = each
            eps = kept * eps + added * jax.random.normal(key, eps.shape, eps.dtype)
            return eps, eps

        keys = jax.random.split(key, schedule.num_steps)
        return PathNoise(jax.lax.scan(step, jnp.zeros_like(x0), (kept, added, keys))[1])


NOISE: dict[str, AbstractNoise] = {
    "independent": IndependentNoise(),
    "antithetic": AntitheticNoise(),
    "path": ForwardPathNoise(),
}


class PosteriorNoise(eqx.Module):
    r"""The noise given z_n alone, when x_0 is one of finitely many points: its mean and variance over all of them.

    :math:`E\|\epsilon - \hat\epsilon\|^2 = \|E[\epsilon | z] - \hat\epsilon\|^2 + tr Var[\epsilon | z]` in expectation over
    the points, so that the term keeps its mean over the set of points (not the mean for a single datum) and loses the variance
    from the choice of the point from which z was made. This costs ``len(points)`` squared distances for each network evaluation.

    Args:
        points: Encoded data, shape ``(point, dim)``.
        log_weight: Logarithm of the weight of each point, up to a constant, shape ``(point,)``, or ``(datum, point)`` where that depends on the datum of
            a batch ``(…, datum)``; 0 for equal weights.
    """

    points: jax.Array
    log_weight: Any = 0.0

    def __call__(
        self, schedule: AbstractSchedule, z: Float[Array, "*batch dim"], n: Int[Array, "*batch"]
    ) -> NoiseMoments:
        """The :class:`NoiseMoments` of ``z``, shape ``(*batch, dim)``, after ``n`` steps."""
        signal = at_step(schedule.signal_scale, n, z.dtype)
        noise = at_step(schedule.noise_scale, n, z.dtype)

        by_datum = jnp.ndim(self.log_weight) == 2

        def moments(row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            z, signal, noise, datum = row
            candidates = (z - signal * self.points) / noise
            squared = jnp.square(candidates).sum(-1)
            log_weight = self.log_weight[datum] if by_datum else self.log_weight
            probability = jax.nn.softmax(log_weight - squared / 2)
            mean = probability @ candidates
            return mean, probability @ jnp.square(candidates - mean)

        rows = z.reshape(-1, z.shape[-1]), signal.ravel(), noise.ravel(), jnp.arange(n.size) % z.shape[-2]
        batch_size = max(1, MOST_NUMBERS // self.points.size)
        mean, variance = jax.lax.map(jax.checkpoint(moments), rows, batch_size=batch_size)
        return NoiseMoments(mean.reshape(z.shape), variance.reshape(z.shape))


class AbstractControl(eqx.Module):
    """A control variate, fitted to one batch: a function that is correlated with the excess, and whose expectation is known.

    To write your own, define the three methods.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> class SquaredNoise(probdiff.elbo.AbstractControl):  # ‖ε‖², of mean dim
        ...     @classmethod
        ...     def fitted(cls, diffusion, x0):
        ...         return cls()
        ...     def value(self, z, n, eps):
        ...         return jnp.square(eps).sum(-1)
        ...     def expected(self, coefficient, x0):
        ...         return jnp.full(len(x0), x0.shape[1] * coefficient.sum())
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0 * z)
        >>> elbo = probdiff.AnalyticELBO(diffusion, control=SquaredNoise)
        >>> elbo.loss(jax.random.key(1), {}, diffusion.model, diffusion.guide, jnp.zeros((4, 2))).shape
        ()
    """

    @classmethod
    @abc.abstractmethod
    def fitted(cls, diffusion: Diffusion, x0: jax.Array) -> "AbstractControl":
        """The control variate for a batch of encoded data, shape ``(datum, dim)``."""

    @abc.abstractmethod
    def value(self, z: jax.Array, n: jax.Array, eps: jax.Array) -> jax.Array:
        """The control variate at ``z``, shape ``(*batch, dim)``, made from ``eps`` at steps n of shape ``batch``; shape ``batch``."""

    @abc.abstractmethod
    def expected(self, coefficient: jax.Array, x0: jax.Array) -> jax.Array:
        """Σ_n coefficient_n E[value | x_0, n], shape ``(datum,)``; ``coefficient`` of shape ``(num_steps,)``."""


class LinearControl(AbstractControl):
    """The excess of the best linear prediction of the noise.

    Attributes:
        mean, basis: Mean m, shape ``(dim,)``, and eigenvectors U of the covariance, shape ``(dim, dim)``, of the batch.
        gain: a_n, shape ``(num_steps, dim)``.
        noise_part: The part of E ‖ε − ε̂‖² without x_0, in the formula of the module, shape ``(num_steps,)``.
        data_part: The factor of (Uᵀ(x_0 − m))² there, shape ``(num_steps, dim)``.
        signal_scale, kl_weight: √ᾱ_n and w_n, shape ``(num_steps,)``.
    """

    mean: jax.Array
    basis: jax.Array
    gain: jax.Array
    noise_part: jax.Array
    data_part: jax.Array
    signal_scale: jax.Array
    kl_weight: jax.Array

    @classmethod
    def fitted(cls, diffusion: Diffusion, x0: Float[Array, "datum dim"]) -> "LinearControl":
        """The best linear prediction for the mean and the covariance of the batch."""
        return cls(diffusion, x0)

    def __init__(self, diffusion: Diffusion, x0: Float[Array, "datum dim"]) -> None:
        x0 = jax.lax.stop_gradient(x0)
        self.mean = x0.mean(0)
        centred = x0 - self.mean
        eigenvalues, self.basis = jnp.linalg.eigh(_product(centred.T, centred) / len(x0))
        schedule = diffusion.schedule
        alpha_bar, noise = (jnp.asarray(t, x0.dtype) for t in (schedule.alpha_bar, schedule.one_minus_alpha_bar))
        explained = alpha_bar[:, None] * jnp.maximum(eigenvalues, 0)
        self.gain = jnp.sqrt(noise)[:, None] / (explained + noise[:, None])
        self.noise_part = jnp.square(explained / (explained + noise[:, None])).sum(-1)
        self.data_part = jnp.square(self.gain) * alpha_bar[:, None]
        self.signal_scale = jnp.sqrt(alpha_bar)
        self.kl_weight = jnp.asarray(per_step(diffusion.kernel.kl_weight(schedule)), x0.dtype)

    def value(
        self, z: Float[Array, "*batch dim"], n: Int[Array, "*batch"], eps: Float[Array, "*batch dim"]
    ) -> Float[Array, "*batch"]:
        """w_n ‖ε − ε̂‖² at ``z``, shape ``(*batch, dim)``, made from ``eps``; n of shape ``batch``."""
        predicted = at_step(self.gain, n, z.dtype) * _product(
            z - self.signal_scale[n - 1][..., None] * self.mean, self.basis
        )
        return self.kl_weight[n - 1] * jnp.square(_product(eps, self.basis) - predicted).sum(-1)

    def expected(self, coefficient: Float[Array, "num_steps"], x0: Float[Array, "datum dim"]) -> Float[Array, "datum"]:
        """Σ_n coefficient_n E[w_n ‖ε − ε̂‖² | x_0], shape ``(datum,)``; ``coefficient`` of shape ``(num_steps,)``."""
        scaled = coefficient * self.kl_weight
        squares = jnp.square(_product(x0 - self.mean, self.basis))
        return _product(squares, _product(scaled, self.data_part)) + _product(scaled, self.noise_part)


CONTROLS: dict[str | None, type[AbstractControl] | None] = {None: None, "linear": LinearControl}
