"""``probdiff sample``: draws from a fitted model, in a file and as a figure."""

import argparse
import inspect
import json
import time

import jax

from probdiff._checks import require
from probdiff.cli.common import check_devices, default_count, sample_figures, usage
from probdiff.samplers import SAMPLERS
from probdiff.storage.run import open_run

IMAGES = 100  # at most, in a figure


def run(arguments: argparse.Namespace) -> int:
    """Draw from the model of a run; returns the exit code."""
    with usage():
        draw, steps = SAMPLERS[arguments.sampler], arguments.steps
        fixed = "steps" not in inspect.signature(draw).parameters
        require(steps is None or not fixed, "--steps", f"none for {arguments.sampler}, which takes all steps", steps)
        folder = open_run(arguments.run)
        diffusion, dataset = folder.diffusion, folder.data
        paths = folder.new_samples(arguments.sampler, arguments.out)
        devices = check_devices(arguments.devices)
    count = arguments.num_samples or default_count(dataset)
    options = {} if steps is None else {"steps": steps}
    key, start = jax.random.key(arguments.seed), time.monotonic()
    with usage():
        samples = draw(diffusion, key=key, num_samples=count, devices=devices, progress=True, **options)
    seconds = time.monotonic() - start
    shown = count if dataset.image_shape is None else min(count, IMAGES)
    how = arguments.sampler + ("" if steps is None else f", {steps} steps")
    title = f"{dataset.name}, N = {diffusion.schedule.num_steps}, {how}"
    figure = list(sample_figures(samples[:shown], dataset, title).values())[-1]  # of a table, the pairs
    with usage():
        folder.save_samples(paths, samples, figure)
    if arguments.json:
        given = {name: getattr(arguments, name) for name in ("run", "sampler", "steps", "seed")}
        files = {"samples": str(paths[0]), "figure": str(paths[1])}
        document = given | {"num_samples": count} | files | {"seconds": round(seconds, 1)}
        print(json.dumps(document), file=arguments.output)
        return 0
    print(f"{count} samples of {dataset.name} by {how} in {seconds:.1f} s")
    print(f"samples: {paths[0]}\nfigure: {paths[1]}")
    return 0
