r"""Sequential Monte Carlo along the reverse chain: the posterior of x given y as weighted particles, and an unbiased estimate of :math:`p_\theta(y)`.

Particles go from z_N to x. Step n shifts the mean of the reverse kernel along the gradient of a twist :math:`\tilde p(y | z_n)`, an approximation of :math:`p(y | z_n)`, and weights each particle by

    p_θ(z_{n−1} | z_n) p̃(y | z_{n−1}) / (q(z_{n−1} | z_n) p̃(y | z_n)),

with p̃(y | z_N) at the start and p_θ(y | z_1), or p(y | x), at the end: the product telescopes to the posterior for every twist. If the effective sample size falls
below half the number of particles, they are resampled. The product of the mean weights between resamplings is an unbiased estimate of :math:`p_\theta(y)`,
for every number of particles. This is the evidence of the *model*, the chain with its N steps, and not of the distribution of its training data.

Sources: Del Moral (2004), Feynman-Kac Formulae, theorem 7.4.2, for the unbiasedness; Wu et al. (2023), arXiv:2306.17775, algorithm 1, for the algorithm.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real
from numpyro import distributions as dist
from numpyro import handlers
from tqdm import tqdm

from probdiff._checks import PyTree, Whole, require, require_count, require_key, require_type
from probdiff._chunks import EVALUATIONS, even_chunk, inputs_at_once
from probdiff._devices import Devices, data_mesh, gather, replicate, shard, to_default_device
from probdiff.diffusion import Diffusion
from probdiff.inference.observations import AbstractObservation
from probdiff.inference.posterior import Posterior
from probdiff.inference.twists import AbstractTwist, Twisted, named_twist

RESAMPLED_BELOW = 0.5  # resample below this effective sample size, as a fraction of the particles


class _State(NamedTuple):
    """Particles at z_n, before their weights include the twist there."""

    z: Float[Array, "particle dim"]
    log_weights: Float[Array, "particle"]
    log_evidence: Float[Array, ""]


class _Seen(NamedTuple):
    """Particles at z_n with their weights, the reverse kernel from each, and the twist there."""

    z: Float[Array, "particle dim"]
    kernel: dist.Distribution
    twisted: Twisted
    log_weights: Float[Array, "particle"]
    log_evidence: Float[Array, ""]


class Problem(eqx.Module):
    """A model given y, with the functions that the particles need.

    Args:
        diffusion: The model, evaluated, given one row of a context if it is conditional.
        observation: The observation.
        twist: The twist.
    """

    diffusion: Diffusion
    observation: AbstractObservation
    twist: AbstractTwist

    def look(self, z: Float[Array, "dim"], n: Int[Array, ""]) -> tuple[dist.Distribution, Twisted]:
        """The reverse kernel from a particle, and the twist there."""
        kernel = self.diffusion.reverse_kernel(z, n)
        twisted = self.twist(self.diffusion, self.observation, z, n)
        return kernel, twisted

    def log_last(self, kernel: dist.Distribution) -> Float[Array, ""] | None:
        """log p_θ(y | z_1) from the kernel at z_1, if it has a closed form."""
        last = self.observation.last_step(self._of_x(kernel))
        return None if last is None else last.log_prob

    def draw(self, kernel: dist.Distribution, twisted: Twisted, key: PRNGKeyArray) -> tuple[Real[Array, "dim"], Float[Array, ""]]:
        """x given z_1, and the log of its weight."""
        last = self.observation.last_step(self._of_x(kernel))
        if last is not None:
            return last.sample(key), jnp.zeros(())
        x = self._of_x(kernel).sample(key)
        return x, self.observation.log_prob(x) - twisted.log_prob

    def _of_x(self, kernel: dist.Distribution) -> dist.Distribution:
        return self.diffusion.kernel.observation(self.diffusion.likelihood, kernel)

    def proposal(self, kernel: dist.Distribution, twisted: Twisted) -> dist.Distribution:
        """The proposal for z_{n−1}: a Gaussian kernel, its mean shifted along the gradient of the twist times its variance; any other kernel unchanged."""
        if not (isinstance(kernel, dist.Independent) and isinstance(kernel.base_dist, dist.Normal)):
            return kernel
        normal = kernel.base_dist
        return dist.Normal(normal.loc + jnp.square(normal.scale) * twisted.gradient, normal.scale).to_event(1)

    def at_once(self, dim: int) -> int:
        """The number of particles to evaluate at a time."""
        return max(1, inputs_at_once(self.diffusion.network) // self.twist.evaluations(self.observation, dim))


def _look(problem: Problem, state: _State, n: Int[Array, ""], mesh: Mesh | None) -> _Seen:
    """The reverse kernel and the twist of particles at step n, evaluated in chunks; at n = 1 the twist is p(y | z_1), if it has a closed form."""

    def one(z: Float[Array, "dim"]) -> tuple[dist.Distribution, Twisted]:
        return problem.look(z, n)

    z = shard(state.z, mesh)
    kernel, twisted = jax.lax.map(one, z, batch_size=min(len(z), problem.at_once(z.shape[-1])))
    log_last = jax.vmap(problem.log_last)(kernel)
    if log_last is not None:
        twisted = twisted._replace(log_prob=jnp.where(n == 1, log_last, twisted.log_prob))
    log_weights = state.log_weights + twisted.log_prob
    # (A particle that a twist has moved so far that its numbers overflow has weight 0; NaN would spread to all weights.)
    log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    return _Seen(z, kernel, twisted, log_weights, state.log_evidence)


def _ess(log_weights: Float[Array, "particle"]) -> Float[Array, ""]:
    total = jax.nn.logsumexp(log_weights)
    return jnp.where(total == -jnp.inf, 0, jnp.exp(2 * total - jax.nn.logsumexp(2 * log_weights)))


def _log_mean(log_weights: Float[Array, "particle"]) -> Float[Array, ""]:
    return jax.nn.logsumexp(log_weights) - jnp.log(len(log_weights))


def _systematic(key: PRNGKeyArray, log_weights: Float[Array, "particle"]) -> Int[Array, "particle"]:
    """The parents of new particles, by one uniform number for all."""
    size = len(log_weights)
    upper = jnp.cumsum(jax.nn.softmax(log_weights))
    place = (jax.random.uniform(key, dtype=upper.dtype) + jnp.arange(size)) / size
    return jnp.minimum(jnp.searchsorted(upper / upper[-1], place, side="right"), size - 1)


def _multinomial(key: PRNGKeyArray, log_weights: Float[Array, "particle"]) -> Int[Array, "particle"]:
    """The parents of new particles, drawn independently; the first particle is its own parent."""
    return jax.random.categorical(key, log_weights, shape=log_weights.shape).at[0].set(0)


@eqx.filter_jit
def _begin(problem: Problem, size: int, key: PRNGKeyArray, path: Float[Array, "num_steps dim"] | None) -> _State:
    """Particles at z_N; the first is that of a given path, if there is one."""
    assert problem.diffusion.dim is not None
    prior = problem.diffusion.kernel.prior((problem.diffusion.dim,))
    z = jax.vmap(prior.sample)(jax.random.split(jax.random.fold_in(key, 2**31 - 1), size))
    z = z if path is None else z.at[0].set(path[-1])
    return _State(z, jnp.zeros(size, z.dtype), jnp.zeros((), z.dtype))


def _resampled(seen: _Seen, key: PRNGKeyArray, conditional: bool) -> _Seen:
    """The particles, resampled if their weights have become too unequal."""
    parents = (_multinomial if conditional else _systematic)(key, seen.log_weights)
    few = _ess(seen.log_weights) < RESAMPLED_BELOW * len(parents)
    particles = seen.z, seen.kernel, seen.twisted
    z, kernel, twisted = jax.tree.map(lambda leaf: jnp.where(few.reshape((1,) * leaf.ndim), leaf[parents], leaf), particles)
    log_evidence = seen.log_evidence + jnp.where(few, _log_mean(seen.log_weights), 0)
    return _Seen(z, kernel, twisted, jnp.where(few, 0, seen.log_weights), log_evidence)


@eqx.filter_jit
def _steps(
    problem: Problem,
    state: _State,
    steps: Int[Array, "step"],
    key: PRNGKeyArray,
    path: Float[Array, "num_steps dim"] | None,
    mesh: Mesh | None,
) -> tuple[_State, Float[Array, "step"]]:
    """The state after some steps n, from z_n to z_{n−1} each (0 for none), and the effective sample size at each z_n."""
    size = len(state.z)

    def step(state: _State, n: Int[Array, ""]) -> tuple[_State, Float[Array, ""]]:
        resample_key, propose_key = jax.random.split(jax.random.fold_in(key, n))
        seen = _look(problem, state, n, mesh)
        kept = _resampled(seen, resample_key, path is not None)
        proposal = jax.vmap(problem.proposal)(kept.kernel, kept.twisted)
        z = jax.vmap(lambda q, key: q.sample(key))(proposal, jax.random.split(propose_key, size))
        z = z if path is None else z.at[0].set(path[n - 2])
        log_ratio = jax.vmap(lambda p, q, z: p.log_prob(z) - q.log_prob(z))(kept.kernel, proposal, z)
        return _State(z, kept.log_weights + log_ratio - kept.twisted.log_prob, kept.log_evidence), _ess(seen.log_weights)

    def step_or_none(state: _State, n: Int[Array, ""]) -> tuple[_State, Float[Array, ""]]:
        return jax.lax.cond(n > 0, step, lambda state, n: (state, jnp.zeros_like(state.log_evidence)), state, n)

    return jax.lax.scan(step_or_none, state, steps)


@eqx.filter_jit
def _end(
    problem: Problem, state: _State, key: PRNGKeyArray, x: Real[Array, "dim"] | None, mesh: Mesh | None
) -> tuple[Real[Array, "particle dim"], Float[Array, "particle"], Float[Array, ""], Float[Array, ""]]:
    """From z_1 to x: the particles with their log weights, their effective sample size, and the log of the estimate of the evidence."""
    seen = _look(problem, state, jnp.ones((), jnp.int32), mesh)
    keys = jax.random.split(jax.random.fold_in(key, 2**31 - 2), len(seen.z))
    drawn, change = jax.vmap(problem.draw)(seen.kernel, seen.twisted, keys)
    if x is not None:
        # (If the last step has a closed form, the weight depends on z_1 and not on x.)
        known = jax.vmap(problem.log_last)(seen.kernel) is not None
        own = 0.0 if known else problem.observation.log_prob(x) - seen.twisted.log_prob[0]
        drawn, change = drawn.at[0].set(x.astype(drawn.dtype)), change.at[0].set(own)
    log_weights = seen.log_weights + change
    return gather((drawn, log_weights, _ess(log_weights), seen.log_evidence + _log_mean(log_weights)), mesh)


class Run(NamedTuple):
    """One run of the particles: ``samples`` (particle, dim), ``log_weights`` (particle,), ``log_evidence``, and the ``ess`` at each step n, shape ``(num_steps,)``."""

    samples: np.ndarray
    log_weights: np.ndarray
    log_evidence: float
    ess: np.ndarray


def run_particles(
    problem: Problem,
    size: int,
    key: PRNGKeyArray,
    *,
    path: tuple[Float[Array, "num_steps dim"], Real[Array, "dim"]] | None = None,
    mesh: Mesh | None = None,
    bar: tqdm | None = None,
) -> Run:
    """Particles from z_N to x, some steps at a time, so that a progress bar can move and Ctrl-C interrupts.

    Args:
        problem: The model given y.
        size: Number of particles.
        key: JAX key.
        path: Latents z_1 … z_N and a datum, a particle that is kept throughout (conditional sequential Monte Carlo); None for none.
        mesh: The devices that share the particles.
        bar: A progress bar, moved by 1 for each step.
    """
    num_steps = problem.diffusion.schedule.num_steps
    latents, x = (None, None) if path is None else path
    assert problem.diffusion.dim is not None
    cost = size * problem.twist.evaluations(problem.observation, problem.diffusion.dim)
    length = even_chunk(max(1, num_steps - 1), EVALUATIONS // cost)
    state, ess = _begin(problem, size, key, latents), []
    for first in range(num_steps, 1, -length):
        steps = first - np.arange(length)
        state, found = _steps(problem, state, jnp.asarray(np.where(steps >= 2, steps, 0)), key, latents, mesh)
        ess.append(np.asarray(found)[steps >= 2])
        if bar is not None:
            bar.update(len(ess[-1]))
    samples, log_weights, last, log_evidence = jax.device_get(to_default_device(_end(problem, state, key, x, mesh), mesh))
    return Run(samples, log_weights.astype(np.float64), float(log_evidence), np.concatenate([[last], *(each[::-1] for each in ess[::-1])]))


def make_problem(diffusion: Diffusion, observation: AbstractObservation, twist: AbstractTwist | str, context: PyTree) -> Problem:
    """A model given y, checked.

    Raises:
        ValueError, TypeError: If the observation does not suit the model, or an argument is out of range.
    """
    require_type("diffusion", diffusion, Diffusion)
    require_type("observation", observation, AbstractObservation)
    expected = "one that knows its dimension: Diffusion(…, dim=…) or network.dim"
    require(diffusion.dim is not None, "diffusion", expected, None)
    dim, diffusion = diffusion.dim, diffusion.evaluated().given(context)
    assert dim is not None
    diffusion.require_context(1)
    of_x = jax.eval_shape(lambda z: diffusion.kernel.observation(diffusion.likelihood, diffusion.reverse_kernel(z, 1)), jnp.zeros(dim))
    observation.check(dim, diffusion.likelihood, of_x)
    return Problem(diffusion, observation, named_twist(twist).adapted(diffusion, observation))


def smc(
    diffusion: Diffusion,
    observation: AbstractObservation,
    *,
    key: PRNGKeyArray,
    num_particles: Whole,
    twist: AbstractTwist | str = "tweedie",
    context: PyTree = None,
    num_runs: Whole = 1,
    devices: Devices = None,
    progress: bool = False,
) -> Posterior:
    r"""The posterior of x given an observation y, under a fitted diffusion as the prior, and its evidence.

    Args:
        diffusion: The model.
        observation: :class:`~probdiff.inference.LinearGaussian`, :class:`~probdiff.inference.Inpainting`, :class:`~probdiff.inference.Program`, or one of
            your own.
        key: JAX key.
        num_particles: Number of particles in each run, at least 1.
        twist: ``"tweedie"``, ``"point"``, ``"none"`` or an object: :mod:`probdiff.inference.twists`.
        context: Of a conditional model: one row.
        num_runs: Number of independent runs; more than one gives a standard error of the evidence. Their particles are combined, weighted by the evidence of each run.
        devices: Number of devices (or a list of them) that share the particles.
        progress: Show a progress bar.

    Returns:
        A :class:`~probdiff.inference.Posterior`. A further call with equal shapes needs no compilation.

    Raises:
        ValueError, TypeError: If the observation does not suit the model, or an argument is out of range.

    Example:
        >>> import jax, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> observation = probdiff.inference.LinearGaussian([[1.0, -1.0]], y=[0.4], scale=0.5)
        >>> posterior = probdiff.inference.smc(diffusion, observation, key=jax.random.key(0), num_particles=16, num_runs=2)
        >>> posterior.samples.shape, posterior.ess.shape, posterior.log_evidence < 0
        ((32, 2), (5,), True)
    """
    problem = make_problem(diffusion, observation, twist, context)
    require_count("num_particles", num_particles)
    require_count("num_runs", num_runs)
    require_key(key)
    mesh = data_mesh(devices)
    problem, key = replicate((problem, key), mesh)
    steps = (problem.diffusion.schedule.num_steps - 1) * int(num_runs)
    with tqdm(total=steps, unit="step", desc="particles", disable=not progress) as bar:
        keys = [key] if num_runs == 1 else list(jax.random.split(key, int(num_runs)))
        runs = [run_particles(problem, int(num_particles), each, mesh=mesh, bar=bar) for each in keys]
    return Posterior.of_runs(runs)


def log_evidence(
    diffusion: Diffusion,
    observation: AbstractObservation,
    *,
    key: PRNGKeyArray,
    num_particles: Whole,
    twist: AbstractTwist | str = "tweedie",
    context: PyTree = None,
) -> Float[Array, ""]:
    r"""The log of an unbiased estimate of :math:`p_\theta(y)`, nats, as a function that JAX can trace: for a ``factor`` in another program.

    Under :class:`~probdiff.inference.PseudoMarginal` unknown parameters of the observation are then sampled exactly (particle marginal Metropolis–Hastings)::

        def program(key, y):
            scale = numpyro.sample("scale", dist.HalfNormal(1))
            observed = Program(lambda x: numpyro.sample("y", dist.Normal(x[:2], scale).to_event(1), obs=y))
            numpyro.factor("evidence", log_evidence(fitted, observed, key=key, num_particles=128))

    Source: Andrieu, Doucet and Holenstein (2010), doi:10.1111/j.1467-9868.2009.00736.x, section 2.4.2.

    Args:
        diffusion, observation, twist, context: As for :func:`smc`.
        key: JAX key.
        num_particles: Number of particles.

    Raises:
        ValueError, TypeError: If the observation does not suit the model, or an argument is out of range.

    Example:
        >>> import jax, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> observation = probdiff.inference.LinearGaussian([[1.0, -1.0]], y=[0.4], scale=0.5)
        >>> probdiff.inference.log_evidence(diffusion, observation, key=jax.random.key(0), num_particles=16).shape
        ()
    """
    problem = make_problem(diffusion, observation, twist, context)
    require_count("num_particles", num_particles)
    require_key(key)
    with handlers.block():  # independent of any program in which this is called
        return evidence(problem, int(num_particles), key)


def evidence(
    problem: Problem,
    size: int,
    key: PRNGKeyArray,
    path: tuple[Float[Array, "num_steps dim"], Real[Array, "dim"]] | None = None,
) -> Float[Array, ""]:
    """The log of the estimate of one run, all steps at once; arguments as for :func:`run_particles`."""
    return evidence_and_ess(problem, size, key, path)[0]


def evidence_and_ess(
    problem: Problem,
    size: int,
    key: PRNGKeyArray,
    path: tuple[Float[Array, "num_steps dim"], Real[Array, "dim"]] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The log of the estimate of one run, all steps at once, and the smallest effective sample size; arguments as for :func:`run_particles`."""
    latents, x = (None, None) if path is None else path
    steps = jnp.arange(problem.diffusion.schedule.num_steps, 1, -1)
    state, ess = _steps(problem, _begin(problem, size, key, latents), steps, key, latents, None)
    _, _, last, log_evidence = _end(problem, state, key, x, None)
    return log_evidence, jnp.minimum(last, ess.min(initial=size))
