"""The commands ``probdiff fit``, ``probdiff inspect``, ``probdiff audit``, ``probdiff compare``, ``probdiff sample``,
``probdiff posterior`` and ``probdiff verify``.

Exit codes: 0, success; 1, the fit or a check failed; 2, an argument or a file was not usable (the message is one line); 130, interrupted.

Each command is a module with a function ``run(arguments)``, imported when the command is known: this module needs only the
standard library, so that ``--help`` is quick and Ctrl-C works from the start. argparse checks each option by itself; the command checks
conditions on several options or on files.
"""

import _thread
import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from probdiff import __version__

TWISTS = ("none", "point", "tweedie")  # the names in probdiff.inference
SAMPLERS = ("ancestral", "ddim", "langevin", "ode")  # the names in probdiff.samplers, whose import needs JAX


class UsageError(Exception):
    """An argument or a file cannot be used: the commands print a message of one line, and end with exit code 2.

    Example:
        >>> from probdiff.cli import UsageError
        >>> print(UsageError("--num-steps: Expected at least 1; got 0"))
        --num-steps: Expected at least 1; got 0
    """


def main(argv: Sequence[str] | None = None) -> int:
    r"""Run a command; returns the exit code.

    Args:
        argv: The words after ``probdiff``; those of the process if not given.

    Example:
        >>> import contextlib, io
        >>> from probdiff.cli import main
        >>> with contextlib.redirect_stderr(io.StringIO()) as said:
        ...     code = main(["fit", "--num-steps", "0"])
        >>> code, said.getvalue()
        (2, 'probdiff: error: --num-steps: Expected an integer of at least 1; got 0\n')
    """
    try:
        with _on_signals(_end_at_once):
            started = time.monotonic()
            arguments = parser().parse_args(argv, argparse.Namespace(started=started))
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            warnings.simplefilter("ignore", DeprecationWarning)  # for warnings that are not from the user's code
            with _document_only() if arguments.json else contextlib.nullcontext(sys.stdout) as arguments.output:
                return _run(arguments)
    except UsageError as error:
        print(f"probdiff: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nprobdiff: interrupted", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    with _on_signals(_end_at_once):
        from probdiff._devices import set_compiler_options  # which needs JAX

        set_compiler_options()
        _keep_what_is_compiled()
        command = importlib.import_module(f"probdiff.cli.{arguments.command}")
    with _on_signals(_interrupt), _no_interrupt_lost():
        return command.run(arguments)


@contextlib.contextmanager
def _on_signals(handler: Callable[..., Any]) -> Iterator[None]:
    """Call ``handler`` on Ctrl-C and SIGTERM; on Ctrl-C only if it is not ignored, as it is in the background of a shell."""
    kinds = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        kinds.append(signal.SIGINT)
    before = [(kind, signal.signal(kind, handler)) for kind in kinds]
    try:
        yield
    finally:
        for kind, old in before:
            signal.signal(kind, old)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Repeat an interrupt that Python ignored.

    Python ignores exceptions in callbacks, and JAX has a callback that is called at every garbage collection.
    """

    ignored, over = threading.Event(), threading.Event()

    def watch() -> None:
        while ignored.wait() and not over.is_set():
            ignored.clear()
            while in_hook():  # an exception in it would be ignored as well
                time.sleep(0.01)
            _thread.interrupt_main(signal.SIGTERM)

    def in_hook() -> bool:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return any(each.f_code is hook.__code__ for each, _ in traceback.walk_stack(frame)) if frame else False

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            ignored.set()
        else:
            before(unraisable)

    threading.Thread(target=watch, daemon=True).start()
    before, sys.unraisablehook = sys.unraisablehook, hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        over.set()
        ignored.set()


def _end_at_once(*_: object) -> None:
    """End the process: during the import of a C extension, a KeyboardInterrupt leads to an ImportError or an abort."""
    os.write(2, b"\nprobdiff: interrupted\n")
    os._exit(130)


def _keep_what_is_compiled() -> None:
    """Let JAX keep compiled programs in the user's cache folder for the next run, unless the user has set a folder."""
    import jax

    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "probdiff")
    # Not by the environment, which JAX has read already.
    for option, value in {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0}.items():
        if option.upper() not in os.environ:
            jax.config.update(option, value)


def _warn(message: object, *_: object, **__: object) -> None:
    from tqdm import tqdm

    # On a new line, as a progress bar may be on this one.
    tqdm.write(f"probdiff: warning: {' '.join(str(message).split())}", file=sys.stderr)


@contextlib.contextmanager
def _document_only() -> Iterator[TextIO]:
    """A stream whose text is all that reaches standard output, at the end.

    All other output, also from C libraries, goes to standard error.
    """
    import ctypes

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


class _Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line, and that accepts no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def parser() -> argparse.ArgumentParser:
    """The parser of all commands.

    Example:
        >>> from probdiff.cli import parser
        >>> parser().parse_args(["fit", "--data", "moons"]).data
        'moons'
    """
    parser = _Parser(prog="probdiff", description="Diffusion models as NumPyro programs.")
    parser.add_argument("--version", action="version", version=f"probdiff {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for add in (_add_fit, _add_inspect, _add_audit, _add_compare, _add_sample, _add_posterior, _add_verify):
        add(commands)
    return parser


def _number(kind: type, is_good: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """The type of a numeric option, with messages of the form of :func:`probdiff._checks.require`."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if is_good(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"Expected {expected}; got {text}")

    return read


_count = _number(int, lambda value: 1 <= value < 2**32, "an integer of at least 1")
_seed = _number(int, lambda value: 0 <= value < 2**32, "an integer of at least 0")  # the largest seed of a JAX key
_rate = _number(float, lambda value: 0 < value < float("inf"), "a positive number")


def _add_fit(commands: "argparse._SubParsersAction[_Parser]") -> None:
    fit = commands.add_parser("fit", help="fit a diffusion model and compute its bound two ways")
    fit.add_argument(
        "--data",
        metavar="NAME|FILE",
        help="digits (default), fashion-mnist, fashion-mnist-16, checkerboard, circles, moons, 8gaussians, swissroll; a .npy, .npz, .csv or idx file of shape "
        "(datum, column) or of images; or a folder with the four files of MNIST",
    )
    fit.add_argument("--index", metavar="COLUMN", help="column of the .csv file that numbers the rows, to leave out")
    columns = "columns of the context, by name or counted from 0, such as age,sex; for a .npz file the name of an array; for digits and folders of images: labels"
    fit.add_argument("--context", metavar="COLUMNS", help=columns)
    fit.add_argument("--out", metavar="DIR", help="run folder (default: the next free runs/NAME-k)")
    fit.add_argument("--num-steps", type=_count, metavar="N", help="steps of the chain")
    fit.add_argument("--iterations", type=_count, metavar="K", help="SVI updates")
    fit.add_argument("--minutes", type=_rate, metavar="M", help="time for the fit, in the place of --iterations")
    fit.add_argument("--batch-size", type=_count, metavar="B", help="data per update")
    fit.add_argument("--learning-rate", type=_rate, metavar="R", help="peak learning rate of Adam")
    fit.add_argument("--seed", type=_seed, metavar="S", help="seed of everything random (default 0)")
    fit.add_argument("--resume", action="store_true", help="continue the run in --out; with more --iterations or --minutes, also after its end")
    _add_devices(fit)
    fit.add_argument("--coordinator", metavar="HOST:PORT", help="with several processes: the address of the first (or: auto)")
    fit.add_argument("--processes", type=int, metavar="P", help="number of processes")
    fit.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    _add_json(fit)


def _add_inspect(commands: "argparse._SubParsersAction[_Parser]") -> None:
    inspect = commands.add_parser("inspect", help="the results of a fitted model, and the terms of its bound by steps")
    inspect.add_argument("run", metavar="RUN", help="run folder")
    inspect.add_argument("--figures", action="store_true", help="draw the figures again, in place of those in RUN")
    known = "decompose the gap of the bound, for data of known density, and store the result in RUN"
    inspect.add_argument("--ledger", action="store_true", help=known)
    _add_json(inspect)


def _add_audit(commands: "argparse._SubParsersAction[_Parser]") -> None:
    audit = commands.add_parser("audit", help="audit a network: its bound both ways, the terms of the bound, and errors in its use")
    audit.add_argument("model", metavar="RUN|FILE.py:NAME", help="run folder; or a script, and the name of a Diffusion in it, with a network of any library")
    audit.add_argument("--data", metavar="NAME|FILE", help="data for the model of a script, as in probdiff fit: their test split is used")
    audit.add_argument("--num-items", type=_count, metavar="K", help="test items (default: 64 for many steps, up to 1024 for few)")
    audit.add_argument("--num-draws", type=_count, default=8, metavar="S", help="draws of the noise for each (default 8)")
    _add_json(audit)


def _add_compare(commands: "argparse._SubParsersAction[_Parser]") -> None:
    compare = commands.add_parser("compare", help="compare all estimators of the bound on one run, or several runs")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="run folder; with several, the models are compared")
    compare.add_argument("--num-draws", type=int, metavar="S", help="draws of each estimator (default: as many as --minutes allow), or of each model (4)")
    compare.add_argument("--num-items", type=int, metavar="K", help="test items of the batch whose bound is estimated (64)")
    compare.add_argument("--minutes", type=_rate, metavar="M", help="approximate duration, compilation included (1)")
    names = "estimators to compare (default: all)"
    compare.add_argument("--estimators", type=lambda text: [name.strip() for name in text.split(",")], metavar="A,B,C", help=names)
    _add_devices(compare)
    _add_json(compare)


def _add_sample(commands: "argparse._SubParsersAction[_Parser]") -> None:
    sample = commands.add_parser("sample", help="draw from a fitted model")
    sample.add_argument("run", metavar="RUN", help="run folder")
    given = "context of a conditional model: 7, or age=0.3,sex=1, for all samples, or a .csv or .npy file with a row for each (default: the test data's)"
    sample.add_argument("--context", metavar="VALUES|FILE", help=given)
    sample.add_argument("--num-samples", type=_count, metavar="K", help="samples to draw (64 images, or 2000 points)")
    sample.add_argument("--sampler", default="ancestral", choices=SAMPLERS, help="the default is ancestral")
    sample.add_argument(
        "--steps",
        type=_count,
        metavar="S",
        help="steps of ddim, noise levels of langevin (default: all N); equal steps of ode (default: adaptive)",
    )
    sample.add_argument("--seed", type=_seed, default=0, metavar="S", help="seed (default 0)")
    sample.add_argument("--out", metavar="FILE", help="a new .npy or .csv file (default: the next free RUN/samples/NAME-k)")
    _add_devices(sample)
    _add_json(sample, "print the options and the paths of the files as one JSON document")


def _add_posterior(commands: "argparse._SubParsersAction[_Parser]") -> None:
    posterior = commands.add_parser("posterior", help="condition a fitted model on an observation: weighted samples, and the evidence")
    posterior.add_argument("run", metavar="RUN", help="run folder")
    observe = "a .npz file with matrix, y and scale, or a .npy, .npz or .csv file of one datum with NaN for missing values"
    posterior.add_argument("--observe", metavar="FILE", required=True, help=observe)
    posterior.add_argument("--particles", type=_count, default=256, metavar="K", help="particles of each run (default 256)")
    posterior.add_argument("--runs", type=_count, default=4, metavar="R", help="independent runs, for a standard error of the evidence (default 4)")
    posterior.add_argument("--twist", choices=TWISTS, default="tweedie", help="approximation of p(y | z_n) that guides the particles (default tweedie)")
    posterior.add_argument("--context", metavar="VALUES|FILE", help="context of a conditional model: 7, or age=0.3,sex=1, or a .csv or .npy file of one row")
    posterior.add_argument("--seed", type=_seed, default=0, metavar="S", help="seed (default 0)")
    _add_devices(posterior)
    _add_json(posterior)


def _add_verify(commands: "argparse._SubParsersAction[_Parser]") -> None:
    verify = commands.add_parser("verify", help="check the mathematics on this machine, in float32 and float64")
    _add_json(verify)


def _add_devices(command: argparse.ArgumentParser) -> None:
    command.add_argument("--devices", type=int, metavar="K", help="devices that share the work (default: one)")


def _add_json(command: argparse.ArgumentParser, words: str = "print the result as one JSON document") -> None:
    command.add_argument("--json", action="store_true", help=words)
