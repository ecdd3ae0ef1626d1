# %% [markdown]
# # Does a fit survive being killed?
#
# A small fit of the digits on the command line is killed (`kill -9`) at random moments and resumed, several times, and then left to
# finish. Its checkpoint and its parameters must equal those of an undisturbed fit bit for bit, and its folder must be readable after
# every kill.

# %%
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import probdiff
from probdiff.storage.checkpoint import read_leaves

parser = argparse.ArgumentParser(description="Does a fit survive being killed?")
parser.add_argument("--quick", action="store_true", help="one run, one kill, to see that it runs")
quick = parser.parse_args().quick

RUNS, KILLS = (1, 1) if quick else (10, 5)  # kills of each run
OPTIONS = ["--num-steps", "5", "--batch-size", "32", "--iterations", "600" if quick else "3000"]
COMPARED = ("checkpoint.eqx", "checkpoint.previous.eqx", "parameters.eqx", "schedule.npy", "losses.csv", "validation.csv")

# %% [markdown]
# The processes share a compilation cache, so that kills come during the fit and not only before it.

# %%
folder = Path(tempfile.mkdtemp())
if quick:
    np.save(folder / "few.npy", np.random.default_rng(0).normal(size=(60, 2)))
    OPTIONS += ["--data", str(folder / "few.npy")]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def start(path):
    """Start a fit, or resume the one in the folder."""
    arguments = ["fit", "--out", str(path), *OPTIONS] + ["--resume"] * path.exists()
    return subprocess.Popen(
        [sys.executable, "-m", "probdiff.cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def end(process):
    _, error = process.communicate()
    assert process.returncode == 0, error


def contents(path):
    return {name: (path / name).read_bytes() for name in COMPARED}


def done(path):
    """The number of iterations in the checkpoint; None if there is no checkpoint yet."""
    run = probdiff.open_run(path)
    assert run.untrained.schedule.num_steps == 5
    run.checkpoint.require_intact()
    return read_leaves(run.checkpoint.path)[0]["iterations"] if run.checkpoint.exists() else None


# %%
began = time.monotonic()
end(start(folder / "undisturbed"))
seconds = time.monotonic() - began
expected = contents(folder / "undisturbed")
print(f"An undisturbed run takes {seconds:.1f} s")

rng = random.Random(0)
moments = []
with tqdm(total=RUNS * KILLS, unit="kill") as bar:
    for k in range(RUNS):
        path = folder / f"killed-{k}"
        for _ in range(KILLS):
            process = start(path)
            time.sleep(rng.uniform(0, seconds))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            moments.append(done(path) if path.exists() else "no folder")
            bar.update()
        end(start(path))
        assert contents(path) == expected, f"run {k} differs from the undisturbed one"

# %%
before = sum(m == "no folder" for m in moments), sum(m is None for m in moments)
fits = [m for m in moments if isinstance(m, int)]
print(
    f"{len(moments)} kills: {before[0]} before there was a folder, {before[1]} before the first checkpoint, {len(fits)} after it "
    f"(with {sorted(set(fits))} iterations in the checkpoint)"
)
print(f"All {RUNS} runs ended with the files of the undisturbed one, byte for byte: {', '.join(COMPARED)}")
