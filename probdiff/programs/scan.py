r"""A diffusion model as a pair of NumPyro programs, which ``scan`` along the chain.

    guide            q(z_1:N | x_0)      z_1 | x_0, then z_n | z_{n-1}: the forward noising chain
    posterior_guide  q(z_1:N | x_0)      the same distribution after Bayes' rule: z_N | x_0, then z_{n-1} | z_n, x_0
    model            p_θ(x, z_1:N)       z_N, then z_{n-1} | z_n for n = N … 2, then x | z_1

One pattern serves every program that runs in the model's order: a ``scan`` over n = N … 1 whose carry is the
*distribution* of the next latent. The last carry of the model is the distribution from which the likelihood is made, so that N latents cost N
evaluations of the network.
"""

import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Float, Int
from numpyro import distributions as dist
from numpyro.contrib.control_flow import scan

from probdiff.chain.forward import forward_marginal, forward_posterior, forward_step
from probdiff.chain.schedules import AbstractSchedule
from probdiff.programs.sites import AbstractDiffusion, Data, ForwardStep, NoGivenPath, Size, minibatch, require_plates


def model(diffusion: AbstractDiffusion, x: Data | None, num_data: Size | None = None) -> Data:
    """The reverse chain.

    Args:
        diffusion: The Diffusion.
        x: Data as the user has it, shape ``(datum, dim)``, or None to generate.
        num_data: Size of the full data set, of which ``x`` is a minibatch: log densities are scaled by
            ``num_data / len(x)``. With ``x=None``, the number of data to draw.

    Returns:
        The data, shape ``(datum, dim)``: ``x`` itself, or the draws.
    """
    require_plates(None)
    size, dim = diffusion.data_shape(x, num_data)
    diffusion = diffusion.with_param_site()

    def step(next_z: dist.Distribution, n: Int[Array, ""]) -> tuple[dist.Distribution, None]:
        with numpyro.plate("data", size):
            z = numpyro.sample("z", next_z)
        return diffusion.reverse_kernel(z, n, diffusion.training_key(x)), None

    with minibatch(x, num_data):
        last, _ = scan(step, diffusion.kernel.prior((size, dim)), _descending_steps(diffusion.schedule))
        with numpyro.plate("data", size):
            return numpyro.sample("x", diffusion.kernel.observation(diffusion.likelihood, last), obs=x)


def guide(diffusion: AbstractDiffusion, x: Data | None, num_data: Size | None = None) -> None:
    """The forward chain, z_1 first. It refuses given values for ``z`` (see :func:`posterior_guide`).

    Arguments as for :func:`model`; ``x`` is required.
    """
    require_plates(None)
    size, x0 = diffusion.encode(x)
    schedule = diffusion.guide_schedule()

    def step(z_prev: Float[Array, "datum dim"], n: Int[Array, ""]) -> tuple[Float[Array, "datum dim"], None]:
        q = forward_step(schedule, z_prev, n).base_dist
        with numpyro.plate("data", size):
            z = numpyro.sample("z", ForwardStep(q.loc, q.scale).to_event(1))
        return z, None

    # The steps ascend here; ``reverse=True`` over descending steps stacks the site in the model's order.
    with minibatch(x, num_data), NoGivenPath():
        scan(step, x0, _descending_steps(schedule), reverse=True)


def posterior_guide(diffusion: AbstractDiffusion, x: Data | None, num_data: Size | None = None) -> None:
    """The forward chain after Bayes' rule, in the model's order; the guide for ``TraceMeanField_ELBO``.

    Arguments as for :func:`model`; ``x`` is required.
    """
    require_plates(None)
    size, x0 = diffusion.encode(x)
    schedule = diffusion.guide_schedule()

    def step(next_z: dist.Distribution, n: Int[Array, ""]) -> tuple[dist.Distribution, None]:
        with numpyro.plate("data", size):
            z = numpyro.sample("z", next_z)
        return forward_posterior(schedule, z, x0, n), None

    with minibatch(x, num_data):
        scan(step, forward_marginal(schedule, x0, schedule.num_steps), _descending_steps(schedule))


def _descending_steps(schedule: AbstractSchedule) -> Int[Array, "num_steps"]:
    return jnp.arange(schedule.num_steps, 0, -1)
