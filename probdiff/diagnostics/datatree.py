"""The terms of the bound as an xarray DataTree, the container of ArviZ, and back; and a summary of the terms."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from probdiff._checks import PyTree, Whole, require_type
from probdiff.diagnostics.tables import format_terms
from probdiff.diffusion import Diffusion
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.terms import ELBOTerms
from probdiff.likelihoods import ColumnLikelihood

if TYPE_CHECKING:
    import xarray

RANGES = 10
CHAINS = {4: 25, 3: 25, 2: 4}  # numbers of chains, and the fewest draws in each: ArviZ underestimates errors from many short chains
STANDS_OUT = 3.0  # standard errors
LONG_NAMES = {
    "prior_kl": "KL of q(z_N | x_0) to N(0, I)",
    "step_kl": "KL of step n, q(z_{n-1} | z_n, x_0) to p(z_{n-1} | z_n)",
    "reconstruction": "log p(x | z_1)",
    "elbo": "evidence lower bound",
}

Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]


def to_datatree(terms: ELBOTerms) -> "xarray.DataTree":
    """Put the terms of the bound into a DataTree for the functions of ArviZ.

    Group ``posterior``, which ArviZ reads by default, is a sample of the data: each draw is a datum, its values are means over the draws of
    noise, and the coordinate ``datum`` has its index. So ``az.summary(tree)`` has a row for each term; ``mean`` is the mean of
    the data, ``sd`` the spread over them, ``mcse_mean`` approximately the standard error over items. It has ``prior_kl``, ``reconstruction`` and
    ``elbo`` with dimensions (chain, draw), and ``step_kl`` with (chain, draw, steps): sums over ten ranges of equally many
    steps, "2-101" and so on.

    Group ``per_datum`` has every draw of noise: ``reconstruction`` and ``elbo`` with (chain, draw, datum), ``step_kl`` with
    (chain, draw, steps, datum). Group ``per_step`` has ``step_kl`` with (chain, draw, step, datum), n = 2 … N; group ``constant_data``
    has ``prior_kl``, which is exact, with (datum,), and of a conditional model the ``context``, or one variable for each of its arrays,
    ``context[age]`` and so on. Everything but the context is in nats.

    Independent draws may be divided into chains in any way: here into four, three or two of equal length, with at
    least 25, 25 or 4 draws each. Otherwise there is one chain, and ArviZ's ``r_hat`` is NaN.

    Args:
        terms: :class:`~probdiff.elbo.ELBOTerms`.

    Raises:
        TypeError: If ``terms`` are not ELBOTerms.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> terms = probdiff.elbo_terms(diffusion, jax.numpy.zeros((3, 2)), key=jax.random.key(1), num_draws=4)
        >>> tree = probdiff.to_datatree(terms)
        >>> dict(tree["per_step"]["step_kl"].sizes)
        {'chain': 1, 'draw': 4, 'step': 4, 'datum': 3}
    """
    import xarray as xr

    require_type("terms", terms, ELBOTerms)
    prior_kl, step_kl, reconstruction = (np.asarray(each) for each in (terms.prior_kl, terms.step_kl, terms.reconstruction))
    num_kls, num_data = step_kl.shape[1:]
    ranges = np.array_split(np.arange(num_kls), min(RANGES, num_kls)) if num_kls else []
    elbo, datum = np.asarray(terms.elbo), np.arange(num_data)
    steps, mean_kls, kls = {}, Variables(), Variables()
    if ranges:
        sums = np.stack([step_kl[:, each].sum(1) for each in ranges], 1)
        steps = {"steps": [str(each[0] + 2) if len(each) == 1 else f"{each[0] + 2}-{each[-1] + 2}" for each in ranges]}
        mean_kls, kls = {"step_kl": (("steps",), sums.mean(0).T)}, {"step_kl": (("steps", "datum"), sums)}
    means = {"prior_kl": ((), prior_kl)} | mean_kls | {"reconstruction": ((), reconstruction.mean(0)), "elbo": ((), elbo.mean(0))}
    per_datum = kls | {"reconstruction": (("datum",), reconstruction), "elbo": (("datum",), elbo)}
    full: Variables = {"step_kl": (("step", "datum"), step_kl)}
    groups = {
        "posterior": _sample(means, steps),
        "per_datum": _sample(per_datum, steps | {"datum": datum}),
        "per_step": _sample(full, {"step": np.arange(2, num_kls + 2), "datum": datum}),
        "constant_data": xr.Dataset({"prior_kl": ("datum", prior_kl)}, {"datum": datum}),
    }
    context = _context_variables(terms.context)
    sizes = groups["posterior"].sizes
    groups["posterior"].coords["datum"] = ("chain", "draw"), datum.reshape(sizes["chain"], sizes["draw"])
    for group in groups.values():
        for name, variable in group.data_vars.items():
            sampled = "" if terms.closed_form or name != "step_kl" else " (sampled log-ratio)"
            variable.attrs.update(units="nats", long_name=LONG_NAMES[str(name)] + sampled)
    groups["per_step"]["step_kl"].attrs["closed_form"] = int(terms.closed_form)
    groups["constant_data"] = groups["constant_data"].assign(context)
    return xr.DataTree.from_dict(groups)


def _context_variables(context: PyTree) -> Variables:
    """The arrays of a context by name, each with the names of its axes."""
    found: Variables = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(context)[0]:
        name = "context" + "".join(f"[{_key(each)}]" for each in path)
        found[name] = (("datum", *(f"{name}_dim_{axis}" for axis in range(leaf.ndim - 1))), np.asarray(leaf))
    return found


def _key(entry: Any) -> str:
    """One step of a path into a tree, as text."""
    return str(next(getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name)))


def _sample(variables: Variables, coords: dict[str, Any]) -> "xarray.Dataset":
    """Arrays whose leading axis is independent draws, cut into chains; each with the names of its other axes."""
    import xarray as xr

    count = len(next(iter(variables.values()))[1])
    chains = next((k for k, fewest in CHAINS.items() if count % k == 0 and count // k >= fewest), 1)
    numbers = {"chain": np.arange(chains), "draw": np.arange(count // chains)}
    cut = {
        name: (("chain", "draw", *dims), values.reshape(chains, count // chains, *values.shape[1:]))
        for name, (dims, values) in variables.items()
    }
    return xr.Dataset(cut, coords | numbers)


def from_datatree(tree: "xarray.DataTree") -> ELBOTerms:
    """The :class:`~probdiff.elbo.ELBOTerms` from which :func:`~probdiff.to_datatree` made a tree; trees of versions before 0.2, with a single group, are read as well.

    A context that was a tree of arrays is returned as a dict of arrays, by the names of the variables.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> terms = probdiff.elbo_terms(diffusion, jax.numpy.zeros((3, 2)), key=jax.random.key(1), num_draws=4)
        >>> back = probdiff.diagnostics.from_datatree(probdiff.to_datatree(terms))
        >>> bool((back.step_kl == terms.step_kl).all())
        True
    """
    groups = ("per_step", "per_datum") if "per_step" in tree else ("posterior", "posterior")
    step_kl, reconstruction = (tree[group].dataset[name] for group, name in zip(groups, ("step_kl", "reconstruction")))
    prior_kl = jnp.asarray(tree["constant_data"].dataset["prior_kl"].values)
    cut = [jnp.asarray(each.values.reshape(each.shape[0] * each.shape[1], *each.shape[2:])) for each in (step_kl, reconstruction)]
    constants = tree["constant_data"].dataset
    context: Any = {str(name): jnp.asarray(constants[name].values) for name in constants if name != "prior_kl"}
    context = context.get("context", context or None)
    return ELBOTerms(prior_kl, cut[0], cut[1], bool(step_kl.attrs.get("closed_form", 1)), context)


def arviz_dims(diffusion: Diffusion) -> dict[str, dict[str, Any]]:
    """Names for the axes of the programs' sites, ``az.from_numpyro(mcmc, **arviz_dims(diffusion))``; also for ``az.from_numpyro_svi``.

    Args:
        diffusion: The model.

    Returns:
        A dict: ``dims``, for ``z`` step, datum and dim, for ``x`` datum and dim, or column if each column has its own likelihood;
        ``coords``, the steps N … 1 in the order of ``z``, and the names of the columns.

    Raises:
        TypeError: If ``diffusion`` is not a Diffusion.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> probdiff.diagnostics.arviz_dims(diffusion)["dims"]
        {'z': ['step', 'datum', 'dim'], 'x': ['datum', 'dim']}
    """
    require_type("diffusion", diffusion, Diffusion)
    coords: dict[str, Any] = {"step": np.arange(diffusion.schedule.num_steps, 0, -1)}
    likelihood, of_columns = diffusion.likelihood, isinstance(diffusion.likelihood, ColumnLikelihood)
    if isinstance(likelihood, ColumnLikelihood) and likelihood.columns is not None:
        coords["column"] = list(likelihood.columns)
    return {"dims": {"z": ["step", "datum", "dim"], "x": ["datum", "column" if of_columns else "dim"]}, "coords": coords}


def inspect_terms(tree: "xarray.DataTree", dim: Whole | None = None) -> dict[str, Any]:
    """Summarise the terms of the bound by ranges of steps, and find the range with the largest KL and the item with the lowest bound.

    A range or an item is named if it differs from the next by more than three standard errors of the difference.

    Args:
        tree: The DataTree of :func:`~probdiff.to_datatree`.
        dim: Number of dimensions, for figures in bits/dim; None for continuous data.

    Returns:
        A dict: ``table``, a pandas DataFrame in nats per item with a row for each range of steps and each other term, and columns
        ``nats``, ``share`` (of Σ step KL), ``error_over_items`` (noise included) and ``error_of_noise`` (NaN for a single draw);
        ``num_items`` and ``num_draws``; ``largest_steps``, the range of steps that costs most, and ``worst_item``, the item of the
        lowest bound: each a dict with the difference from the next, or None if that is not significant, by the error over
        items for the range and by the Monte Carlo error for the item; ``text``, the summary as text.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> terms = probdiff.elbo_terms(diffusion, jax.numpy.zeros((3, 2)), key=jax.random.key(1), num_draws=4)
        >>> found = probdiff.diagnostics.inspect_terms(probdiff.to_datatree(terms))
        >>> found["num_items"], list(found["table"].columns)
        (3, ['nats', 'share', 'error_over_items', 'error_of_noise'])
    """
    import pandas as pd

    per_datum = tree["per_datum"].dataset
    draws = {str(name): each.values.reshape(-1, *each.shape[2:]) for name, each in per_datum.data_vars.items()}
    elbo = draws["elbo"]
    kls = {}
    if "step_kl" in draws:
        kls = dict(zip(per_datum["steps"].values.tolist(), np.moveaxis(draws["step_kl"], 1, 0)))
    named = {f"step_kl[{steps}]": each for steps, each in kls.items()}
    prior_kl = np.broadcast_to(tree["constant_data"].dataset["prior_kl"].values, elbo.shape)
    rows = {"prior_kl": prior_kl, **named, "reconstruction": draws["reconstruction"], "elbo": elbo}
    table = pd.DataFrame.from_dict({name: _estimate(each)._asdict() for name, each in rows.items()}, orient="index")
    table.columns = ["nats", "error_over_items", "error_of_noise"]
    table.insert(1, "share", table["nats"].loc[list(named)] / table["nats"].loc[list(named)].sum())
    largest, worst = None, None
    if len(kls) > 1:
        first, second, *_ = sorted(kls, key=lambda steps: -kls[steps].mean())
        lead = _estimate(kls[first] - kls[second])
        if lead.mean > STANDS_OUT * lead.error:
            largest = {"steps": first, "next": second, "lead": lead.mean, "lead_error": lead.error}
    if elbo.shape[1] > 1:
        lowest, second, *_ = elbo.mean(0).argsort().tolist()
        own, lead = (_estimate(each[:, None]) for each in (elbo[:, lowest], elbo[:, second] - elbo[:, lowest]))
        if lead.mean > STANDS_OUT * lead.monte_carlo_error:
            worst = {"item": lowest, "elbo": own.mean, "error": own.monte_carlo_error}
            worst |= {"next": second, "lead": lead.mean, "lead_error": lead.monte_carlo_error}
    found = {"num_items": elbo.shape[1], "num_draws": len(elbo), "largest_steps": largest, "worst_item": worst}
    return found | {"table": table, "text": format_terms(table, found, dim)}


def _estimate(draws: Float[np.ndarray, "draw datum"]) -> Estimate:
    """The mean and its two errors; the error of the noise is unknown for a single draw."""
    return Estimate.of_draws(draws) if len(draws) > 1 else Estimate.of(draws[0])._replace(monte_carlo_error=float("nan"))
