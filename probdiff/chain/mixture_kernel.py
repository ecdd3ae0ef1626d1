r"""The mixture reverse kernel for data on a grid: every level that is still possible has a Gaussian of its own.

    p(z_{n−1} | z_n) = ∏_i Σ_v p(v | z_n) q(z_{n−1,i} | z_{n,i}, v)

with v the levels and p(v | z_n) from a :class:`~probdiff.CategoricalHead`. A Gaussian kernel replaces the sum by one Gaussian of the same
mean, which costs nats where steps are few and the sum has several humps. For one dimension the mixture is exact, whatever the number of
steps. At n = 1 the level itself is drawn from p(v | z_1). Source of the idea, in discrete diffusion: Austin et al. (2021),
arXiv:2107.03006, section 3.3.
"""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.distributions.batch_util import promote_batch_shape

from probdiff._checks import require_count, require_step
from probdiff.chain.reverse import GaussianKernel
from probdiff.chain.schedules import array_module, at_step


class StepMixture(dist.MixtureSameFamily):
    """NumPyro's mixture, which ``scan`` can stack."""


@promote_batch_shape.register
def _promote_mixture(d: StepMixture):
    parts = promote_batch_shape(d.mixing_distribution), promote_batch_shape(d.component_distribution)
    promoted = copy.copy(d)
    promoted._mixing_distribution, promoted._component_distribution = parts
    promoted._batch_shape = parts[0].batch_shape
    return promoted


class MixtureKernel(eqx.Module):
    """Mixture reverse steps; the network must be a :class:`~probdiff.CategoricalHead` of as many levels.

    Its KL has no closed form: the analytic bound has a sampled log-ratio in its place, unbiased and labelled as sampled.

    Args:
        levels: Number of levels L.
    """

    levels: int
    closed_form = False

    def __init__(self, levels):
        require_count("levels", levels)
        self.levels = int(levels)

    def prior(self, shape):
        """N(0, I) as a distribution of the kernel's own kind, for latents of shape ``(*batch, dim)``: equal parts."""
        shape = (*shape, self.levels)
        return _mixture(jnp.full(shape, -jnp.log(self.levels)), jnp.zeros(shape), jnp.ones(shape))

    def predict(self, network, z, n, key=None):
        """What the kernel wants to know of the network: log p(v | z_n) of every level, shape ``(*z.shape, levels)``."""
        network = network if key is not None else eqx.nn.inference_mode(network)
        return network.log_probabilities(z, jnp.broadcast_to(jnp.asarray(n, jnp.int32), z.shape[:-1]), key=key)

    def __call__(self, schedule, z, log_probabilities, n):
        r"""The distribution of :math:`z_{n-1}` given :math:`z_n` and the probabilities of the levels.

        Args:
            schedule: The noise schedule.
            z: :math:`z_n`, shape ``(*batch, dim)``.
            log_probabilities: What :meth:`predict` gave.
            n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``; at n = 1, where
                :math:`q(z_0 | z_1, v)` has no width, one Gaussian of variance β_1 for each level.
        """
        require_step(n, 1, schedule.num_steps)
        xp = array_module(schedule.beta)
        previous_signal = xp.concatenate([xp.ones(1), schedule.signal[:-1]])
        variance = xp.concatenate([schedule.beta[:1], schedule.posterior_variance[1:]])
        tables = (
            previous_signal * schedule.beta / schedule.one_minus_alpha_bar,
            schedule.alpha**0.5 * schedule.posterior_variance / schedule.beta,
            variance**0.5,
        )
        from_level, from_z, scale = (at_step(table, n, z.dtype)[..., None, None] for table in tables)
        loc = from_level * self._grid(z.dtype) + from_z * z[..., None]
        return _mixture(log_probabilities, loc, jnp.broadcast_to(scale, loc.shape))

    def observation(self, likelihood, last):
        """The distribution of the data: each level with its probability, independent over the dimensions."""
        return dist.Categorical(logits=last.base_dist.mixing_distribution.logits).to_event(1)

    def ceiling(self, schedule, likelihood, x, x0):
        """The reconstruction if the level were known: 0, shape ``(datum,)``."""
        return jnp.zeros(len(x0), x0.dtype)

    def shortfall(self, schedule, x0, noise, z, log_probabilities, n, more):
        r"""An unbiased sample of the KL of step n, shape ``batch``; it may be negative.

        Given z_n, to see z_{n−1} is to see x_0 once more, with precision SNR_{n−1} − SNR_n. So with ξ the noise of
        :math:`z_{n-1} \sim q(z_{n-1} | z_n, x_0)` and :math:`\delta_v = \sqrt{SNR_{n-1} - SNR_n}\,(x_0 - v)`, the log-ratio is
        :math:`-\log \sum_v p(v | z_n) \exp(-\delta_v \xi - \delta_v^2 / 2)` in each dimension.

        Args:
            schedule: The noise schedule.
            x0: Encoded data, shape ``(*batch, dim)``.
            noise: Not needed here.
            z: Not needed here.
            log_probabilities: What :meth:`predict` gave.
            n: Step, 2 ≤ n ≤ N; an entry for n = 1 means nothing.
            more: A function that gives ξ, shaped like ``x0``.
        """
        xp = array_module(schedule.log_snr)
        snr = xp.exp(schedule.log_snr)
        gained = snr[:-1] * -xp.expm1(schedule.log_snr[1:] - schedule.log_snr[:-1])
        root = at_step(xp.concatenate([xp.zeros(1), gained]) ** 0.5, n, x0.dtype)[..., None, None]
        offset = root * (x0[..., None] - self._grid(x0.dtype))
        xi = more()[..., None]
        return -jax.nn.logsumexp(log_probabilities - offset * (xi + offset / 2), -1).sum(-1)

    def weight(self, schedule):
        r"""About what a squared error of the noise costs: that of Gaussian steps, shape ``(num_steps,)``."""
        return GaussianKernel("posterior").weight(schedule)

    def constants(self, schedule, dim):
        """Zeros: a network that knows the level leaves no KL."""
        return array_module(schedule.beta).zeros(schedule.num_steps)

    def _grid(self, dtype):
        return jnp.linspace(-1.0, 1.0, self.levels, dtype=dtype)


def _mixture(logits, loc, scale):
    return StepMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale)).to_event(1)
