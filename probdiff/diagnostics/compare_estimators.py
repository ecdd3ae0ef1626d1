"""Every estimator of the bound on the same data: value, variance, gradient variance, cost, and whether they agree.

Draw s of every estimator starts from the same key, so that estimators with the same parts have the same random numbers, and
differences are taken draw by draw. All figures are for these data, and errors are Monte Carlo errors. Only the variances of
estimators that evaluate all steps are estimated from a few of the items if there are many.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from scipy import special

from probdiff._checks import Number, PyTree, Whole, require, require_count, require_key, require_type
from probdiff._devices import Devices, data_mesh, replicate
from probdiff.diagnostics.cost_ratios import ratio_errors
from probdiff.diagnostics.estimator_comparison import COSTS, EstimatorComparison
from probdiff.diagnostics.estimator_draws import DIRECTIONS, EstimatorDraws, draw_estimators
from probdiff.diagnostics.z_scores import pairwise_z
from probdiff.diffusion import Diffusion
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.estimators import ESTIMATORS, suitable_estimators
from probdiff.elbo.importance import log_mean_exp, pareto_khat
from probdiff.elbo.terms import bits_per_dim
from probdiff.programs.sites import Data

REFERENCE = "kl_uniform"
FAMILY_ERROR = 0.0027  # three standard errors, for all pairs together


def compare_estimators(
    diffusion: Diffusion,
    x: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_draws: Whole | None = None,
    minutes: Number = 1,
    estimators: Iterable[str] | str | None = None,
    devices: Devices = None,
    progress: bool = False,
) -> EstimatorComparison:
    """Estimate the bound of one model on the same data by every estimator.

    The data are one batch, and an estimator with one evaluation per datum is drawn for all of it: its variance depends on the size of
    the batch. Estimators with N evaluations per datum are drawn for the first data only, 2¹²/N of them but at least 4: the draws
    of different data are independent, so that the variance of the mean over all data follows from the variances for a few data.

    Estimators that learn (probabilities of steps, coefficients) first learn on ``x``, and are then held fixed. For the
    columns about values they are adapted to the value, for those about gradients to the gradient.

    Args:
        diffusion: The model.
        x: Data, shape ``(datum, dim)``: the variances are those of a fit if there are as many data as in its batches.
        context: Of a conditional model: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key.
        num_draws: Draws of the estimators with N network evaluations a datum, at least 2. The others have larger variances and cost
            less: they are drawn up to 64 times as often. Gradients are drawn 8 to 1024 times, within about 2¹⁵ network
            evaluations. If not given, the number of draws is determined by ``minutes``.
        minutes: Time limit, compilation included, if ``num_draws`` is not given. The smallest number of draws from which errors can be estimated is
            made even if it takes longer, except for gradients of estimators that evaluate all steps, which are drawn if time is left. With several
            processes, whose clocks differ, only this smallest number is made.
        estimators: Names out of :data:`~probdiff.ESTIMATORS`; all that suit the reverse kernel if not given.
        devices: Number of devices (or a list of them) that share the draws.
        progress: Show progress bars.

    Returns:
        An :class:`EstimatorComparison`.

    Raises:
        ValueError, TypeError: If the data or an estimator do not suit the model, a name is unknown, ``num_draws`` is less than 2, or
            ``minutes`` is not positive.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0 * z)
        >>> x = jax.random.normal(jax.random.key(1), (4, 2))
        >>> names = ["kl_uniform", "kl_stratified"]
        >>> comparison = probdiff.compare_estimators(diffusion, x, key=jax.random.key(2), num_draws=2, estimators=names)
        >>> comparison.table["evaluations"].tolist()  # of the network, for each datum and draw
        [1, 1]
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.given(context)
    x = diffusion.read_data(x)
    if num_draws is not None:
        require_count("num_draws", num_draws)
        require(num_draws >= 2, "num_draws", "at least 2, for an error", num_draws)
    require(0 < minutes < np.inf, "minutes", "a positive number", minutes)
    require_key(key)
    names = check_names(suitable_estimators(diffusion) if estimators is None else estimators)
    mesh = data_mesh(devices)
    diffusion, x, key = replicate((diffusion, jnp.asarray(x), key), mesh)
    measured = draw_estimators(
        names, diffusion, x, key=key, num_draws=num_draws, minutes=minutes, mesh=mesh, progress=progress
    )
    return _summarise(measured, x, diffusion.likelihood.levels is not None)


def check_names(names: Iterable[str] | str) -> list[str]:
    """The names as a list, checked to be known and different."""
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in ESTIMATORS]
    require(not unknown, "estimators", f"names out of {', '.join(ESTIMATORS)}", ", ".join(map(repr, unknown)))
    require(names, "estimators", "at least one name", "none")
    return list(dict.fromkeys(names))


def _summarise(measured: dict[str, EstimatorDraws], x: jax.Array, levels: bool) -> EstimatorComparison:
    import pandas as pd

    table = pd.DataFrame.from_dict({name: _row(each, x, levels) for name, each in measured.items()}, orient="index")
    variances = {
        "value": {name: each.value_variance for name, each in measured.items()},
        "gradient": {name: each.gradient_variance for name, each in measured.items() if each.gradient_variance},
    }
    cost_errors = {}
    for cost in COSTS:
        kind, _, unit = cost.partition("_by_")
        column = unit if unit == "evaluations" or kind == "value" else f"{kind}_seconds"
        seconds = {name: getattr(measured[name], f"{kind}_seconds") for name in variances[kind]} if unit == "seconds" else None
        errors = ratio_errors(variances[kind], seconds).reindex(index=table.index, columns=table.index)
        product = table[f"{kind}_variance"] * table[column]
        table[cost] = product / product.get(REFERENCE, np.nan)
        table[f"{cost}_error"] = table[cost] * errors.get(REFERENCE, np.nan)
        cost_errors[cost] = errors
    projections = {name: each.projections for name, each in measured.items() if each.projections is not None}
    value_z = pairwise_z(list(measured), _pair_of_values(measured))
    gradient_z = pairwise_z(list(projections), _pair_of_gradients(measured))
    num_scores = max(1, (value_z.count().sum() + DIRECTIONS * gradient_z.count().sum()) // 2)
    trace = measured["trace"].values if "trace" in measured else None
    return EstimatorComparison(
        table=table,
        draws=_stacked([each.values for each in measured.values()], len(x)),
        projections=projections,
        value_z=value_z,
        gradient_z=gradient_z,
        z_limit=float(-special.ndtri(FAMILY_ERROR / 2 / num_scores)),
        cost_errors=cost_errors,
        iwae=None if trace is None else Estimate.of(log_mean_exp(trace, 0)),
        khat=None if trace is None else pareto_khat(trace),
        dim=x.shape[1],
    )


def _row(measured: EstimatorDraws, x: jax.Array, levels: bool) -> dict[str, Any]:
    means = measured.values.mean(1)
    error = means.std(ddof=1) / np.sqrt(len(means))
    bits, bits_error = bits_per_dim(np.array([means.mean(), -error]), x.shape[1])
    gradient, seconds, projections = measured.gradient_variance, measured.gradient_seconds, measured.projections
    return {
        "elbo": means.mean(),
        "se": error,
        **({"bits_per_dim": bits, "bits_se": bits_error} if levels else {}),
        "items": measured.values.shape[1],
        "draws": len(means),
        "sd": np.sqrt(measured.value_variance.value),
        "evaluations": measured.evaluations,
        "seconds": measured.value_seconds.mean(),
        "value_variance": measured.value_variance.value,
        "gradient_variance": np.nan if gradient is None else gradient.value,
        "gradient_draws": 0 if projections is None else len(projections),
        "gradient_seconds": np.nan if seconds is None else seconds.mean(),
    }


def _pair_of_values(measured: dict[str, EstimatorDraws]) -> Callable[[str, str], tuple[np.ndarray, ...] | None]:
    """For :func:`pairwise_z`: draws of the mean bound of the items that both estimators were drawn for."""

    def pair(*names: str) -> tuple[np.ndarray, ...] | None:
        both = [measured[name] for name in names]
        count = min(each.values.shape[1] for each in both)
        if any(count < each.values.shape[1] and not each.is_of_each_datum for each in both):
            return None
        return tuple(each.values[:, :count].mean(1)[:, None] for each in both)

    return pair


def _pair_of_gradients(measured: dict[str, EstimatorDraws]) -> Callable[[str, str], tuple[np.ndarray, ...] | None]:
    """The same for projections of the gradient, which are means over all items that an estimator was drawn for."""

    def pair(a: str, b: str) -> tuple[np.ndarray, ...] | None:
        first, second = measured[a], measured[b]
        if first.projections is None or second.projections is None or first.values.shape[1] != second.values.shape[1]:
            return None
        return first.projections, second.projections

    return pair


def _stacked(values: list[np.ndarray], num_items: int) -> np.ndarray:
    """The first draws of all estimators, equally many, NaN for items that were not drawn; shape ``(estimator, draw, datum)``."""
    stacked = np.full((len(values), min(map(len, values)), num_items), np.nan)
    for row, each in zip(stacked, values):
        row[:, : each.shape[1]] = each[: len(row)]
    return stacked
