r"""Reverse steps for data on a grid: in each dimension a mixture of Gaussians, one for each level.

    p(z_{n−1} | z_n) = ∏_i Σ_v p(v | z_n) q(z_{n−1,i} | z_{n,i}, v)

where v runs over the levels, and p(v | z_n) comes from a :class:`~probdiff.networks.CategoricalHead`. A Gaussian kernel replaces the mixture by one Gaussian
of the same mean, which costs nats where steps are few and the mixture is multimodal. For data of one dimension and exact p(v | z_n) the mixture is exact
for any number of steps. At n = 1 the level itself is drawn from p(v | z_1). Source of the idea, in discrete diffusion: Austin et al.
(2021), arXiv:2107.03006, section 3.3.
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Real
from numpyro import distributions as dist
from numpyro.distributions.batch_util import promote_batch_shape

from probdiff._checks import AnyArray, Step, Whole, require, require_count, require_step
from probdiff.chain.reverse import AbstractKernel, GaussianKernel, SampledStep
from probdiff.chain.schedules import AbstractSchedule, Table, TableByDim, array_module, at_step
from probdiff.likelihoods import AbstractLikelihood


class StepMixture(dist.MixtureSameFamily):
    """NumPyro's mixture, with the promotion of batch shapes that ``scan`` needs."""


@promote_batch_shape.register
def _promote_mixture(d: StepMixture) -> StepMixture:
    parts = promote_batch_shape(d.mixing_distribution), promote_batch_shape(d.component_distribution)
    promoted = copy.copy(d)
    promoted._mixing_distribution, promoted._component_distribution = parts
    promoted._batch_shape = parts[0].batch_shape
    return promoted


class MixtureKernel(AbstractKernel):
    """Mixture reverse steps; the network must be a :class:`~probdiff.networks.CategoricalHead` of as many levels.

    The step KL has no closed form: in the analytic bound an unbiased sample of the log-ratio replaces it (``ELBOTerms.closed_form`` is False).

    Args:
        levels: Number of levels L.

    Raises:
        ValueError: If ``levels`` is not a positive integer.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> grid = probdiff.DiscretizedNormalLikelihood(4)
        >>> network = probdiff.networks.CategoricalHead(lambda z, n: z[..., None] * jnp.arange(4.0), levels=4)
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), network, grid, kernel=probdiff.chain.MixtureKernel(4))
        >>> probdiff.elbo_terms(diffusion, jnp.array([[0, 3]]), key=jax.random.key(0)).step_kl.shape
        (1, 4, 1)
    """

    levels: int = eqx.field(static=True)
    closed_form: ClassVar[bool] = False
    prediction: ClassVar[str] = "log_probabilities"

    def __init__(self, levels: Whole) -> None:
        require_count("levels", levels)
        self.levels = int(levels)

    def prior(self, shape: tuple[int, ...]) -> dist.Distribution:
        """N(0, I) as a mixture, for latents of shape ``(*batch, dim)``: L equal components."""
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
        """The distribution of the data: categorical over the levels, independent over the dimensions."""
        return dist.Categorical(logits=last.base_dist.mixing_distribution.logits).to_event(1)

    def noise_free_reconstruction(
        self,
        schedule: AbstractSchedule,
        likelihood: AbstractLikelihood,
        x: Real[AnyArray, "datum column"],
        x0: Float[Array, "datum dim"],
    ) -> Float[Array, "datum"]:
        """The reconstruction term for a network that knows the level: 0, shape ``(datum,)``."""
        return jnp.zeros(len(x0), x0.dtype)

    def excess(self, schedule: AbstractSchedule, step: SampledStep) -> Float[Array, "*batch"]:
        r"""An unbiased sample of the KL of step n, shape ``batch``; it may be negative.

        Given z_n, observing z_{n−1} is one more observation of x_0, of precision SNR_{n−1} − SNR_n. With ξ the noise of
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
        r"""The weight of a squared error of the noise under Gaussian steps, an approximation, in nats, shape ``(num_steps,)``."""
        return GaussianKernel("posterior").kl_weight(schedule)

    def constants(self, schedule: AbstractSchedule, dim: int) -> Table:
        """Zeros: the KL of a network that knows the level is 0. Shape ``(num_steps,)``."""
        return array_module(schedule.beta).zeros(schedule.num_steps)

    def check_parts(self, network: Callable[..., Any], likelihood: AbstractLikelihood) -> None:
        """Refuse a network that does not predict probabilities of as many levels, and a likelihood of data other than the levels 0 … L − 1."""
        for name, part, expected in (("network", network, "CategoricalHead"), ("likelihood", likelihood, "DiscretizedNormalLikelihood")):
            levels = getattr(part, "levels", None)
            got = f"a {type(part).__name__} of {levels}" if levels else f"a {type(part).__name__}"
            require(levels == self.levels, name, f"a {expected} of {self.levels} levels for this MixtureKernel", got)
        first = getattr(likelihood, "first", 0)
        require(first == 0, "likelihood", "levels from 0 for a MixtureKernel", f"levels from {first}: subtract it from the data")

    def _grid(self, dtype: DTypeLike) -> Float[Array, "level"]:
        return jnp.linspace(-1.0, 1.0, self.levels, dtype=dtype)


def _mixture(
    logits: Float[Array, "*batch dim level"], loc: Float[Array, "*batch dim level"], scale: Float[Array, "*batch dim level"]
) -> dist.Independent:
    return StepMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale)).to_event(1)
