r"""The uncertainty of x_0 at each step, measured on paths of the model itself: for twists that need a covariance of x_0 given z_n.

By Tweedie's formula of second order the derivative of the predicted mean gives this covariance,

    Cov[x_0 | z_n] = (1−ᾱ_n)/√ᾱ_n · ∂x̂_0/∂z_n = (1−ᾱ_n)/ᾱ_n · (I − √(1−ᾱ_n) ∂ε̂/∂z_n),

exactly so for the exact network. For a fitted network it is wrong where there is little signal: an error of the derivative of ε̂ by 1 % is multiplied by (1−ᾱ_n)/ᾱ_n, which is
400 at a log-SNR of −6. A covariance has no negative eigenvalue. Steps at which the formula gives a negative variance on some path of the model are marked, and the mean
squared error of the prediction is the variance to be used there.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from probdiff.chain.schedules import at_step
from probdiff.diffusion import Diffusion

PATHS = 32
SEED = 20_061  # the paths are those of the model, whatever the key of the particles


class Uncertainty(eqx.Module):
    """The variance of x_0 given z_n, on average over paths of the model.

    Attributes:
        variance: Mean squared error of the predicted x_0 in each dimension, shape ``(num_steps, dim)``, step n at ``[n - 1]``.
        credible: Whether the derivative of the network gave no negative variance, in a random direction, on any path, shape ``(num_steps,)``.
    """

    variance: Float[Array, "num_steps dim"]
    credible: Bool[Array, "num_steps"]


def predicted_x0(diffusion: Diffusion, z: Float[Array, "dim"], n: Int[Array, ""]) -> Float[Array, "dim"]:
    r""":math:`\hat x_0`, the mean of x_0 that the network predicts from z_n, shape ``(dim,)``."""
    signal, noise = (at_step(table, n, z.dtype) for table in (diffusion.schedule.signal_scale, diffusion.schedule.noise_scale))
    return (z - noise * diffusion.predict_noise(z, n)) / signal


@eqx.filter_jit
def measure_uncertainty(diffusion: Diffusion) -> Uncertainty:
    """The :class:`Uncertainty` of a model, from a few paths of its reverse chain; at about three evaluations of the network for each path and step."""
    dim, num_steps = diffusion.dim, diffusion.schedule.num_steps
    assert dim is not None
    key = jax.random.key(SEED)

    def one(z: Float[Array, "dim"], probe: Float[Array, "dim"], n: Int[Array, ""], key: PRNGKeyArray) -> tuple[Array, tuple[Array, Array]]:
        x0, change = jax.jvp(lambda z: predicted_x0(diffusion, z, n), (z,), (probe,))
        return diffusion.reverse_kernel(z, n).sample(key), (x0, probe @ change < 0)

    def step(z: Float[Array, "path dim"], n: Int[Array, ""]) -> tuple[Array, tuple[Array, Array]]:
        step_key, probe_key = jax.random.split(jax.random.fold_in(key, n))
        probes = jax.random.normal(probe_key, z.shape, z.dtype)
        return jax.vmap(one, (0, 0, None, 0))(z, probes, n, jax.random.split(step_key, PATHS))

    first = jax.vmap(diffusion.kernel.prior((dim,)).sample)(jax.random.split(key, PATHS))
    _, (x0, negative) = jax.lax.scan(step, first, jnp.arange(num_steps, 0, -1))
    # (The prediction at n = 1 is x_0, but for the variance of the last step.)
    return Uncertainty(jnp.square(x0 - x0[-1]).mean(1)[::-1], ~negative.any(1)[::-1])
