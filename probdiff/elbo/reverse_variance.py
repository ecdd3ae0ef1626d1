"""The best reverse variances for a given network, from its mean squared errors on data."""

import equinox as eqx
import jax
import jax.numpy as jnp

from probdiff._checks import require, require_count, require_key, require_type
from probdiff._chunks import inputs_at_once
from probdiff.diffusion import Diffusion


def optimal_variance(diffusion, x, *, key, num_draws=1):
    r"""Set the reverse variances of a model with ``reverse_variance="optimal"`` to the best for its network.

    Args:
        diffusion: The model.
        x: Data to estimate :math:`m_n = E\|\epsilon - \hat\epsilon\|^2 / d` from, of every step; those that the network was trained on, or
            held-out data. Shape ``(datum, dim)``.
        key: JAX key.
        num_draws: Draws of the noise for each step and datum.

    Returns:
        The Diffusion with these variances.

    Raises:
        ValueError: If the model has other reverse variances.
    """
    require_type("diffusion", diffusion, Diffusion)
    require(diffusion.kernel.is_estimated, "diffusion", "reverse_variance='optimal'", diffusion.kernel.name)
    diffusion.check_data(x)
    require_key(key)
    require_count("num_draws", num_draws)
    found = _squared_error(diffusion.evaluated(), jnp.asarray(x), key, num_draws)
    return diffusion.with_kernel(diffusion.kernel.with_squared_error(found))


@eqx.filter_jit
def _squared_error(diffusion, x, key, num_draws):
    """m_n of each step, shape ``(num_steps,)``."""
    x0 = diffusion.likelihood.encode(x)

    def one(n):
        eps = jax.random.normal(jax.random.fold_in(key, n), (num_draws, *x0.shape), x0.dtype)
        step = diffusion.sampled_step(x, x0, jnp.full(eps.shape[:-1], n), eps)
        return jnp.square(eps - step.prediction).mean()

    steps = jnp.arange(1, diffusion.schedule.num_steps + 1)
    return jax.lax.map(one, steps, batch_size=max(1, inputs_at_once(diffusion.network) // (len(x) * num_draws)))
