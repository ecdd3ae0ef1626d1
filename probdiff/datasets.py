"""Data by name or from a file, split into training, validation and test.

``digits`` are scikit-learn's 8×8 images. The two-dimensional sets are those of FFJORD (Grathwohl et al. 2019,
arXiv:1810.01367), drawn independently, and come with their density: their entropy is computed by quadrature, not
copied. A user's own file is an array of shape ``(datum, dim)``; floats are continuous data, integers are levels of a
grid.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from probdiff._checks import Numbers, require, require_finite
from probdiff._files import MAX_BYTES, read_npy, read_npz
from probdiff.chain.schedules import AbstractSchedule
from probdiff.likelihoods import AbstractLikelihood, DiscretizedNormalLikelihood, NormalLikelihood
from probdiff.networks.base import Network
from probdiff.oracles.distributions import GaussianMixture, LogProb, Points, UniformBoxes

SIZES = {"train": 100_000, "validation": 5_000, "test": 20_000}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Data in three splits, with what is known about them.

    Attributes:
        name: Name of the set, or stem of the file.
        train, validation, test: Arrays of shape ``(datum, dim)``: floats, or integers for data on a grid.
        levels: Number of levels of data on a grid; None for continuous data.
        oracle: The true distribution (see :mod:`probdiff.oracles.distributions`), where it is known; otherwise None.
        image_shape: Shape of a datum seen as an image; None if it is not one.
    """

    name: str
    train: Real[np.ndarray, "train dim"]
    validation: Real[np.ndarray, "validation dim"]
    test: Real[np.ndarray, "test dim"]
    levels: int | None = None
    oracle: GaussianMixture | UniformBoxes | None = None
    image_shape: tuple[int, int] | None = None

    @property
    def dim(self) -> int:
        """Number of dimensions of a datum."""
        return self.train.shape[1]

    def likelihood(self) -> DiscretizedNormalLikelihood | NormalLikelihood:
        """The likelihood for these data: discretised for a grid, else standardised by the training split."""
        if self.levels is not None:
            return DiscretizedNormalLikelihood(self.levels)
        return NormalLikelihood.standardized(self.train)

    @property
    def log_prob(self) -> Callable[[Points], LogProb] | None:
        """True log-density in nats of points of shape ``(*batch, dim)``, a function; None where it is not known."""
        return None if self.oracle is None else self.oracle.log_prob

    def entropy(self) -> tuple[float, float]:
        """Differential entropy in nats, and an estimate of its numerical error.

        Raises:
            ValueError: If the density is not known.
        """
        return self._known().entropy()

    def exact_network(self, schedule: AbstractSchedule, likelihood: AbstractLikelihood) -> Network:
        r"""The best ε-network there is for these data, :math:`E[\epsilon | z_n]`: nothing is trained.

        Args:
            schedule: The noise schedule.
            likelihood: The NormalLikelihood that encodes the data for the chain.

        Returns:
            An ε-network, ``network(z, n) -> eps_hat`` with ``z`` of shape ``(*batch, dim)``.

        Raises:
            ValueError: If the density is not known; TypeError for another likelihood.
        """
        oracle = self._known()
        kind = type(likelihood).__name__
        require(isinstance(likelihood, NormalLikelihood), "likelihood", "a NormalLikelihood", kind, TypeError)
        assert isinstance(likelihood, NormalLikelihood)
        return oracle.standardized(likelihood.loc, likelihood.scale).network(schedule)

    def _known(self) -> GaussianMixture | UniformBoxes:
        require(self.oracle is not None, "dataset", "a data set with a known density", self.name)
        assert self.oracle is not None
        return self.oracle
    def independent_levels(self) -> tuple[float, float]:
        """Mean test log-likelihood in nats, and its standard error, when every dimension is coded by itself.

        One categorical distribution per dimension, fitted to the training split with half a count added to each
        level (Jeffreys' prior).

        Raises:
            ValueError: If the data are not on a grid.
        """
        require(self.levels is not None, "dataset", "data on a grid", self.name)
        assert self.levels is not None
        counts = 0.5 + np.array([np.bincount(column, minlength=self.levels) for column in self.train.T])
        log_p = np.log(counts / counts.sum(1, keepdims=True))
        per_datum = log_p[np.arange(self.dim), self.test].sum(1)
        return per_datum.mean(), per_datum.std(ddof=1) / np.sqrt(len(per_datum))


def load(name: str | Path, seed: int = 0) -> Dataset:
    """A data set by name, or from a ``.npy``, ``.npz`` or ``.csv`` file.

    Args:
        name: One of :data:`NAMES`, or the path of a file.
        seed: Seed of the draws of the two-dimensional sets, and of the shuffle before a file is split
            (80 % training, 10 % validation, 10 % test).

    Raises:
        ValueError: If the name is unknown, or the file's array is not usable; FileNotFoundError if there is no
            such file; TypeError if its dtype is neither floating nor integer.
    """
    name = str(name)
    if name == "digits":
        return _digits()
    if name in PLANAR:
        return _planar(name, seed)
    suffix = Path(name).suffix
    require(
        suffix in READERS, "data", f"one of {', '.join(NAMES)}, or a file ending in {', '.join(READERS)}", repr(name)
    )
    return _from_file(Path(name), seed)


def _digits() -> Dataset:
    # scikit-learn's load_digits without scikit-learn, whose import takes a second.
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    images = np.loadtxt(file, np.int32, delimiter=",")[:, :-1]  # the last column is the label
    return Dataset("digits", images[:1000], images[1000:1350], images[1350:], levels=17, image_shape=(8, 8))


# Two-dimensional sets: points from a NumPy generator, and their distribution.


Plane = Float[np.ndarray, "point 2"]
Curve = Callable[[Float[np.ndarray, "point"]], Plane]


@dataclasses.dataclass(frozen=True)
class _Curves:
    """Points on curves c(t), t uniform on [0, 1], one of the curves at random, plus isotropic noise.

    A constant c is a point. With t on the nodes of Gauss-Legendre quadrature this is a mixture of Gaussians; beside
    their own noise, the nodes are so dense that its ε-network is exact to 1e-10 where the data are.
    """

    curves: tuple[Curve, ...]
    sd: float
    nodes: int

    def sample(self, rng: np.random.Generator, size: int) -> Plane:
        t, which = rng.random(size), rng.integers(len(self.curves), size=size)
        points = np.stack([curve(t) for curve in self.curves])[which, np.arange(size)]
        return points + self.sd * rng.standard_normal((size, 2))

    def oracle(self) -> GaussianMixture:
        node, weight = np.polynomial.legendre.leggauss(self.nodes)
        means = np.concatenate([curve((node + 1) / 2) for curve in self.curves])
        weights = np.tile(weight / 2, len(self.curves)) / len(self.curves)
        return GaussianMixture(weights, means, self.sd**2 * np.eye(2))


def _plane(x: Float[np.ndarray, "*#point"], y: Float[np.ndarray, "*#point"] | float) -> Plane:
    return np.stack(np.broadcast_arrays(x, y), -1)


def _circle(radius: float) -> Curve:
    return lambda t: radius * _plane(np.cos(2 * np.pi * t), np.sin(2 * np.pi * t))


def _point(angle: float) -> Curve:
    return lambda t: 4 / 1.414 * _plane(np.cos(angle) + 0 * t, np.sin(angle))


def _upper_moon(t: Float[np.ndarray, "point"]) -> Plane:
    return 2 * _plane(np.cos(np.pi * t), np.sin(np.pi * t)) + [-1, -0.2]


def _lower_moon(t: Float[np.ndarray, "point"]) -> Plane:
    return 2 * _plane(1 - np.cos(np.pi * t), 0.5 - np.sin(np.pi * t)) + [-1, -0.2]


def _roll(t: Float[np.ndarray, "point"]) -> Plane:
    angle = 1.5 * np.pi * (1 + 2 * t)
    return angle[..., None] * _plane(np.cos(angle), np.sin(angle)) / 5


class _Checkerboard:
    """Uniform on the eight black squares, of side 2, of a board on [−4, 4]²."""

    def sample(self, rng: np.random.Generator, size: int) -> Plane:
        x = rng.random(size) * 4 - 2
        y = rng.random(size) - 2 * rng.integers(2, size=size) + np.floor(x) % 2
        return 2 * _plane(x, y)

    def oracle(self) -> UniformBoxes:
        lower = [(x, y) for x in (-4, -2, 0, 2) for y in (-4, -2, 0, 2) if (x + y) % 4 == 0]
        return UniformBoxes(lower, np.add(lower, 2))


PLANAR: dict[str, _Curves | _Checkerboard] = {
    "checkerboard": _Checkerboard(),
    "circles": _Curves((_circle(3.0), _circle(1.5)), 0.24, 300),
    "moons": _Curves((_upper_moon, _lower_moon), 0.2, 150),
    "8gaussians": _Curves(tuple(_point(k * np.pi / 4) for k in range(8)), 0.5 / 1.414, 1),
    "swissroll": _Curves((_roll,), 0.2, 400),
}
NAMES = ("digits", *PLANAR)


def _planar(name: str, seed: int) -> Dataset:
    rng = np.random.default_rng([seed, *name.encode()])
    sizes = (SIZES[split] for split in ("train", "validation", "test"))
    train, validation, test = (PLANAR[name].sample(rng, size).astype(np.float32) for size in sizes)
    return Dataset(name, train, validation, test, oracle=PLANAR[name].oracle())


# A user's own file.


def _read_npz(path: Path) -> np.ndarray:
    arrays = read_npz(path)
    require(len(arrays) == 1, str(path), "one array", f"{len(arrays)}: {', '.join(arrays)}")
    (array,) = arrays.values()
    return array


def _read_csv(path: Path) -> Real[np.ndarray, "row column"]:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = file.readline().strip()
    require(first != "", str(path), "rows of numbers", "an empty file or an empty first line")
    header = int(not any(_is_number(cell) for cell in first.split(",")))
    options: dict[str, Any] = {"delimiter": ",", "skiprows": header, "ndmin": 2, "encoding": "utf-8-sig"}
    try:
        return np.loadtxt(path, np.int64, **options)
    except ValueError:
        pass
    try:
        return np.loadtxt(path, np.float64, **options)
    except ValueError as error:
        raise ValueError(f"{path}: Expected a readable .csv file; got: {error}") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


READERS = {".npy": read_npy, ".npz": _read_npz, ".csv": _read_csv}


def _from_file(path: Path, seed: int) -> Dataset:
    require(path.is_file(), "data", "an existing file", f"{path}, which is not there", FileNotFoundError)
    size = path.stat().st_size
    require(size > 0, str(path), "an array", "an empty file")
    require(size <= MAX_BYTES, str(path), f"a file of at most {MAX_BYTES} bytes", f"{size} bytes")
    array = check_array(READERS[path.suffix](path), str(path))
    grid = np.issubdtype(array.dtype, np.integer)
    levels = None
    if grid:
        require(array.min() >= 0, str(path), "integer levels 0, 1, 2, …", f"a negative integer, {array.min()}")
        require(array.max() >= 1, str(path), "integers of at least two levels", "zeros only")
        levels = int(array.max()) + 1
    else:
        constant = np.flatnonzero(np.ptp(array, 0) == 0)
        require(constant.size == 0, str(path), "columns that vary", f"a constant column {constant[:1]}")
        coarse = np.flatnonzero(array.std(0) < 1e3 * np.spacing(np.abs(array).max(0).astype(np.float32)))
        require(
            coarse.size == 0,
            str(path),
            "columns whose spread float32 resolves",
            f"column {coarse[:1]}: subtract its mean",
        )
        require(
            not np.all(array == np.round(array)),
            str(path),
            "floats for continuous data, or an integer dtype for data on a grid",
            "whole numbers stored as floats: data on a grid has no density; save x.astype(int)",
        )
    order = np.random.default_rng(seed).permutation(len(array))
    held_out = max(2, len(array) // 10)
    array = array[order].astype(np.int32 if grid else np.float32)
    train, validation, test = np.split(array, [len(array) - 2 * held_out, len(array) - held_out])
    return Dataset(path.stem, train, validation, test, levels=levels)


def check_array(array: Numbers, name: str = "data") -> Real[np.ndarray, "datum dim"]:
    """The array, if it can be data: finite real numbers of shape ``(datum, dim)``, at least 10 rows.

    Raises:
        ValueError: For a wrong rank, too few rows, NaN or infinity; TypeError for a wrong dtype.
    """
    array = np.asarray(array)
    real = np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
    require(real, name, "floats or integers", f"dtype {array.dtype}", TypeError)
    hint = ""
    if array.ndim > 2:
        hint = "; flatten each datum first: x.reshape(len(x), -1)"
    elif array.ndim < 2:
        hint = "; one number per datum is x.reshape(-1, 1)"
    require(array.ndim == 2, name, "shape (datum, dim)", f"shape {array.shape}{hint}")
    require(len(array) >= 10 and array.shape[1] > 0, name, "at least 10 rows, for three splits", f"shape {array.shape}")
    require_finite(name, array)
    return array
