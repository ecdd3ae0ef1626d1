r"""Metropolis–Hastings on an unbiased estimate of the likelihood: the posterior is exact for every variance of the estimate.

The estimate of the present state is kept and never recomputed; a proposal has an estimate on new random numbers. This is a Markov chain on the state
together with the random numbers, whose marginal is the posterior. A large variance lowers the acceptance rate: the chain stays long where an estimate was too high. The
number of particles should be such that the standard deviation of the log estimate is about 1 (Doucet et al. 2015, arXiv:1210.1871).

Source: Andrieu and Roberts (2009), Annals of Statistics 37, 697, doi:10.1214/07-AOS574.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.infer.hmc_util import warmup_adapter
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import initialize_model
from numpyro.util import is_prng_key

from probdiff._checks import PyTree, require

SCALING = 2.56  # scale of the steps of the random walk, times the root of the dimension: Sherlock et al. (2015), arXiv:1309.7209, section 3.2


class PseudoMarginalState(NamedTuple):
    """The state of :class:`PseudoMarginal`.

    Attributes:
        i: Iteration.
        z: The unconstrained values of the latent sites, by name.
        potential_energy: Minus the log joint density of z and the data, with the estimate made when z was proposed.
        accept_prob, mean_accept_prob: Acceptance probability of the last proposal, and its mean.
        adapt_state: NumPyro's adaptation of the covariance of the steps to the covariance of the samples, during warm-up.
        rng_key: JAX key.
    """

    i: jax.Array
    z: PyTree
    potential_energy: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    adapt_state: Any
    rng_key: jax.Array


class PseudoMarginal(MCMCKernel):
    """A kernel for ``numpyro.infer.MCMC``: a random walk, with new random numbers for the estimate of the likelihood in each proposal.

    The first argument of the program is a key, for the :class:`~probdiff.inference.ConditionalEstimate` of the observed site::

        def program(key, x):
            c = numpyro.sample("c", dist.Normal(0, 1).expand([len(x), 2]).to_event(1))
            numpyro.sample("x", ConditionalEstimate(fitted, c, key=key, num_particles=16), obs=x)

        mcmc = MCMC(PseudoMarginal(program), num_warmup=1_000, num_samples=10_000)
        mcmc.run(jax.random.key(0), x)

    Args:
        model: The program. Its log density must be the log density of its sites plus the log of an unbiased estimate that depends on the key.
        init_strategy: As for the kernels of NumPyro.

    Raises:
        TypeError: If ``model`` is not callable. ValueError in use, with ``chain_method="vectorized"``.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from probdiff.inference import PseudoMarginal
        >>> def program(key):  # a noisy likelihood: the key is that of its noise
        ...     c = numpyro.sample("c", dist.Normal(0, 1))
        ...     numpyro.factor("likelihood", -c**2 + 0.1 * jax.random.normal(key))
        >>> mcmc = MCMC(PseudoMarginal(program), num_warmup=5, num_samples=10, progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> mcmc.get_samples()["c"].shape
        (10,)
    """

    def __init__(self, model: Callable[..., Any], *, init_strategy: Callable[..., Any] = init_to_uniform) -> None:
        require(callable(model), "model", "a program whose first argument is a key", type(model).__name__, TypeError)
        self._model, self._init_strategy = model, init_strategy

    @property
    def model(self) -> Callable[..., Any]:
        """The program."""
        return self._model

    @property
    def sample_field(self) -> str:
        """The field of the state that holds the sample."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The fields that are collected: the sample and the acceptance probability."""
        return ("z", "accept_prob")

    def get_diagnostics_str(self, state: PseudoMarginalState) -> str:
        """The mean acceptance probability, as text for the progress bar."""
        return f"acc. prob={state.mean_accept_prob:.2f}"

    def init(self, rng_key: jax.Array, num_warmup: int, init_params: Any, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None) -> PseudoMarginalState:
        """NumPyro's call before the first iteration."""
        require(is_prng_key(rng_key), "chain_method", "'sequential' or 'parallel' with PseudoMarginal", "'vectorized'")
        model_kwargs, self._num_warmup = model_kwargs or {}, num_warmup
        rng_key, init_key, adapt_key, noise_key = jax.random.split(rng_key, 4)
        start, self._potential, self._postprocess, _ = initialize_model(
            init_key,
            self._model,
            dynamic_args=True,
            init_strategy=self._init_strategy,
            model_args=(noise_key, *model_args),
            model_kwargs=model_kwargs,
            validate_grad=False,
        )
        z, energy = start.z, start.potential_energy
        if init_params is not None:
            z, energy = init_params, self._potential(noise_key, *model_args, **model_kwargs)(init_params)
        start_adapting, self._adapt = warmup_adapter(
            num_warmup, adapt_step_size=False, adapt_mass_matrix=True, dense_mass=True
        )
        size = len(ravel_pytree(z)[0])
        adapt_state = start_adapting((z,), adapt_key, SCALING / size**0.5, mass_matrix_size=size)
        zero = jnp.zeros((), energy.dtype)
        return PseudoMarginalState(jnp.array(0), z, energy, zero, zero, adapt_state._replace(rng_key=None), rng_key)

    def postprocess_fn(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Callable[..., Any]:
        """NumPyro's call for the function from unconstrained values to those of the sites."""
        return self._postprocess(jax.random.key(0), *args, **(kwargs or {}))

    def sample(self, state: PseudoMarginalState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None) -> PseudoMarginalState:
        """Propose a state with a new estimate, and accept it or keep the present one."""
        rng_key, walk_key, noise_key, accept_key = jax.random.split(state.rng_key, 4)
        flat, unravel = ravel_pytree(state.z)
        step = state.adapt_state.step_size * (state.adapt_state.mass_matrix_sqrt_inv.T @ jax.random.normal(walk_key, flat.shape, flat.dtype))
        proposal = unravel(flat + step)
        energy = self._potential(noise_key, *model_args, **(model_kwargs or {}))(proposal)
        log_ratio = state.potential_energy - energy
        accept_prob = jnp.where(jnp.isnan(log_ratio), 0, jnp.exp(jnp.minimum(log_ratio, 0)))
        accepted = jax.random.uniform(accept_key) < accept_prob
        z, energy = jax.tree.map(
            lambda new, old: jnp.where(accepted, new, old), (proposal, energy), (state.z, state.potential_energy)
        )
        warming = state.i < self._num_warmup
        adapt_state = jax.lax.cond(
            warming, lambda adapt: self._adapt(state.i, accept_prob, (z,), adapt), lambda adapt: adapt, state.adapt_state
        )
        i = state.i + 1
        count = jnp.where(warming, i, i - self._num_warmup)
        mean = state.mean_accept_prob + (accept_prob - state.mean_accept_prob) / count
        return PseudoMarginalState(i, z, energy, accept_prob, mean, adapt_state, rng_key)
