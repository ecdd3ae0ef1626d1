"""``probdiff posterior``: the posterior of x given an observation, under a fitted model as the prior, with its evidence."""

import argparse
import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Real

from probdiff._checks import require
from probdiff.cli.common import check_devices, read_contexts, usage
from probdiff.datasets import Dataset
from probdiff.datasets.files import read_rows
from probdiff.diagnostics.plots import plot_samples
from probdiff.inference import AbstractObservation, Inpainting, LinearGaussian, Posterior, smc
from probdiff.storage.files import write_bytes
from probdiff.storage.run import next_free, open_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINEAR = {"matrix", "y", "scale"}
IMAGES = 16  # images in a figure
EXPECTED = "a .npz file with matrix, y and scale, or a .npy, .npz or .csv file of one datum with NaN where nothing is known"


def run(arguments: argparse.Namespace) -> int:
    """Condition the model of a run on an observation; returns the exit code."""
    with usage():
        folder = open_run(arguments.run)
        diffusion, dataset = folder.diffusion, folder.data
        observation = read_observation(Path(arguments.observe), dataset)
        context = _context(dataset, arguments.context)
        devices = check_devices(arguments.devices)
    start = time.monotonic()
    with usage():
        posterior = smc(
            diffusion,
            observation,
            key=jax.random.key(arguments.seed),
            num_particles=arguments.particles,
            twist=arguments.twist,
            context=context,
            num_runs=arguments.runs,
            devices=devices,
            progress=True,
        )
    seconds = time.monotonic() - start
    path = next_free("posterior", folder.path / "posteriors", ".npz")
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(value) for name, value in posterior._asdict().items()})
    write_bytes(path, buffer.getvalue())
    title = f"{dataset.name} given {Path(arguments.observe).name}, N = {diffusion.schedule.num_steps}"
    _figure(posterior, observation, dataset, title).savefig(path.with_suffix(".png"))
    error = None if arguments.runs == 1 else posterior.log_evidence_error
    if arguments.json:
        asked = {name: getattr(arguments, name) for name in ("run", "observe", "particles", "runs", "twist", "seed", "context")}
        found = {"log_evidence": posterior.log_evidence, "log_evidence_error": error, "ess": posterior.ess.tolist()}
        files = {"posterior": str(path), "figure": str(path.with_suffix(".png")), "seconds": round(seconds, 1)}
        print(json.dumps(asked | found | files), file=arguments.output)
        return 0
    print(f"{posterior}\nin {seconds:.1f} s", file=arguments.output)
    print(f"posterior: {path}\nfigure: {path.with_suffix('.png')}", file=arguments.output)
    return 0


def read_observation(path: Path, dataset: Dataset) -> AbstractObservation:
    """The observation in a file: a linear one, or a datum with some missing values.

    Raises:
        ValueError, OSError: If the file holds neither.
    """
    require(path.exists(), "--observe", EXPECTED, f"{path}, which does not exist", FileNotFoundError)
    require(path.suffix in (".npz", ".npy", ".csv"), "--observe", EXPECTED, path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if LINEAR <= set(arrays):
            return LinearGaussian(arrays["matrix"], arrays["y"], arrays["scale"])
        require(len(arrays) == 1, "--observe", EXPECTED, f"arrays {', '.join(sorted(arrays))}")
        (x,) = arrays.values()
    else:
        rows = read_rows(path)
        x = rows if isinstance(rows, np.ndarray) else _columns_of(rows, dataset)
    try:
        known = np.asarray(x, float).reshape(-1)
    except (TypeError, ValueError):
        raise ValueError(f"--observe: Expected numbers, and NaN or nothing where nothing is known; got text in {path}") from None
    require(known.size == dataset.dim, "--observe", f"{dataset.dim} values, of one datum", f"shape {np.shape(x)}")
    mask, values = ~np.isnan(known), np.nan_to_num(known)
    if dataset.levels is None:
        return Inpainting(mask, values.astype(np.float32))
    require(np.all(values == values.round()), "--observe", "levels, which are integers", values[values != values.round()][:1])
    return Inpainting(mask, values.astype(np.int32))


def _columns_of(rows: Any, dataset: Dataset) -> Any:
    """The columns of x in a frame, by name and in the order of the data; a missing column is not observed."""
    if dataset.columns is None:
        return rows.to_numpy()
    there = [name for name in dataset.columns if name in rows]
    require(there, "--observe", f"some of the columns {', '.join(dataset.columns)}", ", ".join(map(str, rows.columns)))
    return rows.reindex(columns=list(dataset.columns)).to_numpy()


def _context(dataset: Dataset, text: str | None) -> Real[np.ndarray, "1 width"] | None:
    """The one row of a context that a conditional model is given."""
    needed = dataset.test_context is not None
    require(needed == (text is not None), "--context", "the values of one row" if needed else "none, for a model without", text)
    if text is None:
        return None
    covariates = dataset.covariates
    require(covariates is not None, "--context", "data whose covariates are known", None)
    assert covariates is not None
    rows, _ = read_contexts(covariates, text)
    require(len(rows) == 1, "--context", "the values of one row", f"{len(rows)} rows")
    return rows


def _figure(posterior: Posterior, observation: AbstractObservation, dataset: Dataset, title: str) -> "Figure":
    """Images resampled by weight beside the observed pixels, or else the posterior mean; for other data, the first two dimensions of the particles."""
    if dataset.image_shape is None:
        return posterior.plot(title)
    drawn = posterior.resample(jax.random.key(0), IMAGES)
    name, image = "posterior mean", np.asarray(posterior.mean)
    if isinstance(observation, Inpainting):
        name, image = "observed pixels", np.where(observation.mask, observation.values, np.nan)
    return plot_samples(drawn, image[None], dataset.image_shape, title, (name, "samples of the posterior"))
