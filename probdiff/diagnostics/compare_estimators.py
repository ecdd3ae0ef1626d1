"""Every estimator of the bound on the same data: value, variance, gradient variance, cost, and whether they agree.

Draw s of every estimator starts from the same key, so that estimators which share parts share their random numbers, and
differences are taken draw by draw. All figures are for these data: errors are Monte Carlo errors.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.infer.elbo import ELBO
from scipy import special
from tqdm import tqdm

from probdiff._checks import Whole, require, require_count, require_key, require_type
from probdiff._chunks import MOST_NUMBERS, inputs_at_once
from probdiff._sharding import Devices, data_mesh, gather, replicate, shard
from probdiff.diagnostics.tables import format_estimators
from probdiff.diagnostics.z_scores import pairwise_z
from probdiff.diffusion import Diffusion
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.estimators import ESTIMATORS
from probdiff.elbo.importance import log_mean_exp, pareto_khat
from probdiff.elbo.objective import StepObjective
from probdiff.elbo.terms import bits_per_dim
from probdiff.programs.sites import PARAMS, Data

REFERENCE = "kl_uniform"
FAMILY_ERROR = 0.0027  # three standard errors, for all pairs together
BLOCK_ROWS = 2**16  # of the network between two looks at Ctrl-C
ROWS_AT_ONCE = 512  # of the network, of several draws
MORE_DRAWS = 64
GRADIENT_ROWS = 2**15  # of the network, for the way back of gradients
GRADIENT_DRAWS = (8, 1024)
DIRECTIONS = 8
LEARNING = (300, 256)  # updates, and data in each, before an estimator that learns is measured


@dataclasses.dataclass(frozen=True)
class EstimatorComparison:
    """The result of :func:`compare_estimators`. Prints as a table.

    Attributes:
        table: One row per estimator, a pandas DataFrame. ``elbo``, ``se`` (nats per datum; ``bits_per_dim``,
            ``bits_se``); ``sd``, ``value_variance``: of one draw of the mean over data; ``evaluations``: network
            evaluations per datum and draw; ``seconds``: of one draw of all data; ``gradient_variance``: trace of the
            covariance of the gradient of the mean bound in all parameters; ``gradient_draws``; ``gradient_seconds``;
            and four costs relative to ``kl_uniform`` (which has 1; below is better): ``value_by_evaluations`` and
            ``value_by_seconds``, variance × cost, and the same for the gradient.
        draws: The first ``num_draws`` of each estimator's bound, nats, shape ``(estimator, draw, datum)``. Only the
            mean over data means something for ``kl_posterior_target``.
        projections: Gradients along a few fixed random directions, a dict from estimator to shape
            ``(draw, direction)``; empty if the model has no parameters.
        value_z, gradient_z: Pairwise z-scores of the means, DataFrames; of the directions, the largest is given.
        z_limit: Largest |z| that is expected of the pairs together (family-wise error 0.27 %).
        iwae: The importance-weighted bound on all paths of ``trace``, an ``Estimate``; None without ``trace``.
        khat: Pareto k̂ of the weights of those paths, shape ``(datum,)``; None without ``trace``.
        dim: Number of dimensions, for bits/dim.
    """

    table: Any
    draws: np.ndarray
    projections: dict
    value_z: Any
    gradient_z: Any
    z_limit: float
    iwae: Estimate | None
    khat: np.ndarray | None
    dim: int

    @property
    def largest_z(self) -> float:
        """The largest pairwise z-score without its sign, in values and in gradients."""
        scores = [self.value_z.values.ravel(), self.gradient_z.values.ravel()]
        return float(np.nanmax(np.abs(np.concatenate([[0.0], *scores]))))

    @property
    def agree(self) -> bool:
        """Whether all estimators agree, in values and in gradients."""
        return self.largest_z <= self.z_limit

    def best(self, cost: str) -> str | None:
        """The estimator for which a cost, a column of :attr:`table`, is least; None if it is known for none."""
        column = self.table[cost].dropna()
        return None if column.empty else column.idxmin()

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
        """Everything but the draws, for JSON; what is not known is None."""
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
            "iwae": known,
            "khat": None if self.khat is None else [float(k) if np.isfinite(k) else None for k in self.khat],
        }

    def plot(self) -> Any:
        """A figure: each estimator's bound with its error, and its costs relative to ``kl_uniform``."""
        from probdiff.diagnostics.plots import plot_estimators

        return plot_estimators(self.table, self.draws.shape[2])

    def __str__(self) -> str:
        """The table, pairwise z-scores and the verdict."""
        return format_estimators(self)


def _json_matrix(frame: Any) -> dict[str, Any]:
    return {name: {k: v for k, v in row.items() if np.isfinite(v)} for name, row in frame.iterrows()}


def compare_estimators(
    diffusion: Diffusion,
    x: Data,
    *,
    key: PRNGKeyArray,
    num_draws: Whole = 200,
    estimators: Iterable[str] | str | None = None,
    devices: Devices = None,
    progress: bool = False,
) -> EstimatorComparison:
    """Estimate the bound of one model on the same data in every way.

    Estimators that learn (probabilities of steps, coefficients) first learn on ``x``, and are then held fixed. In the
    columns on values they are adapted to the value, in those on gradients to the gradient.

    Args:
        diffusion: The model.
        x: Data, shape ``(datum, dim)``.
        key: JAX key.
        num_draws: Draws of the estimators with N network evaluations a datum, at least 2. The others vary more and cost
            less: they are drawn up to 64 times as often. Gradients are drawn as often as about 2¹⁵ network
            evaluations allow, but 8 to 1024 times.
        estimators: Names out of :data:`~probdiff.ESTIMATORS`; all if not given.
        devices: Number of devices (or a list of them) that share the draws.
        progress: Show progress bars.

    Returns:
        An :class:`EstimatorComparison`.

    Raises:
        ValueError, TypeError: If the data do not suit the model, a name is unknown, or ``num_draws`` is less than 2.
    """
    require_type("diffusion", diffusion, Diffusion)
    x = diffusion.read_data(x)
    require_count("num_draws", num_draws)
    require(num_draws >= 2, "num_draws", "at least 2, for an error", num_draws)
    require_key(key)
    names = check_names(ESTIMATORS if estimators is None else estimators)
    mesh = data_mesh(devices)
    diffusion, x, key = replicate((diffusion, jnp.asarray(x), key), mesh)
    draw_key, learn_key, direction_key = jax.random.split(key, 3)
    size = sum(leaf.size for leaf in jax.tree.leaves(diffusion.trainable()))
    directions = jax.random.normal(direction_key, (DIRECTIONS, size)) / np.sqrt(max(1, size))
    with tqdm(total=len(names), unit="estimator", disable=not progress) as bar:
        measured = {}
        for name in names:
            bar.set_description(name)
            measured[name] = _measure(name, diffusion, x, num_draws, draw_key, learn_key, directions, mesh)
            bar.update()
    return _summarise(measured, num_draws, x)


def check_names(names: Iterable[str] | str) -> list[str]:
    """The names as a list, each known and there once."""
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in ESTIMATORS]
    require(not unknown, "estimators", f"names out of {', '.join(ESTIMATORS)}", ", ".join(map(repr, unknown)))
    require(names, "estimators", "at least one name", "none")
    return list(dict.fromkeys(names))


def _measure(
    name: str,
    diffusion: Diffusion,
    x: jax.Array,
    num_draws: Whole,
    draw_key: PRNGKeyArray,
    learn_key: PRNGKeyArray,
    directions: Float[Array, "direction size"],
    mesh: Mesh | None,
) -> dict[str, Any]:
    """Draws of one estimator: values, projections of gradients, variance of gradients, cost."""
    # Values are those of the bound model; a gradient needs its ``param`` site.
    trainable, diffusion = diffusion.trainable_without_dropout(), diffusion.evaluated()
    guide, elbo = by_value = _adapted(*ESTIMATORS[name](diffusion), "value")
    by_gradient = _adapted(*ESTIMATORS[name](trainable), "gradient")
    evaluations = getattr(elbo, "evaluations", diffusion.schedule.num_steps)
    learned = _learn(diffusion, *by_value, x, learn_key)
    rows = evaluations * len(x)
    # A path goes through the network step by step, the terms of the analytic bound as many at a time as fit.
    at_once = min(rows, inputs_at_once(diffusion.network)) if isinstance(elbo, StepObjective) else len(x)
    together = max(1, ROWS_AT_ONCE // at_once)
    value = functools.partial(_value, diffusion, *by_value, x, learned)
    more = min(MORE_DRAWS, max(1, diffusion.schedule.num_steps // evaluations))
    values, _, seconds = _in_blocks(
        lambda key: (value(key), ()), _keys(draw_key, num_draws * more), together, rows, mesh
    )
    result = {"values": values, "evaluations": evaluations, "seconds": seconds}
    if directions.size:
        count = int(np.clip(GRADIENT_ROWS // rows, *GRADIENT_DRAWS))
        together = max(1, min(together, GRADIENT_ROWS // rows, MOST_NUMBERS // directions.shape[1]))
        gradient = functools.partial(_gradient, trainable, *by_gradient, x, learned, directions)
        (projections, squares), total, seconds = _in_blocks(gradient, _keys(draw_key, count), together, rows, mesh)
        square_of_mean = float(jnp.square(total / count).sum())
        variance = (squares.mean() - square_of_mean) * count / (count - 1)
        result |= {"projections": projections, "gradient_variance": variance, "gradient_seconds": seconds}
    return result


def _keys(key: PRNGKeyArray, count: Whole) -> jax.Array:
    """The keys of the first ``count`` draws: the same whatever ``count`` is."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def _adapted(guide: Callable, elbo: ELBO, purpose: str) -> tuple[Callable, ELBO]:
    if not isinstance(elbo, StepObjective):
        return guide, elbo
    adapted = elbo.adapted_to(purpose)
    return adapted.guide, adapted


def _learn(diffusion: Diffusion, guide: Callable, elbo: ELBO, x: jax.Array, key: PRNGKeyArray) -> dict[str, Any]:
    """The state that the estimator learns from repetitions of ``x``, by site; empty for most."""
    state = elbo.initial_state if isinstance(elbo, StepObjective) else {}
    if not state:
        return {}
    updates, size = LEARNING
    many = jnp.tile(x, (-(-size // len(x)), 1))

    def update(state: Any, key: PRNGKeyArray) -> tuple[Any, None]:
        return elbo.loss_with_mutable_state(key, state, diffusion.model, guide, many)["mutable_state"], None

    return jax.jit(lambda state, keys: jax.lax.scan(update, state, keys)[0])(state, jax.random.split(key, updates))


def _value(
    diffusion: Diffusion, guide: Callable, elbo: ELBO, x: jax.Array, learned: Any, key: PRNGKeyArray
) -> Float[Array, "datum"]:
    """One draw of each datum's bound, shape ``(datum,)``."""
    if isinstance(elbo, StepObjective):
        return elbo.per_datum(key, x, learned)

    def one(key: PRNGKeyArray, x: jax.Array) -> jax.Array:
        return -elbo.loss(key, {}, diffusion.model, guide, x[None])

    return jax.vmap(one)(jax.random.split(key, len(x)), x)


def _gradient(
    diffusion: Diffusion,
    guide: Callable,
    elbo: ELBO,
    x: jax.Array,
    learned: Any,
    directions: Float[Array, "direction size"],
    key: PRNGKeyArray,
) -> Any:
    """One draw of the gradient of the mean bound: its projections, its square length, and the gradient itself."""

    def mean_bound(params: Any) -> jax.Array:
        return -elbo.loss(key, {PARAMS: params, **learned}, diffusion.model, guide, x) / len(x)

    gradient = ravel_pytree(jax.grad(mean_bound)(diffusion.trainable()))[0]
    return (directions @ gradient, jnp.square(gradient).sum()), gradient


def _in_blocks(
    function: Callable, keys: jax.Array, together: int, rows: int, mesh: Mesh | None
) -> tuple[Any, Any, float]:
    """Draws of ``function`` and the seconds of one draw once it is compiled.

    Args:
        function: Gives what to keep of each draw, and what to keep only the sum of.
        keys: One per draw.
        together: Draws to evaluate side by side, at most.
        rows: Network evaluations of a draw; of these, some 2¹⁶ are made in each call, so that Ctrl-C is heard.
    """
    together = _divisor(len(keys), together)
    groups = _divisor(len(keys) // together, max(1, BLOCK_ROWS // (rows * together)))
    calls = keys.reshape(-1, groups, together)

    def several(total: Any, keys: jax.Array) -> Any:
        def add(total: Any, keys: jax.Array) -> Any:
            kept, added = jax.vmap(function)(shard(keys, mesh))
            return jax.tree.map(lambda a, b: a + b.sum(0), total, added), kept

        return gather(jax.lax.scan(add, total, keys), mesh)

    total = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, keys[0])[1])
    compiled = jax.jit(several).lower(total, calls[0]).compile()
    parts, start = [], time.perf_counter()
    for each in calls:
        total, part = compiled(total, each)
        parts.append(jax.device_get(part))
    seconds = (time.perf_counter() - start) / len(keys)
    joined = jax.tree.map(lambda *p: np.concatenate(p).reshape(-1, *p[0].shape[2:]).astype(np.float64), *parts)
    return joined, total, seconds


def _divisor(number: int, largest: int) -> int:
    """The largest divisor of ``number`` that is not above ``largest``."""
    return max(size for size in range(1, min(number, largest) + 1) if number % size == 0)


def _summarise(measured: dict[str, Any], num_draws: Whole, x: jax.Array) -> EstimatorComparison:
    import pandas as pd

    rows = {name: _row(each, x) for name, each in measured.items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    for kind in ("value", "gradient"):
        seconds = "seconds" if kind == "value" else "gradient_seconds"
        for unit, cost in (("evaluations", table["evaluations"]), ("seconds", table[seconds])):
            product = table[f"{kind}_variance"] * cost
            table[f"{kind}_by_{unit}"] = product / product.get(REFERENCE, np.nan)
    means = {name: each["values"].mean(1)[:, None] for name, each in measured.items()}
    projections = {name: each["projections"] for name, each in measured.items() if "projections" in each}
    pairs = max(1, len(measured) * (len(measured) - 1) // 2)
    num_scores = pairs * (1 + (DIRECTIONS if projections else 0))
    trace = measured.get("trace", {}).get("values")
    return EstimatorComparison(
        table=table,
        draws=np.stack([each["values"][:num_draws] for each in measured.values()]),
        projections=projections,
        value_z=pairwise_z(means),
        gradient_z=pairwise_z(projections),
        z_limit=float(-special.ndtri(FAMILY_ERROR / 2 / num_scores)),
        iwae=None if trace is None else Estimate.of(log_mean_exp(trace, 0)),
        khat=None if trace is None else pareto_khat(trace),
        dim=x.shape[1],
    )


def _row(measured: dict[str, Any], x: jax.Array) -> dict[str, Any]:
    means = measured["values"].mean(1)
    error = means.std(ddof=1) / np.sqrt(len(means))
    bits, bits_error = bits_per_dim(np.array([means.mean(), -error]), x.shape[1])
    return {
        "elbo": means.mean(),
        "se": error,
        "bits_per_dim": bits,
        "bits_se": bits_error,
        "sd": means.std(ddof=1),
        "evaluations": measured["evaluations"],
        "seconds": measured["seconds"],
        "value_variance": means.var(ddof=1),
        "gradient_variance": measured.get("gradient_variance", np.nan),
        "gradient_draws": len(measured.get("projections", ())),
        "gradient_seconds": measured.get("gradient_seconds", np.nan),
    }
