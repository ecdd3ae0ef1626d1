# %% [markdown]
# # Can a damaged file do harm?
#
# Data files and the files of a run are damaged at random: bits are flipped; bytes are cut out, doubled or overwritten; values of the
# JSON document are replaced or left out. Reading such a file must end within a bounded time, with a result or with a clean refusal
# (ValueError, TypeError, OSError).

# %%
import argparse
import collections
import json
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import probdiff

parser = argparse.ArgumentParser(description="Can a damaged file do harm?")
parser.add_argument("--quick", action="store_true", help="150 files, to see that it runs")
quick = parser.parse_args().quick

CASES = 150 if quick else 10_000
LONGEST = 20.0  # seconds for one file
REFUSALS = (ValueError, TypeError, OSError)
ODD = [None, True, -1, 0, 1, 2.5, 10**9, 10**30, 1e308, float("nan"), "", "moons", "MLP", "\x00", [], [1], {}, {"name": 1}]

folder = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)

# %% [markdown]
# ## Good files to start from

# %%
floats, levels = rng.normal(size=(30, 3)), rng.integers(0, 5, (30, 3))
np.save(folder / "floats.npy", floats.astype(np.float32))
np.save(folder / "levels.npy", levels)
np.savez(folder / "plain.npz", x=floats)
np.savez_compressed(folder / "packed.npz", x=levels)
np.savetxt(folder / "table.csv", floats, delimiter=",", header="a,b,c", comments="")
np.savetxt(folder / "counts.csv", levels, "%d", delimiter=",")
DATA = ["floats.npy", "levels.npy", "plain.npz", "packed.npz", "table.csv", "counts.csv"]

network = probdiff.MLP(3, key=jax.random.key(0), hidden=8, num_blocks=1)
diffusion = probdiff.Diffusion(probdiff.cosine_schedule(4), network, probdiff.NormalLikelihood.standardized(floats))
run = probdiff.storage.create_run(folder / "run", diffusion, {"data": str(folder / "floats.npy"), "seed": 0})
fit = probdiff.fit(diffusion, floats, iterations=4, batch_size=4, validate_every=2, checkpoint=run.checkpoint, progress=False)
run.save(fit=fit, terms=probdiff.elbo_terms(fit.diffusion, floats, key=jax.random.key(0)), results={"run": "run"})
template = fit.state

READERS = {
    "config.json": lambda run: (run.untrained, run.data, run.config),
    "schedule.npy": lambda run: run.untrained,
    "parameters.eqx": lambda run: run.diffusion,
    "checkpoint.eqx": lambda run: run.checkpoint.load(template),
    "results.json": lambda run: run.results,
    "elbo.nc": lambda run: run.terms,
    "losses.csv": lambda run: run.losses,
}


# %% [markdown]
# ## Ways to damage them


# %%
def spoil_bytes(content):
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        kind, size = rng.integers(5), len(content)
        start = int(rng.integers(size + 1))
        stop = min(size, start + int(rng.integers(1, 40)))
        if kind == 0 and size:
            content[start % size] ^= 1 << rng.integers(8)
        elif kind == 1:
            del content[start:stop]
        elif kind == 2:
            content[start:start] = content[start:stop]
        elif kind == 3:
            content[start:stop] = rng.bytes(stop - start)
        else:
            del content[start:]
    return bytes(content)


def spoil_json(content):
    """The document with one value replaced or left out."""
    document = json.loads(content)
    place = document
    while True:
        key = list(place)[rng.integers(len(place))] if isinstance(place, dict) else int(rng.integers(len(place)))
        inner = place[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            place = inner
            continue
        if isinstance(place, dict) and rng.random() < 0.2:
            del place[key]
        else:
            place[key] = ODD[rng.integers(len(ODD))]
        return json.dumps(document).encode()


def cases():
    """For each case: the name of the good file, the path and content of the damaged one, and a function that reads it."""
    scratch = folder / "scratch"
    shutil.copytree(run.path, scratch)
    spoiled_run = probdiff.open_run(scratch)
    for i in range(CASES):
        if i % 10 < 5:
            name = DATA[rng.integers(len(DATA))]
            path = folder / f"spoiled{Path(name).suffix}"
            yield name, path, spoil_bytes((folder / name).read_bytes()), lambda path=path: probdiff.datasets.load(path)
        else:
            name = list(READERS)[rng.integers(len(READERS))] if i % 10 < 8 else "config.json"
            good = (run.path / name).read_bytes()
            spoil = spoil_json if name == "config.json" and rng.random() < 0.8 else spoil_bytes
            yield name, scratch / name, spoil(good), lambda name=name: READERS[name](spoiled_run)
            (scratch / name).write_bytes(good)


# %%
outcomes, slowest = collections.defaultdict(collections.Counter), 0.0
warnings.simplefilter("ignore")
for name, path, content, read in tqdm(cases(), total=CASES, unit="file"):
    path.write_bytes(content)
    began = time.monotonic()
    try:
        read()
        outcome = "read"
    except REFUSALS as error:
        outcome = "refused"
        assert str(error), f"{name}: a refusal without a message"
    slowest = max(slowest, time.monotonic() - began)
    assert slowest < LONGEST, f"{name}: {slowest:.1f} s"
    outcomes[name][outcome] += 1

# %%
print(f"{CASES} damaged files: each was read or refused, in at most {slowest:.1f} s")
for name, counts in outcomes.items():
    print(f"{name:16}" + ", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items())))
