r"""The reverse kernels :math:`p_\theta(z_{n-1} | z_n)`, whose parameters come from the prediction of a network.

Source: Ho et al. (2020), arXiv:2006.11239, eqs. 1, 5 and 7.
"""

import abc
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Real
from numpyro import distributions as dist

from probdiff._checks import AnyArray, Step, Whole, require_step
from probdiff.chain.schedules import AbstractSchedule, Table, TableByDim, array_module, at_dims, at_step
from probdiff.chain.variances import AbstractReverseVariance, named_variance, variance_name
from probdiff.likelihoods import AbstractLikelihood


class NoiseMoments(NamedTuple):
    """Conditional mean and variance of the noise in latents z_n, both shaped like the latents; where the noise is known, the variance is the number 0."""

    mean: Float[Array, "*batch dim"]
    variance: Float[Array, "*batch dim"] | float


def weighted_error(
    weight: TableByDim, n: Step, noise: NoiseMoments, eps_hat: Float[Array, "*batch dim"]
) -> Float[Array, "*batch"]:
    """The expected squared error of ``eps_hat``, given the conditional moments of the noise, times entry n of ``weight``; summed over the dimensions."""
    squared = jnp.square(noise.mean - eps_hat) + noise.variance
    return (at_dims(weight, n, eps_hat.dtype) * squared).sum(-1)


class SampledStep(NamedTuple):
    """Latents z_n of the forward chain, and the prediction of the network for them.

    Attributes:
        x, x0: Data, and the same encoded, shape ``(datum, dim)``.
        n: Steps, of shape ``(*batch, datum)`` or of one that broadcasts to it.
        z: Latents after n steps, shape ``(*batch, datum, dim)``.
        noise: :class:`NoiseMoments` of the noise in ``z``.
        prediction: The network's prediction of the quantity that the kernel needs, usually of the noise, shaped like ``z``.
        extra_noise: A function that gives standard normal noise shaped like ``z``, for a kernel whose KL is sampled.
    """

    x: Real[AnyArray, "datum dim"]
    x0: Float[AnyArray, "datum dim"]
    n: Step
    z: Float[Array, "*batch dim"]
    noise: NoiseMoments
    prediction: Float[Array, "*batch dim"] | Float[Array, "*batch dim level"]
    extra_noise: Callable[[], Float[Array, "*batch dim"]] | None


class AbstractKernel(eqx.Module):
    """The family of distributions of the reverse steps.

    To write your own, define ``prediction``, ``closed_form`` and the abstract methods: the programs need the first three, the analytic bound the others. The KL of
    step n is entry n of :meth:`constants`, which does not depend on the prediction, plus :meth:`excess`, which does.

    Attributes:
        prediction: The quantity that the network predicts: ``"noise"``, or the name of a method of the network (called like the network itself).
        closed_form: Whether :meth:`excess` is exact given z_n; otherwise it is an unbiased sample.
        is_estimated: Whether the kernel has variances that are computed from a network's errors (:meth:`with_squared_error`).

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> kernel: probdiff.chain.AbstractKernel = probdiff.chain.GaussianKernel("posterior")
        >>> schedule = probdiff.cosine_schedule(10)
        >>> kernel(schedule, jnp.zeros((3, 2)), jnp.zeros((3, 2)), 5).event_shape  # p(z_4 | z_5) where no noise is predicted
        (2,)
    """

    prediction: eqx.AbstractClassVar[str]
    closed_form: eqx.AbstractClassVar[bool]

    @property
    def name(self) -> str:
        """The kernel's name in messages and in run folders; by default, the name of its class."""
        return type(self).__name__

    @abc.abstractmethod
    def prior(self, shape: tuple[int, ...]) -> dist.Distribution:
        """N(0, I) as a distribution of the same class as the reverse steps, for latents of shape ``(*batch, dim)``."""

    @abc.abstractmethod
    def __call__(
        self,
        schedule: AbstractSchedule,
        z: Float[Array, "*batch dim"],
        prediction: Float[Array, "*batch dim"] | Float[Array, "*batch dim level"],
        n: Step,
    ) -> dist.Distribution:
        """The distribution of :math:`z_{n-1}` given :math:`z_n`, shape ``(*batch, dim)``, and the prediction; n of shape ``batch``."""

    @abc.abstractmethod
    def observation(self, likelihood: AbstractLikelihood, last: dist.Distribution) -> dist.Distribution:
        """The distribution of the data, given the distribution of the last reverse step."""

    @abc.abstractmethod
    def noise_free_reconstruction(
        self,
        schedule: AbstractSchedule,
        likelihood: AbstractLikelihood,
        x: Real[AnyArray, "datum column"],
        x0: Float[Array, "datum dim"],
    ) -> Float[Array, "datum"]:
        """The reconstruction term for a network that knows the noise, in nats, shape ``(datum,)``."""

    @abc.abstractmethod
    def excess(self, schedule: AbstractSchedule, step: SampledStep) -> Float[Array, "*batch"]:
        """The part of the KL of steps 2 … N that depends on the prediction, in nats, shape ``batch``; entries of n = 1 are not used."""

    @abc.abstractmethod
    def constants(self, schedule: AbstractSchedule, dim: int) -> Table:
        """The part of the KL of each step that does not depend on the prediction, 0 at n = 1, in nats, shape ``(num_steps,)``."""

    @abc.abstractmethod
    def kl_weight(self, schedule: AbstractSchedule) -> TableByDim:
        """The weight, at least approximate, of a squared error of the noise in the KL of each step, shape ``(num_steps,)`` or ``(num_steps, dim)``."""

    def step_kl(self, schedule: AbstractSchedule, step: SampledStep) -> Float[Array, "*batch"]:
        r"""KL of one reverse step, :math:`KL[q(z_{n-1} | z_n, x_0) \| p_\theta(z_{n-1} | z_n)]`, 2 ≤ n ≤ N.

        Returns:
            Nats, summed over ``dim``, shape ``batch``; exact given z_n if :attr:`closed_form`.
        """
        constant = at_step(self.constants(schedule, step.x0.shape[-1]), step.n, step.x0.dtype)
        return constant + self.excess(schedule, step)

    def check_parts(self, network: Callable[..., Any], likelihood: AbstractLikelihood) -> None:
        """Refuse a network or a likelihood that the kernel does not suit."""

    @property
    def is_estimated(self) -> bool:
        """Whether :meth:`with_squared_error` changes anything."""
        return False

    def with_squared_error(self, squared_error: Float[Array, "num_steps"]) -> "AbstractKernel":
        """The kernel with variances computed from the network's mean squared error per dimension at each step, shape ``(num_steps,)``."""
        return self


class GaussianKernel(AbstractKernel):
    r"""Gaussian reverse steps.

    :math:`p_\theta(z_{n-1} | z_n) = N(\mu_\theta, v_n I)` with
    :math:`\mu_\theta = (z_n - \beta_n / \sqrt{1-\bar\alpha_n}\, \hat\epsilon) / \sqrt{\alpha_n}`. The step n = 1 is the
    Gaussian from which the likelihood is made, with :math:`v_1 = \beta_1` for every reverse variance.
    Source: Ho et al. (2020), arXiv:2006.11239, section 3.2 and eq. 11.

    Args:
        reverse_variance: :math:`v_n`: an :class:`~probdiff.chain.AbstractReverseVariance`, or one of the names in
            :mod:`probdiff.chain.variances`.
        schedule: The noise schedule; ``"learned"`` and ``"optimal"`` start from it.
        dim: Dimension of the data; for ``"learned"``.

    Raises:
        ValueError: If the name of the reverse variance is not known, or it needs a ``schedule`` or ``dim`` that is missing.

    Example:
        >>> import numpy as np, probdiff
        >>> schedule = probdiff.cosine_schedule(10)
        >>> np.allclose(probdiff.chain.GaussianKernel("forward").variance(schedule)[1:], schedule.beta[1:])
        True
    """

    reverse_variance: AbstractReverseVariance
    closed_form: ClassVar[bool] = True
    prediction: ClassVar[str] = "noise"

    def __init__(
        self,
        reverse_variance: AbstractReverseVariance | str,
        schedule: AbstractSchedule | None = None,
        dim: Whole | None = None,
    ) -> None:
        if not isinstance(reverse_variance, AbstractReverseVariance):
            reverse_variance = named_variance(reverse_variance, schedule, dim)
        self.reverse_variance = reverse_variance

    def prior(self, shape: tuple[int, ...]) -> dist.Distribution:
        """N(0, I) as a distribution of the same class as the reverse steps, for latents of shape ``(*batch, dim)``."""
        return dist.Normal(jnp.zeros(shape), jnp.ones(shape[-1:])).to_event(1)

    def variance(self, schedule: AbstractSchedule) -> TableByDim:
        r"""The table :math:`v_n`, shape ``(num_steps,)`` or, by dimension, ``(num_steps, dim)``."""
        xp, log_ratio = self._log_ratio(schedule)
        posterior, beta = (_columns(table, log_ratio) for table in (schedule.posterior_variance, schedule.beta))
        later = posterior[1:] * xp.exp(log_ratio[1:])
        return xp.concatenate([xp.broadcast_to(beta[:1], log_ratio[:1].shape), later])

    def __call__(
        self, schedule: AbstractSchedule, z: Float[Array, "*batch dim"], eps_hat: Float[Array, "*batch dim"], n: Step
    ) -> dist.Independent:
        r"""The distribution of :math:`z_{n-1}` given :math:`z_n` and the predicted noise.

        Args:
            schedule: The noise schedule.
            z: :math:`z_n`, shape ``(*batch, dim)``.
            eps_hat: Predicted noise, same shape.
            n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.
        """
        require_step(n, 1, schedule.num_steps)
        per_eps = at_step(schedule.beta / schedule.noise_scale, n, z.dtype)
        per_z = at_step(schedule.alpha**-0.5, n, z.dtype)
        loc = per_z[..., None] * (z - per_eps[..., None] * eps_hat)
        scale = jnp.sqrt(at_dims(self.variance(schedule), n, z.dtype))
        return dist.Normal(loc, jnp.broadcast_to(scale, (*scale.shape[:-1], z.shape[-1]))).to_event(1)

    def observation(self, likelihood: AbstractLikelihood, last: dist.Independent) -> dist.Distribution:
        """The distribution of the data, given the distribution of the last reverse step."""
        return likelihood(last.base_dist.loc, last.base_dist.scale)

    def noise_free_reconstruction(
        self,
        schedule: AbstractSchedule,
        likelihood: AbstractLikelihood,
        x: Real[AnyArray, "datum column"],
        x0: Float[Array, "datum dim"],
    ) -> Float[Array, "datum"]:
        """The reconstruction term for a network that knows the noise, log p(x | x_0, v_1), in nats, shape ``(datum,)``."""
        return likelihood(x0, at_step(schedule.beta**0.5, 1, x0.dtype)).log_prob(x)

    def excess(self, schedule: AbstractSchedule, step: SampledStep) -> Float[Array, "*batch"]:
        r"""The weighted squared error of the noise, in expectation given the moments of the noise; at n = 1, the squared error in the log-density of x_0.

        The KL of step n is :math:`w_n \|\epsilon - \hat\epsilon\|^2`, with
        :math:`w_n = \beta_n^2 / (2 v_n \alpha_n (1-\bar\alpha_n))`, plus
        :math:`\tfrac{d}{2} (\tilde\beta_n / v_n - 1 - \log \tilde\beta_n / v_n)`; both are sums over the dimensions if
        :math:`v_n` depends on the dimension. It is computed from :math:`\epsilon - \hat\epsilon`: the difference of the two means would cancel in float32.
        Source: Ho et al. (2020), arXiv:2006.11239, eqs. 8 to 12.
        """
        return weighted_error(self.kl_weight(schedule), step.n, step.noise, step.prediction)

    def kl_weight(self, schedule: AbstractSchedule) -> TableByDim:
        r"""The table :math:`w_n`, shape ``(num_steps,)`` or, by dimension, ``(num_steps, dim)``.

        :math:`w_1 = 1 / (2 \alpha_1)` is the weight of the squared error in the log-density of x_0.
        """
        variance = self.variance(schedule)
        factor = schedule.beta**2 / (2 * schedule.alpha * schedule.one_minus_alpha_bar)
        return _columns(factor, variance) / variance

    def constant(self, schedule: AbstractSchedule) -> TableByDim:
        """The KL per dimension of a step whose noise is predicted exactly (0 at n = 1), shaped like :meth:`kl_weight`."""
        xp, log_ratio = self._log_ratio(schedule)
        later = log_ratio[1:]
        return xp.concatenate([xp.zeros_like(log_ratio[:1]), (xp.expm1(-later) + later) / 2])

    def constants(self, schedule: AbstractSchedule, dim: int) -> Table:
        """:meth:`constant`, summed over ``dim`` dimensions, shape ``(num_steps,)``."""
        constant = self.constant(schedule)
        return constant.sum(-1) if constant.ndim == 2 else constant * dim

    def _log_ratio(self, schedule: AbstractSchedule) -> tuple[ModuleType, TableByDim]:
        """log(v_n / β̃_n), and the array module for it."""
        log_ratio = self.reverse_variance(schedule)
        return array_module(log_ratio, schedule.beta), log_ratio

    @property
    def name(self) -> str:
        """The name of the reverse variance."""
        return variance_name(self.reverse_variance)

    @property
    def is_estimated(self) -> bool:
        """Whether the reverse variance is estimated from the errors of a network."""
        return self.reverse_variance.is_estimated

    def with_squared_error(self, squared_error: Float[Array, "num_steps"]) -> "GaussianKernel":
        """The kernel with the reverse variance of least KL for these mean squared errors per dimension, shape ``(num_steps,)``."""
        return GaussianKernel(self.reverse_variance.with_squared_error(squared_error))


def _columns(table: Table, like: TableByDim) -> Table | Float[AnyArray, "num_steps #dim"]:
    """A table over steps, with an axis for the dimensions if ``like`` has one."""
    return table[:, None] if like.ndim == 2 else table
