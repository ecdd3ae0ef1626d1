"""Models compared by their bound on the same data, in the manner of ArviZ's ``compare``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from probdiff._checks import PyTree, Whole, require, require_count, require_type
from probdiff.diffusion import Diffusion
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.terms import bits_per_dim, elbo_terms
from probdiff.programs.sites import Data


@dataclasses.dataclass(frozen=True)
class ModelComparison:
    """The result of :func:`~probdiff.compare_models`. Prints as a table.

    Attributes:
        table: One row per model, best first, a pandas DataFrame in nats per datum: ``rank``; ``elbo`` and ``se``, over data;
            ``elbo_diff`` to the best model and ``dse``, its standard error over data, paired item by item;
            ``mc_error``, the part of ``se`` that comes from the noise.
        elbo: Each model's bound of each datum, a dict from name to shape ``(datum,)``.
        num_draws: Draws per datum over which the bound is averaged.
        levels: Whether the data are on a grid, so that bits/dim are defined.
        dim: Number of dimensions.

    Example:
        >>> import jax, probdiff
        >>> networks = {name: probdiff.MLP(2, key=jax.random.key(0), hidden=hidden) for name, hidden in (("small", 4), ("large", 8))}
        >>> models = {name: probdiff.Diffusion(probdiff.cosine_schedule(5), network) for name, network in networks.items()}
        >>> comparison = probdiff.compare_models(models, jax.numpy.zeros((3, 2)), key=jax.random.key(1))
        >>> comparison.elbo["small"].shape, float(comparison.table["elbo_diff"].min())
        ((3,), 0.0)
    """

    table: Any
    elbo: dict[str, np.ndarray]
    num_draws: Whole
    levels: bool
    dim: int

    def to_elpd(self) -> dict[str, Any]:
        """Each model's bound in place of its log predictive density, for ``az.compare`` and ``az.plot_compare``.

        The values are sums over data, as in ArviZ. No leave-one-out is needed (``az.loo``): none of the models was fitted to these data. The
        effective number of parameters, ``p``, is NaN. ArviZ's stacking exponentiates the bound of each datum: below −700 nats, use
        ``method="pseudo-BMA"``.

        Returns:
            A dict from name to ArviZ's ``ELPDData``.
        """
        import arviz as az
        import xarray as xr

        def one(elbo: Float[np.ndarray, "datum"]) -> Any:
            total, error = float(elbo.sum()), Estimate.of(elbo).error * len(elbo)
            kept = {"n_samples": self.num_draws, "n_data_points": len(elbo), "scale": "log", "warning": False, "good_k": None}
            return az.ELPDData(elpd=total, se=error, p=float("nan"), elpd_i=xr.DataArray(elbo, dims="datum"), **kept)

        return {name: one(elbo) for name, elbo in self.elbo.items()}

    def to_dict(self) -> dict[str, Any]:
        """The table, for JSON."""
        table = self.table.astype(object).where(self.table.notna(), None)
        return {
            "models": {name: dict(row) for name, row in table.iterrows()},
            "num_items": len(next(iter(self.elbo.values()))),
            "num_draws": self.num_draws,
        }

    def __repr__(self) -> str:
        """The table."""
        return format_models(self)


def format_models(comparison: ModelComparison) -> str:
    """A :class:`ModelComparison` as text."""
    table = comparison.table
    width = 2 + max(len(str(name)) for name in table.index)
    bits = f"{'bits/dim':>10}" if comparison.levels else ""
    lines = [
        f"The bound of {len(next(iter(comparison.elbo.values())))} items, mean per item in nats, "
        f"{comparison.num_draws} draws each",
        f"{'':{width}}{'rank':>5}{'ELBO':>12}{'± s.e.':>9}{'difference':>12}{'± paired':>10}{'MC error':>10}{bits}",
    ]
    for name, row in table.iterrows():
        line = f"{name:{width}}{int(row['rank']):5d}{row['elbo']:12.4f}{row['se']:9.4f}{row['elbo_diff']:12.4f}"
        line += f"{row['dse']:10.4f}{row['mc_error']:10.4f}"
        lines.append(line + (f"{bits_per_dim(row['elbo'], comparison.dim):10.4f}" if comparison.levels else ""))
    return "\n".join([*lines, "difference: the bound of the best model minus that of this one, paired item by item"])


def compare_models(
    models: Mapping[str, Diffusion],
    x: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_draws: Whole = 4,
    progress: bool = False,
) -> ModelComparison:
    """Rank models by their bound on the same data.

    The difference of two models is taken item by item, so that the variation over items that both share cancels. Models of equal N
    are evaluated on the same noise.

    Args:
        models: A dict from name to trained Diffusion, at least two.
        x: Data to which none of the models was fitted, shape ``(datum, dim)``.
        context: Of the conditional models among them: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key.
        num_draws: Draws per datum.
        progress: Show a progress bar for each model.

    Returns:
        A :class:`ModelComparison`.

    Raises:
        ValueError, TypeError: If the data do not suit one of the models, or their likelihoods are of different kinds: a
            density and a probability cannot be compared.

    Example:
        >>> import jax, probdiff
        >>> schedule, x = probdiff.cosine_schedule(5), jax.random.normal(jax.random.key(0), (8, 1))
        >>> exact = probdiff.Diffusion(schedule, probdiff.oracles.GaussianOracle([0.0], [[1.0]]).network(schedule))
        >>> nothing = probdiff.Diffusion(schedule, lambda z, n: 0 * z)
        >>> comparison = probdiff.compare_models({"exact": exact, "no network": nothing}, x, key=jax.random.key(1))
        >>> list(comparison.table.index)  # the best first
        ['exact', 'no network']
    """
    import pandas as pd

    require(isinstance(models, dict), "models", "a dict from name to Diffusion", type(models).__name__, TypeError)
    require(len(models) >= 2, "models", "at least two", len(models))
    require_count("num_draws", num_draws)
    require(len(x) >= 2, "x", "at least two data", len(x))
    for name, diffusion in models.items():
        require_type(str(name), diffusion, Diffusion)
    conditional = [name for name, diffusion in models.items() if diffusion.is_conditional]
    require(context is None or conditional, "context", "None, for models without", f"a {type(context).__name__}")
    models = {name: diffusion.given(context) if name in conditional else diffusion for name, diffusion in models.items()}
    for diffusion in models.values():
        diffusion.read_data(x)
    of = {name: diffusion.likelihood.discrete(x.shape[1]) for name, diffusion in models.items()}
    different = [str(name) for name, kinds in of.items() if kinds != next(iter(of.values()))]
    got = f"other columns with a density in {', '.join(different)}, whose bounds cannot be compared"
    require(not different, "models", "likelihoods with the same discrete columns", got)
    moments = {
        name: elbo_terms(diffusion, x, key=key, num_draws=num_draws, reduce=True, progress=progress).elbo
        for name, diffusion in models.items()
    }
    elbo = {name: np.asarray(each.mean, np.float64) for name, each in moments.items()}
    best = max(elbo, key=lambda name: elbo[name].mean())
    rows: dict[str, dict[str, Any]] = {}
    for name in sorted(elbo, key=lambda name: -elbo[name].mean()):
        estimate = Estimate.of(elbo[name], moments[name].variance, int(num_draws))
        difference = Estimate.of(elbo[best] - elbo[name])
        rows[name] = {
            "rank": len(rows),
            "elbo": estimate.mean,
            "se": estimate.error,
            "elbo_diff": difference.mean,
            "dse": difference.error,
            "mc_error": estimate.monte_carlo_error,
        }
    columns = x.shape[1]
    levels = all(diffusion.likelihood.levels is not None for diffusion in models.values())
    return ModelComparison(pd.DataFrame.from_dict(rows, orient="index"), elbo, num_draws, levels, columns)
