"""``probdiff sample``: draws from a fitted model, in a file and as a figure."""

import inspect
import json
import time

import jax

from probdiff._checks import require
from probdiff.cli.common import check_devices, check_integer, default_count, usage
from probdiff.diagnostics.plots import plot_samples
from probdiff.samplers import SAMPLERS
from probdiff.storage.run import open_run

IMAGES = 100  # at most, in a figure


def run(arguments):
    """Draw from the model of a run; returns the exit code."""
    with usage():
        _check(arguments)
        folder = open_run(arguments.run)
        diffusion, dataset = folder.diffusion, folder.data
        paths = folder.new_samples(arguments.sampler, arguments.out)
        devices = check_devices(arguments.devices)
    count = arguments.num_samples or default_count(dataset)
    options = {} if arguments.steps is None else {"steps": arguments.steps}
    key, start = jax.random.key(arguments.seed), time.monotonic()
    with usage():
        draw = SAMPLERS[arguments.sampler]
        samples = draw(diffusion, key=key, num_samples=count, devices=devices, progress=True, **options)
    seconds = time.monotonic() - start
    shown = count if dataset.image_shape is None else min(count, IMAGES)
    steps = "" if arguments.steps is None else f", {arguments.steps} steps"
    title = f"{dataset.name}, N = {diffusion.schedule.num_steps}, {arguments.sampler}{steps}"
    figure = plot_samples(samples[:shown], dataset.test[:shown], dataset.image_shape, title)
    with usage():
        folder.save_samples(paths, samples, figure)
    if arguments.json:
        given = {name: getattr(arguments, name) for name in ("run", "sampler", "steps", "seed")}
        files = {"samples": str(paths[0]), "figure": str(paths[1])}
        document = given | {"num_samples": count} | files | {"seconds": round(seconds, 1)}
        print(json.dumps(document), file=arguments.output)
        return 0
    print(f"{count} samples of {dataset.name} by {arguments.sampler}{steps} in {seconds:.1f} s")
    print(f"samples: {paths[0]}\nfigure: {paths[1]}")
    return 0


def _check(arguments):
    sampler, steps = arguments.sampler, arguments.steps
    require(sampler in SAMPLERS, "--sampler", f"one of {', '.join(SAMPLERS)}", sampler)
    for name, lowest in (("num_samples", 1), ("steps", 1), ("seed", 0)):
        if getattr(arguments, name) is not None:
            check_integer(name, getattr(arguments, name), lowest)
    takes_steps = "steps" in inspect.signature(SAMPLERS[sampler]).parameters
    require(steps is None or takes_steps, "--steps", f"none for {sampler}, which takes all steps", steps)
