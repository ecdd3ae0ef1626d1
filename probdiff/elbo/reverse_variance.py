"""The reverse variances of least KL for a given network, from its mean squared errors on data.

Source: Bao et al. (2022), arXiv:2201.06503, theorem 1.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._checks import PyTree, Whole, require, require_count, require_key, require_type
from probdiff._chunks import over_steps
from probdiff.diffusion import Diffusion
from probdiff.programs.sites import Data


def optimal_variance(
    diffusion: Diffusion, x: Data, *, context: PyTree = None, key: PRNGKeyArray, num_draws: Whole = 1
) -> Diffusion:
    r"""Set the reverse variances of a model with ``reverse_variance="optimal"`` to the variances of least expected KL for its network.

    Args:
        diffusion: The model.
        x: Data from which :math:`m_n = E\|\epsilon - \hat\epsilon\|^2 / d` is estimated at every step: the training data of the network, or
            held-out data. Shape ``(datum, dim)``.
        context: Of a conditional model: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key.
        num_draws: Draws of the noise for each step and datum.

    Returns:
        The Diffusion with these variances.

    Raises:
        ValueError, TypeError: If the model has other reverse variances, or the data do not suit it.

    Example:
        >>> import jax, probdiff
        >>> schedule, network = probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8)
        >>> diffusion = probdiff.Diffusion(schedule, network, reverse_variance="optimal")
        >>> x = jax.random.normal(jax.random.key(1), (8, 2))
        >>> best = probdiff.elbo.optimal_variance(diffusion, x, key=jax.random.key(2))
        >>> best.kernel.reverse_variance.squared_error.shape
        (5,)
    """
    require_type("diffusion", diffusion, Diffusion)
    require(diffusion.kernel.is_estimated, "diffusion", "reverse_variance='optimal'", diffusion.kernel.name)
    given = diffusion.evaluated().given(context)
    x = given.read_data(x)
    require_key(key)
    require_count("num_draws", num_draws)
    found = _squared_error(given, jnp.asarray(x), key, int(num_draws))
    return diffusion.with_kernel(diffusion.kernel.with_squared_error(found))


@eqx.filter_jit
def _squared_error(diffusion: Diffusion, x: jax.Array, key: PRNGKeyArray, num_draws: int) -> Float[Array, "num_steps"]:
    """m_n of each step, shape ``(num_steps,)``."""
    x0 = diffusion.likelihood.encode(x)

    def one(n: Int[Array, ""]) -> Float[Array, ""]:
        eps = jax.random.normal(jax.random.fold_in(key, n), (num_draws, *x0.shape), x0.dtype)
        step = diffusion.sampled_step(x, x0, jnp.full(eps.shape[:-1], n), eps)
        return jnp.square(eps - step.prediction).mean()

    return over_steps(one, diffusion.schedule.num_steps, diffusion.network, len(x) * num_draws)
