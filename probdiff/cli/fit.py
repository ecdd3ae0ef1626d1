"""``probdiff fit``: a run folder with a fitted model, and its bound on the test split computed two ways."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from probdiff._checks import require
from probdiff._devices import wait_for_all
from probdiff.cli import parser
from probdiff.cli.common import check_devices, draw_figures, flag, usage
from probdiff.datasets import NAMES, Dataset, load
from probdiff.datasets.covariates import split_words
from probdiff.diagnostics.agreement import TwoWays, compute_both_ways
from probdiff.diagnostics.common_paths import CommonPaths
from probdiff.diagnostics.datatree import to_datatree
from probdiff.diagnostics.tables import format_fit
from probdiff.diffusion import Diffusion
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.random_steps import data_set_elbo
from probdiff.elbo.terms import bits_per_dim
from probdiff.presets import default_diffusion, default_options
from probdiff.storage.run import Run, check_free, check_splits, create_run, next_free, open_run
from probdiff.training import fit

OPTIONS = ("num_steps", "batch_size", "learning_rate", "seed")
LIMITS = ("iterations", "minutes")  # of which a fit has one
ITEMS = 512
DRAWS = 4
EVALUATIONS = 2**16  # evaluations of the network, for each of the two ways
NOISE_SHARE = 0.18  # the Monte Carlo error of the bound, in units of its error over the data: approximate, so that it is below a fifth
SIGNS = {"prior_kl": -1, "step_kl": -1, "reconstruction": 1}


def run(arguments: argparse.Namespace) -> int:
    """Fit a model, or resume a fit, and evaluate it; returns the exit code."""
    given = {name: getattr(arguments, name) for name in (*OPTIONS, *LIMITS) if getattr(arguments, name) is not None}
    with usage():
        require(len(given.keys() & LIMITS) < 2, "--minutes", "none with --iterations", arguments.minutes)
        resumable = not arguments.resume or arguments.out is not None
        require(resumable, "--resume", "--out DIR, the run to go on with", "none")
        first = _join(arguments)
        devices = check_devices(arguments.devices)
        folder, diffusion, dataset, options = _prepare(given, arguments, first)
        folder.checkpoint.require_intact()
    if first:
        about = f"{dataset.name}, {len(dataset.train)} training items of {dataset.dim} dimensions"
        print(
            f"probdiff: {_words(dataset) or about}\n"
            f"probdiff: N = {options['num_steps']} steps in {diffusion.dim} dimensions, {_limit(options)[1]:g} {_limit(options)[0]}, in {folder.path}",
            file=sys.stderr if arguments.json else sys.stdout,
            flush=True,
        )
    try:
        results = _fit_and_evaluate(folder, diffusion, dataset, options, devices, first)
    except KeyboardInterrupt:
        print(f"\nprobdiff: interrupted; go on with: probdiff fit --out {folder.path} --resume", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        kept = f"the last good state is in {folder.path}" if folder.checkpoint.exists() else "nothing was saved yet"
        print(f"probdiff: error: {error}; {kept}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"probdiff: error: {error}; the files that were saved before are in {folder.path}", file=sys.stderr)
        return 1
    if first and arguments.json:
        print(json.dumps(results), file=arguments.output)
    elif first:
        _print_results(results, folder)
    return 0


def _words(dataset: Dataset) -> str | None:
    """The kinds of the columns, as text; None if there is only one obvious kind."""
    return None if (dataset.oracle or dataset.image_shape) and dataset.covariates is None else dataset.describe()


def _print_results(results: dict[str, Any], folder: Run) -> None:
    print(f"\n{format_fit(results)}\n")
    if results["skipped_updates"]:
        print(f"{results['skipped_updates']} updates were skipped: their loss or gradient was not finite")
    seconds = results["seconds"]
    print(f"fitted in {seconds['fit']:.0f} s, evaluated in {seconds['evaluation']:.0f} s; figures in {folder.figures}")
    print(f"next: probdiff inspect {folder.path}")


def _join(arguments: argparse.Namespace) -> bool:
    """Become one of several processes, if requested; returns whether this is the first, which prints and writes."""
    address, count, index = arguments.coordinator, arguments.processes, arguments.process
    if address is None and count is None and index is None:
        return True
    require(address is not None, "--coordinator", "the address HOST:PORT of the first process, or auto", "none")
    require(arguments.out is not None, "--out", "a folder that all processes see", "none")
    if address == "auto":
        none = count is None and index is None
        require(none, "--coordinator", "no --processes and --process with auto, which finds them", "some")
    else:
        among = count is not None and index is not None and 0 <= index < count
        require(among, "--process", "one of 0 … P−1 out of --processes P", f"{index} of {count}")
        host, _, port = address.rpartition(":")
        require(host and port.isdigit(), "--coordinator", "HOST:PORT or auto", address)
    try:
        jax.distributed.initialize(None if address == "auto" else address, count, index)
    except RuntimeError as error:
        raise ValueError(f"--coordinator: Expected processes that find each other; got: {error}") from None
    return jax.process_index() == 0


def _prepare(given: dict[str, Any], arguments: argparse.Namespace, first: bool) -> tuple[Run, Diffusion, Dataset, dict[str, Any]]:
    """The run folder, the model, the data and the options; nothing is compiled before this has passed."""
    if arguments.resume:
        return _reopen(given, arguments, first)
    if arguments.out is not None and first:
        check_free(arguments.out)
    name = _data_name(arguments.data or "digits")
    columns = _columns(arguments)
    dataset = load(name, given.get("seed", 0), **columns)
    options = {"data": name} | default_options(dataset) | given | columns
    if "minutes" in given:
        del options["iterations"]
    # The first bar, as the programs that draw the weights are compiled, too.
    with tqdm(total=1, unit="model", desc="building the model", leave=False, disable=not first) as bar:
        diffusion = default_diffusion(dataset, options["num_steps"], options["seed"])
        bar.update()
    check_splits(diffusion, dataset)
    path = arguments.out or next_free(dataset.name)
    if first:
        # The encoding of the context must not change with the file: the run stores it.
        create_run(path, diffusion, options, dataset if diffusion.is_conditional else None)
    wait_for_all("run folder")
    return open_run(path), diffusion, dataset, options


def _reopen(given: dict[str, Any], arguments: argparse.Namespace, first: bool) -> tuple[Run, Diffusion, Dataset, dict[str, Any]]:
    """The run to resume, its model, its data and its options; no option may be changed, except for more iterations or minutes after the end."""
    folder = open_run(arguments.out)
    options = folder.config
    limit = _limit(options)[0]
    names = (*OPTIONS, limit)
    missing = [name for name in ("data", *names) if name not in options]
    without = f"a config.json without {', '.join(missing)}: go on in Python, with probdiff.fit(…, checkpoint=run.checkpoint)"
    require(not missing, str(folder.path), "a run of probdiff fit", without)
    checked = parser().parse_args(["fit", *(f"{flag(name)}={options[name]}" for name in names)])
    options |= {name: getattr(checked, name) for name in names}
    asked = given | ({"data": _data_name(arguments.data)} if arguments.data else {}) | _columns(arguments)
    more = asked.get(limit, 0) > options[limit]
    if more:
        expected = f"{options[limit]:g}, as in the run to resume, before it goes on to more"
        done = folder.checkpoint.minutes if limit == "minutes" else folder.checkpoint.num_iterations
        require(done >= options[limit], flag(limit), expected, f"{asked[limit]:g} after {done:.3g} {limit}")
        options[limit] = asked[limit]
    for name, value in asked.items():
        require(value == options.get(name), flag(name), f"{options.get(name)}, as in the run to resume", value)
    untrained, dataset = folder.untrained, folder.data
    if more and first:
        folder.extend(limit, options[limit])
    return folder, untrained, dataset, options


def _limit(options: dict[str, Any]) -> tuple[str, float]:
    """The name and the value of the limit of a fit, in iterations or minutes."""
    name = "minutes" if "minutes" in options else "iterations"
    return name, options.get(name, 0)


def _columns(arguments: argparse.Namespace) -> dict[str, Any]:
    """The columns that are not data, if named by options: the one that numbers the rows, and those of the context."""
    given = None if arguments.context is None else split_words(arguments.context)
    require(given is None or (given and all(given)), "--context", "columns, with commas between them", repr(arguments.context))
    return {name: value for name, value in (("index", arguments.index), ("context", given)) if value is not None}


def _data_name(name: str) -> str:
    """The name of the data; for files, the absolute path, so that a run can be opened from any folder."""
    return name if name in NAMES or not Path(name).exists() else str(Path(name).resolve())


def _fit_and_evaluate(
    folder: Run, diffusion: Diffusion, dataset: Dataset, options: dict[str, Any], devices: int | None, first: bool
) -> dict[str, Any]:
    """Fit, evaluate and save; returns the saved results. Of several processes, the first saves."""
    fit_key, evaluation_key = jax.random.split(jax.random.key(options["seed"]))
    start = time.monotonic()
    fitted = fit(
        diffusion,
        dataset.train,
        context=dataset.train_context,
        iterations=options.get("iterations"),
        minutes=options.get("minutes"),
        batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        key=fit_key,
        validation=dataset.validation,
        validation_context=dataset.validation_context,
        validate_every=options.get("validate_every", 500),
        checkpoint=folder.checkpoint,
        devices=devices,
    )
    seconds = {"fit": time.monotonic() - start}
    if first:
        folder.save(fit=fitted)
    start = time.monotonic()
    both, results = evaluate(fitted.diffusion, dataset, key=evaluation_key, devices=devices, progress=first)
    seconds["evaluation"] = time.monotonic() - start
    results |= {
        "run": str(folder.path),
        "skipped_updates": fitted.skipped_updates,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    if first:
        folder.save(terms=both.terms, results=results)
        draw_figures(folder.figures, fitted.diffusion, dataset, fitted.losses, fitted.validation, to_datatree(both.terms))
    return results


def evaluate(
    diffusion: Diffusion, dataset: Dataset, *, key: jax.Array, devices: int | None = None, progress: bool = False
) -> tuple[TwoWays, dict[str, Any]]:
    """The bound on the test split.

    All items are evaluated at random steps, with a Monte Carlo error of at most about a fifth of the error over the items. The bound is computed both
    ways for the first items, as many as need 2¹⁶ network evaluations each way (512 at most).

    Args:
        diffusion: A trained Diffusion.
        dataset: A :class:`~probdiff.datasets.Dataset`.
        key: JAX key.
        devices: Number of devices that share the data.
        progress: Show progress bars.

    Returns:
        The :class:`~probdiff.diagnostics.agreement.TwoWays`, and the table as a dict for JSON (nats per datum throughout).
    """
    both_key, test_key = jax.random.split(key)
    num_steps = diffusion.schedule.num_steps
    options: dict[str, Any] = {"devices": devices, "progress": progress}
    diffusion = diffusion.given(dataset.test_context)
    whole = data_set_elbo(diffusion, dataset.test, key=test_key, noise_share=NOISE_SHARE, **options)
    some = slice(min(ITEMS, max(2, EVALUATIONS // (num_steps * DRAWS)), len(dataset.test)))
    items = dataset.test[some]
    both = compute_both_ways(diffusion.take(some), items, key=both_key, num_draws=DRAWS, **options)
    parts = {"prior_kl": whole.prior_kl, "step_kl": whole.step_kl, "reconstruction": whole.reconstruction}
    test = {name: _row(Estimate.of(part), dataset, SIGNS[name]) for name, part in parts.items()}
    test["elbo"] = _row(whole.estimate, dataset) | {"monte_carlo_error": whole.estimate.monte_carlo_error}
    difference, difference_error = both.difference
    results = {
        "data": dataset.name,
        "dim": dataset.dim,
        "num_steps": num_steps,
        "columns": _words(dataset),
        "context": dataset.covariates and list(dataset.covariates.names),
        "test": {"num_items": len(dataset.test), "num_evaluations": whole.num_evaluations, **test},
        "two_ways": {
            "num_items": len(items),
            "num_draws": DRAWS,
            "analytic": _row(both.analytic, dataset),
            "trace_elbo": _row(both.trace, dataset),
            "difference": difference,
            "difference_error": difference_error,
            "z": both.z,
            "detectable": both.detectable,
            "common_paths": both.common and _common(both.common),
            "agree": both.agree,
        },
        "reference": _reference(dataset, whole.elbo),
    }
    return both, results


def _common(common: CommonPaths) -> dict[str, Any]:
    num_steps, num_items = common.traced["step_kl"].shape
    return {"num_items": num_items, "num_terms": num_steps + 2, "largest": common.largest, "wrong": common.wrong}


def _row(estimate: Estimate, dataset: Dataset, sign: int = 1) -> dict[str, Any]:
    """A row in nats and in bits/dim; the latter as a code length, which a KL (``sign`` −1) increases."""
    row = {"nats": estimate.mean, "error": estimate.error}
    if dataset.levels is not None:
        bits, error = (float(bits_per_dim(nats, dataset.dim)) for nats in (sign * estimate.mean, -estimate.error))
        row |= {"bits_per_dim": bits, "bits_error": error}
    return row


def _reference(dataset: Dataset, elbo: np.ndarray) -> dict[str, Any]:
    """The reference for the bound: the true density if it is known, otherwise independent columns."""
    if dataset.log_prob is None:
        name = "independent_columns" if dataset.levels is None else "independent_dimensions"
        return {name: _row(Estimate(*dataset.independent_columns(), 0.0), dataset)}
    entropy, entropy_error = dataset.entropy()
    log_prob = dataset.log_prob(dataset.test)
    return {
        "entropy": {"nats": float(entropy), "error": float(entropy_error)},
        "log_prob": _row(Estimate.of(log_prob), dataset),
        "gap": _row(Estimate.of(log_prob - elbo), dataset),
    }
