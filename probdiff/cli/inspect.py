"""``probdiff inspect``: the results of a run, and the terms of the bound."""

import argparse
import json
from typing import Any

import jax

from probdiff._checks import require
from probdiff.cli.common import draw_figures, usage
from probdiff.diagnostics.datatree import inspect_terms
from probdiff.diagnostics.gap import gap_decomposition
from probdiff.diagnostics.tables import format_fit
from probdiff.likelihoods import DiscretizedNormalLikelihood
from probdiff.storage.run import Run, open_run

LEDGER_ROWS = 2**20


def run(arguments: argparse.Namespace) -> int:
    """Print the results of a run; returns the exit code. Computes and writes only on request."""
    with usage():
        folder = open_run(arguments.run)
        results = {} if folder.has_terms_only else folder.results
        tree = folder.datatree
        found = inspect_terms(tree, _dim_of_a_grid(folder, results))
        if arguments.figures:
            draw_figures(folder.figures, folder.diffusion, folder.data, folder.losses, folder.validation, tree)
        if arguments.ledger:
            _take_apart(folder)
        ledger = folder.ledger
    figures = [str(path) for path in sorted((folder.path / "figures").glob("*.png"))]
    if arguments.json:
        table = json.loads(found.pop("table").to_json(orient="index", double_precision=15))
        results |= {} if ledger is None else {"ledger": ledger.to_dict()}
        print(json.dumps(results | {"inspection": found | {"table": table}, "figures": figures}), file=arguments.output)
        return 0
    if results.get("columns"):
        print(f"{results['columns']}\n")
    print(f"{format_fit(results) if results else _describe(folder)}\n\n{found['text']}\n")
    if ledger is not None:
        print(f"{ledger}\n")
    print("figures: " + (", ".join(figures) or "none"))
    return 0


def _dim_of_a_grid(folder: Run, results: dict[str, Any]) -> int | None:
    """Number of dimensions for figures in bits/dim, None for continuous data."""
    if results:
        return results["dim"] if "bits_per_dim" in results.get("test", {}).get("elbo", {}) else None
    model = folder.config["model"]
    return model["dim"] if model["likelihood"]["name"] == DiscretizedNormalLikelihood.__name__ else None


def _describe(folder: Run) -> str:
    """A run that was saved in Python, described as text."""
    model = folder.config["model"]
    parts = ", ".join(model[part]["name"] for part in ("network", "likelihood"))
    return (
        f"{folder.path}: N = {model['num_steps']} steps in {model['dim']} dimensions, {parts}\n"
        "There is no final table: it comes with probdiff fit. These are the terms that were saved, and nothing is computed."
    )


def _take_apart(folder: Run) -> None:
    """Decompose the gap on some test data, and store the result in the run."""
    dataset, diffusion = folder.data, folder.diffusion
    require(dataset.oracle is not None, "--ledger", "data whose density is known, as of the planar sets", dataset.name)
    x = dataset.test[: max(100, LEDGER_ROWS // diffusion.schedule.num_steps)]
    folder.save_ledger(gap_decomposition(diffusion, dataset.oracle, x, key=jax.random.key(0), progress=True))
