"""``probdiff audit``: the audit of the network of a run, or of one from elsewhere, on test data."""

import argparse
import json
import runpy

import jax

from probdiff._checks import require
from probdiff.cli.common import usage
from probdiff.datasets import Dataset, load
from probdiff.diagnostics.findings import audit
from probdiff.diffusion import Diffusion
from probdiff.storage.run import open_run

ROWS = 2**18  # pairs of a datum and a step
FEWEST, MOST = 64, 1024


def run(arguments: argparse.Namespace) -> int:
    """Print the audit of a model on its test data; returns the exit code. Nothing is written."""
    with usage():
        diffusion, dataset = _model_and_data(arguments.model, arguments.data)
        given, there = arguments.num_items, len(dataset.test)
        good = given is None or 2 <= given <= there
        require(good, "--num-items", f"2 to {there}, the items of the test split", given)
        draws = arguments.num_draws
        require(draws >= 2, "--num-draws", "an integer of at least 2", draws)
        count = given or min(MOST, max(FEWEST, ROWS // diffusion.schedule.num_steps))
        x, context = dataset.test[:count], None if dataset.test_context is None else dataset.test_context[:count]
        result = audit(diffusion, x, context=context, key=jax.random.key(0), num_draws=draws, progress=True)
    print(json.dumps(result.to_dict()) if arguments.json else result, file=arguments.output)
    return 0


def _model_and_data(model: str, data: str | None) -> tuple[Diffusion, Dataset]:
    """The model of a run with the data of the run; or that of a script, which is run, with the data of ``--data``."""
    path, _, name = model.rpartition(":")
    if not path.endswith(".py"):
        require(data is None, "--data", "none with a run, which has its own data", data)
        folder = open_run(model)
        return folder.diffusion, folder.data
    require(data is not None, "--data", f"the data of {name}, a name or a file as for probdiff fit", "none")
    found = runpy.run_path(path).get(name)
    require(isinstance(found, Diffusion), model, f"a Diffusion named {name} in {path}", "nothing of that name" if found is None else type(found).__name__)
    assert isinstance(found, Diffusion)
    return found, load(data)
