r"""A fitted conditional model as a likelihood: for programs in which x is observed and its context c has a prior.

The likelihood :math:`p_\theta(x | c)` itself is not known; two approximations can replace it. Both are NumPyro distributions of x, for fixed random
numbers, and smooth in c:

    ConditionalBound       log_prob is the evidence lower bound. NUTS then samples from the density p(c) exp L(x; c), which is not the posterior:
                           it is too narrow or shifted, to the extent that the gap log p_θ(x | c) − L(x; c) varies with c.
    ConditionalEstimate    exp(log_prob) is an unbiased estimate of p_θ(x | c). With new random numbers in every proposal, as in
                           :class:`~probdiff.inference.PseudoMarginal`, the posterior is exact, for any number of paths.

Source: Andrieu and Roberts (2009), doi:10.1214/07-AOS574.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Real
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints

from probdiff._checks import AnyArray, PyTree, Whole, require, require_count, require_key, require_type
from probdiff._context import num_rows
from probdiff.diffusion import Diffusion
from probdiff.elbo.importance import path_log_weight
from probdiff.elbo.terms import elbo_terms

Rows = Real[AnyArray, "*sample datum column"]


class _ConditionalLikelihood(dist.Distribution):
    """Common base: the model given a context, a key and a number of draws; there is one datum for each row of the context."""

    support: constraints.Constraint = constraints.real_vector
    reparametrized_params: list[str] = []
    pytree_data_fields: tuple[str, ...] = ("diffusion", "key")
    pytree_aux_fields: tuple[str, ...] = ("count",)

    def __init__(self, diffusion: Diffusion, context: PyTree, key: PRNGKeyArray, count: Whole, validate_args: bool | None) -> None:
        require_type("diffusion", diffusion, Diffusion)
        require(context is not None, "context", "a context, the argument of the likelihood", None)
        dim = "Diffusion(…, dim=…) or a network with .dim"
        require(diffusion.dim is not None, "diffusion", f"one that knows its dimension: {dim}", None)
        require_key(key)
        self.diffusion: Diffusion = diffusion.evaluated().given(context)
        self.key: PRNGKeyArray = key
        self.count: int = int(count)
        # (For categories the chain has more dimensions than the data have columns.)
        datum = jax.eval_shape(diffusion.likelihood.decode, jnp.zeros(diffusion.dim))
        super().__init__((num_rows(self.diffusion.context),), datum.shape, validate_args=validate_args)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Rows:
        """Draws from the model, shape ``(*sample_shape, datum, dim)``."""

        def draw(key: PRNGKeyArray) -> Rows:
            with handlers.block():  # the sites of the model are not those of the program that this is called in
                return handlers.seed(self.diffusion.model, key)(None)

        for _ in sample_shape:
            draw = jax.vmap(draw)
        return draw(jax.random.split(key, sample_shape))

    def log_prob(self, value: Rows) -> Float[Array, "*sample datum"]:
        """The bound or the estimate in place of log p(x | c), for each datum, nats, shape ``(*sample, datum)``."""

        def function(x: Any) -> Any:
            self.diffusion.check_data(x)
            return self._log_prob(x)

        for _ in range(jnp.ndim(value) - 2):
            function = jax.vmap(function)
        return function(jnp.asarray(value))

    @abc.abstractmethod
    def _log_prob(self, x: Real[Array, "datum column"]) -> Float[Array, "datum"]:
        """:meth:`log_prob` for data of shape ``(datum, dim)``."""


class ConditionalBound(_ConditionalLikelihood):
    r"""The evidence lower bound L(x; c) as a likelihood of c, on fixed random numbers.

    ``numpyro.sample("x", ConditionalBound(fitted, c, key=key), obs=x)`` in a program in which c has a prior. NUTS then
    samples the density :math:`\propto p(c)\, e^{L(x; c)}`. The bound is below :math:`\log p_\theta(x | c)` by a gap; if the gap varies with c,
    this density is not the posterior (see :mod:`probdiff.inference.likelihood`). The same key must be given every time, as an argument of the program
    or a constant.

    Args:
        diffusion: A fitted conditional model.
        context: As for :meth:`~probdiff.Diffusion.given`, a row for each datum: the batch shape.
        key: JAX key of the noise.
        num_draws: Draws of the noise over which the bound is averaged, each of N network evaluations a datum.

    Raises:
        ValueError, TypeError: If the context does not suit the model, the model does not know its dimension, or ``num_draws`` is not a positive integer.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1, context_dim=3))
        >>> context, x = jnp.ones((4, 3)), jnp.zeros((4, 2))
        >>> probdiff.inference.ConditionalBound(diffusion, context, key=jax.random.key(1), num_draws=2).log_prob(x).shape
        (4,)
    """

    def __init__(
        self, diffusion: Diffusion, context: PyTree, *, key: PRNGKeyArray, num_draws: Whole = 8, validate_args: bool | None = None
    ) -> None:
        require_count("num_draws", num_draws)
        super().__init__(diffusion, context, key, num_draws, validate_args)

    def _log_prob(self, x: Real[Array, "datum column"]) -> Float[Array, "datum"]:
        return elbo_terms(self.diffusion, x, key=self.key, num_draws=self.count).elbo.mean(0)


class ConditionalEstimate(_ConditionalLikelihood):
    r"""An unbiased estimate of :math:`p_\theta(x | c)` as a likelihood of c: :math:`\tfrac1K \sum_k p_\theta(x, z^k | c) / q(z^k | x)` on K paths.

    For :class:`~probdiff.inference.PseudoMarginal`, which gives the program a new key for each proposal. With one key for all values of c, as under NUTS, it is the
    likelihood on fixed paths: a bound in expectation, tighter than :class:`ConditionalBound` but, for few paths, less smooth.

    Args:
        diffusion: A fitted conditional model.
        context: As for :meth:`~probdiff.Diffusion.given`, a row for each datum: the batch shape.
        key: JAX key of the paths.
        num_particles: Paths K of each datum: N K network evaluations a datum.

    Raises:
        ValueError, TypeError: If the context does not suit the model, the model does not know its dimension, or ``num_particles`` is not a positive integer.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1, context_dim=3))
        >>> context, x = jnp.ones((4, 3)), jnp.zeros((4, 2))
        >>> probdiff.inference.ConditionalEstimate(diffusion, context, key=jax.random.key(1), num_particles=2).log_prob(x).shape
        (4,)
    """

    def __init__(
        self, diffusion: Diffusion, context: PyTree, *, key: PRNGKeyArray, num_particles: Whole = 8, validate_args: bool | None = None
    ) -> None:
        require_count("num_particles", num_particles)
        super().__init__(diffusion, context, key, num_particles, validate_args)

    def _log_prob(self, x: Real[Array, "datum column"]) -> Float[Array, "datum"]:
        keys = jax.random.split(self.key, self.count)
        log_weights = jax.vmap(lambda key: path_log_weight(self.diffusion, x, jax.random.split(key, len(x))))(keys)
        return jax.nn.logsumexp(log_weights, 0) - jnp.log(self.count)
