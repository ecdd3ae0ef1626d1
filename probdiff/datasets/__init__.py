"""Data by name, from a file or from the user's arrays and data frames, split into training, validation and test.

``digits`` are scikit-learn's 8×8 images, ``fashion-mnist`` the 28×28 images of a Debian package; the two-dimensional sets have a known density. In the
user's own data, floats are continuous and integers are levels of a grid; if the columns of a table are of several kinds, the kind of each is found from
its values.
Imports likelihoods, networks and oracles.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from probdiff._checks import Whole, require
from probdiff._frames import is_frame
from probdiff.datasets.covariates import Covariate, Covariates
from probdiff.datasets.dataset import Dataset
from probdiff.datasets.files import read_file
from probdiff.datasets.images import load_fashion_mnist, load_folder
from probdiff.datasets.planar import PLANAR
from probdiff.datasets.tables import Columns, listed, read_table, split_table

__all__ = ["NAMES", "PLANAR", "Covariate", "Covariates", "Dataset", "load", "split"]

SIZES = {"train": 100_000, "validation": 5_000, "test": 20_000}
FASHION_MNIST = {"fashion-mnist": None, "fashion-mnist-16": 16}
NAMES = ("digits", *FASHION_MNIST, *PLANAR)
SUFFIXES = (".npy", ".npz", ".csv", ".idx", "ubyte", "ubyte.gz")


def load(name: Any, seed: Whole = 0, index: str | None = None, context: Columns | None = None) -> Dataset:
    """A data set by name, from a ``.npy``, ``.npz``, ``.csv`` or idx file, from a folder of images like MNIST's, or from a data frame.

    Args:
        name: One of :data:`NAMES`, the path of a file, or a data frame. ``fashion-mnist`` is read from the Debian package ``dataset-fashion-mnist``;
            another folder with the four idx files of MNIST is given by its path.
        seed: Seed of the draws of the two-dimensional sets, and of the shuffle before data are split
            (80 % training, 10 % validation, 10 % test).
        index: Name of the column of a ``.csv`` file or of a data frame that numbers the rows and is left out. A first column of
            the file without a name or named ``index`` whose values differ, or with the values 0, 1, 2, … or 1, 2, 3, …, is recognised.
        context: For a conditional model: the columns of the context, by name or counted from 0, one or a sequence, as for :func:`split`;
            for an ``.npz`` file of two arrays, the name of the array with the context; for the digits, Fashion-MNIST and folders of images, ``"labels"``.

    Raises:
        ValueError: If the name is unknown, or the array is not usable; FileNotFoundError if there is no
            such file; TypeError if a column holds anything but numbers or categories.

    Example:
        >>> import probdiff
        >>> digits = probdiff.datasets.load("digits")
        >>> digits.train.shape, digits.levels
        ((1000, 64), 17)
    """
    if is_frame(name):
        return split(name, seed=seed, index=index, context=context)
    name = str(name)
    if name in ("digits", *FASHION_MNIST) or Path(name).is_dir():
        require(index is None, "index", f"none for {name}", repr(index))
        require(listed(context) in ([], ["labels"]), "context", f"labels, or none, for {name}", repr(context))
        if name == "digits":
            return _digits(context is not None)
        if name in FASHION_MNIST:
            return load_fashion_mnist(FASHION_MNIST[name], context is not None)
        return load_folder(Path(name), Path(name).name, context is not None)
    if name in PLANAR:
        for option, value in (("index", index), ("context", context)):
            require(value is None, option, f"none for {name}", repr(value))
        return _planar(name, int(seed))
    known = f"one of {', '.join(NAMES)}, a folder that is made like MNIST's, or a file ending in {', '.join(SUFFIXES)}"
    require(name.endswith(SUFFIXES), "data", known, repr(name))
    return split_table(read_file(Path(name), index, context), Path(name).stem, seed, name)


def split(x: Any, *, seed: Whole = 0, name: str = "data", index: str | None = None, context: Any = None) -> Dataset:
    """Data of your own, shuffled and split: 80 % training, 10 % validation, 10 % test.

    Args:
        x: An array of shape ``(datum, column)``, integer images of shape ``(datum, height, width)``, or a data frame of pandas, polars or pyarrow. If all
            values are integers, they are levels of one grid, except in named columns that have a negative value, or that are fewer than 16 and of different ranges. In these, and
            in a table of floats, categories and truth values, a column with at most ten distinct values is categorical, other whole numbers are on a grid of their own if they
            span less than 256, and all others are continuous (:meth:`~probdiff.datasets.Dataset.describe`).
        seed: Seed of the shuffle.
        name: Name of the data set.
        index: Name of a column of a data frame to leave out, because it numbers the rows.
        context: For a conditional model: columns of ``x`` by name or counted from 0, which are then not part of the data; or an array of shape ``(datum, covariate)``,
            or a data frame, with a row for each row of ``x``. In its columns, labels, truth values and at most ten distinct whole
            numbers become one dimension for each category (:class:`Covariate`); other numbers are standardised by the training split.

    Returns:
        A :class:`Dataset`; its ``likelihood()`` suits its columns. With a context it has ``train_context``, ``validation_context`` and ``test_context``, for a
        network with ``context_dim=data.context_dim``, and ``covariates``, which encodes other rows in the same way.

    Raises:
        ValueError, TypeError: If the data cannot be used, because a column is constant, holds text, or has a cell that is missing or not
            finite; the message names the column.

    Example:
        >>> import numpy as np, pandas, probdiff
        >>> frame = pandas.DataFrame({"height": np.linspace(1.5, 2.0, 50), "colour": ["red", "blue"] * 25})
        >>> frame["colour"] = frame["colour"].astype("category")
        >>> data = probdiff.datasets.split(frame)
        >>> len(data.train), len(data.validation), len(data.test)
        (40, 5, 5)
    """
    return split_table(read_table(x, name, index, context), name, seed, name)


def _digits(given_labels: bool) -> Dataset:
    # scikit-learn's load_digits without scikit-learn, whose import takes a second.
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, np.int32, delimiter=",")
    images, labels = table[:, :-1], table[:, -1]
    digits = Dataset("digits", images[:1000], images[1000:1350], images[1350:], levels=17, image_shape=(8, 8))
    if not given_labels:
        return digits
    covariates = Covariates((Covariate("label", tuple(map(float, range(10)))),))
    return digits.with_context(covariates, np.split(covariates.encode(labels), [1000, 1350]))


def _planar(name: str, seed: int) -> Dataset:
    rng = np.random.default_rng([seed, *name.encode()])
    sizes = (SIZES[split] for split in ("train", "validation", "test"))
    train, validation, test = (PLANAR[name].sample(rng, size).astype(np.float32) for size in sizes)
    return Dataset(name, train, validation, test, oracle=PLANAR[name].oracle())
