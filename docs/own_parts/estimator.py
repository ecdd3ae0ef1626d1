"""A user-defined estimator, registered by name: an antithetic pair of steps for each datum, n and N + 1 − n."""

import jax
import jax.numpy as jnp

import probdiff


class MirroredSteps(probdiff.elbo.AbstractSteps):
    """A uniform step n, and its mirror image N + 1 − n."""

    def num_rows(self, num_steps):
        """Two terms for each datum."""
        return 2

    def draw(self, key, size, num_steps, probability=None):
        """Steps, and N/2, the inverse of how often each is drawn on average: with probability 1/N in each of two rows. Shape ``(2, size)`` each."""
        n = jax.random.randint(key, (size,), 1, num_steps + 1)
        return jnp.stack([n, num_steps + 1 - n]), jnp.full((2, size), num_steps / 2)


def kl_mirrored(diffusion, **options):
    """The guide and the ELBO, as for every estimator."""
    elbo = probdiff.AnalyticELBO(diffusion, MirroredSteps(), **options)
    return elbo.guide, elbo


probdiff.ESTIMATORS["kl_mirrored"] = kl_mirrored
