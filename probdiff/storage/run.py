"""The run folder: the files of a fit, and how they are read. Their layout is defined here only.

    config.json      the options of the fit, and the description of the model
    schedule.npy     the variances beta_n, float64; absent for a learned schedule, which is among the parameters
    data.eqx         the data, if they are not loaded by name, and their context
    checkpoint.eqx   the state of the fit, to resume from; checkpoint.previous.eqx, the one before it
    parameters.eqx   the trained parameters
    losses.csv       the loss of every iteration; validation.csv, the bound on the validation data
    elbo.nc          the terms of the bound on test data, a DataTree
    results.json     the final table
    ledger.json      the decomposition of the gap of the bound, if it was computed
    estimators.nc    draws of every estimator of the bound, if they were compared
    figures/         loss, KL against step, samples
    samples/         samples that were drawn later, an array and a figure each
    posteriors/      posteriors by ``probdiff posterior``, arrays and a figure each

Folders of probdiff 0.1 have ``.npz`` in place of ``.eqx``; they are read, and a resumed fit writes ``.eqx``.
"""

import dataclasses
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np

from probdiff import datasets
from probdiff._checks import Number, require, require_type
from probdiff.chain.learned import LearnedSchedule
from probdiff.chain.mixture import MixtureKernel
from probdiff.chain.schedules import AbstractSchedule, NoiseSchedule
from probdiff.datasets.arrays import MAX_BYTES, read_npy
from probdiff.diagnostics.compare_estimators import EstimatorComparison
from probdiff.diagnostics.datatree import from_datatree, to_datatree
from probdiff.diagnostics.gap import GapDecomposition
from probdiff.diffusion import Diffusion
from probdiff.elbo.terms import ELBOTerms
from probdiff.programs.sites import PARAMS
from probdiff.storage.checkpoint import Checkpoint, load_tree, save_tree
from probdiff.storage.data import load_data, save_data
from probdiff.storage.description import describe, make_likelihood, make_network
from probdiff.storage.files import read_json, replace, write_bytes, write_json
from probdiff.training import Fit

if TYPE_CHECKING:  # imported where they are needed, as the imports are slow
    import xarray as xr
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: Path of the folder.
        like: For a run with a custom network, a Diffusion or a network of the same structure; otherwise None.

    Example:
        >>> import jax, probdiff, tempfile
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> run = probdiff.storage.create_run(tempfile.mkdtemp() + "/mine", diffusion)
        >>> run.save(terms=probdiff.elbo_terms(diffusion, jax.numpy.zeros((3, 2)), key=jax.random.key(1), num_draws=4))
        >>> run.config["model"]["num_steps"], run.terms.elbo.shape
        (5, (4, 3))
    """

    path: Path
    like: Any = None

    @property
    def config(self) -> dict[str, Any]:
        """The options of the fit, a dict; ``config["model"]`` describes the model."""
        return read_json(self.path / "config.json")

    def extend(self, limit: str, value: Number) -> None:
        """Record that the fit continues in another leg, up to a number of ``"iterations"`` or ``"minutes"``; ``config["legs"]`` has the end of each."""
        config = self.config
        legs = [*config.get("legs", [config[limit]]), value]
        write_json(self.path / "config.json", config | {limit: value, "legs": legs})

    @property
    def checkpoint(self) -> Checkpoint:
        """The :class:`Checkpoint` of the fit."""
        return Checkpoint(self.path / "checkpoint.eqx")

    @property
    def data(self) -> datasets.Dataset:
        """The :class:`~probdiff.datasets.Dataset` that was fitted.

        Raises:
            ValueError: If the run does not record its data.
        """
        path, config = self.path / "data.eqx", self.config
        if path.exists():
            return load_data(path)
        got = "a configuration without 'data': probdiff.storage.create_run(…, data=dataset) keeps them"
        require("data" in config, str(self.path), "a run that has or names its data", got)
        return datasets.load(config["data"], config.get("seed", 0), config.get("index"))

    @property
    def untrained(self) -> Diffusion:
        """The Diffusion with its initial parameters."""
        if isinstance(self.like, Diffusion):
            return self.like
        config = self.config
        require("model" in config, str(self.path), "a run folder", "a config.json without 'model'")
        path = self.path / "schedule.npy"
        betas = read_npy(path) if path.exists() or "schedule" not in config["model"] else None
        try:
            return self._described(config, betas)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            got = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.path}: Expected the description of a model in config.json; got {got}") from None

    def _described(self, config: dict[str, Any], betas: np.ndarray | None) -> Diffusion:
        """The model that ``config`` describes; its size is checked before the network is made."""
        model, network = config["model"], self.like
        if betas is None:
            schedule: AbstractSchedule = LearnedSchedule(**model["schedule"])
        else:
            schedule = NoiseSchedule.from_betas(betas)
        if network is None:

            def make() -> Callable[..., Any]:
                return make_network(model["network"], jax.random.key(config.get("seed", 0)))

            leaves = jax.tree.leaves(eqx.filter(eqx.filter_eval_shape(make), lambda leaf: hasattr(leaf, "dtype")))
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            require(size <= MAX_BYTES, str(self.path), f"a network of at most {MAX_BYTES} bytes", size)
            network = make()
        likelihood = make_likelihood(model["likelihood"])
        if "mixture_levels" in model:
            return Diffusion(schedule, network, likelihood, dim=model["dim"], kernel=MixtureKernel(model["mixture_levels"]))
        return Diffusion(schedule, network, likelihood, model["reverse_variance"], dim=model["dim"])

    @property
    def diffusion(self) -> Diffusion:
        """The trained Diffusion.

        Raises:
            FileNotFoundError: If the fit has not ended.
        """
        there = [path for suffix in (".eqx", ".npz") if (path := self.path / f"parameters{suffix}").exists()]
        got = "one without parameters.eqx; go on with probdiff fit --resume"
        require(there, str(self.path), "a finished run", got, FileNotFoundError)
        diffusion = self.untrained
        own = diffusion.trainable()
        return diffusion.bind({PARAMS: load_tree(there[0], own, wider=True)[0]} if jax.tree.leaves(own) else {})

    @property
    def best_so_far(self) -> Diffusion:
        """The Diffusion with the best validation bound so far, while its fit continues in this process or another.

        Raises:
            FileNotFoundError: If the fit has no checkpoint, or had no validation yet.
        """
        diffusion = self.untrained
        best = self.checkpoint.load_best(diffusion.trainable())
        got = "no checkpoint, or one from before the first validation"
        require(best is not None, str(self.path), "a checkpoint of a fit with validation data", got, FileNotFoundError)
        return diffusion.bind({PARAMS: best})

    @property
    def losses(self) -> np.ndarray:
        """Negative bound of each iteration's minibatch, nats per datum, shape ``(iteration,)``."""
        return self._table("losses.csv")[:, 1]

    @property
    def validation(self) -> np.ndarray:
        """Rows of (iteration, bound on the validation data in nats per datum)."""
        return self._table("validation.csv")

    @property
    def terms(self) -> ELBOTerms:
        """The :class:`~probdiff.elbo.ELBOTerms` of the test data in ``elbo.nc``."""
        return from_datatree(self.datatree)

    @property
    def datatree(self) -> "xr.DataTree":
        """The DataTree in ``elbo.nc``, in the present layout of :func:`~probdiff.to_datatree`.

        Raises:
            FileNotFoundError: If the terms were not saved; ValueError if the file is damaged.
        """
        import h5py
        import xarray as xr

        path, got = self.path / "elbo.nc", "one without elbo.nc: run.save(terms=probdiff.elbo_terms(…)) writes it"
        require(path.exists(), str(self.path), "a run with the terms of the bound", got, FileNotFoundError)
        try:
            h5py.File(path, "r").close()  # checked first, as h5netcdf raises a second error when it is deleted
            with xr.open_datatree(path, engine="h5netcdf") as tree:
                size = sum(node.to_dataset().nbytes for node in tree.subtree)
                require(size <= MAX_BYTES, "size", f"at most {MAX_BYTES} bytes of arrays", size)
                tree = tree.load()
                return tree if "per_step" in tree else to_datatree(from_datatree(tree))  # of versions before 0.2
        except Exception as error:  # HDF5 raises many kinds of errors for a damaged file
            raise ValueError(f"{path}: Expected an intact netCDF file; got: {error}") from None

    @property
    def results(self) -> dict[str, Any]:
        """The final table, a dict.

        Raises:
            FileNotFoundError: If the fit has not ended.
        """
        path, got = self.path / "results.json", "one without results.json; go on with probdiff fit --resume, or in Python: run.save(terms=probdiff.elbo_terms(…))"
        require(path.exists(), str(self.path), "a finished run", got, FileNotFoundError)
        return read_json(path)

    @property
    def has_terms_only(self) -> bool:
        """Whether the run has the terms of the bound but no final table, as after ``save`` in Python."""
        return (self.path / "elbo.nc").exists() and not (self.path / "results.json").exists()

    @property
    def ledger(self) -> GapDecomposition | None:
        """The :class:`~probdiff.diagnostics.GapDecomposition` that was saved; None if there is none."""
        path = self.path / "ledger.json"
        return GapDecomposition.from_dict(read_json(path)) if path.exists() else None

    @property
    def figures(self) -> Path:
        """The folder of the figures; it is made when first asked for."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def save(self, fit: Fit | None = None, terms: ELBOTerms | None = None, results: dict[str, Any] | None = None) -> None:
        """Write the given parts: a :class:`~probdiff.training.Fit`, :class:`~probdiff.elbo.ELBOTerms`, a dict of results."""
        if fit is not None:
            save_tree(self.path / "parameters.eqx", fit.params[PARAMS], iterations=len(fit.losses))
            losses = np.column_stack([np.arange(1, len(fit.losses) + 1), fit.losses])
            for name, table, unit in (("losses", losses, "negative_bound_nats"), ("validation", fit.validation, "bound_nats")):
                replace(self.path / f"{name}.csv", _csv_writer(table, f"iteration,{unit}"))
        if terms is not None:
            replace(self.path / "elbo.nc", lambda path: to_datatree(terms).to_netcdf(path, engine="h5netcdf"))
        if results is not None:
            write_json(self.path / "results.json", results)

    def save_ledger(self, ledger: GapDecomposition) -> Path:
        """Write a :class:`~probdiff.diagnostics.GapDecomposition`, numbers and figure; returns the path of the figure."""
        write_json(self.path / "ledger.json", ledger.to_dict())
        path = self.figures / "ledger.png"
        ledger.plot(f"N = {len(ledger.log_snr)}, {ledger.num_items} data").savefig(path)
        return path

    def save_comparison(self, comparison: EstimatorComparison) -> Path:
        """Write an :class:`~probdiff.diagnostics.compare_estimators.EstimatorComparison`, draws and figure; returns the path of the figure."""
        tree = comparison.to_datatree()
        replace(self.path / "estimators.nc", lambda path: tree.to_netcdf(path, engine="h5netcdf"))
        path = self.figures / "estimators.png"
        comparison.plot().savefig(path)
        return path

    def new_samples(self, sampler: str, out: str | Path | None = None) -> tuple[Path, Path]:
        """The paths for new samples and for their figure, in one folder, which is made.

        Args:
            sampler: Name of the sampler, for the name of the file.
            out: Path of the file, ending in ``.npy`` or, with the names and labels of the columns, in ``.csv``; the next free path in the run if
                not given, ``.csv`` if the columns have names.

        Raises:
            ValueError: If ``out`` has another ending; FileExistsError if one of the two files exists.
        """
        suffix = ".npy" if self.data.columns is None else ".csv"
        path = next_free(sampler, self.path / "samples", ".png").with_suffix(suffix) if out is None else Path(out)
        require(path.suffix in (".npy", ".csv"), "out", "a file ending in .npy or .csv", str(path))
        paths = path, path.with_suffix(".png")
        for each in paths:
            require(not each.exists(), "out", "a new file", f"{each}, which exists", FileExistsError)
        path.parent.mkdir(parents=True, exist_ok=True)
        return paths

    def save_samples(
        self, paths: tuple[Path, Path], samples: np.ndarray, figure: "Figure", context: np.ndarray | None = None
    ) -> None:
        """Write samples and their figure to the paths from :meth:`new_samples`; a ``.csv`` file also has the context of each sample."""
        if paths[0].suffix == ".csv":
            write_bytes(paths[0], self.data.to_frame(samples, context).to_csv(index=False).encode())
        else:
            buffer = io.BytesIO()
            np.save(buffer, samples, allow_pickle=False)
            write_bytes(paths[0], buffer.getvalue())
        figure.savefig(paths[1])

    def _table(self, name: str) -> np.ndarray:
        return np.loadtxt(self.path / name, delimiter=",", skiprows=1, ndmin=2).reshape(-1, 2)


def _csv_writer(table: np.ndarray, header: str) -> Callable[[Path], None]:
    return lambda path: np.savetxt(path, table, ["%d", "%.9g"], ",", header=header, comments="")


def create_run(
    path: str | Path, diffusion: Diffusion, config: dict[str, Any] | None = None, data: datasets.Dataset | None = None
) -> Run:
    """Make a run folder for a model that is to be fitted.

    Args:
        path: Path of a folder that does not exist yet, or is empty.
        diffusion: The Diffusion.
        config: Anything else to record, a dict for JSON; from ``data`` and ``seed`` :attr:`Run.data` loads data by name.
        data: A :class:`~probdiff.datasets.Dataset`, such as :func:`probdiff.datasets.split` makes, to store in the run: the commands need
            its test data. The context is stored for a conditional model only, and a known density for the sets of :data:`probdiff.datasets.PLANAR` only.

    Raises:
        FileExistsError: If the folder exists and is not empty; ValueError or TypeError if the data are not a Dataset, or do not suit the model.

    Example:
        >>> import jax, probdiff, tempfile
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> run = probdiff.storage.create_run(tempfile.mkdtemp() + "/mine", diffusion, {"note": "a first try"})
        >>> sorted(path.name for path in run.path.iterdir())
        ['config.json', 'schedule.npy']
    """
    require_type("diffusion", diffusion, Diffusion)
    if data is not None:
        require_type("data", data, datasets.Dataset)
        data = data if diffusion.is_conditional else data.without_context()
        check_splits(diffusion, data)
    path = Path(path)
    check_free(path)
    # Made under another name, so that an incomplete run never exists.
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if isinstance(diffusion.schedule, NoiseSchedule):
            np.save(temporary / "schedule.npy", diffusion.schedule.beta)
        if data is not None:
            save_data(temporary / "data.eqx", data)
        write_json(temporary / "config.json", {**(config or {}), "model": describe(diffusion)})
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Run(path)


def check_splits(diffusion: Diffusion, data: datasets.Dataset) -> None:
    """Refuse data that do not suit a model, in any of the splits, with their context."""
    for split, context in (
        (data.train, data.train_context),
        (data.validation, data.validation_context),
        (data.test, data.test_context),
    ):
        diffusion.given(context).check_data(split)


def check_free(path: str | Path) -> None:
    """Refuse a path that is not free: a file, or a folder that is not empty."""
    taken = Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir()))
    require(not taken, "out", "a new folder (or --resume, to go on with a run)", f"{path}, which exists", FileExistsError)


def open_run(path: str | Path, like: Any = None) -> Run:
    """Open a run folder.

    Args:
        path: Path of the folder.
        like: For a run with a custom network: an untrained Diffusion, or network, of the same structure.

    Returns:
        A :class:`Run`, with ``.diffusion``, ``.config``, ``.data`` and ``.terms``.

    Raises:
        FileNotFoundError: If there is no run in that folder.

    Example:
        >>> import jax, probdiff, tempfile
        >>> folder = tempfile.mkdtemp() + "/mine"
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> run = probdiff.storage.create_run(folder, diffusion)
        >>> probdiff.open_run(folder).untrained.schedule.num_steps  # .diffusion, after run.save(fit=…)
        5
    """
    path = Path(path)
    require((path / "config.json").is_file(), "run", "a run folder", f"{path}, which has no config.json", FileNotFoundError)
    return Run(path, like)


def next_free(name: str, parent: str | Path = "runs", suffix: str = "") -> Path:
    """The first of ``parent``/``name``-1``suffix``, -2, … that does not exist."""
    k = 1
    while (path := Path(parent) / f"{name}-{k}{suffix}").exists():
        k += 1
    return path
