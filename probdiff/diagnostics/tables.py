"""Results as text: the table of a fit, and the terms of the bound."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from probdiff._checks import Whole
from probdiff.elbo.terms import bits_per_dim

if TYPE_CHECKING:
    import pandas

WIDTH = 80
MOST_NAMED = 3  # of the terms or items that are out of order
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
