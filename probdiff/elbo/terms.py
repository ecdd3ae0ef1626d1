r"""The evidence lower bound, term by term, in closed form where there is one.

    L(x) = - KL[q(z_N | x_0) ‖ p(z_N)]                                   prior_kl         closed form
           - Σ_{n=2..N} E_q KL[q(z_{n-1} | z_n, x_0) ‖ p_θ(z_{n-1} | z_n)]   step_kl          closed form given z_n
           + E_q log p_θ(x | z_1)                                        reconstruction

in nats, summed over the dimensions of a datum. Source: Ho et al. (2020), arXiv:2006.11239, eq. 5. Each term needs
only the marginal q(z_n | x_0), so that every step has its own noise and steps can be evaluated in any order:
in chunks of network inputs, so that beside arrays of the size of the result the memory does not grow with N or the number of draws.
"""

from collections.abc import Callable
from typing import Any, Literal, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._checks import AnyArray, PyTree, Whole, is_concrete, require, require_count, require_key, require_type
from probdiff._chunks import EVALUATIONS, blocks, filled, inputs_at_once
from probdiff._devices import Devices, data_mesh, gather, replicate, shard, to_default_device
from probdiff.chain.forward import prior_kl
from probdiff.chain.reverse import SampledStep
from probdiff.diffusion import Diffusion
from probdiff.programs.sites import Data

Noise = Float[AnyArray, "draw num_steps datum dim"]


def bits_per_dim(nats: Any, dim: Whole) -> Any:
    """Code length in bits per dimension of an ELBO or log-likelihood in nats: −nats / (dim ln 2).

    Example:
        >>> import math, probdiff
        >>> print(probdiff.elbo.bits_per_dim(-64 * math.log(16), dim=64))  # 64 pixels of 16 levels, all alike
        4.0
    """
    return -nats / (dim * np.log(2))


class ELBOTerms(eqx.Module):
    """The terms of the bound, in nats, summed over the dimensions of each datum.

    Attributes:
        prior_kl: KL[q(z_N | x_0) ‖ N(0, I)], shape ``(datum,)``; exact, no sampling.
        step_kl: KL of step n, shape ``(draw, step, datum)``, steps n = 2 … N ascending (N = 1: no steps).
        reconstruction: log p(x | z_1), shape ``(draw, datum)``.
        closed_form: Whether the KLs are computed in closed form given z_n; otherwise each is an unbiased sampled log-ratio.
        context: Of a conditional model, the context of each datum, a tree of arrays of shape ``(datum, …)``.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> terms = probdiff.elbo_terms(diffusion, jax.numpy.zeros((3, 2)), key=jax.random.key(1), num_draws=4)
        >>> terms.prior_kl.shape, terms.step_kl.shape, terms.reconstruction.shape, terms.elbo.shape
        ((3,), (4, 4, 3), (4, 3), (4, 3))
    """

    prior_kl: jax.Array
    step_kl: jax.Array
    reconstruction: jax.Array
    closed_form: bool = eqx.field(static=True, default=True)
    context: PyTree = None

    @property
    def elbo(self) -> Float[Array, "draw datum"]:
        """The bound, −prior_kl − Σ step_kl + reconstruction, shape ``(draw, datum)``."""
        return self.reconstruction - self.step_kl.sum(1) - self.prior_kl


class Moments(eqx.Module):
    """Mean and variance over draws.

    Attributes:
        mean: Mean.
        variance: Variance between draws (divisor ``num_draws`` − 1; NaN for a single draw). The Monte Carlo variance of
            the mean is ``variance / num_draws``.

    Example:
        >>> import jax, probdiff
        >>> draws = jax.numpy.array([1.0, 3.0])
        >>> probdiff.elbo.Moments(draws.mean(), draws.var(ddof=1)).variance.item()
        2.0
    """

    mean: jax.Array
    variance: jax.Array


class ELBOMoments(eqx.Module):
    """The reduced form of :class:`ELBOTerms`: moments over draws instead of the draws.

    Attributes:
        prior_kl: As in :class:`ELBOTerms`, shape ``(datum,)``.
        step_kl: Moments of shape ``(step, datum)``.
        reconstruction: Moments of shape ``(datum,)``.
        elbo: Moments of shape ``(datum,)``.
        num_draws: Number of draws over which the moments are taken.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> moments = probdiff.elbo_terms(diffusion, jax.numpy.zeros((3, 2)), key=jax.random.key(1), num_draws=4, reduce=True)
        >>> moments.step_kl.mean.shape, moments.elbo.variance.shape, moments.num_draws
        ((4, 3), (3,), 4)
    """

    prior_kl: jax.Array
    step_kl: Moments
    reconstruction: Moments
    elbo: Moments
    num_draws: Whole


def _noise(
    key: PRNGKeyArray, draw: Int[Array, ""], n: Int[Array, ""], like: Float[Array, "datum dim"]
) -> Float[Array, "datum dim"]:
    """The noise of draw ``draw`` at step ``n``; it does not depend on what else is evaluated in the same call."""
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, draw), n), like.shape, like.dtype)


class _Terms(eqx.Module):
    """The terms of the bound for the draws numbered ``draws``, on noise that is drawn here, or on given noise."""

    diffusion: Diffusion
    x: jax.Array
    x0: jax.Array
    key: jax.Array | None
    draws: jax.Array
    noise: jax.Array | None

    def step_kl(self, index: Int[Array, "row"], n: Int[Array, "row"]) -> Float[Array, "row datum"]:
        """KLs of steps ``n`` of the draws at ``index``, both of shape ``(row,)``: shape ``(row, datum)``."""
        own = jax.random.key(0) if self.key is None else self.key
        extra_key = jax.random.fold_in(own, 2**32 - 1)  # no draw has this number
        return self.diffusion.step_kl(self._step(index, n, lambda: self._draw(extra_key, index, n)))

    def reconstruction(self, index: Int[Array, "row"]) -> Float[Array, "row datum"]:
        """log p(x | z_1) of the draws at ``index``, shape ``(row, datum)``."""
        return self.diffusion.log_likelihood(self._step(index, jnp.ones_like(index)))

    def _step(
        self, index: Int[Array, "row"], n: Int[Array, "row"], extra_noise: Callable[[], jax.Array] | None = None
    ) -> SampledStep:
        return self.diffusion.sampled_step(self.x, self.x0, n[:, None], self._eps(index, n), extra_noise=extra_noise)

    def _eps(self, index: Int[Array, "row"], n: Int[Array, "row"]) -> Float[Array, "row datum dim"]:
        if self.noise is not None:
            return self.noise[index, n - 1].astype(self.x0.dtype)
        assert self.key is not None  # one of the two is given
        return self._draw(self.key, index, n)

    def _draw(self, key: PRNGKeyArray, index: Int[Array, "row"], n: Int[Array, "row"]) -> Float[Array, "row datum dim"]:
        return jax.vmap(_noise, (None, 0, 0, None))(key, self.draws[index], n, self.x0)


def _encoded_shape(diffusion: Diffusion, x: Data) -> tuple[int, int]:
    return len(x), diffusion.likelihood.encoded_dim(x.shape[1])


@eqx.filter_jit
def _evaluate(
    diffusion: Diffusion,
    x: jax.Array,
    key: PRNGKeyArray | None,
    draws: Int[Array, "draw"],
    steps: Int[Array, "step"],
    first: bool,
    noise: Float[Array, "draw num_steps datum dim"] | None,
    mesh: Mesh | None,
) -> ELBOTerms:
    """ELBOTerms of the draws numbered ``draws``: the KLs of ``steps``, and if ``first`` also the reconstruction, otherwise of shape ``(0, datum)``.

    ``noise`` is None or of shape ``(len(draws), num_steps, datum, dim)``.
    """
    x, diffusion = shard(x, mesh), diffusion.with_context(shard(diffusion.context, mesh))
    terms = _Terms(diffusion, x, diffusion.likelihood.encode(x), key, draws, noise)
    chunk = inputs_at_once(diffusion.network) // len(x)

    def step_kl(i: Int[Array, "row"]) -> Float[Array, "row datum"]:
        return terms.step_kl(i // len(steps), steps[i % len(steps)])

    def rows(function: Callable[[jax.Array], jax.Array], size: int) -> Float[Array, "row datum"]:
        return filled(function, size, chunk, jnp.zeros((size, len(x)), terms.x0.dtype))

    kls = rows(step_kl, len(draws) * len(steps)).reshape(len(draws), len(steps), len(x))
    log_lik = rows(terms.reconstruction, len(draws) if first else 0)
    return gather(ELBOTerms(prior_kl(diffusion.schedule, terms.x0), kls, log_lik, diffusion.kernel.closed_form, diffusion.context), mesh)


@overload
def elbo_terms(
    diffusion: Diffusion,
    x: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray | None = None,
    num_draws: Whole | None = None,
    noise: Noise | None = None,
    reduce: Literal[False] = False,
    devices: Devices = None,
    progress: bool = False,
) -> ELBOTerms: ...


@overload
def elbo_terms(
    diffusion: Diffusion,
    x: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray | None = None,
    num_draws: Whole | None = None,
    noise: Noise | None = None,
    reduce: Literal[True],
    devices: Devices = None,
    progress: bool = False,
) -> ELBOMoments: ...


def elbo_terms(
    diffusion: Diffusion,
    x: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray | None = None,
    num_draws: Whole | None = None,
    noise: Noise | None = None,
    reduce: bool = False,
    devices: Devices = None,
    progress: bool = False,
) -> ELBOTerms | ELBOMoments:
    r"""The terms of the bound on each datum, with independent noise for each term.

    Draw s at step n is evaluated at :math:`z_n = \sqrt{\bar\alpha_n} x_0 + \sqrt{1-\bar\alpha_n}\, \epsilon_{s,n}`, independent over
    draws, steps and data. For the same number of data, the same ``key`` gives the same noise to any model of equal N and dimension.

    Args:
        diffusion: The model.
        x: Data as the user has it, shape ``(datum, dim)``.
        context: Of a conditional model: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key of the noise.
        num_draws: Number of draws; if not given, 1 or the number in ``noise``.
        noise: The noise itself, instead of ``key``: shape ``(draw, num_steps, datum, dim)`` with the encoded dimension, step n at
            ``[:, n - 1]``. Two models on the same noise are compared on common random numbers. For a kernel whose KL is sampled, the additional
            noise is then the same in every call.
        reduce: Return the moments over draws (:class:`ELBOMoments`): memory then does not grow with draws.
        devices: Number of devices (or a list of them) that share the data; one device gives the same terms, up to rounding.
        progress: Show a progress bar.

    Returns:
        :class:`ELBOTerms`, or :class:`ELBOMoments` if ``reduce``. Nats.

    Raises:
        ValueError, TypeError: If the data, ``noise`` or ``num_draws`` do not fit the model, or not exactly one of ``key`` and ``noise`` is given.

    Example:
        >>> import jax, probdiff
        >>> schedule = probdiff.cosine_schedule(num_steps=5)
        >>> normal = probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule), reverse_variance="forward")
        >>> terms = probdiff.elbo_terms(diffusion, jax.numpy.zeros((3, 2)), key=jax.random.key(0), num_draws=4)
        >>> terms.step_kl.shape  # (draw, step n = 2 … N, datum)
        (4, 4, 3)
        >>> exact = probdiff.oracles.exact_terms(diffusion, jax.numpy.zeros((3, 2)))
        >>> bool(abs(terms.prior_kl - exact["prior_kl"]).max() < 1e-5)
        True
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.evaluated().given(context)
    x = diffusion.read_data(x)
    require(
        (key is None) != (noise is None), "key, noise", "exactly one of the two", "neither" if key is None else "both"
    )
    if noise is None:
        require_key(key)
    else:
        noise = jnp.asarray(noise)
        shape = (len(noise) if num_draws is None else num_draws, diffusion.schedule.num_steps, *_encoded_shape(diffusion, x))
        require(
            noise.shape == shape and len(noise) > 0,
            "noise",
            f"shape (draw, num_steps, datum, dim) = {shape}",
            noise.shape,
        )
        require(jnp.issubdtype(noise.dtype, jnp.floating), "noise", "floats", f"dtype {noise.dtype}", TypeError)
        num_draws = len(noise)
    num_draws = 1 if num_draws is None else num_draws
    require_count("num_draws", num_draws)
    mesh = data_mesh(devices)
    diffusion, x, key, noise = replicate((diffusion, jnp.asarray(x), key, noise), mesh)
    return to_default_device(_in_blocks(diffusion, x, key, int(num_draws), noise, reduce, mesh, progress), mesh)


def _in_blocks(
    diffusion: Diffusion,
    x: jax.Array,
    key: PRNGKeyArray | None,
    num_draws: int,
    noise: Float[Array, "draw num_steps datum dim"] | None,
    reduce: bool,
    mesh: Mesh | None,
    progress: bool,
) -> ELBOTerms | ELBOMoments:
    """Evaluate in blocks of draws, or of the steps of one draw, so that a progress bar can move and Ctrl-C interrupts."""
    num_steps, at_once = diffusion.schedule.num_steps, EVALUATIONS // len(x)
    if not all(map(is_concrete, jax.tree.leaves((diffusion, x, key, noise)))):  # in a larger program: one loop over all steps of a draw
        at_once = max(at_once, num_steps)
    whole_draws, desc = at_once // num_steps, "terms of the bound, all steps"

    def evaluate(draws: np.ndarray, steps: np.ndarray, first: bool = True) -> ELBOTerms:
        numbers = replicate((jnp.asarray(draws), jnp.asarray(steps)), mesh)
        eps = None if noise is None else noise[draws]
        return jax.block_until_ready(_evaluate(diffusion, x, key, *numbers, first, eps, mesh))

    def evaluate_by_steps(draw: int) -> ELBOTerms:
        draws, of_draw = np.array([draw]), f"{desc}, draw {draw + 1} of {num_draws}"
        steps = blocks(num_steps - 1, at_once, unit="step", desc=of_draw, progress=progress)
        terms, kls = evaluate(draws, np.arange(0)), [evaluate(draws, 2 + each, first=False).step_kl for each in steps]
        return _with_step_kl(terms, kls, num_steps - 1, mesh)

    found, sums = [], None
    for draws in map(np.unique, blocks(num_draws, whole_draws, unit="draw", desc=desc, progress=progress and whole_draws > 0)):
        terms = evaluate(draws, np.arange(2, num_steps + 1)) if whole_draws or num_steps == 1 else evaluate_by_steps(int(draws[0]))
        if reduce:
            sums = _added(terms, sums, mesh)
        else:
            found.append(terms)
    if sums is not None:
        _, means, squares = sums
        step_kl, reconstruction, elbo = (Moments(m, s / (num_draws - 1) if num_draws > 1 else s * jnp.nan) for m, s in zip(means, squares))
        return ELBOMoments(terms.prior_kl, step_kl, reconstruction, elbo, num_draws)
    if len(found) == 1:
        return found[0]
    drawn = [jnp.concatenate(parts) for parts in zip(*((each.step_kl, each.reconstruction) for each in found))]
    return eqx.tree_at(lambda terms: (terms.step_kl, terms.reconstruction), found[0], tuple(drawn))


@eqx.filter_jit
def _with_step_kl(terms: ELBOTerms, parts: list[jax.Array], size: int, mesh: Mesh | None) -> ELBOTerms:
    """The terms with the KLs of ``size`` steps, from parts of shape ``(draw, part, datum)``, the last of which may be too long."""
    return gather(eqx.tree_at(lambda terms: terms.step_kl, terms, jnp.concatenate(parts, 1)[:, :size]), mesh)


@eqx.filter_jit(donate="all-except-first")
def _added(terms: ELBOTerms, sums: Any, mesh: Mesh | None) -> Any:
    """The number of draws, their means and their sums of squared deviations, with the draws of ``terms`` added (Chan et al. 1983, doi:10.1080/00031305.1983.10483115)."""
    values = terms.step_kl, terms.reconstruction, terms.elbo
    count, means = jnp.asarray(len(terms.reconstruction), terms.prior_kl.dtype), [value.mean(0) for value in values]
    squares = [jnp.square(value - mean).sum(0) for value, mean in zip(values, means)]
    if sums is None:
        return gather((count, means, squares), mesh)
    seen, old_means, old_squares = sums
    total, changes = seen + count, [mean - old for mean, old in zip(means, old_means)]
    means = [old + change * count / total for old, change in zip(old_means, changes)]
    squares = [old + new + jnp.square(change) * seen * count / total for old, new, change in zip(old_squares, squares, changes)]
    return gather((total, means, squares), mesh)
