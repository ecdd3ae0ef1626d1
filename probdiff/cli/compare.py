"""``probdiff compare``: all estimators of the bound on one run, or the models of several runs."""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from probdiff._checks import require
from probdiff.cli import UsageError
from probdiff.cli.common import check_devices, flag, usage
from probdiff.datasets import Dataset
from probdiff.diagnostics.compare_estimators import check_names, compare_estimators
from probdiff.diagnostics.compare_models import compare_models
from probdiff.diffusion import Diffusion
from probdiff.storage.run import Run, open_run

ITEMS = 64  # default number of items in a batch: as many as in a minibatch of a fit, or fewer
MINUTES = 1.0
LEAST_MINUTES = 1e-3
MODEL_ROWS = 2**21


def run(arguments: argparse.Namespace) -> int:
    """Compare the estimators of one run, or several runs; returns the exit code."""
    several = len(arguments.runs) > 1
    with usage():
        _check(arguments, several)
        runs = [open_run(path) for path in arguments.runs]
        models = {path: run.diffusion for path, run in zip(arguments.runs, runs)}
        datasets = {path: run.data for path, run in zip(arguments.runs, runs)}
        _check_same_data(runs, [*datasets.values()])
        if not several:
            _check_num_items(arguments.num_items, len(datasets[arguments.runs[0]].test))
    if several:
        return _compare_models(arguments, models, datasets)
    return _compare_estimators(arguments, runs[0], models[arguments.runs[0]], datasets[arguments.runs[0]])


def _compare_models(arguments: argparse.Namespace, models: dict[str, Diffusion], datasets: dict[str, Dataset]) -> int:
    """Compare models on the same test data; each conditional model is given the context of its own run."""
    largest = max(model.schedule.num_steps for model in models.values())
    draws = arguments.num_draws or 4
    rows = slice(max(2, MODEL_ROWS // (largest * draws)))
    items = next(iter(datasets.values())).test[rows]
    contexts = {path: None if data.test_context is None else data.test_context[rows] for path, data in datasets.items()}
    with usage():
        models = {path: model.given(contexts[path]) for path, model in models.items()}
        result = compare_models(models, items, key=jax.random.key(0), num_draws=draws, progress=True)
    names = {path: list(data.covariates.names) for path, data in datasets.items() if data.covariates is not None}
    if arguments.json:
        print(json.dumps(result.to_dict() | {"context": names}), file=arguments.output)
    else:
        print("\n".join([str(result), *(f"{path}: given {', '.join(each)}" for path, each in names.items())]), file=arguments.output)
    return 0


def _compare_estimators(arguments: argparse.Namespace, folder: Run, diffusion: Diffusion, dataset: Dataset) -> int:
    count, num_steps = arguments.num_items or ITEMS, diffusion.schedule.num_steps
    items, context = dataset.test[:count], None if dataset.test_context is None else dataset.test_context[:count]
    with usage():
        devices = check_devices(arguments.devices)
    print(f"probdiff: {len(items)} test items, N = {num_steps}", file=sys.stderr, flush=True)
    spent = (time.monotonic() - arguments.started) / 60  # the imports are a part of the minutes
    minutes = max((arguments.minutes or MINUTES) - spent, LEAST_MINUTES)
    options = {"num_draws": arguments.num_draws, "minutes": minutes, "estimators": arguments.estimators}
    result = compare_estimators(diffusion, items, context=context, key=jax.random.key(0), devices=devices, progress=True, **options)
    # The results are shown even if they cannot be written.
    try:
        path, problem = str(folder.save_comparison(result)), None
    except OSError as error:
        path, problem = None, error
    text = json.dumps(result.to_dict() | {"figure": path}) if arguments.json else f"{result}\nfigure: {path}"
    print(text, file=arguments.output)
    if problem is not None:
        raise UsageError(problem)
    return 0


def _check(arguments: argparse.Namespace, several: bool) -> None:
    names, draws, lowest = arguments.estimators, arguments.num_draws, 1 if several else 2
    require(draws is None or draws >= lowest, "--num-draws", f"an integer of at least {lowest}", draws)
    one = f"{len(arguments.runs)}, which are compared as models"
    for option in ("estimators", "num_items", "minutes"):
        require(not several or getattr(arguments, option) is None, flag(option), "one run", one)
    both = arguments.minutes is not None and draws is not None
    require(not both, "--minutes", "either --minutes or --num-draws", "both")
    different = len({Path(path).resolve() for path in arguments.runs}) == len(arguments.runs)
    require(different, "RUN", "different runs", " ".join(arguments.runs))
    if names is not None:
        check_names(names)


def _check_num_items(given: int | None, there: int) -> None:
    good = given is None or 2 <= given <= there
    require(good, "--num-items", f"2 to {there}, the items of the test split", given)


def _check_same_data(runs: list[Run], datasets: list[Dataset]) -> None:
    words = [
        f"{run.config.get('data', data.name)}, seed {run.config.get('seed', 0)}"
        f"{'' if data.covariates is None else ', given ' + ', '.join(data.covariates.names)}"
        for run, data in zip(runs, datasets)
    ]
    for run, dataset, got in zip(runs, datasets, words):
        same = np.array_equal(dataset.test, datasets[0].test)
        require(same, str(run.path), f"the test data of {runs[0].path} ({words[0]})", f"other data ({got})")
