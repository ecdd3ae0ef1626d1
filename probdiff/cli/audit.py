"""``probdiff audit``: the audit of the network of a run on its test data."""

import argparse
import json

import jax

from probdiff._checks import require
from probdiff.cli.common import usage
from probdiff.diagnostics.findings import audit
from probdiff.storage.run import open_run

ROWS = 2**18  # of data and steps
FEWEST, MOST = 64, 1024


def run(arguments: argparse.Namespace) -> int:
    """Print the audit of a run on its test data; returns the exit code. Nothing is written."""
    with usage():
        folder = open_run(arguments.run)
        diffusion, dataset = folder.diffusion, folder.data
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
