r"""The bound as that of a network that knows the noise, minus the excess of every step over it.

A network that knew the noise, :math:`\hat\epsilon = \epsilon`, would attain

    noise_free_bound(x) = − prior KL − Σ_{n≥2} d · constant_n + log p(x | x_0, v_1),

which has no sampling error: the noise-free bound. What is left is one positive term per step (at n = 1: nearly always positive on a grid),

    excess_n = w_n ‖ε − ε̂(z_n, n)‖²   (n ≥ 2, and n = 1 under a normal likelihood),

and the bound is L(x) = noise_free_bound(x) − Σ_n E excess_n. Every estimator of the analytic bound is a way to estimate that
sum; large constants such as the log-density of a peaked p(x | z_1) never get into its variance.
"""

import dataclasses

import jax.numpy as jnp

from probdiff.chain.forward import prior_kl
from probdiff.elbo.objective import StepObjective


@dataclasses.dataclass(frozen=True)
class BoundTerm:
    """The terms of the bound, as a :class:`~probdiff.elbo.objective.StepObjective` takes them."""

    def kl_weight(self, diffusion):
        """The table w_n that squared errors are weighed with, shape ``(num_steps,)``, float64."""
        return diffusion.kernel.kl_weight(diffusion.schedule)

    def noise_free_bound(self, diffusion, x, x0):
        """The bound of a network that knew the noise, in nats, shape ``(datum,)``."""
        constant = diffusion.kernel.constants(diffusion.schedule, x0.shape[-1]).sum()
        return self._reconstruction(diffusion, x, x0) - constant - prior_kl(diffusion.schedule, x0)

    def __call__(self, diffusion, step):
        """The excess of the terms over the noise-free bound, in nats.

        Args:
            diffusion: The model.
            step: A :class:`~probdiff.chain.reverse.SampledStep` of steps n, shape ``(row, datum)``.

        Returns:
            Shape ``(row, datum)``.
        """
        first = self._reconstruction(diffusion, step.x, step.x0) - diffusion.log_likelihood(step)
        return jnp.where(step.n == 1, first, diffusion.kernel.excess(diffusion.schedule, step))

    def _reconstruction(self, diffusion, x, x0):
        return diffusion.kernel.noise_free_reconstruction(diffusion.schedule, diffusion.likelihood, x, x0)


class AnalyticELBO(StepObjective):
    """The analytic bound as an objective for ``SVI``, in the place of ``Trace_ELBO``: a :class:`StepObjective`.

    ``AnalyticELBO(diffusion, steps="all", *, noise=, control=, points=, adapt_to=, num_particles=, vectorize_particles=)``
    """

    term = BoundTerm()
