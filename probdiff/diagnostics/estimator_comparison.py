"""The result of a comparison of estimators, and its text."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probdiff.diagnostics.cost_ratios import tied_with_best
from probdiff.diagnostics.tables import MOST_NAMED, WIDTH
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.importance import khat_error, khat_limit

if TYPE_CHECKING:
    import pandas

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


def format_estimators(comparison: EstimatorComparison) -> str:
    """An :class:`EstimatorComparison` as text of 80 columns: verdict, costs, bounds."""
    verdict = [line for words in _verdict(comparison) for line in textwrap.wrap(words, WIDTH, subsequent_indent="  ")]
    return "\n".join([*verdict, "", *_costs(comparison.table, comparison.draws.shape[2]), "", *_bounds(comparison)])


def _costs(table: "pandas.DataFrame", num_items: int) -> Iterator[str]:
    yield f"Variance × cost for a batch of {num_items}, relative to kl_uniform's (below 1 is better)"
    yield f"{'':20}{'values':>22}{'gradients':>30}"
    yield f"{'':20}" + f"{'evaluations':>15}{'seconds':>15}" * 2
    for name, row in table.iterrows():
        yield f"{name:20}" + "".join(_with_error(row[cost], row[f"{cost}_error"]) for cost in COSTS)
    if table["gradient_variance"].isna().any() and table["gradient_variance"].notna().any():
        yield "–: no time for gradients of estimators that evaluate all steps (--minutes)"


def _with_error(value: float, error: float) -> str:
    """A number and its standard error in 15 columns, to the first digit of the error."""
    if np.isnan(value):
        return f"{'–':>8}{'':7}"
    if value >= 1e6:
        return f"{value:8.1e} ±{error:5.0e}".replace("nan", "  –")
    decimals = int(np.clip(-np.floor(np.log10(error)), 0, 3)) if error > 0 else 2
    return f"{value:8.{decimals}f} ±{error:5.{decimals}f}".replace("nan", "  –")


def _bounds(comparison: EstimatorComparison) -> Iterator[str]:
    table, bits = comparison.table, "bits_per_dim" in comparison.table
    scores = [each.abs().max(axis=1).reindex(table.index) for each in (comparison.value_z, comparison.gradient_z)]
    yield "The bound of the first items, nats per item; z: the largest |z| of any pair"
    yield (
        f"{'':20}{'items':>5}{'draws':>6}{'evals':>6}{'ELBO':>10}{'± s.e.':>8}"
        + (f"{'bits/dim':>9}{'± s.e.':>7}" if bits else "")
        + f"{'z':>4}{'∇ z':>5}"
    )
    for name, row in table.iterrows():
        line = f"{name:20}{int(row['items']):5d}{int(row['draws']):6d}{int(row['evaluations']):6d}{row['elbo']:10.3f}{row['se']:8.3f}"
        line += f"{row['bits_per_dim']:9.4f}{row['bits_se']:7.4f}" if bits else ""
        yield (line + f"{scores[0][name]:4.1f}{scores[1][name]:5.1f}").replace("nan", "  –")


def _verdict(comparison: EstimatorComparison) -> Iterator[str]:
    table = comparison.table
    if len(table) > 1:
        words = "agree" if comparison.agree else "DO NOT AGREE"
        yield (
            f"The {len(table)} estimators {words}: the largest |z| is {comparison.largest_z:.1f}, "
            f"and {comparison.z_limit:.1f} is the limit for so many pairs"
        )
    for kind in ("value", "gradient"):
        best = comparison.tied(f"{kind}_by_evaluations")
        if best:
            cost, error = _with_error(*(table.loc[best[0], f"{kind}_by_evaluations{end}"] for end in ("", "_error"))).split("±")
            yield (
                f"best for {kind}s: {_with_ties(best)}; its variance × evaluations is {cost.strip()} ± {error.strip()} of kl_uniform's. "
                f"By seconds: {_with_ties(comparison.tied(f'{kind}_by_seconds'))}"
            )
    if comparison.iwae is not None:
        yield from _weights(comparison)


def _with_ties(names: Sequence[str]) -> str:
    best, *tied = names
    return best + (f", tied with {', '.join(tied)}" if tied else "")


def _weights(comparison: EstimatorComparison) -> Iterator[str]:
    """The importance-weighted bound and k̂ of the paths of ``trace``, as text."""
    khat, limit, row = comparison.khat, comparison.khat_limit, comparison.table.loc["trace"]
    assert comparison.iwae is not None and khat is not None and limit is not None
    num_draws = int(row["draws"])
    yield (
        f"importance-weighted bound on the {num_draws} paths of trace: {comparison.iwae.mean:.4f} nats "
        f"per item, {comparison.iwae.mean - row['elbo']:.4f} above the ELBO of the same {int(row['items'])} items"
    )
    if np.isnan(khat).any():
        yield "Pareto k̂ of their weights: not from so few draws"
        return
    middle = float(np.median(khat))
    error = khat_error(middle, num_draws) if np.isfinite(middle) else 0.0
    high = [str(k) for k in np.flatnonzero(khat > limit)]
    named = f"above it: item {', '.join(high[:MOST_NAMED])}" + (f" and {len(high) - MOST_NAMED} more" if len(high) > MOST_NAMED else "")
    yield (
        f"Pareto k̂ of their weights: median {middle:.2f}, its own error about {error:.2f} an item; the limit for {num_draws} draws is "
        f"{limit:.2f}; {named if high else 'none is above it'}. k̂ says whether the weights can be trusted; it does not measure the gap of the bound"
    )
