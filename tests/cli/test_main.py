"""The command line as a whole: signals, standard output, what is compiled."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from cli_runs import small_run
from conftest import release_but

import probdiff
from probdiff import cli
from probdiff.cli import verify as verify_command
from probdiff.storage.checkpoint import read_leaves

pytestmark = pytest.mark.xdist_group("cli")  # its tests share what is costly to make


def test_what_is_compiled_is_kept_for_the_next_run(monkeypatch, tmp_path):
    """In the user's cache folder, unless the user says otherwise; JAX has read its environment before."""
    option = "jax_compilation_cache_dir"
    before = getattr(jax.config, option)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        cli._keep_what_is_compiled()
        assert getattr(jax.config, option) == before == os.environ[option.upper()]
        monkeypatch.delenv(option.upper())
        cli._keep_what_is_compiled()
        assert getattr(jax.config, option) == str(tmp_path / "probdiff")
    finally:
        jax.config.update(option, before)


SIGNALS = [("probdiff", signal.SIGINT), ("probdiff.cli", signal.SIGTERM)]


def start(module, *arguments, kind=signal.SIGINT, **keywords):
    """The command line as a process that hears a signal, also in the background, where a shell ignores some."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(kind, signal.SIG_DFL),
        **keywords,
    )


@pytest.mark.long
@pytest.mark.parametrize("module, kind", release_but(SIGNALS[:1], SIGNALS))
def test_ctrl_c_leaves_a_run_to_go_on_with(module, kind, tmp_path):
    options = ["--num-steps", "5", "--batch-size", "64", "--iterations", "3000", "--out", tmp_path / "a"]
    process = start(module, "fit", "--data", "moons", *options, kind=kind)
    while not (tmp_path / "a" / "checkpoint.eqx").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(kind)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.strip().splitlines()[-1].endswith("--resume")
    # That it goes on bit for bit is tested with the fit, and by analyses/crash.py.
    about, leaves = read_leaves(tmp_path / "a" / "checkpoint.eqx")
    assert 500 <= about["iterations"] == len(leaves[-2]) < 3000 and np.isfinite(leaves[-2]).all()


@pytest.mark.parametrize("module, kind", [("probdiff.cli", signal.SIGINT), ("probdiff", signal.SIGTERM)])
def test_ctrl_c_ends_the_imports_in_one_line(module, kind, tmp_path):
    """Of a module in C that is being imported, KeyboardInterrupt makes an ImportError: here, one in the place of JAX."""
    (tmp_path / "jax.py").write_text(
        "import sys, time\n"
        "print('importing', file=sys.stderr, flush=True)\n"
        "try:\n"
        "    time.sleep(60)\n"
        "except BaseException:\n"
        "    raise ImportError('Encountered an error while initializing the extension.')\n"
    )
    paths = [str(tmp_path), str(Path(cli.__file__).parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = start(module, "inspect", "run", kind=kind, env=environment, cwd=tmp_path)
    assert process.stderr.readline() == "importing\n"
    process.send_signal(kind)
    out, error = process.communicate(timeout=50)
    assert process.returncode == 130 and error == "\nprobdiff: interrupted\n" and out == ""


class Callback:
    """Is interrupted as it is deleted, where Python ignores every exception."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)


@pytest.fixture
def ctrl_c_is_heard():
    """SIGINT as in a terminal: a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before or signal.SIG_DFL)


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_in_a_callback_is_not_lost(patched, capsys):
    """JAX has a callback at each garbage collection, which is where a signal is heard that came in compiled code."""

    def verify(progress):
        callback = Callback()
        del callback
        for _ in range(2000):
            time.sleep(0.01)  # a longer one goes on to its end

    patched(verify_command.verify, verify)
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook]
    assert cli.main(["verify"]) == 130
    assert capsys.readouterr().err == "\nprobdiff: interrupted\n"
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook] == before


def test_an_interrupt_that_is_ignored_stays_so(patched):
    """As a shell has it for its jobs in the background."""

    def verify(progress):
        signal.raise_signal(signal.SIGINT)
        return {"holds": False, "checks": [], "device": "", "jax": "", "numpyro": "", "seconds": 0}

    patched(verify_command.verify, verify)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli.main(["verify"]) == 1
    finally:
        signal.signal(signal.SIGINT, before)


def test_standard_output_is_the_document_alone_whatever_a_library_prints(capfd, patched):
    """In Python, and past it by the file descriptor, as libraries in C do."""

    def reopened(*arguments):
        print("from Python")
        os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks\n")
        return right(*arguments)

    path, right = small_run()[0], probdiff.open_run
    patched(right, reopened)
    assert cli.main(["inspect", str(path), "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["data"] == "digits" and captured.out.count("\n") == 1
    assert "[Gloo]" in captured.err and "from Python" in captured.err
    assert cli.main(["inspect", str(path)]) == 0
    assert "[Gloo]" in capfd.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["fit", "--steps", "3"], "unrecognized arguments: --steps 3"),
    (["fit", "--num-steps", "many"], "--num-steps: Expected an integer of at least 1; got many"),
    (["fit", "--num-steps"], "--num-steps: expected one argument"),
    (["compare", "run", "--num-draws", "1.5"], "--num-draws: invalid int value: '1.5'"),
    (["train"], "COMMAND: invalid choice: 'train' (choose from"),
    ([], "the following arguments are required: COMMAND"),
])  # fmt: skip
def test_unknown_options(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"probdiff: error: {message}") and captured.err.count("\n") == 1 and captured.out == ""
