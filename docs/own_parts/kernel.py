"""A user-defined reverse kernel: the network predicts the noise, and for each dimension the logarithm of the variance divided by β̃_n."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

import probdiff
from probdiff.chain.schedules import at_step


class TwoHeadedKernel(probdiff.chain.GaussianKernel):
    """N(μ, β̃_n exp(r)), with β_1 exp(r) at n = 1; the network's method ``noise_and_log_ratio`` gives the noise and r, on a last axis."""

    prediction: ClassVar[str] = "noise_and_log_ratio"

    def prior(self, shape):
        """N(0, I), with a scale for each datum as in the reverse steps, so that a scan can carry the distribution."""
        return dist.Normal(jnp.zeros(shape), jnp.ones(shape)).to_event(1)

    def __call__(self, schedule, z, prediction, n):
        """The Gaussian with variance β̃_n, its scale multiplied by exp(r / 2)."""
        normal = super().__call__(schedule, z, prediction[..., 0], n).base_dist
        return dist.Normal(normal.loc, normal.scale * jnp.exp(prediction[..., 1] / 2)).to_event(1)

    def excess(self, schedule, step):
        """The whole KL divergence: Σ [w_n e^{-r} (ε − ε̂)² + (e^{-r} − 1 + r) / 2] over the dimensions."""
        eps_hat, r = step.prediction[..., 0], step.prediction[..., 1]
        error = jnp.square(step.noise.mean - eps_hat) + step.noise.variance
        weight = at_step(self.kl_weight(schedule), step.n, r.dtype)[..., None]
        return (weight * jnp.exp(-r) * error + (jnp.expm1(-r) + r) / 2).sum(-1)

    def constants(self, schedule, dim):
        """Zero: no part of the KL divergence is known without the network."""
        return np.zeros(schedule.num_steps)
