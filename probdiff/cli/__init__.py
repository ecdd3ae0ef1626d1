"""The commands ``probdiff fit``, ``probdiff inspect``, ``probdiff compare``, ``probdiff sample`` and ``probdiff verify``.

Exit codes: 0, done; 1, the fit or a check failed; 2, something given was not usable (one line says what); 130, interrupted.
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

OPTIONS = ("num_steps", "iterations", "batch_size", "learning_rate", "seed")
SAMPLES = {"image": 64, "points": 2000}
IMAGES = 100  # at most, in a figure
ESTIMATOR_ROWS, ESTIMATOR_ITEMS = 2**11, (2, 128)
MODEL_ROWS = 2**21
LEDGER_ROWS = 2**20


class UsageError(Exception):
    """Something that the user gave cannot be used."""


def main(argv=None):
    """Run a command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    _keep_what_is_compiled()
    before = signal.signal(signal.SIGTERM, _interrupt)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        warnings.simplefilter("ignore", DeprecationWarning)  # of what is not the user's code
        try:
            with _document_only() if arguments.json else contextlib.nullcontext(sys.stdout) as arguments.output:
                return arguments.command(arguments)
        except UsageError as error:
            print(f"probdiff: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\nprobdiff: interrupted", file=sys.stderr)
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)


def _keep_what_is_compiled():
    """Have JAX keep what it compiles in the user's cache folder, for the next run; what the user has set goes first."""
    import jax

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probdiff"
    # Not by way of the environment, which JAX has read by now.
    for option, value in {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0}.items():
        if option.upper() not in os.environ:
            jax.config.update(option, value)


def _interrupt(*_):
    raise KeyboardInterrupt


def _warn(message, *_, **__):
    print(f"probdiff: warning: {' '.join(str(message).split())}", file=sys.stderr)


@contextlib.contextmanager
def _document_only():
    """A stream whose text is all that reaches standard output, at the end; what else is printed, by libraries in C as well, goes to
    standard error."""
    document = io.StringIO()
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield document
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        print(document.getvalue(), end="", flush=True)


def _parser():
    parser = argparse.ArgumentParser(prog="probdiff", description="Diffusion models as NumPyro programs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fit = commands.add_parser("fit", help="fit a diffusion model and compute its bound two ways")
    fit.set_defaults(command=_fit)
    fit.add_argument(
        "--data",
        metavar="NAME|FILE",
        help="digits (default), checkerboard, circles, moons, 8gaussians, "
        "swissroll, or a .npy, .npz or .csv file of shape (datum, dim)",
    )
    fit.add_argument("--out", metavar="DIR", help="run folder (default: the next free runs/NAME-k)")
    fit.add_argument("--num-steps", type=int, metavar="N", help="steps of the chain")
    fit.add_argument("--iterations", type=int, metavar="K", help="SVI updates")
    fit.add_argument("--batch-size", type=int, metavar="B", help="data per update")
    fit.add_argument("--learning-rate", type=float, metavar="R", help="peak learning rate of Adam")
    fit.add_argument("--seed", type=int, metavar="S", help="seed of everything random (default 0)")
    fit.add_argument("--resume", action="store_true", help="go on with the run in --out")
    _add_devices(fit)
    fit.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: the address of the first (or: auto)")
    fit.add_argument("--processes", type=int, metavar="P", help="how many processes there are")
    fit.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    fit.add_argument("--json", action="store_true", help="print the result as one JSON document")
    inspect = commands.add_parser("inspect", help="where a fitted model spends its nats, step by step")
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("run", metavar="RUN", help="run folder")
    inspect.add_argument("--json", action="store_true", help="print the result as one JSON document")
    compare = commands.add_parser("compare", help="compare all estimators of the bound on one run, or several runs")
    compare.set_defaults(command=_compare)
    compare.add_argument("runs", metavar="RUN", nargs="+", help="run folder; with several, the models are compared")
    compare.add_argument("--num-draws", type=int, metavar="S", help="draws of each estimator (48), of each model (4)")
    compare.add_argument("--estimators", metavar="A,B,C", help="estimators to compare (default: all)")
    _add_devices(compare)
    compare.add_argument("--json", action="store_true", help="print the result as one JSON document")
    sample = commands.add_parser("sample", help="draw from a fitted model")
    sample.set_defaults(command=_sample)
    sample.add_argument("run", metavar="RUN", help="run folder")
    sample.add_argument("--num-samples", type=int, metavar="K", help="samples to draw (64 images, or 2000 points)")
    sample.add_argument("--sampler", default="ancestral", metavar="NAME", help="ancestral (default), ddim, langevin or ode")
    sample.add_argument(
        "--steps",
        type=int,
        metavar="S",
        help="steps of ddim, noise levels of langevin (default: all N); equal steps of ode (default: it chooses)",
    )
    sample.add_argument("--seed", type=int, default=0, metavar="S", help="seed (default 0)")
    sample.add_argument("--out", metavar="FILE.npy", help="a new file (default: the next free RUN/samples/NAME-k.npy)")
    _add_devices(sample)
    sample.add_argument("--json", action="store_true", help="print what was written as one JSON document")
    verify = commands.add_parser("verify", help="check the mathematics on this machine, in float32 and float64")
    verify.set_defaults(command=_verify)
    verify.add_argument("--json", action="store_true", help="print the result as one JSON document")
    return parser


def _add_devices(command):
    command.add_argument("--devices", type=int, metavar="K", help="devices that share the work (default: one)")


def _usage(function, *arguments, **keywords):
    """Call a function that checks what the user gave; its errors become one line and exit code 2."""
    try:
        return function(*arguments, **keywords)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(error) from None


def _fit(arguments):
    given = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    _usage(_check_options, given)
    if arguments.resume and arguments.out is None:
        raise UsageError("--resume: Expected --out DIR, the run to go on with; got none")
    first = _usage(_join, arguments)
    devices = _usage(_check_devices, arguments)
    run, dataset, options = _usage(_prepare, given, arguments, first)
    diffusion = _usage(getattr, run, "untrained")
    _usage(run.checkpoint.require_intact)
    if first:
        print(
            f"probdiff: {dataset.name}, {len(dataset.train)} training items of {dataset.dim} dimensions, "
            f"N = {options['num_steps']} steps, {options['iterations']} iterations, in {run.path}",
            file=sys.stderr if arguments.json else sys.stdout,
            flush=True,
        )

    try:
        results = _fit_and_evaluate(run, diffusion, dataset, options, devices, first)
    except KeyboardInterrupt:
        print(f"\nprobdiff: interrupted; go on with: probdiff fit --out {run.path} --resume", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        kept = f"the last good state is in {run.path}" if run.checkpoint.exists() else "nothing was saved yet"
        print(f"probdiff: error: {error}; {kept}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"probdiff: error: {error}; what was saved before is in {run.path}", file=sys.stderr)
        return 1
    if not first:
        return 0
    if arguments.json:
        print(json.dumps(results), file=arguments.output)
        return 0
    from probdiff.diagnostics.report import format_table

    print(f"\n{format_table(results)}\n")
    if results["skipped_updates"]:
        print(f"{results['skipped_updates']} updates were skipped: their loss or gradient was not finite")
    seconds = results["seconds"]
    print(f"fitted in {seconds['fit']:.0f} s, evaluated in {seconds['evaluation']:.0f} s; figures in {run.figures}")
    print(f"next: probdiff inspect {run.path}")
    return 0


def _fit_and_evaluate(run, diffusion, dataset, options, devices, first):
    """Fit, evaluate and save; gives the results as they are saved. Of several processes, the first saves."""
    import jax

    import probdiff
    from probdiff.diagnostics.report import evaluate

    fit_key, report_key = jax.random.split(jax.random.key(options["seed"]))
    start = time.monotonic()
    fit = probdiff.fit(
        diffusion,
        dataset.train,
        iterations=options["iterations"],
        batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        key=fit_key,
        validation=dataset.validation,
        checkpoint=run.checkpoint,
        devices=devices,
    )
    seconds = {"fit": time.monotonic() - start}
    if first:
        run.save(fit=fit)
    start = time.monotonic()
    both, results = evaluate(fit.diffusion, dataset, key=report_key, devices=devices, progress=first)
    seconds["evaluation"] = time.monotonic() - start
    results |= {
        "run": str(run.path),
        "skipped_updates": fit.skipped_updates,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    if first:
        run.save(terms=both.terms, results=results)
        _draw_figures(run, fit.diffusion, dataset)
    return results


def _join(arguments):
    """Become one of several processes, if so asked; whether this is the first, which prints and writes."""
    address, count, index = arguments.coordinator, arguments.processes, arguments.process
    if address is None and count is None and index is None:
        return True
    if address is None:
        raise ValueError("--coordinator: Expected the address HOST:PORT of the first process, or auto; got none")
    if arguments.out is None:
        raise ValueError("--out: Expected a folder that all processes see; got none")
    if address == "auto":
        if count is not None or index is not None:
            raise ValueError("--coordinator: Expected no --processes and --process with auto, which finds them; got some")
    elif count is None or index is None or not 0 <= index < count:
        raise ValueError(f"--process: Expected one of 0 … P−1 out of --processes P; got {index} of {count}")
    elif not address.rpartition(":")[2].isdigit() or not address.rpartition(":")[0]:
        raise ValueError(f"--coordinator: Expected HOST:PORT or auto; got {address}")
    import jax

    try:
        jax.distributed.initialize(None if address == "auto" else address, count, index)
    except RuntimeError as error:
        raise ValueError(f"--coordinator: Expected processes that find each other; got: {error}") from None
    return jax.process_index() == 0


def _check_devices(arguments):
    """The number of devices, None for one: all there are, if there are several processes."""
    import jax

    from probdiff._sharding import data_mesh

    count = arguments.devices
    if count is None and jax.process_count() > 1:
        count = jax.device_count()
    if jax.process_count() > 1 and count != jax.device_count():
        raise ValueError(f"--devices: Expected all {jax.device_count()} devices of the processes; got {count}")
    data_mesh(count)
    return count


def _check_options(given):
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        lowest = 0 if name == "seed" else 1
        if name == "learning_rate":
            good, expected = isinstance(value, int | float) and 0 < value < float("inf"), "a positive number"
        else:
            good, expected = isinstance(value, int) and lowest <= value < 2**32, f"an integer of at least {lowest}"
        if not good:
            raise ValueError(f"{flag}: Expected {expected}; got {value}")


def _prepare(given, arguments, first):
    """The run folder, the data and the options; nothing is compiled before this has passed."""
    from probdiff import datasets, presets
    from probdiff._sharding import wait_for_all
    from probdiff.storage import run as runs

    if arguments.resume:
        run = runs.open_run(arguments.out)
        options = run.config
        missing = [name for name in ("data", *OPTIONS) if name not in options]
        if missing:
            raise ValueError(f"{run.path}: Expected a run of probdiff fit; got a config.json without {', '.join(missing)}")
        _check_options({name: options[name] for name in OPTIONS})
        asked = given | ({"data": _data_name(arguments.data)} if arguments.data else {})
        for name, value in asked.items():
            if value != options[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')}: Expected {options[name]}, as in the run to resume; got {value}"
                )
        return run, run.data, options
    if arguments.out is not None and first:
        runs.check_free(arguments.out)
    name = _data_name(arguments.data or "digits")
    dataset = datasets.load(name, given.get("seed", 0))
    options = {"data": name} | presets.default_options(dataset) | given
    diffusion = presets.default_diffusion(dataset, options["num_steps"], options["seed"])
    for split in (dataset.train, dataset.validation, dataset.test):
        diffusion.check_data(split)
    path = arguments.out or runs.next_free(dataset.name)
    if first:
        runs.create_run(path, diffusion, options)
    wait_for_all("run folder")
    return runs.open_run(path), dataset, options


def _data_name(name):
    """Files by their absolute path, so that a run can be opened from anywhere."""
    from probdiff import datasets

    return name if name in datasets.NAMES or not Path(name).exists() else str(Path(name).resolve())


def _draw_figures(run, diffusion, dataset):
    import jax
    from numpyro.infer import Predictive

    from probdiff.diagnostics import plots

    title = f"{dataset.name}, N = {diffusion.schedule.num_steps}"
    count = SAMPLES["points" if dataset.image_shape is None else "image"]
    samples = Predictive(diffusion.model, num_samples=1)(jax.random.key(0), None, num_data=count)["x"][0]
    figures = {
        "loss": plots.plot_loss(run.losses, run.validation, title),
        "step_kl": plots.plot_step_kl(run.datatree, diffusion.schedule, title),
        "samples": plots.plot_samples(samples, dataset.test[:count], dataset.image_shape, title),
    }
    paths = [run.figures / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values()):
        figure.savefig(path)
    return paths


def _inspect(arguments):
    import probdiff
    from probdiff.diagnostics.datatree import inspect_terms
    from probdiff.diagnostics.report import format_table

    run = _usage(probdiff.open_run, arguments.run)
    diffusion, dataset, results = (_usage(getattr, run, name) for name in ("diffusion", "data", "results"))
    tree = _usage(getattr, run, "datatree")
    found = inspect_terms(tree, dataset.dim if dataset.levels is not None else None)
    paths = _draw_figures(run, diffusion, dataset)
    account = None
    if dataset.oracle is not None:
        account = _account(run, diffusion, dataset)
        paths.append(run.figures / "ledger.png")
    if arguments.json:
        results |= {} if account is None else {"ledger": account.to_dict()}
        summary = json.loads(found["summary"].to_json(orient="index"))
        print(json.dumps(results | {"inspection": found | {"summary": summary}, "figures": [str(p) for p in paths]}), file=arguments.output)
        return 0
    print(f"{format_table(results)}\n")
    print(found["text"])
    if account is not None:
        print(f"\n{account}\n")
    print("figures: " + ", ".join(str(path) for path in paths))
    return 0


def _account(run, diffusion, dataset):
    """The ledger of some test data, and its figure in the run."""
    import jax

    import probdiff
    from probdiff.diagnostics import plots

    x = dataset.test[: max(100, LEDGER_ROWS // diffusion.schedule.num_steps)]
    account = probdiff.gap_decomposition(diffusion, dataset.oracle, x, key=jax.random.key(0), progress=True)
    title = f"{dataset.name}, N = {diffusion.schedule.num_steps}, {len(x)} test data"
    plots.plot_gap(account, title).savefig(run.figures / "ledger.png")
    return account


def _compare(arguments):
    import jax

    import probdiff

    several = len(arguments.runs) > 1
    names = None if arguments.estimators is None else [name.strip() for name in arguments.estimators.split(",")]
    _usage(_check_compare, arguments, several, names)
    runs = [_usage(probdiff.open_run, path) for path in arguments.runs]
    models = {path: _usage(getattr, run, "diffusion") for path, run in zip(arguments.runs, runs)}
    datasets = [_usage(getattr, run, "data") for run in runs]
    _usage(_check_same_data, runs, datasets)
    test, diffusion = datasets[0].test, models[arguments.runs[0]]
    key = jax.random.key(0)
    if several:
        largest = max(model.schedule.num_steps for model in models.values())
        draws = arguments.num_draws or 4
        items = test[: max(2, MODEL_ROWS // (largest * draws))]
        result = _usage(probdiff.compare_models, models, items, key=key, num_draws=draws, progress=True)
        print(json.dumps(result.to_dict()) if arguments.json else result, file=arguments.output)
        return 0
    items = test[: min(ESTIMATOR_ITEMS[1], max(ESTIMATOR_ITEMS[0], ESTIMATOR_ROWS // diffusion.schedule.num_steps))]
    draws = arguments.num_draws or 48
    devices = _usage(_check_devices, arguments)
    print(f"probdiff: {len(items)} test items, N = {diffusion.schedule.num_steps}", file=sys.stderr, flush=True)
    result = probdiff.compare_estimators(
        diffusion, items, key=key, num_draws=draws, estimators=names, devices=devices, progress=True
    )
    # What was computed is shown even if it cannot be written.
    try:
        path, problem = str(runs[0].save_comparison(result)), None
    except OSError as error:
        path, problem = None, error
    print(json.dumps(result.to_dict() | {"figure": path}) if arguments.json else f"{result}\nfigure: {path}", file=arguments.output)
    if problem is not None:
        raise UsageError(problem)
    return 0


def _sample(arguments):
    import jax

    import probdiff
    from probdiff.diagnostics import plots

    _usage(_check_sample, arguments)
    run = _usage(probdiff.open_run, arguments.run)
    diffusion, dataset = (_usage(getattr, run, name) for name in ("diffusion", "data"))
    paths = _usage(run.new_samples, arguments.sampler, arguments.out)
    devices = _usage(_check_devices, arguments)
    count = arguments.num_samples or SAMPLES["points" if dataset.image_shape is None else "image"]
    options = {} if arguments.steps is None else {"steps": arguments.steps}
    start = time.monotonic()
    samples = _usage(
        probdiff.SAMPLERS[arguments.sampler],
        diffusion,
        {},
        key=jax.random.key(arguments.seed),
        num_samples=count,
        devices=devices,
        progress=True,
        **options,
    )
    seconds = time.monotonic() - start
    shown = count if dataset.image_shape is None else min(count, IMAGES)
    steps = "" if arguments.steps is None else f", {arguments.steps} steps"
    title = f"{dataset.name}, N = {diffusion.schedule.num_steps}, {arguments.sampler}{steps}"
    figure = plots.plot_samples(samples[:shown], dataset.test[:shown], dataset.image_shape, title)
    _usage(run.save_samples, paths, samples, figure)
    if arguments.json:
        names = ("run", "sampler", "steps", "seed")
        written = {"num_samples": count, "samples": str(paths[0]), "figure": str(paths[1]), "seconds": round(seconds, 1)}
        print(json.dumps({name: getattr(arguments, name) for name in names} | written), file=arguments.output)
        return 0
    print(f"{count} samples of {dataset.name} by {arguments.sampler}{steps} in {seconds:.1f} s")
    print(f"samples: {paths[0]}\nfigure: {paths[1]}")
    return 0


def _verify(arguments):
    from probdiff.cli.verification import format_table, verify

    results = verify(progress=True)
    print(json.dumps(results) if arguments.json else format_table(results), file=arguments.output)
    return 0 if results["holds"] else 1


def _check_sample(arguments):
    import inspect

    from probdiff.samplers import SAMPLERS

    if arguments.sampler not in SAMPLERS:
        raise ValueError(f"--sampler: Expected one of {', '.join(SAMPLERS)}; got {arguments.sampler}")
    for name, lowest in (("num_samples", 1), ("steps", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and not lowest <= value < 2**32:
            raise ValueError(f"--{name.replace('_', '-')}: Expected an integer of at least {lowest}; got {value}")
    if arguments.steps is not None and "steps" not in inspect.signature(SAMPLERS[arguments.sampler]).parameters:
        raise ValueError(f"--steps: Expected none for {arguments.sampler}, which takes all steps; got {arguments.steps}")


def _check_compare(arguments, several, names):
    from probdiff.diagnostics.compare_estimators import check_names

    draws, lowest = arguments.num_draws, 1 if several else 2
    if draws is not None and draws < lowest:
        raise ValueError(f"--num-draws: Expected an integer of at least {lowest}; got {draws}")
    if several and names is not None:
        raise ValueError(f"--estimators: Expected one run; got {len(arguments.runs)}, which are compared as models")
    if len({Path(run).resolve() for run in arguments.runs}) < len(arguments.runs):
        raise ValueError(f"RUN: Expected different runs; got {' '.join(arguments.runs)}")
    if names is not None:
        check_names(names)


def _check_same_data(runs, datasets):
    import numpy as np

    for run, dataset in zip(runs, datasets):
        if not np.array_equal(dataset.test, datasets[0].test):
            expected, got = (f"{r.config['data']}, seed {r.config.get('seed', 0)}" for r in (runs[0], run))
            raise ValueError(f"{run.path}: Expected the test data of {runs[0].path} ({expected}); got other data ({got})")
