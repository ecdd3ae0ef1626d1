"""The terms of the bound as an xarray DataTree, the container of ArviZ, and back; and where in it the nats are."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from probdiff._checks import Whole, require_type
from probdiff.elbo.terms import ELBOTerms, bits_per_dim

if TYPE_CHECKING:
    import pandas
    import xarray

TOP = 10


def to_datatree(terms: ELBOTerms) -> "xarray.DataTree":
    """Put the terms of the bound into a DataTree that ArviZ's functions take.

    Group ``posterior`` has ``step_kl`` with dimensions (chain, draw, step, datum), and ``reconstruction`` and
    ``elbo`` with (chain, draw, datum); group ``constant_data`` has ``prior_kl`` with (datum,). One chain: the draws are
    independent. Coordinate ``step`` is n = 2 … N; everything is in nats.

    Args:
        terms: :class:`~probdiff.elbo.ELBOTerms`.
    """
    import arviz as az

    require_type("terms", terms, ELBOTerms)
    num_steps = terms.step_kl.shape[1] + 1
    posterior = {name: np.asarray(getattr(terms, name))[None] for name in ("step_kl", "reconstruction", "elbo")}
    tree = az.from_dict(
        {"posterior": posterior, "constant_data": {"prior_kl": np.asarray(terms.prior_kl)}},
        dims={
            "step_kl": ["step", "datum"],
            "reconstruction": ["datum"],
            "elbo": ["datum"],
            "prior_kl": ["datum"],
        },
        coords={"step": np.arange(2, num_steps + 1), "datum": np.arange(len(terms.prior_kl))},
    )
    long_names = {
        "prior_kl": "KL of q(z_N | x_0) to N(0, I)",
        "step_kl": "KL of step n, q(z_{n-1} | z_n, x_0) to p(z_{n-1} | z_n)",
        "reconstruction": "log p(x | z_1)",
        "elbo": "evidence lower bound",
    }
    if not terms.closed_form:
        long_names["step_kl"] += " (sampled log-ratio)"
    for group in ("posterior", "constant_data"):
        for name, variable in tree[group].data_vars.items():
            variable.attrs.update(units="nats", long_name=long_names[name])
    tree["posterior"]["step_kl"].attrs["closed_form"] = int(terms.closed_form)
    return tree


def from_datatree(tree: "xarray.DataTree") -> ELBOTerms:
    """The :class:`~probdiff.elbo.ELBOTerms` that :func:`to_datatree` was given."""
    posterior = tree["posterior"].dataset
    values = (tree["constant_data"].dataset["prior_kl"], posterior["step_kl"][0], posterior["reconstruction"][0])
    closed_form = bool(posterior["step_kl"].attrs.get("closed_form", 1))
    prior_kl, step_kl, reconstruction = (jnp.asarray(value.values) for value in values)
    return ELBOTerms(prior_kl, step_kl, reconstruction, closed_form)


def inspect_terms(tree: "xarray.DataTree", dim: Whole | None = None) -> dict[str, Any]:
    """Summarise the terms of the bound.

    Args:
        tree: The DataTree of :func:`~probdiff.to_datatree`.
        dim: Number of dimensions, for figures in bits/dim; None for continuous data.

    Returns:
        A dict: ``summary``, ArviZ's summary of the ten steps of largest KL, over all draws and data (a pandas
        DataFrame, nats); ``dominant_step`` and ``dominant_share``, its share of Σ step KL; ``half_of_kl``, the number
        of steps that make up half of it; ``worst_item``, ``worst_elbo`` and ``worst_error``, the item of the lowest
        bound in nats; ``text``, all of it in words.
    """
    posterior = tree["posterior"].dataset
    elbo = posterior["elbo"].values[0]
    per_item = elbo.mean(0)
    worst = int(per_item.argmin())
    error = float(elbo[:, worst].std(ddof=1) / np.sqrt(len(elbo))) if len(elbo) > 1 else float("nan")
    bits = "" if dim is None else f" = {bits_per_dim(per_item[worst], dim):.3f} bits/dim"
    found = {"worst_item": worst, "worst_elbo": float(per_item[worst]), "worst_error": error}
    worst_text = (
        f"coded worst: test item {worst}, ELBO {per_item[worst]:.2f} ± {error:.2f} nats{bits} "
        f"(median of the items: {np.median(per_item):.2f})"
    )
    step_kl = posterior["step_kl"]
    if step_kl.sizes["step"] == 0:
        import pandas as pd

        return found | {"summary": pd.DataFrame(), "text": f"N = 1: there are no step KLs\n{worst_text}"}
    per_step = step_kl.mean(("chain", "draw", "datum")).values
    order = np.argsort(per_step)[::-1]
    share = per_step[order] / per_step.sum()
    half = int(np.searchsorted(np.cumsum(share), 0.5)) + 1
    first = int(step_kl["step"].values[order[0]])
    summary = _summary(step_kl.isel(step=order[:TOP]))
    text = [
        f"The {len(summary)} steps of largest KL, nats per datum; mean, spread over {elbo.shape[1]} items × {len(elbo)} draws",
        summary.to_string(),
        f"step {first} dominates: {share[0]:.2%} of Σ step KL; the {half} largest of {len(per_step)} steps make up half of it",
        worst_text,
    ]
    return {
        **found,
        "summary": summary,
        "dominant_step": first,
        "dominant_share": float(share[0]),
        "half_of_kl": half,
        "text": "\n".join(text),
    }


def _summary(step_kl: "xarray.DataArray") -> "pandas.DataFrame":
    """ArviZ's summary per step, draws and data taken together as draws."""
    import arviz as az

    flat = step_kl.transpose("chain", "draw", "datum", "step").values.reshape(1, -1, step_kl.sizes["step"])
    tree = az.from_dict(
        {"posterior": {"step_kl": flat}}, dims={"step_kl": ["step"]}, coords={"step": step_kl["step"].values}
    )
    return (
        az.summary(tree, kind="stats", round_to=4).assign(mcse=flat[0].std(0, ddof=1) / np.sqrt(flat.shape[1])).round(5)
    )
