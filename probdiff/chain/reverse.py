r"""The reverse kernels :math:`p_\theta(z_{n-1} | z_n)`: what the model makes of the network's prediction.

The mixture kernel is for data on a grid: every level that is still possible has a Gaussian of its own,

    p(z_{n−1} | z_n) = ∏_i Σ_v p(v | z_n) q(z_{n−1,i} | z_{n,i}, v)

with v the levels and p(v | z_n) from a :class:`~probdiff.networks.CategoricalHead`. A Gaussian kernel replaces the sum by one Gaussian
of the same mean, which costs nats where steps are few and the sum has several humps. For one dimension the mixture is exact, whatever
the number of steps. At n = 1 the level itself is drawn from p(v | z_1). Source of the idea, in discrete diffusion: Austin et al.
(2021), arXiv:2107.03006, section 3.3.
"""

import abc
import copy
from collections.abc import Callable
from types import ModuleType
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Real
from numpyro import distributions as dist
from numpyro.distributions.batch_util import promote_batch_shape

from probdiff._checks import AnyArray, Step, Whole, require, require_count, require_step
from probdiff.chain.schedules import AbstractSchedule, Table, TableByDim, array_module, at_dims, at_step
from probdiff.chain.variances import AbstractReverseVariance, named_variance, variance_name
from probdiff.likelihoods import AbstractLikelihood


class NoiseMoments(NamedTuple):
    """Conditional mean and variance of the noise in some z_n, shaped like them; the variance may be 0, where the noise is known."""

    mean: Float[Array, "*batch dim"]
    variance: Float[Array, "*batch dim"] | float


def weighted_error(
    weight: TableByDim, n: Step, noise: NoiseMoments, eps_hat: Float[Array, "*batch dim"]
) -> Float[Array, "*batch"]:
    """The squared error of ``eps_hat`` times entry n of ``weight``, in expectation over what is not known of the noise."""
    squared = jnp.square(noise.mean - eps_hat) + noise.variance
    return (at_dims(weight, n, eps_hat.dtype) * squared).sum(-1)


class SampledStep(NamedTuple):
    """Latents z_n of the forward chain, and what the network says there.

    Attributes:
        x, x0: Data, and the same encoded, shape ``(datum, dim)``.
        n: Steps, shape ``(*batch, datum)``, or what broadcasts to it.
        z: Latents after n steps, shape ``(*batch, datum, dim)``.
        noise: :class:`NoiseMoments` of the noise in ``z``.
        prediction: What the network predicts of what the kernel asks for; mostly the noise, shaped like ``z``.
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
    """The family of the reverse steps.

    To write your own, give what the programs need (:meth:`prior`, :meth:`__call__`, :meth:`observation`) and what the analytic bound
    needs (the KL of step n is :meth:`constants`, known exactly, plus :meth:`excess`, which depends on the prediction).

    Attributes:
        prediction: What the network is asked for: ``"noise"``, or the name of a method of the network (called like the network itself).
        closed_form: Whether :meth:`excess` is exact given z_n; otherwise it is an unbiased sample.
        is_estimated: Whether the kernel has variances that are computed from a network's errors (:meth:`with_squared_error`).
    """

    prediction: eqx.AbstractClassVar[str]
    closed_form: eqx.AbstractClassVar[bool]

    @property
    def name(self) -> str:
        """Name by which kernels of one class are told apart, in messages and in run folders."""
        return type(self).__name__

    @abc.abstractmethod
    def prior(self, shape: tuple[int, ...]) -> dist.Distribution:
        """N(0, I) as a distribution of the kernel's own kind, for latents of shape ``(*batch, dim)``."""

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
        """The distribution of the data, given that of the last reverse step."""

    @abc.abstractmethod
    def noise_free_reconstruction(
        self,
        schedule: AbstractSchedule,
        likelihood: AbstractLikelihood,
        x: Real[AnyArray, "datum column"],
        x0: Float[Array, "datum dim"],
    ) -> Float[Array, "datum"]:
        """The reconstruction if the noise were known, in nats, shape ``(datum,)``."""

    @abc.abstractmethod
    def excess(self, schedule: AbstractSchedule, step: SampledStep) -> Float[Array, "*batch"]:
        """The part of the KL of steps 2 … N that depends on the prediction, in nats, shape ``batch``; an entry of n = 1 is not looked at."""

    @abc.abstractmethod
    def constants(self, schedule: AbstractSchedule, dim: int) -> Table:
        """The rest of the KL of each step, 0 at n = 1, in nats, shape ``(num_steps,)``."""

    @abc.abstractmethod
    def kl_weight(self, schedule: AbstractSchedule) -> TableByDim:
        """About what a squared error of the noise costs at each step, shape ``(num_steps,)`` or ``(num_steps, dim)``."""

    def step_kl(self, schedule: AbstractSchedule, step: SampledStep) -> Float[Array, "*batch"]:
        r"""KL of one reverse step, :math:`KL[q(z_{n-1} | z_n, x_0) \| p_\theta(z_{n-1} | z_n)]`, 2 ≤ n ≤ N.

        Returns:
            Nats, summed over ``dim``, shape ``batch``; exact given z_n if :attr:`closed_form`.
        """
        constant = at_step(self.constants(schedule, step.x0.shape[-1]), step.n, step.x0.dtype)
        return constant + self.excess(schedule, step)

    def check_parts(self, network: Callable, likelihood: AbstractLikelihood) -> None:
        """Refuse a network or a likelihood that the kernel does not suit."""

    @property
    def is_estimated(self) -> bool:
        """Whether :meth:`with_squared_error` changes anything."""
        return False

    def with_squared_error(self, squared_error: Float[Array, "num_steps"]) -> "AbstractKernel":
        """The kernel with its variances from the network's mean squared error at each step, shape ``(num_steps,)``."""
        return self


class GaussianKernel(AbstractKernel):
    r"""Gaussian reverse steps.

    :math:`p_\theta(z_{n-1} | z_n) = N(\mu_\theta, v_n I)` with
    :math:`\mu_\theta = (z_n - \beta_n / \sqrt{1-\bar\alpha_n}\, \hat\epsilon) / \sqrt{\alpha_n}`. At n = 1 it is the
    Gaussian that the likelihood reads, with :math:`v_1 = \beta_1` whatever the reverse variance.
    Source: Ho et al. (2020), arXiv:2006.11239, section 3.2 and eq. 11.

    Args:
        reverse_variance: :math:`v_n`: an :class:`~probdiff.chain.AbstractReverseVariance`, or one of the names in
            :mod:`probdiff.chain.variances`.
        schedule: The noise schedule; ``"learned"`` and ``"optimal"`` start from it.
        dim: Dimension of the data; for ``"learned"``.
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
        """N(0, I) as a distribution of the kernel's own kind, for latents of shape ``(*batch, dim)``."""
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
        """The distribution of the data, given that of the last reverse step."""
        return likelihood(last.base_dist.loc, last.base_dist.scale)

    def noise_free_reconstruction(
        self,
        schedule: AbstractSchedule,
        likelihood: AbstractLikelihood,
        x: Real[AnyArray, "datum column"],
        x0: Float[Array, "datum dim"],
    ) -> Float[Array, "datum"]:
        """The reconstruction if the noise were known, log p(x | x_0, v_1), shape ``(datum,)``."""
        return likelihood(x0, at_step(schedule.beta**0.5, 1, x0.dtype)).log_prob(x)

    def excess(self, schedule: AbstractSchedule, step: SampledStep) -> Float[Array, "*batch"]:
        r"""The weighted error of the noise, in expectation over what is not known of it; at n = 1, the error in the density of x_0.

        The KL of step n is :math:`w_n \|\epsilon - \hat\epsilon\|^2`, with
        :math:`w_n = \beta_n^2 / (2 v_n \alpha_n (1-\bar\alpha_n))`, plus
        :math:`\tfrac{d}{2} (\tilde\beta_n / v_n - 1 - \log \tilde\beta_n / v_n)` where the variances differ; by dimension, if
        :math:`v_n` is. Computed from :math:`\epsilon - \hat\epsilon`: the difference of the two means would cancel in float32.
        Source: Ho et al. (2020), arXiv:2006.11239, eqs. 8 to 12.
        """
        return weighted_error(self.kl_weight(schedule), step.n, step.noise, step.prediction)

    def kl_weight(self, schedule: AbstractSchedule) -> TableByDim:
        r"""The table :math:`w_n`, shape ``(num_steps,)`` or, by dimension, ``(num_steps, dim)``.

        At n = 1 it weighs the squared error in the log-density of x_0: :math:`w_1 = 1 / (2 \alpha_1)`.
        """
        variance = self.variance(schedule)
        factor = schedule.beta**2 / (2 * schedule.alpha * schedule.one_minus_alpha_bar)
        return _columns(factor, variance) / variance

    def constant(self, schedule: AbstractSchedule) -> TableByDim:
        """The KL per dimension of a step whose noise is predicted exactly (0 at n = 1), shaped like :meth:`kl_weight`."""
        xp, log_ratio = self._log_ratio(schedule)
        return (xp.expm1(-log_ratio) + log_ratio) / 2

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
        """Whether the reverse variance is."""
        return self.reverse_variance.is_estimated

    def with_squared_error(self, squared_error: Float[Array, "num_steps"]) -> "GaussianKernel":
        """The kernel with the reverse variance that is best for errors of this size."""
        return GaussianKernel(self.reverse_variance.with_squared_error(squared_error))


class StepMixture(dist.MixtureSameFamily):
    """NumPyro's mixture, which ``scan`` can stack."""


@promote_batch_shape.register
def _promote_mixture(d: StepMixture) -> StepMixture:
    parts = promote_batch_shape(d.mixing_distribution), promote_batch_shape(d.component_distribution)
    promoted = copy.copy(d)
    promoted._mixing_distribution, promoted._component_distribution = parts
    promoted._batch_shape = parts[0].batch_shape
    return promoted


class MixtureKernel(AbstractKernel):
    """Mixture reverse steps; the network must be a :class:`~probdiff.networks.CategoricalHead` of as many levels.

    Its KL has no closed form: the analytic bound has a sampled log-ratio in its place, unbiased and labelled as sampled.

    Args:
        levels: Number of levels L.
    """

    levels: int = eqx.field(static=True)
    closed_form: ClassVar[bool] = False
    prediction: ClassVar[str] = "log_probabilities"

    def __init__(self, levels: Whole) -> None:
        require_count("levels", levels)
        self.levels = int(levels)

    def prior(self, shape: tuple[int, ...]) -> dist.Distribution:
        """N(0, I) as a distribution of the kernel's own kind, for latents of shape ``(*batch, dim)``: equal parts."""
        shape = (*shape, self.levels)
        return _mixture(jnp.full(shape, -jnp.log(self.levels)), jnp.zeros(shape), jnp.ones(shape))

    def __call__(
        self,
        schedule: AbstractSchedule,
        z: Float[Array, "*batch dim"],
        log_probabilities: Float[Array, "*batch dim level"],
        n: Step,
    ) -> dist.Independent:
        r"""The distribution of :math:`z_{n-1}` given :math:`z_n` and the probabilities of the levels.

        Args:
            schedule: The noise schedule.
            z: :math:`z_n`, shape ``(*batch, dim)``.
            log_probabilities: log p(v | z_n) of every level, the network's prediction, shape ``(*z.shape, levels)``.
            n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``; at n = 1, where
                :math:`q(z_0 | z_1, v)` has no width, one Gaussian of variance β_1 for each level.
        """
        require_step(n, 1, schedule.num_steps)
        xp = array_module(schedule.beta)
        previous_signal = xp.concatenate([xp.ones(1), schedule.signal_scale[:-1]])
        variance = xp.concatenate([schedule.beta[:1], schedule.posterior_variance[1:]])
        tables = (
            previous_signal * schedule.beta / schedule.one_minus_alpha_bar,
            schedule.alpha**0.5 * schedule.posterior_variance / schedule.beta,
            variance**0.5,
        )
        from_level, from_z, scale = (at_step(table, n, z.dtype)[..., None, None] for table in tables)
        loc = from_level * self._grid(z.dtype) + from_z * z[..., None]
        return _mixture(log_probabilities, loc, jnp.broadcast_to(scale, loc.shape))

    def observation(self, likelihood: AbstractLikelihood, last: dist.Independent) -> dist.Distribution:
        """The distribution of the data: each level with its probability, independent over the dimensions."""
        return dist.Categorical(logits=last.base_dist.mixing_distribution.logits).to_event(1)

    def noise_free_reconstruction(
        self,
        schedule: AbstractSchedule,
        likelihood: AbstractLikelihood,
        x: Real[AnyArray, "datum column"],
        x0: Float[Array, "datum dim"],
    ) -> Float[Array, "datum"]:
        """The reconstruction if the level were known: 0, shape ``(datum,)``."""
        return jnp.zeros(len(x0), x0.dtype)

    def excess(self, schedule: AbstractSchedule, step: SampledStep) -> Float[Array, "*batch"]:
        r"""An unbiased sample of the KL of step n, shape ``batch``; it may be negative.

        Given z_n, to see z_{n−1} is to see x_0 once more, with precision SNR_{n−1} − SNR_n. So with ξ the noise of
        :math:`z_{n-1} \sim q(z_{n-1} | z_n, x_0)` and :math:`\delta_v = \sqrt{SNR_{n-1} - SNR_n}\,(x_0 - v)`, the log-ratio is
        :math:`-\log \sum_v p(v | z_n) \exp(-\delta_v \xi - \delta_v^2 / 2)` in each dimension.
        """
        assert step.extra_noise is not None
        x0, xp = step.x0, array_module(schedule.log_snr)
        snr = xp.exp(schedule.log_snr)
        gained = snr[:-1] * -xp.expm1(schedule.log_snr[1:] - schedule.log_snr[:-1])
        root = at_step(xp.concatenate([xp.zeros(1), gained]) ** 0.5, step.n, x0.dtype)[..., None, None]
        offset = root * (x0[..., None] - self._grid(x0.dtype))
        xi = step.extra_noise()[..., None]
        return -jax.nn.logsumexp(step.prediction - offset * (xi + offset / 2), -1).sum(-1)

    def kl_weight(self, schedule: AbstractSchedule) -> TableByDim:
        r"""About what a squared error of the noise costs: that of Gaussian steps, shape ``(num_steps,)``."""
        return GaussianKernel("posterior").kl_weight(schedule)

    def constants(self, schedule: AbstractSchedule, dim: int) -> Table:
        """Zeros: a network that knows the level leaves no KL."""
        return array_module(schedule.beta).zeros(schedule.num_steps)

    def check_parts(self, network: Callable, likelihood: AbstractLikelihood) -> None:
        """Refuse a network that has no probabilities of as many levels, and a likelihood of other data."""
        for name, part, expected in (("network", network, "CategoricalHead"), ("likelihood", likelihood, "DiscretizedNormalLikelihood")):
            levels = getattr(part, "levels", None)
            got = f"a {type(part).__name__} of {levels}" if levels else f"a {type(part).__name__}"
            require(levels == self.levels, name, f"a {expected} of {self.levels} levels for this MixtureKernel", got)

    def _grid(self, dtype: DTypeLike) -> Float[Array, "level"]:
        return jnp.linspace(-1.0, 1.0, self.levels, dtype=dtype)


def _mixture(
    logits: Float[Array, "*batch dim level"], loc: Float[Array, "*batch dim level"], scale: Float[Array, "*batch dim level"]
) -> dist.Independent:
    return StepMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale)).to_event(1)


def _columns(table: Table, like: TableByDim) -> Table | Float[AnyArray, "num_steps #dim"]:
    """A table over steps, with an axis for the dimensions if ``like`` has one."""
    return table[:, None] if like.ndim == 2 else table
