"""An estimator of one's own, by name: two steps for each datum, n and N + 1 − n, as far from each other as they can be on average."""

import jax
import jax.numpy as jnp

import probdiff


class MirroredSteps(probdiff.elbo.AbstractSteps):
    """A uniform step n, and N + 1 − n."""

    def num_rows(self, num_steps):
        """Two terms for each datum."""
        return 2

    def draw(self, key, size, num_steps, probability=None):
        """Steps and their inverse probabilities, shape ``(2, size)``: each step is in each row with probability 1/N."""
        n = jax.random.randint(key, (size,), 1, num_steps + 1)
        return jnp.stack([n, num_steps + 1 - n]), jnp.full((2, size), num_steps / 2)


def kl_mirrored(diffusion, **options):
    """The guide and the ELBO, as every estimator gives them."""
    elbo = probdiff.AnalyticELBO(diffusion, MirroredSteps(), **options)
    return elbo.guide, elbo


probdiff.ESTIMATORS["kl_mirrored"] = kl_mirrored
