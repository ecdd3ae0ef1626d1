"""``probdiff inspect``: where a fitted model spends its nats, step by step."""

import argparse
import json

import jax

from probdiff.cli.common import draw_figures, usage
from probdiff.datasets import Dataset
from probdiff.diagnostics.datatree import inspect_terms
from probdiff.diagnostics.gap import GapDecomposition, gap_decomposition
from probdiff.diagnostics.plots import plot_gap
from probdiff.diagnostics.tables import format_fit
from probdiff.diffusion import Diffusion
from probdiff.storage.run import Run, open_run

LEDGER_ROWS = 2**20


def run(arguments: argparse.Namespace) -> int:
    """Inspect a run, and draw its figures anew; returns the exit code."""
    with usage():
        folder = open_run(arguments.run)
        diffusion, dataset, results, tree = folder.diffusion, folder.data, folder.results, folder.datatree
    found = inspect_terms(tree, dataset.dim if dataset.levels is not None else None)
    paths = draw_figures(folder.figures, diffusion, dataset, folder.losses, folder.validation, tree)
    account = None
    if dataset.oracle is not None:
        account = _account(folder, diffusion, dataset)
        paths.append(folder.figures / "ledger.png")
    if arguments.json:
        summary = json.loads(found["summary"].to_json(orient="index"))
        results |= {} if account is None else {"ledger": account.to_dict()}
        results |= {"inspection": found | {"summary": summary}, "figures": [str(path) for path in paths]}
        print(json.dumps(results), file=arguments.output)
        return 0
    print(f"{format_fit(results)}\n")
    print(found["text"])
    if account is not None:
        print(f"\n{account}\n")
    print("figures: " + ", ".join(str(path) for path in paths))
    return 0


def _account(folder: Run, diffusion: Diffusion, dataset: Dataset) -> GapDecomposition:
    """The gap of some test data taken apart, and its figure in the run."""
    x = dataset.test[: max(100, LEDGER_ROWS // diffusion.schedule.num_steps)]
    account = gap_decomposition(diffusion, dataset.oracle, x, key=jax.random.key(0), progress=True)
    title = f"{dataset.name}, N = {diffusion.schedule.num_steps}, {len(x)} test data"
    plot_gap(account, title).savefig(folder.figures / "ledger.png")
    return account
