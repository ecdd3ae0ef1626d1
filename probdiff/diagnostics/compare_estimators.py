"""Every estimator of the bound on the same data: value, variance, gradient variance, cost, and whether they agree.

Draw s of every estimator starts from the same key, so that estimators with the same parts have the same random numbers, and
differences are taken draw by draw. All figures are for these data, and errors are Monte Carlo errors. Only the variances of
estimators that evaluate all steps are estimated from a few of the items if there are many.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from scipy import special

from probdiff._checks import Number, PyTree, Whole, require, require_count, require_key, require_type
from probdiff._devices import Devices, data_mesh, replicate
from probdiff.diagnostics.cost_ratios import ratio_errors, tied_with_best
from probdiff.diagnostics.estimator_draws import DIRECTIONS, EstimatorDraws, draw_estimators
from probdiff.diagnostics.tables import format_estimators
from probdiff.diagnostics.z_scores import pairwise_z
from probdiff.diffusion import Diffusion
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.estimators import ESTIMATORS, suitable_estimators
from probdiff.elbo.importance import khat_limit, log_mean_exp, pareto_khat
from probdiff.elbo.terms import bits_per_dim
from probdiff.programs.sites import Data

REFERENCE = "kl_uniform"
FAMILY_ERROR = 0.0027  # three standard errors, for all pairs together
COSTS = [f"{kind}_by_{unit}" for kind in ("value", "gradient") for unit in ("evaluations", "seconds")]


@dataclasses.dataclass(frozen=True)
class EstimatorComparison:
    """The result of :func:`~probdiff.compare_estimators`. It is printed as a verdict and two tables.

    Attributes:
        table: One row per estimator, a pandas DataFrame. ``elbo``, ``se`` (nats per datum; ``bits_per_dim``, ``bits_se`` if the data
            are on a grid): of the first ``items`` data, by ``draws`` draws; ``value_variance``, its root ``sd``: of one draw of the
            mean over *all* data; ``evaluations``: network evaluations per datum and draw; ``seconds``: of one draw of all data;
            ``gradient_variance``: trace of the covariance of the gradient of the mean bound of all data in all parameters;
            ``gradient_draws``; ``gradient_seconds``; four costs relative to ``kl_uniform`` (whose cost is 1; lower is better),
            ``value_by_evaluations`` and ``value_by_seconds``, variance × cost, and the same for the gradient; and the standard error
            of each, ``value_by_evaluations_error`` and so on (NaN if there are too few draws; for seconds, the error over repeated calls,
            which does not include a constant load of the machine).
        draws: The first draws of each estimator's bound, as many as every estimator has, nats, shape ``(estimator, draw, datum)``; NaN
            for data that an estimator was not drawn for. For ``kl_posterior_target`` only the mean over data is an estimate of a bound.
        projections: Gradients of the mean bound of the first ``items`` data along a few fixed random directions, a dict from estimator
            to shape ``(draw, direction)``; empty if the model has no parameters.
        value_z, gradient_z: Pairwise z-scores of the means, DataFrames; for gradients, the largest over the directions. Both means are over the
            same items; NaN if that is impossible: for gradients, and for ``kl_posterior_target``, between batches of different size.
        z_limit: The limit that the largest ``|z|`` of all pairs exceeds by chance with probability 0.27 % (family-wise error).
        cost_errors: For each of the four costs, the standard errors of the log ratios of all pairs, DataFrames.
        iwae: The importance-weighted bound on all paths of ``trace``, an ``Estimate``; None without ``trace``.
        khat: Pareto k̂ of the weights of those paths, shape ``(item,)``; None without ``trace``.
        dim: Number of dimensions, for bits/dim.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0 * z)
        >>> x = jax.random.normal(jax.random.key(1), (4, 2))
        >>> names = ["kl_uniform", "kl_stratified"]
        >>> comparison = probdiff.compare_estimators(diffusion, x, key=jax.random.key(2), num_draws=2, estimators=names)
        >>> comparison.agree, float(comparison.table.loc["kl_uniform", "value_by_evaluations"])
        (True, 1.0)
    """

    table: Any
    draws: np.ndarray
    projections: dict[str, np.ndarray]
    value_z: Any
    gradient_z: Any
    z_limit: float
    cost_errors: dict[str, Any]
    iwae: Estimate | None
    khat: np.ndarray | None
    dim: int

    @property
    def largest_z(self) -> float:
        """The largest absolute pairwise z-score, of values and of gradients."""
        scores = [self.value_z.values.ravel(), self.gradient_z.values.ravel()]
        return float(np.nanmax(np.abs(np.concatenate([[0.0], *scores]))))

    @property
    def agree(self) -> bool:
        """Whether all estimators agree, in values and in gradients."""
        return self.largest_z <= self.z_limit

    def best(self, cost: str) -> str | None:
        """The estimator with the least cost, for a column of :attr:`table`; None if the cost is unknown for all."""
        return next(iter(self.tied(cost)), None)

    def tied(self, cost: str) -> list[str]:
        """The estimators whose cost is within two standard errors of the least cost; the best comes first."""
        return tied_with_best(self.table[cost], self.cost_errors[cost])

    @property
    def khat_limit(self) -> float | None:
        """The limit that k̂ must not exceed for this number of paths (:func:`~probdiff.elbo.importance.khat_limit`); None without ``trace``."""
        return None if self.khat is None else khat_limit(int(self.table.loc["trace", "draws"]))

    def to_datatree(self) -> Any:
        """A DataTree: the draws, ``posterior/elbo`` (chain, draw, estimator, datum), and the ``table`` (estimator)."""
        import arviz as az
        import xarray as xr

        tree = az.from_dict(
            {"posterior": {"elbo": np.moveaxis(self.draws, 0, 1)[None]}},
            dims={"elbo": ["estimator", "datum"]},
            coords={"estimator": list(self.table.index), "datum": np.arange(self.draws.shape[2])},
        )
        tree["table"] = xr.DataTree(xr.Dataset.from_dataframe(self.table.rename_axis("estimator")))
        tree["posterior"]["elbo"].attrs.update(units="nats", long_name="estimate of the evidence lower bound")
        return tree

    def to_dict(self) -> dict[str, Any]:
        """All results but the draws, a dict for JSON; unknown values are None."""
        table = self.table.astype(object).where(self.table.notna(), None)
        known = self.iwae and {k: v if np.isfinite(v) else None for k, v in self.iwae._asdict().items()}
        return {
            "estimators": {name: dict(row) for name, row in table.iterrows()},
            "num_draws": self.draws.shape[1],
            "num_items": self.draws.shape[2],
            "value_z": _json_matrix(self.value_z),
            "gradient_z": _json_matrix(self.gradient_z),
            "z_limit": self.z_limit,
            "agree": self.agree,
            "best_for_values": self.best("value_by_evaluations"),
            "best_for_gradients": self.best("gradient_by_evaluations"),
            "tied": {cost: self.tied(cost) for cost in COSTS},
            "iwae": known,
            "khat_limit": self.khat_limit,
            "khat": None if self.khat is None else [float(k) if np.isfinite(k) else None for k in self.khat],
        }

    def plot(self) -> Any:
        """A figure: each estimator's bound with its error, and its costs relative to ``kl_uniform``."""
        from probdiff.diagnostics.plots import plot_estimators

        return plot_estimators(self.table, self.draws.shape[2])

    def __repr__(self) -> str:
        """The verdict, the costs of each estimator, and its estimates."""
        return format_estimators(self)


def _json_matrix(frame: Any) -> dict[str, Any]:
    return {name: {k: v for k, v in row.items() if np.isfinite(v)} for name, row in frame.iterrows()}


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
