"""Results as text: the tables of a fit, of the comparisons, of the decomposition of the gap and of the audit."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probdiff._checks import Whole
from probdiff.elbo.importance import khat_error
from probdiff.elbo.terms import bits_per_dim

if TYPE_CHECKING:
    import pandas

    import probdiff.diagnostics.compare_estimators
    import probdiff.diagnostics.compare_models
    import probdiff.diagnostics.findings
    import probdiff.diagnostics.gap

BLOCKS = 8
DIGITS = 4
MOST_NAMED = 3  # terms of the bound that differ, at most
MOST_GIVEN = 5  # covariates by name
LABELS = {
    "prior_kl": "prior KL",
    "step_kl": "Σ step KL",
    "reconstruction": "reconstruction, E log p(x | z_1)",
    "elbo": "ELBO",
    "analytic": "ELBO, analytic decomposition",
    "trace_elbo": "ELBO, Trace_ELBO on sampled paths",
    "independent_dimensions": "log-likelihood of independent pixels",
    "independent_columns": "log-likelihood of independent columns",
    "entropy": "minus entropy of the distribution",
    "log_prob": "log p(x) of these items, exact",
    "gap": "gap: log p(x) − ELBO, of these items",
}


def format_fit(results: Mapping[str, Any]) -> str:
    """The results of ``probdiff fit`` as text: the bound on the test split, beside the reference values for the data."""
    test, both, reference = results["test"], results["two_ways"], dict(results["reference"])
    bits = "bits_per_dim" in test["elbo"]
    width = 38
    header = f"{'':{width}}{'nats':>10}{'± s.e.':>9}" + (f"{'bits/dim':>12}{'± s.e.':>9}" if bits else "")

    def line(name: str, row: Mapping[str, Any]) -> str:
        text = f"{LABELS[name]:{width}}{row['nats']:10.4f}{row['error']:9.4f}"
        return text + (f"{row['bits_per_dim']:12.4f}{row['bits_error']:9.4f}" if "bits_per_dim" in row else "")

    if "entropy" in reference:
        reference["entropy"] = reference["entropy"] | {"nats": -reference["entropy"]["nats"]}
    lines = [
        f"{results['data']}, test split: {test['num_items']} items of {results['dim']} dimensions{_given(results)}, N = {results['num_steps']} steps",
        header,
        *(line(name, test[name]) for name in ("prior_kl", "step_kl", "reconstruction", "elbo")),
        *(line(name, row) for name, row in reference.items()),
        *_noise(test),
        "",
        f"The bound two ways, on the first {both['num_items']} items, {both['num_draws']} draws each",
        header,
        *(line(name, both[name]) for name in ("analytic", "trace_elbo")),
        f"{'difference (± Monte Carlo error)':{width}}{both['difference']:10.4f}{both['difference_error']:9.4f}"
        f"   {abs(both['z']):.1f} standard errors",
        *_agreement(both),
    ]
    return "\n".join(lines)


def _given(results: Mapping[str, Any]) -> str:
    """The covariates of a conditional model, by name if they are few."""
    names = results.get("context") or []
    return f" given {', '.join(names) if len(names) <= MOST_GIVEN else f'{len(names)} covariates'}" if names else ""


def _noise(test: Mapping[str, Any]) -> Iterator[str]:
    if "num_evaluations" in test:  # not in a run of probdiff 0.1, which evaluated all steps
        yield (
            f"(at {test['num_evaluations']} random steps of each item: Monte Carlo error of the ELBO "
            f"{test['elbo']['monte_carlo_error']:.4f} nats)"
        )


def _agreement(both: Mapping[str, Any]) -> Iterator[str]:
    """The verdict, and the difference that would have been detected."""
    common = both.get("common_paths")
    seen = []
    if "detectable" in both:
        seen.append(f"a difference of {both['detectable']:.2g} nats would have been seen nine times in ten")
    if common:
        seen.append(
            f"on common paths of {common['num_items']} items the {common['num_terms']} terms differ by {common['largest']:.1g} nats at most"
        )
    verdict = "they agree" if both["agree"] else "THEY DISAGREE"
    wrong = common["wrong"] if common else []
    more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
    named = f" in {', '.join(wrong[:MOST_NAMED])}{more}" if wrong else ""
    yield from (verdict + named, *seen)


WIDTH = 80
COST_COLUMNS = [f"{kind}_by_{unit}" for kind in ("value", "gradient") for unit in ("evaluations", "seconds")]


def format_estimators(comparison: "probdiff.diagnostics.compare_estimators.EstimatorComparison") -> str:
    """An :class:`~probdiff.diagnostics.compare_estimators.EstimatorComparison` as text of 80 columns: verdict, costs, bounds."""
    verdict = [line for words in _verdict(comparison) for line in textwrap.wrap(words, WIDTH, subsequent_indent="  ")]
    return "\n".join([*verdict, "", *_costs(comparison.table, comparison.draws.shape[2]), "", *_bounds(comparison)])


def _costs(table: "pandas.DataFrame", num_items: int) -> Iterator[str]:
    yield f"Variance × cost for a batch of {num_items}, relative to kl_uniform's (below 1 is better)"
    yield f"{'':20}{'values':>22}{'gradients':>30}"
    yield f"{'':20}" + f"{'evaluations':>15}{'seconds':>15}" * 2
    for name, row in table.iterrows():
        yield f"{name:20}" + "".join(_with_error(row[cost], row[f"{cost}_error"]) for cost in COST_COLUMNS)
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


def _bounds(comparison: "probdiff.diagnostics.compare_estimators.EstimatorComparison") -> Iterator[str]:
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


def _verdict(comparison: "probdiff.diagnostics.compare_estimators.EstimatorComparison") -> Iterator[str]:
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


def _weights(comparison: "probdiff.diagnostics.compare_estimators.EstimatorComparison") -> Iterator[str]:
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


def format_models(comparison: "probdiff.diagnostics.compare_models.ModelComparison") -> str:
    """A :class:`~probdiff.diagnostics.compare_models.ModelComparison` as text."""
    table: pandas.DataFrame = comparison.table
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


def format_terms(table: "pandas.DataFrame", found: Mapping[str, Any], dim: Whole | None = None) -> str:
    """The findings of :func:`~probdiff.diagnostics.inspect_terms` as text.

    Args:
        table: The entry ``table`` of the findings.
        found: The other entries.
        dim: Number of dimensions, for figures in bits/dim; None for continuous data.
    """
    num_items, num_draws, largest, worst = (found[name] for name in ("num_items", "num_draws", "largest_steps", "worst_item"))
    lines = [
        f"The bound of the first {num_items} items by its terms, {num_draws} draws of the noise each",
        f"{'':34}{'nats':>10}{'share':>8}{'± over items':>14}{'± of the noise':>16}",
    ]
    for name, row in table.iterrows():
        label = LABELS.get(str(name), str(name).replace("step_kl[", "KL of steps ").rstrip("]"))
        share = f"{row['share']:8.1%}" if row["share"] >= 0 else 8 * " "
        errors = f"{row['error_over_items']:14.4f}{row['error_of_noise']:16.4f}".replace("nan", "  –")
        lines.append(f"{label:34}{row['nats']:10.4f}{share}{errors}")
    if largest is None:
        lines.append("no range of steps costs more than the next by three standard errors over items")
    else:
        lead = f"{largest['lead']:.2f} ± {largest['lead_error']:.2f} nats more than steps {largest['next']}"
        lines.append(f"steps {largest['steps']} cost most, {lead}")
    if worst is None:
        lines.append("no item has a lower bound than the next by three standard errors of the noise")
    else:
        bits = "" if dim is None else f" = {bits_per_dim(worst['elbo'], dim):.3f} bits/dim"
        lines += [
            f"lowest bound: item {worst['item']}, ELBO {worst['elbo']:.2f} ± {worst['error']:.2f} nats (of the noise){bits}, "
            f"{worst['lead']:.2f} ± {worst['lead_error']:.2f} nats below the next"
        ]
    return "\n".join(lines)


def format_gap(decomposition: "probdiff.diagnostics.gap.GapDecomposition") -> str:
    """A :class:`~probdiff.diagnostics.gap.GapDecomposition` as text: parts that add up to the gap in the printed digits."""
    parts = {
        "irreducible gap, exact ε": decomposition.irreducible,
        "added by the network": decomposition.network,
        "rest: 0 but for its error": decomposition.residual,
    }
    nats = {name: round(part.mean, DIGITS) + 0.0 for name, part in parts.items()}  # no minus before a zero
    lines = [
        f"The gap of the bound taken apart, on {decomposition.num_items} data; log p(x) is exact, on average "
        f"minus the entropy, {-decomposition.entropy[0]:.4f}",
        f"{'':34}{'nats':>10}{'± s.e.':>9}",
        *(f"{name:34}{nats[name]:10.4f}{part.error:9.4f}" for name, part in parts.items()),
        f"{'gap: log p(x) − ELBO':34}{sum(nats.values()):10.4f}{decomposition.gap.error:9.4f}",
    ]
    per_step, num_steps = decomposition.network_per_step, len(decomposition.network_per_step)
    edges = np.unique(np.linspace(0, num_steps, min(BLOCKS, num_steps) + 1).astype(int))
    lines += ["", f"{'added by the network, by steps':34}{'log-SNR':>16}{'nats':>10}{'share':>8}"]
    for first, last in zip(edges, edges[1:]):
        added = per_step[first:last].sum()
        span = f"{decomposition.log_snr[first]:.1f} … {decomposition.log_snr[last - 1]:.1f}"
        lines.append(f"  n = {first + 1} … {last}".ljust(34) + f"{span:>16}{added:10.5f}" + (f"{added / per_step.sum():8.1%}" if per_step.any() else f"{'–':>8}"))
    return "\n".join(lines)


def format_audit(audit: "probdiff.diagnostics.findings.Audit") -> str:
    """An :class:`~probdiff.diagnostics.findings.Audit` as text of 80 columns: the terms of the bound, the bound two ways, and the findings."""
    table, both = audit.inspection["table"], audit.two_ways
    lines = [
        f"Audit on {audit.inspection['num_items']} data of {audit.dim} dimensions, N = {audit.schedule.num_steps} steps",
        f"{'':38}{'nats':>12}{'± s.e.':>10}{'share':>9}",
    ]
    for name, row in table.iterrows():
        label = LABELS.get(str(name), str(name).replace("step_kl[", "KL of steps ").rstrip("]"))
        share = f"{row['share']:9.1%}" if row["share"] >= 0 else ""
        lines.append(f"{label:38}{row['nats']:12.4f}{row['error_over_items']:10.4f}{share}")
    if audit.bits_per_dim is not None:
        lines.append(f"{'bits/dim':38}{audit.bits_per_dim.mean:12.4f}{audit.bits_per_dim.error:10.4f}")
    difference, error = both.difference
    lines += [
        f"{LABELS['trace_elbo']:38}{both.trace.mean:12.4f}{both.trace.error:10.4f}",
        f"{'difference (± Monte Carlo error)':38}{difference:12.4f}{error:10.4f}   {'they agree' if both.agree else 'THEY DISAGREE'}",
    ]
    if audit.variance is not None:
        lines.append(f"{'the best reverse variances would gain':38}{audit.variance.mean:12.4f}{audit.variance.error:10.4f}")
    words = [f"{i}. {found.name}: {found.sentence} ({_gain(found)})" for i, found in enumerate(audit.findings, 1)]
    lines += ["", f"What is wrong: {'' if words else 'nothing was found'}".rstrip()]
    return "\n".join([*lines, *(line for each in words for line in textwrap.wrap(each, WIDTH, subsequent_indent="   "))])


def _gain(found: "probdiff.diagnostics.findings.Finding") -> str:
    """The gain by a repair, as text."""
    return f"{found.nats:.4g} ± {found.error:.2g} nats" if np.isfinite(found.nats) else "there is no bound"
