"""``probdiff sample``: draws from a fitted model, in a file and as a figure."""

import argparse
import inspect
import json
import time

import jax
import numpy as np
from jaxtyping import Real

from probdiff._checks import require
from probdiff.cli.common import (
    check_devices,
    contexts_of_test_data,
    default_count,
    given,
    read_contexts,
    sample_figures,
    usage,
)
from probdiff.datasets import Dataset
from probdiff.samplers import SAMPLERS
from probdiff.storage.run import open_run

IMAGES = 100  # images in a figure, at most


def run(arguments: argparse.Namespace) -> int:
    """Draw from the model of a run; returns the exit code."""
    with usage():
        draw, steps = SAMPLERS[arguments.sampler], arguments.steps
        fixed = "steps" not in inspect.signature(draw).parameters
        require(steps is None or not fixed, "--steps", f"none for {arguments.sampler}, which takes all steps", steps)
        folder = open_run(arguments.run)
        diffusion, dataset = folder.diffusion, folder.data
        context = _context(dataset, arguments.context, arguments.num_samples)
        paths = folder.new_samples(arguments.sampler, arguments.out)
        devices = check_devices(arguments.devices)
    count = arguments.num_samples or (default_count(dataset) if context is None else len(context))
    options = {} if steps is None else {"steps": steps}
    key, start = jax.random.key(arguments.seed), time.monotonic()
    with usage():
        samples = draw(diffusion, context=context, key=key, num_samples=count, devices=devices, progress=True, **options)
    seconds = time.monotonic() - start
    shown = count if dataset.image_shape is None else min(count, IMAGES)
    how = arguments.sampler + ("" if steps is None else f", {steps} steps")
    what = "" if context is None else given(arguments.context or "the contexts of test data")
    title = f"{dataset.name}{what}, N = {diffusion.schedule.num_steps}, {how}"
    pictured = None if context is None else context[:shown]
    figure = list(sample_figures(samples[:shown], dataset, title, pictured).values())[-1]  # for a table, the pairs of columns
    with usage():
        folder.save_samples(paths, samples, figure, context)
    if arguments.json:
        asked = {name: getattr(arguments, name) for name in ("run", "sampler", "steps", "seed")}
        asked["context"] = None if context is None else arguments.context or "test split"
        files = {"samples": str(paths[0]), "figure": str(paths[1])}
        document = asked | {"num_samples": count} | files | {"seconds": round(seconds, 1)}
        print(json.dumps(document), file=arguments.output)
        return 0
    print(f"{count} samples of {dataset.name}{what and f'{what},'} by {how} in {seconds:.1f} s")
    print(f"samples: {paths[0]}\nfigure: {paths[1]}")
    return 0


def _context(dataset: Dataset, text: str | None, num_samples: int | None) -> Real[np.ndarray, "sample width"] | None:
    """The context of each sample: from the command line, as text or by a file, or from test data; None for a model without a context."""
    if text is None:
        return contexts_of_test_data(dataset, num_samples or default_count(dataset))
    require(dataset.test_context is not None, "--context", "none, for a run whose model is given none", text)
    covariates = dataset.covariates
    require(covariates is not None, "--context", "none, for data whose covariates are not known: sample in Python", text)
    assert covariates is not None
    rows, in_file = read_contexts(covariates, text)
    count = num_samples or (len(rows) if in_file else default_count(dataset))
    require(len(rows) in (1, count), "--num-samples", f"none, or {len(rows)} as {text} has rows", num_samples)
    return rows if len(rows) == count else np.repeat(rows, count, 0)
