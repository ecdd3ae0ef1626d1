r"""The bound as a ceiling, known exactly, minus what the network falls short of it at every step.

A network that knew the noise, :math:`\hat\epsilon = \epsilon`, would attain

    ceiling(x) = − prior KL − Σ_{n≥2} d · constant_n + log p(x | x_0, v_1),

which has no sampling error. What is left is one positive term per step (at n = 1: nearly always positive on a grid),

    shortfall_n = w_n ‖ε − ε̂(z_n, n)‖²   (n ≥ 2, and n = 1 under a normal likelihood),

and the bound is L(x) = ceiling(x) − Σ_n E shortfall_n. Every estimator of the analytic bound is a way to estimate that
sum; large constants such as the log-density of a peaked p(x | z_1) never get into its variance.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp

from probdiff.chain.reverse import NoiseMoments
from probdiff.chain.schedules import at_step
from probdiff.elbo.terms import log_likelihood, prior_kl


@dataclasses.dataclass(frozen=True)
class Shortfall:
    """The terms of the bound, as a :class:`~probdiff.elbo.objective.StepObjective` takes them."""

    def weight(self, diffusion):
        """The table w_n that squared errors are weighed with, shape ``(num_steps,)``, float64."""
        return diffusion.kernel.weight(diffusion.schedule)

    def ceiling(self, diffusion, x, x0):
        """The bound of a network that knew the noise, in nats, shape ``(datum,)``."""
        constant = diffusion.kernel.constants(diffusion.schedule, x0.shape[-1]).sum()
        return self._reconstruction(diffusion, x, x0) - constant - prior_kl(diffusion.schedule, x0)

    def __call__(self, diffusion, x, x0, n, z, noise, prediction, more):
        """What term n lacks to its ceiling, in nats.

        Args:
            diffusion: The model.
            x, x0: Data, and the same encoded, shape ``(datum, dim)``.
            n: Step, shape ``(row, datum)``.
            z: Latent after n steps, shape ``(row, datum, dim)``.
            noise: A :class:`NoiseMoments` of the noise in ``z``.
            prediction: What the kernel wanted to know of the network; mostly the predicted noise, shaped like ``z``.
            more: A function that gives noise shaped like ``z``, for a kernel whose KL is sampled.

        Returns:
            Shape ``(row, datum)``.
        """
        first = self._reconstruction(diffusion, x, x0) - log_likelihood(diffusion, x, z, n, prediction)
        later = diffusion.kernel.shortfall(diffusion.schedule, x0, noise, z, prediction, n, more)
        return jnp.where(n == 1, first, later)


    def _reconstruction(self, diffusion, x, x0):
        return diffusion.kernel.ceiling(diffusion.schedule, diffusion.likelihood, x, x0)


def sampled_noise(schedule, z, n, eps):
    """The noise that ``z`` was made from: a mean without variance."""
    return NoiseMoments(eps, 0.0)


class PosteriorNoise(eqx.Module):
    r"""The noise given z_n alone, when x_0 is one of finitely many points: its mean and variance over all of them.

    :math:`E\|\epsilon - \hat\epsilon\|^2 = \|E[\epsilon | z] - \hat\epsilon\|^2 + tr Var[\epsilon | z]` in expectation over
    the points, so that the term keeps its mean over the set (not over a single datum) and loses the variance that
    comes from which point z was made of. It costs ``len(points)`` squared distances for each network evaluation.

    Args:
        points: Encoded data, shape ``(point, dim)``.
    """

    points: jax.Array

    def __call__(self, schedule, z, n, eps):
        """The :class:`NoiseMoments` of ``z``; ``eps`` is not looked at."""
        signal = at_step(schedule.signal, n, z.dtype)
        noise = at_step(schedule.noise, n, z.dtype)

        def moments(row):
            z, signal, noise = row
            candidates = (z - signal * self.points) / noise
            squared = jnp.square(candidates).sum(-1)
            probability = jax.nn.softmax(-squared / 2)
            mean = probability @ candidates
            return mean, probability @ jnp.square(candidates - mean)

        rows = z.reshape(-1, z.shape[-1]), signal.ravel(), noise.ravel()
        batch_size = max(1, 2**22 // self.points.size)
        mean, variance = jax.lax.map(jax.checkpoint(moments), rows, batch_size=batch_size)
        return NoiseMoments(mean.reshape(z.shape), variance.reshape(z.shape))
