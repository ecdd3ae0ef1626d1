r"""A fitted diffusion as the prior of a latent x in another NumPyro program.

    FlowPrior    a distribution with the density of the probability flow, for NUTS, SVI and every handler
    ChainPrior   the reverse chain itself, as a program whose sites are its noise: exact samples of p_θ(x) as the prior, with N + 1 times as many latents

The two are different models with the same network. ``FlowPrior`` is the distribution of x at the noise of the first step, transported from N(0, I) by an ordinary
differential equation; its differences from :math:`p_\theta` are reported by :func:`probdiff.flow_likelihood`. With either, NUTS
targets the posterior under that prior exactly, up to the error of the solver of the flow.

Sources: Song et al. (2021), arXiv:2011.13456, section 4.3, for the density of the flow; Papaspiliopoulos, Roberts and Sköld (2007), doi:10.1214/088342307000000014, for the noise as latents.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from probdiff._checks import AnyArray, PyTree, Whole, require, require_count, require_type
from probdiff.chain.schedules import at_step
from probdiff.diffusion import Diffusion
from probdiff.flow import in_continuous_time, solve, velocity
from probdiff.likelihoods import NormalLikelihood


class FlowTransform(Transform):
    """The map from z_N to x along the probability flow, and its inverse.

    Args:
        diffusion: The model, evaluated.
        steps: Number of steps of the solver, of equal length in log-SNR.
    """

    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector

    def __init__(self, diffusion: Diffusion, steps: int) -> None:
        self.diffusion: Diffusion = diffusion
        self.steps: int = steps

    def tree_flatten(self) -> tuple[Any, Any]:
        """The model is a child of the tree, the number of steps is static."""
        return (self.diffusion,), (("diffusion",), {"steps": self.steps})

    def __eq__(self, other: object) -> Any:
        """Whether another transform has the same model and steps."""
        return isinstance(other, FlowTransform) and self.diffusion is other.diffusion and self.steps == other.steps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """x in the user's units, from z_N of shape ``(*batch, dim)``."""
        return self._along(x, up=False)[0]

    def _inverse(self, y: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return self._along(y, up=True)[0]

    def log_abs_det_jacobian(
        self, x: Float[Array, "*batch dim"], y: Float[Array, "*batch dim"], intermediates: Any = None
    ) -> Float[Array, "*batch"]:
        """log |dx/dz_N|, shape ``batch``."""
        return -self._along(y, up=True)[1]

    def inverse_and_log_det(self, y: Float[Array, "*batch dim"]) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """z_N and log |dz_N/dx| by one solution."""
        return self._along(y, up=True)

    def _along(self, start: Float[Array, "*batch dim"], up: bool) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """The other end of the flow, and the log of the Jacobian determinant of the map."""
        schedule, likelihood = self.diffusion.schedule, self.diffusion.likelihood
        first, last = schedule.log_snr[[0, -1]].tolist()
        signal = at_step(schedule.signal_scale, jnp.ones((), jnp.int32), start.dtype)
        dim = start.shape[-1]
        scaling = likelihood.log_jacobian(dim) + dim * jnp.log(signal)
        eps = in_continuous_time(self.diffusion)
        directions = jnp.eye(dim, dtype=start.dtype)

        def field(time: Array, state: Any) -> tuple[Array, Array]:
            value, jvp = jax.linearize(lambda z: velocity(eps, z, time), state[0])
            return value, jnp.trace(jax.vmap(jvp)(directions))

        def one(start: Float[Array, "dim"]) -> tuple[Float[Array, "dim"], Float[Array, ""]]:
            zero = jnp.zeros((), start.dtype)
            ends = (first, last) if up else (last, first)
            begin = signal * likelihood.encode(start) if up else start
            (end, change), _ = solve(field, (begin, zero), *ends, rtol=1e-5, atol=1e-5, steps=self.steps)
            return (end, change + scaling) if up else (likelihood.decode(end / signal), change - scaling)

        return jnp.vectorize(one, signature="(d)->(d),()")(start)


class FlowPrior(dist.TransformedDistribution):
    r"""The density of the probability flow as a NumPyro distribution of x, shape ``(dim,)``, in the user's units.

    ``x = numpyro.sample("x", FlowPrior(fitted))`` in any program: under ``NUTS``, ``SVI`` with an AutoGuide, ``plate``, ``expand`` and ``Predictive``. It is a transform of
    N(0, I), so that ``numpyro.infer.reparam.TransformReparam`` samples in the space of z_N, where the posterior is better conditioned.

    The density is that of :math:`z_1/\sqrt{\bar\alpha_1}`, data with the noise :math:`\sigma_1` of the first step, with N(0, I) at z_N in place of
    :math:`q(z_N)`; :func:`probdiff.flow_likelihood` reports its errors. The divergence is exact, with ``dim`` Jacobian-vector products for each
    evaluation of the network, which suits small dimensions.

    Args:
        diffusion: A fitted model, with a :class:`~probdiff.NormalLikelihood`.
        steps: Number of steps of the solver (Heun's), of equal length in log-SNR; enough if twice as many change nothing.
        context: Of a conditional model: one row.

    Raises:
        ValueError, TypeError: If the model has no density, does not know its dimension, or an argument is out of range.

    Example:
        >>> import jax, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> prior = probdiff.inference.FlowPrior(diffusion, steps=5)
        >>> prior.sample(jax.random.key(0), (3,)).shape, prior.log_prob(jax.numpy.zeros((3, 2))).shape
        ((3, 2), (3,))
    """

    pytree_data_fields: tuple[str, ...] = ("base_dist", "transforms")

    def __init__(self, diffusion: Diffusion, *, steps: Whole = 50, context: PyTree = None, validate_args: bool | None = None) -> None:
        diffusion, dim = _with_density(diffusion, context)
        require_count("steps", steps)
        base = dist.Normal(jnp.zeros(dim), 1.0).to_event(1)
        super().__init__(base, [FlowTransform(diffusion, int(steps))], validate_args=validate_args)

    def log_prob(self, value: Float[AnyArray, "*batch dim"], intermediates: Any = None) -> Float[Array, "*batch"]:
        """The log density, nats, shape ``batch``; differentiable."""
        z, log_det = self.transforms[0].inverse_and_log_det(jnp.asarray(value))
        return self.base_dist.log_prob(z) + log_det


class ChainPrior:
    r"""The reverse chain as part of a program: its noise is the latent site, and x is a function of the noise (non-centred).

    ``with numpyro.handlers.scope(prefix="prior"): x = ChainPrior(fitted)()`` in any program. Sites: ``noise``, standard normal, shape ``(num_steps + 1, dim)``, the
    noise of z_n at ``[n]`` and of x at ``[0]``; ``deterministic`` ``x``, shape ``(dim,)``, in the user's units; under plates both have the axes of the plates in front,
    with an independent x for each index. The distribution of x is :math:`p_\theta(x)` itself. Each x has (N + 1) · dim latents, which suits short chains.

    Args:
        diffusion: A fitted model, with a :class:`~probdiff.NormalLikelihood` and Gaussian reverse steps.
        context: Of a conditional model: one row.

    Raises:
        ValueError, TypeError: If the model has no density or does not know its dimension, or its steps are not Gaussian.

    Example:
        >>> import jax, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> from numpyro import handlers
        >>> trace = handlers.trace(handlers.seed(probdiff.inference.ChainPrior(diffusion), 0)).get_trace()
        >>> {name: site["value"].shape for name, site in trace.items()}
        {'noise': (6, 2), 'x': (2,)}
    """

    def __init__(self, diffusion: Diffusion, *, context: PyTree = None) -> None:
        self.diffusion: Diffusion
        self.dim: int
        self.diffusion, self.dim = _with_density(diffusion, context)
        step = jax.eval_shape(lambda z: self.diffusion.reverse_kernel(z, 1), jnp.zeros(self.dim))
        gaussian = isinstance(step, dist.Independent) and isinstance(step.base_dist, dist.Normal)
        require(gaussian, "diffusion", "Gaussian reverse steps", self.diffusion.kernel.name)

    def __call__(self) -> Float[Array, "*plate dim"]:
        """Sample x, shape ``(*plate, dim)``, in the program that this is called in."""
        diffusion, num_steps = self.diffusion, self.diffusion.schedule.num_steps
        sampled = numpyro.sample("noise", dist.Normal(0, 1).expand([num_steps + 1, self.dim]).to_event(2))
        noise = jnp.moveaxis(sampled, -2, 0)

        def step(z: Float[Array, "*plate dim"], each: tuple[Array, Array]) -> tuple[Float[Array, "*plate dim"], None]:
            n, xi = each
            normal: Any = diffusion.reverse_kernel(z, n)
            return normal.base_dist.loc + normal.base_dist.scale * xi, None

        x0, _ = jax.lax.scan(step, noise[-1], (jnp.arange(1, num_steps + 1), noise[:-1]), reverse=True)
        return numpyro.deterministic("x", diffusion.likelihood.decode(x0))


def _with_density(diffusion: Diffusion, context: PyTree) -> tuple[Diffusion, int]:
    """The model prepared for evaluation, given one row of a context, and its dimension."""
    require_type("diffusion", diffusion, Diffusion)
    likelihood = type(diffusion.likelihood).__name__
    require(isinstance(diffusion.likelihood, NormalLikelihood), "diffusion", "a NormalLikelihood, for a density", likelihood, TypeError)
    require(diffusion.dim is not None, "diffusion", "one that knows its dimension: Diffusion(…, dim=…) or network.dim", None)
    assert diffusion.dim is not None
    given = diffusion.evaluated().given(context)
    given.require_context(1)
    return given, diffusion.dim


