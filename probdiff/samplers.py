r"""Samplers of a fitted model.

Each returns samples in the units of the data. A sample depends on the key and on its index, and not on the number of other
samples; a batch of samples is one compiled call, and Ctrl-C interrupts between batches.

    ancestral            the reverse program itself, N evaluations of the network
    ddim                 a sub-sequence of the steps, with noise in proportion to η (none at η = 0)
    annealed_langevin    Langevin steps on the score of each noise level, from the largest to the smallest
    probability_flow     the ordinary differential equation of :mod:`probdiff.flow`

All but ``ancestral`` start from a standard normal at the last step of their sub-sequence (a log-SNR of −3 is low enough for data of unit variance),
and end with the mean E[x_0 | z_n] at its first step: the samples have too little variance if much noise is left there. The error depends on
the number of steps; `analyses/samplers.py` measures it. :func:`guided` is classifier-free guidance of a conditional model.

Sources: Ho et al. (2020), arXiv:2006.11239, algorithm 2; Song et al. (2021), arXiv:2011.13456, eq. 13; the others in their functions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, Shaped
from numpyro import handlers

from probdiff._checks import AnyArray, Number, PyTree, Whole, require, require_count, require_key, require_type
from probdiff._chunks import EACH, EVALUATIONS, blocks, joined, take
from probdiff._devices import Devices, data_mesh, gather, replicate, shard
from probdiff.chain.schedules import AbstractSchedule, at_step
from probdiff.chain.score import score, vp_from_ve
from probdiff.diffusion import Diffusion
from probdiff.flow import in_continuous_time, require_tolerances, solve, velocity
from probdiff.networks.context import Guided

ADAPTIVE = 500  # evaluations of the network: about as many as an adaptive solver needs


Samples = Shaped[np.ndarray, "num_samples dim"]


def ancestral(
    diffusion: Diffusion,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_samples: Whole | None = None,
    devices: Devices = None,
    progress: bool = False,
) -> Samples:
    """Draw from the model by ``diffusion.model``, the reverse chain with all its steps.

    Args:
        diffusion: The model; it must know its dimension.
        context: Of a conditional model, as for :meth:`~probdiff.Diffusion.given`: one sample is drawn for each row.
        key: JAX key.
        num_samples: Number of samples; not needed with a context.
        devices: Number of devices (or a list of them) that share the samples.
        progress: Show a progress bar.

    Returns:
        Samples in the units of the data, shape ``(num_samples, dim)``.

    Raises:
        ValueError, TypeError: If the model does not know its dimension, the context does not suit it, or an argument is out of range.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> probdiff.samplers.ancestral(diffusion, key=jax.random.key(1), num_samples=3).shape
        (3, 2)
    """
    diffusion = _evaluated(diffusion, context)
    evaluations = diffusion.schedule.num_steps
    return _draw(_ancestral, diffusion, (), key, num_samples, evaluations, devices, progress)


def _ancestral(diffusion: Diffusion, key: PRNGKeyArray) -> jax.Array:
    return handlers.seed(diffusion.model, key)(None, num_data=1)[0]


def ddim(
    diffusion: Diffusion,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_samples: Whole | None = None,
    steps: int | Sequence[int] | np.ndarray | None = None,
    eta: Number = 0.0,
    devices: Devices = None,
    progress: bool = False,
) -> Samples:
    r"""Draw by DDIM (denoising diffusion implicit models): steps that keep the marginals of the chain, for any sub-sequence of the steps.

    For a sub-sequence of 1 … N in which step m comes before step n (before its first step, :math:`\bar\alpha = 1`),

    .. math:: z_m = \sqrt{\bar\alpha_m}\, \hat x_0 + \sqrt{1 - \bar\alpha_m - s^2}\, \hat\epsilon + s\, \xi,
        \quad s = \eta \sqrt{\tfrac{1-\bar\alpha_m}{1-\bar\alpha_n}} \sqrt{1 - \bar\alpha_n/\bar\alpha_m}.

    Source: Song et al. (2021), arXiv:2010.02502, eqs. 12 and 16.

    Args:
        diffusion: The model; it must know its dimension.
        context: Of a conditional model, as for :meth:`~probdiff.Diffusion.given`: one sample is drawn for each row.
        key: JAX key.
        num_samples: Number of samples; not needed with a context.
        steps: Number of steps, spread evenly over 1 … N; or the steps themselves, increasing; all N if not given. Each step is one
            evaluation of the network.
        eta: η, 0 to 1: at 0 no noise is added (then z_N decides the sample), at 1 as much as by the reverse chain with
            :math:`v_n = \tilde\beta_n`.
        devices: Number of devices (or a list of them) that share the samples.
        progress: Show a progress bar.

    Returns:
        Samples in the units of the data, shape ``(num_samples, dim)``.

    Raises:
        ValueError, TypeError: If the model does not know its dimension, the context does not suit it, or an argument is out of range.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(10), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> probdiff.samplers.ddim(diffusion, key=jax.random.key(1), num_samples=3, steps=5).shape  # five of the ten steps
        (3, 2)
    """
    diffusion = _evaluated(diffusion, context)
    taken = _subsequence(diffusion, steps)
    require(0 <= eta <= 1, "eta", "0 <= eta <= 1", eta)
    coefficients = _ddim_coefficients(diffusion.schedule, taken, eta)
    return _draw(_ddim, diffusion, (taken, *coefficients), key, num_samples, len(taken), devices, progress)


def _ddim_coefficients(
    schedule: AbstractSchedule, taken: np.ndarray, eta: Number
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The factors of z_n, the predicted noise and new noise in z_m, float64, for each step n of ``taken``."""
    signal, noise = schedule.alpha_bar[taken - 1], schedule.one_minus_alpha_bar[taken - 1]
    signal_before = np.concatenate([[1.0], signal[:-1]])
    noise_before = np.concatenate([[0.0], noise[:-1]])
    added = eta**2 * noise_before / noise * -np.expm1(np.log(signal) - np.log(signal_before))
    per_z = np.sqrt(signal_before / signal)
    per_eps = np.sqrt(np.maximum(noise_before - added, 0)) - per_z * np.sqrt(noise)
    return per_z, per_eps, np.sqrt(added)


def _ddim(
    diffusion: Diffusion, key: PRNGKeyArray, taken: jax.Array, per_z: jax.Array, per_eps: jax.Array, added: jax.Array
) -> jax.Array:
    def step(z: jax.Array, each: Any) -> tuple[jax.Array, None]:
        n, per_z, per_eps, added, key = each
        eps_hat = diffusion.predict_noise(z, n)
        return per_z * z + per_eps * eps_hat + added * jax.random.normal(key, z.shape, z.dtype), None

    start_key, noise_key = jax.random.split(key)
    z = jax.random.normal(start_key, (_dim(diffusion),))
    tables = (jnp.asarray(table, z.dtype) for table in (per_z, per_eps, added))
    x0, _ = jax.lax.scan(step, z, (taken, *tables, jax.random.split(noise_key, len(taken))), reverse=True)
    return diffusion.likelihood.decode(x0)


def annealed_langevin(
    diffusion: Diffusion,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_samples: Whole | None = None,
    steps: int | Sequence[int] | np.ndarray | None = None,
    num_updates: Whole = 10,
    step_size: Number = 0.5,
    devices: Devices = None,
    progress: bool = False,
) -> Samples:
    r"""Draw by Langevin dynamics on the score of each noise level, in variance-exploding (VE) coordinates, from the largest level down.

    At each level, ``num_updates`` times :math:`x \leftarrow x + \tfrac{a}{2} s_\theta(x, n) + \sqrt{a}\, \xi` with
    :math:`a = r \sigma_n^2`: there is no Metropolis test, so that r must be small for the samples to have the right distribution.
    Source: Song and Ermon (2019), arXiv:1907.05600, algorithm 1; for the last denoising step, Jolicoeur-Martineau et al. (2021),
    arXiv:2009.05475, section 3.

    Args:
        diffusion: The model; it must know its dimension.
        context: Of a conditional model, as for :meth:`~probdiff.Diffusion.given`: one sample is drawn for each row.
        key: JAX key.
        num_samples: Number of samples; not needed with a context.
        steps: Number of noise levels, spread evenly over 1 … N; or the levels themselves, increasing; all N if not given.
        num_updates: Evaluations of the network at each level; one more evaluation follows the last level. With too few updates the samples do not reach
            the distribution of the level: for the moons, 10 updates at 50 levels were enough, and 10 updates at 10 levels were not.
        step_size: r, positive.
        devices: Number of devices (or a list of them) that share the samples.
        progress: Show a progress bar.

    Returns:
        Samples in the units of the data, shape ``(num_samples, dim)``.

    Raises:
        ValueError, TypeError: If the model does not know its dimension, the context does not suit it, or an argument is out of range.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> probdiff.samplers.annealed_langevin(diffusion, key=jax.random.key(1), num_samples=3, num_updates=2).shape
        (3, 2)
    """
    diffusion = _evaluated(diffusion, context)
    taken = _subsequence(diffusion, steps)
    require_count("num_updates", num_updates)
    require(0 < step_size < np.inf, "step_size", "a positive number", step_size)
    levels = np.repeat(taken, num_updates)
    arguments = levels, jnp.asarray(step_size)
    return _draw(_annealed_langevin, diffusion, arguments, key, num_samples, len(levels) + 1, devices, progress)


def _annealed_langevin(diffusion: Diffusion, key: PRNGKeyArray, levels: jax.Array, step_size: jax.Array) -> jax.Array:
    schedule = diffusion.schedule
    start_key, noise_key = jax.random.split(key)
    start = jax.random.normal(start_key, (_dim(diffusion),))
    # The standard normal z_N, in VE coordinates.
    x = start * jnp.hypot(1, at_step(schedule.sigma, levels[-1], start.dtype))

    def update(x: jax.Array, each: Any) -> tuple[jax.Array, None]:
        n, key = each
        size = step_size.astype(x.dtype) * jnp.square(at_step(schedule.sigma, n, x.dtype))
        drift = size / 2 * score(diffusion, x, n)
        return x + drift + jnp.sqrt(size) * jax.random.normal(key, x.shape, x.dtype), None

    x, _ = jax.lax.scan(update, x, (levels, jax.random.split(noise_key, len(levels))), reverse=True)
    return _denoised(diffusion, vp_from_ve(schedule, x, levels[0]), levels[0])


def probability_flow(
    diffusion: Diffusion,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_samples: Whole | None = None,
    steps: int | None = None,
    rtol: Number = 1e-4,
    atol: Number = 1e-4,
    devices: Devices = None,
    progress: bool = False,
) -> Samples:
    r"""Draw by the probability flow, a deterministic map from z_N to z_1.

    Args:
        diffusion: The model; it must know its dimension.
        context: Of a conditional model, as for :meth:`~probdiff.Diffusion.given`: one sample is drawn for each row.
        key: JAX key.
        num_samples: Number of samples; not needed with a context.
        steps: Number of steps of Heun's method, of equal length in log-SNR, two evaluations of the network each (four of one that is
            told the step); if not given, an adaptive solver with tolerances ``rtol`` and ``atol``. One more evaluation follows.
        rtol, atol: Relative and absolute tolerance of the adaptive solver for each step.
        devices: Number of devices (or a list of them) that share the samples.
        progress: Show a progress bar.

    Returns:
        Samples in the units of the data, shape ``(num_samples, dim)``.

    Raises:
        ValueError, TypeError: If the model does not know its dimension, the context does not suit it, or an argument is out of range.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> probdiff.samplers.probability_flow(diffusion, key=jax.random.key(1), num_samples=3, steps=4).shape
        (3, 2)
    """
    diffusion = _evaluated(diffusion, context)
    require_tolerances(rtol, atol)
    if steps is not None:
        require_count("steps", steps)
    evaluations = ADAPTIVE if steps is None else 4 * steps + 1
    options = steps, rtol, atol
    return _draw(_probability_flow, diffusion, options, key, num_samples, evaluations, devices, progress)


def _probability_flow(
    diffusion: Diffusion, key: PRNGKeyArray, steps: int | None, rtol: Number, atol: Number
) -> jax.Array:
    eps = in_continuous_time(diffusion)
    start = jax.random.normal(key, (_dim(diffusion),))
    ends = diffusion.schedule.log_snr[[-1, 0]].tolist()
    z, _ = solve(lambda time, z: velocity(eps, z, time), start, *ends, steps=steps, rtol=rtol, atol=atol)
    return _denoised(diffusion, z, 1)


def guided(diffusion: Diffusion, weight: Number) -> Diffusion:
    r"""A conditional model under classifier-free guidance, bound.

    Its network predicts :math:`(1 + w)\, \hat\epsilon(z, c) - w\, \hat\epsilon(z)`, by two evaluations: with the context and without
    (:func:`probdiff.networks.unconditional`). Every sampler and ``Predictive`` accept the model. With w > 0 each sample is more typical of its own context.

    With w = 0 it is the model itself, with w = −1 the unconditional one. With any other weight its samples do not follow p(x | c): no distribution of data
    has these noise predictions at all steps, and for w > 0 the samples vary less than data given c. Its bound is a bound for the guided chain,
    and not for the fitted model. Source: Ho and Salimans (2022), arXiv:2207.12598, eq. 6.

    Args:
        diffusion: A model with a :class:`~probdiff.networks.ContextDropout` in its network.
        weight: w, a finite number.

    Raises:
        ValueError, TypeError: If there is no ContextDropout in the network, the reverse kernel needs another prediction than the noise, or ``weight`` is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> network = probdiff.networks.ContextDropout(probdiff.MLP(2, key=jax.random.key(0), hidden=8, context_dim=3))
        >>> fitted = probdiff.Diffusion(probdiff.cosine_schedule(5), network)
        >>> probdiff.samplers.ddim(probdiff.samplers.guided(fitted, 1.5), context=jnp.ones((4, 3)), key=jax.random.key(1)).shape
        (4, 2)
    """
    require_type("diffusion", diffusion, Diffusion)
    kernel = diffusion.kernel
    require(kernel.prediction == "noise", "diffusion", "a reverse kernel that asks for the noise", f"a {kernel.name}")
    return diffusion.with_network(Guided(diffusion.network, weight)).bind({})


SAMPLERS: dict[str, Callable[..., Samples]] = {"ancestral": ancestral, "ddim": ddim, "langevin": annealed_langevin, "ode": probability_flow}


def _denoised(diffusion: Diffusion, z: Float[Array, "*batch dim"], n: Any) -> jax.Array:
    r"""The mean of x_0 that the network predicts from ``z`` after ``n`` steps, in the units of the data."""
    tables = diffusion.schedule.alpha_bar, diffusion.schedule.one_minus_alpha_bar
    signal, noise = (at_step(np.sqrt(table), n, z.dtype) for table in tables)
    return diffusion.likelihood.decode((z - noise * diffusion.predict_noise(z, n)) / signal)


def _evaluated(diffusion: Diffusion, context: PyTree) -> Diffusion:
    """The model prepared for evaluation and given the context; done before any of its tables is read."""
    require_type("diffusion", diffusion, Diffusion)
    require(
        diffusion.dim is not None, "diffusion", "one that knows its dimension: Diffusion(…, dim=…) or network.dim", None
    )
    return diffusion.evaluated().given(context)


def _dim(diffusion: Diffusion) -> int:
    assert diffusion.dim is not None  # checked by :func:`_evaluated`
    return diffusion.dim


def _subsequence(diffusion: Diffusion, steps: int | Sequence[int] | np.ndarray | None) -> np.ndarray:
    """The sub-sequence of the steps, an increasing array: all steps, a number of them, or the given steps."""
    num_steps = diffusion.schedule.num_steps
    if steps is None:
        return np.arange(1, num_steps + 1)
    steps = np.asarray(steps)
    expected = f"a number of steps, 1 to {num_steps}, or increasing steps from 1 … {num_steps}"
    require(np.issubdtype(steps.dtype, np.integer), "steps", expected, f"dtype {steps.dtype}", TypeError)
    if steps.ndim == 0:
        require(1 <= steps <= num_steps, "steps", expected, steps)
        return np.linspace(num_steps, 1, int(steps)).round().astype(np.int64)[::-1]
    good = (
        steps.ndim == 1 and steps.size > 0 and steps[0] >= 1 and steps[-1] <= num_steps and np.all(np.diff(steps) > 0)
    )
    require(good, "steps", expected, steps)
    return steps


def _draw(
    one: Callable[..., jax.Array],
    diffusion: Diffusion,
    arguments: tuple[Any, ...],
    key: PRNGKeyArray,
    num_samples: Whole | None,
    evaluations: int,
    devices: Devices,
    progress: bool,
) -> Samples:
    """``one(diffusion, key, *arguments)`` for the key of each sample, a batch at a time."""
    if num_samples is not None or diffusion.context is None:
        require_count("num_samples", num_samples)
    num_samples = diffusion.data_shape(None, num_samples)[0]
    require_key(key)
    mesh = data_mesh(devices)
    diffusion, arguments, key = replicate((diffusion, arguments, key), mesh)
    cut = blocks(
        num_samples, max(64, EVALUATIONS // evaluations), unit="sample", desc=one.__name__.strip("_"), progress=progress
    )
    samples = [np.asarray(_draw_batch(one, diffusion, arguments, key, numbers, mesh)) for numbers in cut]
    return joined(samples, num_samples)


@eqx.filter_jit
def _draw_batch(
    one: Callable[..., jax.Array],
    diffusion: Diffusion,
    arguments: tuple[Any, ...],
    key: PRNGKeyArray,
    numbers: AnyArray,
    mesh: Mesh | None,
) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, shard(jnp.asarray(numbers), mesh))
    # Each sample has its own row of the context, like one datum.
    context = take(shard(take(diffusion.context, numbers), mesh), EACH)
    return gather(jax.vmap(lambda key, context: one(diffusion.with_context(context), key, *arguments))(keys, context), mesh)
