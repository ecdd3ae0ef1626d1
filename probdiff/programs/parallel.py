r"""The same three programs with one site per chain: all steps at once.

    guide            z ~ ForwardChain      q(z_1:N | x_0), step by step
    posterior_guide  z ~ PosteriorChain    the same distribution, by Bayes' rule
    model            z ~ ReverseChain      p_θ(z_1:N), then x | z_1

The programs of :mod:`probdiff.programs.scan` ``scan`` over the steps. Here a path of the forward chain is one associative scan (a
composition of affine maps), and for the density of a path under the reverse chain the network is evaluated at all steps at once. Sample sites and
parameters are the same, so that a guide of one module can be used with the model of the other. As no loop pairs values with steps,
the forward guide also accepts given values.

``log_prob`` of a chain gives its factors by the chain rule, shape ``(num_steps, datum)``, as the scanned site does; the log density of a path is their
sum.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real
from numpyro import distributions as dist
from numpyro.distributions import constraints

from probdiff._checks import AnyArray, require
from probdiff._chunks import checkpointed, inputs_at_once
from probdiff.chain.forward import forward_marginal, forward_posterior, forward_step
from probdiff.chain.schedules import AbstractSchedule, at_step, require_schedule
from probdiff.programs.sites import AbstractDiffusion, Data, Size, minibatch, require_plates

Path = Float[AnyArray, "*sample num_steps datum dim"]
Factors = Float[Array, "*sample num_steps datum"]
OUTER = -3  # the highest dim of a user's plate around the programs
Affine = tuple[Float[Array, "..."], Float[Array, "..."]]


class Chain(dist.Distribution):
    """A distribution over paths z_N … z_1, shape ``(num_steps, datum, dim)``, defined by a tree of arrays, ``parts``."""

    support: constraints.Constraint = constraints.real_vector
    reparametrized_params: list[str] = []
    pytree_data_fields: tuple[str, ...] = ("parts",)

    def __init__(self, parts: tuple[Any, ...], shape: tuple[int, ...], *, validate_args: bool | None = None) -> None:
        self.parts = parts
        super().__init__(tuple(shape[:-1]), tuple(shape[-1:]), validate_args=validate_args)

    def require_path(self, value: AnyArray) -> None:
        """Refuse values that are not paths of this chain."""
        shape = (*self.batch_shape, *self.event_shape)
        require(jnp.shape(value)[-3:] == shape, "z", f"shape (num_steps, datum, dim) = {shape}", jnp.shape(value))

    @property
    def steps(self) -> Int[Array, "num_steps 1"]:
        """The steps N … 1 of a path, shape ``(num_steps, 1)``."""
        return jnp.arange(self.batch_shape[0], 0, -1)[:, None]


class ForwardChain(Chain):
    r"""The forward chain :math:`q(z_{1:N} | x_0) = \prod_n q(z_n | z_{n-1})`.

    A path is an associative scan: step n is the affine map :math:`z \mapsto \sqrt{\alpha_n} z + \sqrt{\beta_n} \xi_n`, and maps
    are composed in a tree. Nothing is divided by :math:`\sqrt{\bar\alpha_n}`, which underflows for long chains.

    Args:
        schedule: The noise schedule.
        x0: Encoded data, shape ``(datum, dim)``.

    Raises:
        ValueError, TypeError: If ``schedule`` is not a schedule, or ``x0`` does not have two axes.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> q = probdiff.programs.ForwardChain(probdiff.cosine_schedule(5), jnp.zeros((3, 2)))
        >>> path = q.sample(jax.random.key(0))
        >>> path.shape, q.log_prob(path).shape
        ((5, 3, 2), (5, 3))
    """

    def __init__(
        self, schedule: AbstractSchedule, x0: Float[Array, "datum dim"], *, validate_args: bool | None = None
    ) -> None:
        require_schedule(schedule)
        require(jnp.ndim(x0) == 2, "x0", "shape (datum, dim)", jnp.shape(x0))
        super().__init__((schedule, x0), (schedule.num_steps, *x0.shape), validate_args=validate_args)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Path:
        """Paths, shape ``(*sample_shape, num_steps, datum, dim)``."""
        schedule, x0 = self.parts
        steps = self.steps.reshape(-1, *(1,) * (len(sample_shape) + x0.ndim))
        noise = jax.random.normal(key, (len(steps), *sample_shape, *x0.shape), x0.dtype)
        factor = jnp.sqrt(at_step(schedule.alpha, steps, x0.dtype))
        added = jnp.sqrt(at_step(schedule.beta, steps, x0.dtype)) * noise
        added = added.at[-1].add(factor[-1] * x0)  # the last in this order is z_1
        _, path = jax.lax.associative_scan(_composed, (factor, added), reverse=True)
        return jnp.moveaxis(path, 0, -3)

    def log_prob(self, value: Path) -> Factors:
        r"""The factors :math:`\log q(z_n | z_{n-1})`, shape ``(*sample_shape, num_steps, datum)``."""
        self.require_path(value)
        schedule, x0 = self.parts
        before = jnp.concatenate([value[..., 1:, :, :], jnp.broadcast_to(x0, value[..., :1, :, :].shape)], -3)
        return forward_step(schedule, before, self.steps).log_prob(value)


def _composed(earlier: Affine, later: Affine) -> Affine:
    """The composition of the affine maps z ↦ a z + b of two consecutive stretches of steps."""
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]


class PosteriorChain(ForwardChain):
    r"""The forward chain after Bayes' rule, :math:`q(z_N | x_0) \prod_{n \ge 2} q(z_{n-1} | z_n, x_0)`: the same distribution as
    :class:`ForwardChain`, with other factors.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> schedule, x0 = probdiff.cosine_schedule(5), jnp.zeros((3, 2))
        >>> forward, posterior = probdiff.programs.ForwardChain(schedule, x0), probdiff.programs.PosteriorChain(schedule, x0)
        >>> path = forward.sample(jax.random.key(0))
        >>> bool(jnp.allclose(forward.log_prob(path).sum(0), posterior.log_prob(path).sum(0), rtol=1e-3))
        True
    """

    def log_prob(self, value: Path) -> Factors:
        """The factors in the order of the model, z_N first, in nats, shape ``(*sample_shape, num_steps, datum)``."""
        self.require_path(value)
        schedule, x0 = self.parts
        first = forward_marginal(schedule, x0, schedule.num_steps).log_prob(value[..., :1, :, :])
        if schedule.num_steps == 1:
            return first
        later = forward_posterior(schedule, value[..., :-1, :, :], x0, self.steps[:-1]).log_prob(value[..., 1:, :, :])
        return jnp.concatenate([first, later], -2)


class ReverseChain(Chain):
    r"""The reverse chain :math:`p_\theta(z_{1:N}) = p(z_N) \prod_{n \ge 2} p_\theta(z_{n-1} | z_n)`.

    For the density the network is evaluated at all steps, in chunks (:func:`~probdiff._chunks.inputs_at_once`) whose intermediate values are computed
    again for the gradient: apart from the path itself, memory does not grow with N. Samples are drawn one step after the other.

    Args:
        diffusion: The model.
        shape: ``(datum, dim)``.
        key: For the network's ``key=`` while training.

    Raises:
        ValueError, TypeError: If ``diffusion`` is not a Diffusion, or ``shape`` does not have two entries.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> probdiff.programs.ReverseChain(diffusion, (3, 2)).sample(jax.random.key(1)).shape  # (num_steps, datum, dim)
        (5, 3, 2)
    """

    def __init__(
        self,
        diffusion: AbstractDiffusion,
        shape: tuple[int, int],
        key: PRNGKeyArray | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        _require_diffusion(diffusion)
        require(len(shape) == 2, "shape", "(datum, dim)", tuple(shape))
        super().__init__((diffusion, key), (diffusion.schedule.num_steps, *shape), validate_args=validate_args)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Path:
        """Paths, shape ``(*sample_shape, num_steps, datum, dim)``."""
        diffusion, _ = self.parts
        shape = (*sample_shape, self.batch_shape[1], *self.event_shape)

        def step(
            next_z: dist.Distribution, each: tuple[Int[Array, ""], PRNGKeyArray]
        ) -> tuple[dist.Distribution, Float[Array, "*sample datum dim"]]:
            n, key = each
            z = next_z.sample(key)
            return diffusion.reverse_kernel(z, n), z

        keys = jax.random.split(key, len(self.steps))
        return jnp.moveaxis(jax.lax.scan(step, diffusion.kernel.prior(shape), (self.steps[:, 0], keys))[1], 0, -3)

    def log_prob(self, value: Path) -> Factors:
        """The factors in the order of the model, z_N first, in nats, shape ``(*sample_shape, num_steps, datum)``."""
        self.require_path(value)
        diffusion, key = self.parts
        path = jnp.moveaxis(value, -3, 0)
        first = diffusion.kernel.prior(path.shape[1:]).log_prob(path[:1])
        if len(path) == 1:
            return jnp.moveaxis(first, 0, -2)

        def factors(
            n: Int[Array, "part"], z: Float[Array, "part *sample datum dim"], before: Float[Array, "part *sample datum dim"]
        ) -> Float[Array, "part *sample datum"]:
            own_key = None if key is None else jax.random.fold_in(key, n[0])
            n = n.reshape(-1, *(1,) * (z.ndim - 2))
            return diffusion.reverse_kernel(z, n, own_key).log_prob(before)

        later = checkpointed(factors, inputs_at_once(diffusion.network), self.steps[:-1, 0], path[:-1], path[1:])
        return jnp.moveaxis(jnp.concatenate([first, later]), 0, -2)


def _require_diffusion(value: object) -> None:
    require(isinstance(value, AbstractDiffusion), "diffusion", "a Diffusion", type(value).__name__, TypeError)


class ParallelPrograms(eqx.Module):
    """The programs of a :class:`~probdiff.Diffusion` with one site for the whole chain: ``SVI(programs.model, programs.guide, …)``.

    Inside of ``numpyro.plate(…, dim=-3)`` the programs are independent copies: ``z`` has the axes of such plates in front, and so has an ``x`` that is drawn.

    Args:
        diffusion: The model; ``diffusion.bind`` takes the fitted parameters.

    Raises:
        TypeError: If ``diffusion`` is not a Diffusion.

    Example:
        >>> import jax, probdiff
        >>> from numpyro import handlers
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> programs = probdiff.programs.ParallelPrograms(diffusion)
        >>> trace = handlers.trace(handlers.seed(programs.model, 0)).get_trace(None, num_data=3)
        >>> trace["z"]["value"].shape, trace["x"]["value"].shape
        ((5, 3, 2), (3, 2))
    """

    diffusion: AbstractDiffusion

    def __init__(self, diffusion: AbstractDiffusion) -> None:
        _require_diffusion(diffusion)
        self.diffusion = diffusion

    def model(self, x: Data | None, num_data: Size | None = None, *, context: Any = None) -> Real[AnyArray, "*plates datum column"]:
        """The reverse chain; arguments and sample sites as for :meth:`~probdiff.Diffusion.model`."""
        require_plates(OUTER)
        diffusion = self.diffusion.given(context)
        size, dim = diffusion.data_shape(x, num_data)
        diffusion = diffusion.with_param_site()
        key = diffusion.training_key(x)
        with minibatch(x, num_data), numpyro.plate("data", size):
            with numpyro.plate("step", diffusion.schedule.num_steps, dim=-2):
                z = numpyro.sample("z", ReverseChain(diffusion, (size, dim), key))
            # (Inside a user's plates the axis of the steps is kept, so that the axes of the plates keep their positions.)
            z_1 = z[-1] if z.ndim == 3 else z[..., -1:, :, :]
            last = diffusion.reverse_kernel(z_1, 1, key)
            return numpyro.sample("x", diffusion.kernel.observation(diffusion.likelihood, last), obs=x)

    def guide(self, x: Data | None, num_data: Size | None = None, *, context: Any = None) -> None:
        """The forward chain, factorised step by step; arguments as for :meth:`~probdiff.Diffusion.guide`."""
        self._forward(ForwardChain, x, num_data, context)

    def posterior_guide(self, x: Data | None, num_data: Size | None = None, *, context: Any = None) -> None:
        """The forward chain, factorised by Bayes' rule in the order of the model; arguments as for :meth:`~probdiff.Diffusion.guide`."""
        self._forward(PosteriorChain, x, num_data, context)

    def _forward(self, chain: type[ForwardChain], x: Data | None, num_data: Size | None, context: Any) -> None:
        require_plates(OUTER)
        size, x0 = self.diffusion.given(context).encode(x)
        schedule = self.diffusion.guide_schedule()
        steps = numpyro.plate("step", schedule.num_steps, dim=-2)
        with minibatch(x, num_data), numpyro.plate("data", size), steps:
            numpyro.sample("z", chain(schedule, x0))
