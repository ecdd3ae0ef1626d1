r"""Gaussian reverse steps whose variance the network predicts, for each datum and each dimension.

    p_θ(z_{n−1} | z_n) = N(μ_θ, diag v),    log v = s log β_n + (1 − s) log β̃_n,    s = (r + 1)/2

with r the second output of the network, so that s = 0 at r = −1 and s = 1 at r = 1; r is not bounded. The mean is the mean of
:class:`~probdiff.chain.GaussianKernel`. Source: Nichol and Dhariwal (2021), arXiv:2102.09672, eq. 15, where v is called Σ_θ and s is called v.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Real
from numpyro import distributions as dist

from probdiff._checks import AnyArray, Step, Whole, require
from probdiff.chain.reverse import AbstractKernel, GaussianKernel, SampledStep
from probdiff.chain.schedules import AbstractSchedule, Table, array_module, at_step
from probdiff.chain.variances import REVERSE_VARIANCES, AbstractReverseVariance, ForwardVariance
from probdiff.likelihoods import AbstractLikelihood

PREDICTED = "predicted"

_AT_LEAST = GaussianKernel("posterior")  # the kernel of the same mean and of the least variance, β̃_n


class PredictedVarianceKernel(AbstractKernel):
    r"""Gaussian reverse steps of predicted variance; the network must be a :class:`~probdiff.networks.VarianceHead`.

    At n = 1, where :math:`\tilde\beta_1 = 0`, the variance from which the likelihood is made is predicted like the others, interpolated between
    :math:`\tilde\beta_2` and :math:`\beta_1`: it is not :math:`\beta_1` as under the other Gaussian kernels. Published
    networks were trained, and their bits per dimension reported, in this way: Nichol and Dhariwal (2021), arXiv:2102.09672, section 3.1, clip
    :math:`\tilde\beta_1` to :math:`\tilde\beta_2`. A chain of one step has :math:`v_1 = \beta_1`.

    The KL of a step is exact given z_n. No table :math:`w_n` (:meth:`kl_weight`) holds for all data, as the variance differs from datum to datum: the table for the
    least variance is used where any table gives an unbiased estimate, in the control variate and in the initial probabilities of the steps.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> head = probdiff.networks.VarianceHead(probdiff.MLP(2, key=jax.random.key(0), outputs=2))
        >>> schedule = probdiff.cosine_schedule(10)
        >>> diffusion = probdiff.Diffusion(schedule, head, kernel=probdiff.chain.PredictedVarianceKernel())
        >>> step = diffusion.reverse_kernel(jnp.zeros((3, 2)), 5)
        >>> bool(jnp.all((step.variance > schedule.posterior_variance[4]) & (step.variance < schedule.beta[4])))
        True
    """

    closed_form: ClassVar[bool] = True
    prediction: ClassVar[str] = "noise_and_share"

    @property
    def name(self) -> str:
        """``"predicted"``, as ``Diffusion(…, reverse_variance=…)`` takes it."""
        return PREDICTED

    def prior(self, shape: tuple[int, ...]) -> dist.Distribution:
        """N(0, I) for latents of shape ``(*batch, dim)``, with a variance for each datum and dimension."""
        return dist.Normal(jnp.zeros(shape), jnp.ones(shape)).to_event(1)

    def __call__(
        self, schedule: AbstractSchedule, z: Float[Array, "*batch dim"], prediction: Float[Array, "*batch dim 2"], n: Step
    ) -> dist.Independent:
        r"""The distribution of :math:`z_{n-1}` given :math:`z_n` and the prediction of the network.

        Args:
            schedule: The noise schedule.
            z: :math:`z_n`, shape ``(*batch, dim)``.
            prediction: The noise and s, in this order on the last axis, shape ``(*batch, dim, 2)``.
            n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.
        """
        eps_hat, share = prediction[..., 0], prediction[..., 1]
        span, largest = (at_step(table, n, z.dtype)[..., None] for table in (_span(schedule), schedule.beta**0.5))
        loc = _AT_LEAST(schedule, z, eps_hat, n).base_dist.loc
        return dist.Normal(loc, largest * jnp.exp((share - 1) * span / 2)).to_event(1)

    def observation(self, likelihood: AbstractLikelihood, last: dist.Independent) -> dist.Distribution:
        """The distribution of the data, given the distribution of the last reverse step."""
        return _AT_LEAST.observation(likelihood, last)

    def noise_free_reconstruction(
        self,
        schedule: AbstractSchedule,
        likelihood: AbstractLikelihood,
        x: Real[AnyArray, "datum column"],
        x0: Float[Array, "datum dim"],
    ) -> Float[Array, "datum"]:
        r"""The reconstruction term for a network that knows the noise, at the variance :math:`\beta_1`, in nats, shape ``(datum,)``."""
        return _AT_LEAST.noise_free_reconstruction(schedule, likelihood, x, x0)

    def excess(self, schedule: AbstractSchedule, step: SampledStep) -> Float[Array, "*batch"]:
        r"""The whole KL of step n, in nats, in expectation given the moments of the noise, shape ``batch``.

        With :math:`\rho_i = \log v_i/\tilde\beta_n` and :math:`w_n` the weight at variance :math:`\tilde\beta_n`, it is
        :math:`\sum_i w_n e^{-\rho_i} (\epsilon_i - \hat\epsilon_i)^2 + \tfrac12 (e^{-\rho_i} - 1 + \rho_i)`.
        Source: Nichol and Dhariwal (2021), arXiv:2102.09672, eqs. 4 to 6, for Gaussians.
        """
        eps_hat, share = step.prediction[..., 0], step.prediction[..., 1]
        tables = _AT_LEAST.kl_weight(schedule), ForwardVariance()(schedule)
        weight, span = (at_step(table, step.n, eps_hat.dtype)[..., None] for table in tables)
        squared = jnp.square(step.noise.mean - eps_hat) + step.noise.variance
        log_ratio = share * span
        return (weight * jnp.exp(-log_ratio) * squared + (jnp.expm1(-log_ratio) + log_ratio) / 2).sum(-1)

    def constants(self, schedule: AbstractSchedule, dim: Whole) -> Table:
        """Zeros: no part of a KL is independent of the predicted variance."""
        return array_module(schedule.beta).zeros(schedule.num_steps)

    def kl_weight(self, schedule: AbstractSchedule) -> Table:
        r"""The weight :math:`w_n` of a squared error of the noise at the least variance, shape ``(num_steps,)``."""
        return _AT_LEAST.kl_weight(schedule)

    def check_parts(self, network: Callable[..., Any], likelihood: AbstractLikelihood) -> None:
        """Refuse a network that predicts no variance."""
        predicts = hasattr(network, self.prediction)
        require(predicts, "network", "a VarianceHead for predicted variances", f"a {type(network).__name__}")


def named_kernel(
    reverse_variance: AbstractReverseVariance | str, schedule: AbstractSchedule | None, dim: Whole | None
) -> AbstractKernel:
    """The Gaussian kernel of a reverse variance: ``"predicted"``, or anything that :class:`~probdiff.chain.GaussianKernel` takes.

    Raises:
        ValueError: If the name of the reverse variance is not known.
    """
    if isinstance(reverse_variance, AbstractReverseVariance):
        return GaussianKernel(reverse_variance)
    names = [*REVERSE_VARIANCES, PREDICTED]
    known = isinstance(reverse_variance, str) and reverse_variance in names
    require(known, "reverse_variance", f"one of {names} or an AbstractReverseVariance", repr(reverse_variance))
    return PredictedVarianceKernel() if reverse_variance == PREDICTED else GaussianKernel(reverse_variance, schedule, dim)


def _span(schedule: AbstractSchedule) -> Table:
    r"""The log of the ratio of the largest variance to the least, :math:`\log \beta_n / \tilde\beta_n`, with :math:`\tilde\beta_2` for :math:`\tilde\beta_1`."""
    span = ForwardVariance()(schedule)
    if schedule.num_steps == 1:
        return span
    xp = array_module(span)
    return xp.concatenate([xp.log(schedule.beta[:1] / schedule.posterior_variance[1:2]), span[1:]])
