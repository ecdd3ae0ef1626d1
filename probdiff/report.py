"""The final table of a fit: the bound on the test split, two ways, beside what is known about the data."""

import jax
import numpy as np

from probdiff.comparison import Estimate, compute_both_ways
from probdiff.elbo import bits_per_dim, elbo_terms

ITEMS = 512
DRAWS = 4
ELEMENTS = 2**22


def evaluate(diffusion, dataset, *, key, progress=False):
    """The bound on the test split.

    Both ways on the first 512 items at most (fewer where N is so large that the terms would not fit in about
    16 MiB a draw); by the analytic terms on all of them.

    Args:
        diffusion: A trained Diffusion.
        dataset: A :class:`~probdiff.datasets.Dataset`.
        key: JAX key.
        progress: Show progress bars.

    Returns:
        The :class:`~probdiff.comparison.TwoWays`, and the table as a dict for JSON (nats per datum throughout).
    """
    both_key, test_key = jax.random.split(key)
    num_steps = diffusion.schedule.num_steps
    items = dataset.test[: min(ITEMS, max(2, ELEMENTS // num_steps))]
    both = compute_both_ways(diffusion, items, key=both_key, num_draws=DRAWS, progress=progress)
    if len(items) == len(dataset.test):
        draws, terms = DRAWS, both.terms
        parts = [np.asarray(part).mean(0) for part in (terms.step_kl.sum(1), terms.reconstruction, terms.elbo)]
    else:
        draws = 1
        terms = elbo_terms(diffusion, {}, dataset.test, key=test_key, reduce=True, progress=progress)
        parts = [np.asarray(part.mean, np.float64) for part in (terms.step_kl, terms.reconstruction, terms.elbo)]
        parts[0] = parts[0].sum(0)
    signs = {"prior_kl": -1, "step_kl": -1, "reconstruction": 1, "elbo": 1}
    test = {
        name: _row(Estimate.of(part), dataset, sign)
        for (name, sign), part in zip(signs.items(), (terms.prior_kl, *parts))
    }
    difference, difference_error = both.difference
    results = {
        "data": dataset.name,
        "dim": dataset.dim,
        "num_steps": num_steps,
        "test": {"num_items": len(dataset.test), "num_draws": draws, **test},
        "two_ways": {
            "num_items": len(items),
            "num_draws": DRAWS,
            "analytic": _row(both.analytic, dataset),
            "trace_elbo": _row(both.trace, dataset),
            "difference": difference,
            "difference_error": difference_error,
            "z": both.z,
            "agree": both.agree,
        },
        "reference": _reference(dataset, parts[-1]),
    }
    return both, results


def _row(estimate, dataset, sign=1):
    """Nats as they are; bits/dim as a code length, to which a KL (``sign`` −1) adds."""
    row = {"nats": estimate.mean, "error": estimate.error}
    if dataset.levels is not None:
        bits, error = (float(bits_per_dim(nats, dataset.dim)) for nats in (sign * estimate.mean, -estimate.error))
        row |= {"bits_per_dim": bits, "bits_error": error}
    return row


def _reference(dataset, elbo):
    """What the bound is held against: independent dimensions on a grid, the true density where it is known."""
    if dataset.levels is not None:
        mean, error = dataset.independent_levels()
        return {"independent_dimensions": _row(Estimate(float(mean), float(error), 0.0), dataset)}
    if dataset.log_prob is None:
        return {}
    entropy, entropy_error = dataset.entropy()
    gap = Estimate.of(dataset.log_prob(dataset.test) - elbo)
    return {
        "entropy": {"nats": float(entropy), "error": float(entropy_error)},
        "gap": {"nats": gap.mean, "error": gap.error},
    }


LABELS = {
    "prior_kl": "prior KL",
    "step_kl": "Σ step KL",
    "reconstruction": "reconstruction, E log p(x | z_1)",
    "elbo": "ELBO",
    "analytic": "ELBO, analytic decomposition",
    "trace_elbo": "ELBO, Trace_ELBO on sampled paths",
    "independent_dimensions": "log-likelihood of independent pixels",
    "entropy": "minus entropy of the data",
    "gap": "gap: E log p(x) − ELBO",
}


def format_table(results):
    """The table of :func:`evaluate` as text."""
    test, both, reference = results["test"], results["two_ways"], dict(results["reference"])
    bits = "bits_per_dim" in test["elbo"]
    width = 38
    header = f"{'':{width}}{'nats':>10}{'± s.e.':>9}" + (f"{'bits/dim':>12}{'± s.e.':>9}" if bits else "")

    def line(name, row):
        text = f"{LABELS[name]:{width}}{row['nats']:10.4f}{row['error']:9.4f}"
        return text + (f"{row['bits_per_dim']:12.4f}{row['bits_error']:9.4f}" if "bits_per_dim" in row else "")

    if "entropy" in reference:
        reference["entropy"] = reference["entropy"] | {"nats": -reference["entropy"]["nats"]}
    draws = f"{test['num_draws']} draw{'s' * (test['num_draws'] > 1)} each"
    verdict = "they agree" if both["agree"] else "THEY DISAGREE"
    lines = [
        f"{results['data']}, test split: {test['num_items']} items of {results['dim']} dimensions, {draws}; "
        f"N = {results['num_steps']} steps",
        header,
        *(line(name, test[name]) for name in ("prior_kl", "step_kl", "reconstruction", "elbo")),
        *(line(name, row) for name, row in reference.items()),
        "",
        f"The bound two ways, on the first {both['num_items']} items, {both['num_draws']} draws each",
        header,
        *(line(name, both[name]) for name in ("analytic", "trace_elbo")),
        f"{'difference (± Monte Carlo error)':{width}}{both['difference']:10.4f}{both['difference_error']:9.4f}"
        f"   {abs(both['z']):.1f} standard errors: {verdict}",
    ]
    return "\n".join(lines)
