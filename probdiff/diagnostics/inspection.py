"""Where a fitted model spends its nats: the steps that matter most, the datum that is coded worst."""

import numpy as np

from probdiff.elbo.terms import bits_per_dim

TOP = 10


def inspect_terms(tree, dim=None):
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
    posterior = tree["posterior"]
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


def _summary(step_kl):
    """ArviZ's summary per step, draws and data taken together as draws."""
    import arviz as az

    flat = step_kl.transpose("chain", "draw", "datum", "step").values.reshape(1, -1, step_kl.sizes["step"])
    tree = az.from_dict(
        {"posterior": {"step_kl": flat}}, dims={"step_kl": ["step"]}, coords={"step": step_kl["step"].values}
    )
    return (
        az.summary(tree, kind="stats", round_to=4).assign(mcse=flat[0].std(0, ddof=1) / np.sqrt(flat.shape[1])).round(5)
    )
