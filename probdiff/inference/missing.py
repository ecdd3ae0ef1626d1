r"""Missing values: the marginal density of the observed coordinates of each datum.

A fitted diffusion is a distribution of complete data. The observed coordinates of an incomplete datum have a marginal density, with the others integrated
out, for which there is no analytic bound. Particles along the reverse chain give an unbiased estimate (:mod:`probdiff.inference.particles`) for any missing coordinates.

Source of the estimate: Wu et al. (2023), arXiv:2306.17775.
"""

import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Real

from probdiff._checks import AnyArray, PyTree, Whole, require, require_count, require_finite, require_key, require_type
from probdiff._chunks import EVALUATIONS, blocks, joined, take
from probdiff._frames import is_frame, with_gaps
from probdiff.diffusion import Diffusion
from probdiff.inference.observations import Inpainting
from probdiff.inference.particles import Problem, evidence_and_ess, make_problem
from probdiff.inference.posterior import COLLAPSED, log_mean_with_error
from probdiff.inference.twists import MOST_VALUES, AbstractTwist


class ObservedLogProb(NamedTuple):
    r"""The log density of the observed coordinates of each datum, nats.

    Attributes:
        log_prob: The log of an unbiased estimate of the density, shape ``(datum,)``; the log is too small in expectation.
        error: Standard error of ``log_prob``, from independent runs, shape ``(datum,)``; NaN for one run.
        ess: The smallest effective sample size of the particles over the steps, mean over the runs, shape ``(datum,)``.
        observed: The number of observed coordinates, shape ``(datum,)``.

    Example:
        >>> import numpy as np
        >>> from probdiff.inference import ObservedLogProb
        >>> found = ObservedLogProb(np.array([-1.0, -2.0]), np.array([0.1, 0.1]), np.array([30.0, 20.0]), np.array([1, 2]))
        >>> found.log_prob.mean()  # nats
        np.float64(-1.5)
    """

    log_prob: Float[np.ndarray, "datum"]
    error: Float[np.ndarray, "datum"]
    ess: Float[np.ndarray, "datum"]
    observed: Real[np.ndarray, "datum"]

    def __repr__(self) -> str:
        """Mean over the data with both errors, and the effective sample sizes."""
        count = len(self.log_prob)
        over_data = self.log_prob.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
        over_runs = np.sqrt(np.square(self.error).sum()) / count
        return (
            f"{count} data, of each of which {self.observed.mean():.1f} coordinates were observed on average\n"
            f"log p of the observed coordinates: {self.log_prob.mean():.4f} nats, ± {over_data:.4f} over the data, ± {over_runs:.4f} of the particles\n"
            f"effective sample size at the worst step: {np.median(self.ess):.1f} (median of the data), {self.ess.min():.1f} at the least"
        )


def observed_log_prob(
    diffusion: Diffusion,
    x: Any,
    *,
    mask: Bool[AnyArray, "datum dim"] | None = None,
    key: PRNGKeyArray,
    num_particles: Whole,
    twist: AbstractTwist | str = "tweedie",
    context: PyTree = None,
    num_runs: Whole = 4,
    progress: bool = False,
) -> ObservedLogProb:
    r"""The log density of the observed coordinates of each datum (on a grid, their probability), with the others integrated out, under the model.

    The missing coordinates may differ between the data, without new compilation. With nothing missing this is an estimate of log p(x), and with
    everything missing it is 0, the log of 1. For the distribution of the missing coordinates of a single datum, use :func:`~probdiff.inference.smc` with an
    :class:`~probdiff.inference.Inpainting`.

    Args:
        diffusion: The model, whose likelihood must be independent over the coordinates.
        x: Data, shape ``(datum, dim)``: an array, a masked array (masked values are missing) or a data frame. NaN and the empty cells of a data frame are missing values.
        mask: True where a coordinate is observed, shape ``(datum, dim)``, instead of NaN; the other values are ignored.
        key: JAX key.
        num_particles: Number of particles of each run.
        twist: As for :func:`~probdiff.inference.smc`. ``"tweedie"`` is the :class:`~probdiff.inference.DiagonalTwist` for all data if any datum has more than 16
            observed coordinates.
        context: Of a conditional model: a row for each datum.
        num_runs: Independent runs over which the estimates are averaged: at least 2 for a standard error.
        progress: Show a progress bar.

    Returns:
        :class:`ObservedLogProb`.

    Raises:
        ValueError, TypeError: If the data do not suit the model, or an argument is out of range.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import probdiff
        >>> from probdiff.oracles import GaussianOracle
        >>> schedule = probdiff.log_snr_schedule(10, 4.0, -4.0)
        >>> diffusion = probdiff.Diffusion(schedule, GaussianOracle([0.0] * 3, np.eye(3)).network(schedule), reverse_variance="forward")
        >>> x = np.array([[0.5, np.nan, 0.2], [np.nan, np.nan, np.nan]])
        >>> found = probdiff.inference.observed_log_prob(diffusion, x, key=jax.random.key(0), num_particles=16)
        >>> found.log_prob.shape, found.observed.tolist(), float(found.log_prob[1])
        ((2,), [2, 0], 0.0)
    """
    require_type("diffusion", diffusion, Diffusion)
    for name, value in (("num_particles", num_particles), ("num_runs", num_runs)):
        require_count(name, value)
    require_key(key)
    values, mask = _read(x, mask, diffusion)
    few = min(values.shape[1], MOST_VALUES)
    rows = Inpainting.of_rows(mask, values, few if mask.sum(1).max() <= few else values.shape[1])
    diffusion = diffusion.given(context)
    diffusion.require_context(len(values))
    problem = make_problem(diffusion.take(slice(1)), take(rows, 0), twist, None)
    size, count, dim = int(num_particles), int(num_runs), values.shape[1]
    cost = size * problem.twist.evaluations(take(rows, 0), dim) * diffusion.schedule.num_steps
    at_once = max(1, min(problem.at_once(dim) // size, EVALUATIONS // cost))
    keys = jax.random.split(key, (len(values), count)).reshape(-1)
    found = []
    for part in blocks(len(keys), at_once, unit="run", desc="particles", progress=progress):
        found.append(_evidences(problem, size, take((rows, diffusion.context), part // count), keys[part]))
    log_evidence, ess = (each.reshape(-1, count) for each in joined(found, len(keys)))
    log_prob, error = log_mean_with_error(log_evidence.T)
    nothing = ~mask.any(1)
    _warn_of_collapse(ess.mean(1)[~nothing], size)
    return ObservedLogProb(np.where(nothing, 0, log_prob), np.where(nothing, 0, error), ess.mean(1).astype(np.float64), mask.sum(1))


@eqx.filter_jit
def _evidences(problem: Problem, size: int, rows: PyTree, keys: Array) -> tuple[Float[Array, "row"], Float[Array, "row"]]:
    """A run for each row of observations and contexts: the log of the estimate, and the smallest effective sample size."""

    def one(row: PyTree, key: PRNGKeyArray) -> tuple[Float[Array, ""], Float[Array, ""]]:
        observation, context = row
        diffusion = problem.diffusion.with_context(take(context, None))
        return evidence_and_ess(Problem(diffusion, observation, problem.twist), size, key)

    return jax.vmap(one)(rows, keys)


def _read(x: Any, mask: Any, diffusion: Diffusion) -> tuple[Real[np.ndarray, "datum dim"], Bool[np.ndarray, "datum dim"]]:
    """Complete data, with values allowed by the likelihood in the gaps, and the mask of observed coordinates."""
    x = with_gaps(x) if is_frame(x) else x
    there = ~np.ma.getmaskarray(x) if isinstance(x, np.ma.MaskedArray) else True
    x = np.ma.getdata(x) if isinstance(x, np.ma.MaskedArray) else x
    require(hasattr(x, "shape") and hasattr(x, "dtype"), "x", "an array", type(x).__name__, TypeError)
    x = np.asarray(x)
    require(x.dtype.kind in "iuf", "x", "numbers", f"dtype {x.dtype}", TypeError)
    require(x.ndim == 2 and len(x) > 0, "x", "shape (datum, dim), at least one datum", f"shape {x.shape}")
    require(diffusion.dim in (None, x.shape[1]), "x", f"shape (datum, {diffusion.dim}), a column for each dimension of the chain", f"shape {x.shape}")
    mask = ~np.isnan(x) if mask is None else np.asarray(mask)
    require(mask.dtype == bool, "mask", "truth values, True where a coordinate is observed", f"dtype {mask.dtype}", TypeError)
    require(mask.shape == x.shape, "mask", f"shape {x.shape}, that of x", f"shape {mask.shape}")
    mask = mask & there
    require_finite("x", np.where(mask, x, 0))
    somewhere = np.asarray(diffusion.likelihood.decode(jnp.zeros(x.shape)))
    x = np.where(mask, x, somewhere)
    whole = somewhere.dtype.kind == "i" and np.all(x == np.round(x))
    x = x.astype(somewhere.dtype) if whole else x
    diffusion.likelihood.check_data(x)
    return x, mask


def _warn_of_collapse(ess: Float[np.ndarray, "datum"], size: int) -> None:
    collapsed = int((~(ess >= COLLAPSED * size)).sum())
    if size > 1 and collapsed:
        warnings.warn(
            f"observed_log_prob: the particles of {collapsed} of {len(ess)} data have collapsed: at a step their effective sample size is below "
            f"{COLLAPSED:.0%} of {size}. Their log density is uncertain, and likely too small; take more particles, or another twist",
            stacklevel=3,
        )
