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
import numpy as np

from probdiff.elbo import log_likelihood, prior_kl
from probdiff.schedules import at_step


@dataclasses.dataclass(frozen=True)
class Shortfall:
    """The terms of the bound, as a :class:`~probdiff.objective.StepObjective` takes them."""

    def weight(self, diffusion):
        """The table w_n that squared errors are weighed with, shape ``(num_steps,)``, float64."""
        return diffusion.kernel.weight(diffusion.schedule)

    def ceiling(self, diffusion, x, x0):
        """The bound of a network that knew the noise, in nats, shape ``(datum,)``."""
        constant = diffusion.kernel.constant(diffusion.schedule).sum() * x0.shape[-1]
        return _reconstruction_ceiling(diffusion, x, x0) - constant - prior_kl(diffusion.schedule, x0)

    def __call__(self, diffusion, x, x0, n, z, noise, eps_hat):
        """What term n lacks to its ceiling, in nats.

        Args:
            diffusion: The model.
            x, x0: Data, and the same encoded, shape ``(datum, dim)``.
            n: Step, shape ``(row, datum)``.
            z: Latent after n steps, shape ``(row, datum, dim)``.
            noise: A :class:`NoiseMoments` of the noise in ``z``.
            eps_hat: Its prediction, shaped like ``z``.

        Returns:
            Shape ``(row, datum)``.
        """
        first = _reconstruction_ceiling(diffusion, x, x0) - log_likelihood(diffusion, x, z, n, eps_hat)
        return jnp.where(n == 1, first, weighted_error(self.weight(diffusion), n, noise, eps_hat))


def weighted_error(weight, n, noise, eps_hat):
    """The squared error of ``eps_hat``, times entry n of ``weight``, in expectation over what is not known of the noise."""
    squared_error = jnp.square(noise.mean - eps_hat).sum(-1) + noise.variance
    return at_step(weight, n, eps_hat.dtype) * squared_error


def _reconstruction_ceiling(diffusion, x, x0):
    scale = jnp.asarray(np.sqrt(diffusion.kernel.variance(diffusion.schedule)[0]), x0.dtype)
    return diffusion.likelihood(x0, scale).log_prob(x)


class NoiseMoments(eqx.Module):
    """What is known of the noise in z_n.

    Attributes:
        mean: Shape ``(row, datum, dim)``.
        variance: Trace of the covariance, shape ``(row, datum)``; 0 where the noise itself is known.
    """

    mean: jax.Array
    variance: jax.Array


def sampled_noise(schedule, z, n, eps):
    """The noise that ``z`` was made from: a mean without variance."""
    return NoiseMoments(eps, jnp.zeros(n.shape, z.dtype))


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
        signal = at_step(np.sqrt(schedule.alpha_bar), n, z.dtype)
        noise = at_step(np.sqrt(schedule.one_minus_alpha_bar), n, z.dtype)

        def moments(row):
            z, signal, noise = row
            candidates = (z - signal * self.points) / noise
            squared = jnp.square(candidates).sum(-1)
            probability = jax.nn.softmax(-squared / 2)
            mean = probability @ candidates
            return mean, probability @ jnp.square(candidates - mean).sum(-1)

        rows = z.reshape(-1, z.shape[-1]), signal.ravel(), noise.ravel()
        batch_size = max(1, 2**22 // self.points.size)
        mean, variance = jax.lax.map(jax.checkpoint(moments), rows, batch_size=batch_size)
        return NoiseMoments(mean.reshape(z.shape), variance.reshape(n.shape))
