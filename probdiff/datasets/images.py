"""Images: idx files, the format of MNIST and similar data sets, and Fashion-MNIST."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Integer, Real, UInt8

from probdiff._checks import require
from probdiff.datasets.arrays import MAX_BYTES
from probdiff.datasets.covariates import Covariate, Covariates
from probdiff.datasets.dataset import Dataset

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
HOW_TO_GET_IT = "its four files: apt-get install dataset-fashion-mnist, or give the folder that has them in its place"
LEVELS = 256
HELD_OUT = 2_000  # of the training images, for validation; at most a tenth
DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}


def is_idx(path: Path) -> bool:
    """Whether a file is an idx file, by its name: ``….idx``, ``…-ubyte`` or ``….ubyte``, and any of them with ``.gz``."""
    name = path.name.removesuffix(".gz")
    return name.endswith((".idx", "ubyte"))


def read_idx(path: Path) -> Real[np.ndarray, "..."]:
    """The array in an idx file, gzipped or not.

    The format: two zero bytes, one byte for the type, one for the number of axes, four for the length of each axis, and the numbers, with the most significant byte first.
    Source: LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist.

    Raises:
        ValueError: If it is something else, or damaged.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as file:
                content = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: Expected a gzipped idx file; got: {error}") from None
        require(len(content) <= MAX_BYTES, str(path), f"at most {MAX_BYTES} bytes", "more when it is unpacked")
    known = len(content) >= 4 and content[:2] == b"\0\0" and content[2] in DTYPES and content[3] > 0
    require(known, str(path), "an idx file", f"one that begins with {content[:4].hex(' ') or 'nothing'}")
    dtype, num_axes = np.dtype(DTYPES[content[2]]), content[3]
    start = 4 + 4 * num_axes
    require(len(content) >= start, str(path), "the lengths of its axes", f"{len(content)} bytes")
    shape = tuple(np.frombuffer(content, ">u4", num_axes, 4).tolist())
    size = dtype.itemsize * int(np.prod(shape, dtype=object))
    require(len(content) - start == size, str(path), f"{size} bytes of numbers, for the shape {shape}", f"{len(content) - start}")
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def load_folder(folder: Path, name: str, given_labels: bool, size: int | None = None) -> Dataset:
    """The images of a folder with the four files of MNIST: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of ``t10k``, gzipped or not.

    Args:
        folder: The folder.
        name: Name of the data set.
        given_labels: Whether the labels are the context.
        size: Height and width to bring the images to (:func:`resized`); as they are if not given.

    Returns:
        A :class:`Dataset` of 8-bit images. Validation data are the last of the training images: 2 000, or a tenth of fewer.

    Raises:
        FileNotFoundError: If a file is missing; ValueError if one is damaged, or they do not go together.
    """
    train, test = (_images(_found(folder, FILES[split][0])) for split in ("train", "test"))
    require(train.shape[1:] == test.shape[1:], str(folder), f"test images of shape {train.shape[1:]}, as the others", f"{test.shape[1:]}")
    if size is not None:
        train, test = resized(train, size), resized(test, size)
    shape = train.shape[1], train.shape[2]
    cut = len(train) - min(HELD_OUT, len(train) // 10)
    require(0 < cut < len(train), str(folder), "at least 10 training images", f"{len(train)}")
    flat, flat_test = (images.reshape(len(images), -1) for images in (train, test))
    data = Dataset(name, flat[:cut], flat[cut:], flat_test, levels=LEVELS, image_shape=shape)
    if not given_labels:
        return data
    labels, of_test = (_labels(_found(folder, FILES[split][1]), len(images)) for split, images in (("train", train), ("test", test)))
    covariates = Covariates((Covariate("label", tuple(map(float, np.unique(labels).tolist()))),))
    return data.with_context(covariates, [*np.split(covariates.encode(labels), [cut]), covariates.encode(of_test)])


def load_fashion_mnist(size: int | None, given_labels: bool) -> Dataset:
    """Fashion-MNIST (Xiao et al., 2017, arXiv:1708.07747), 28 × 28, or brought to another size.

    Raises:
        FileNotFoundError: If it is not there; the message says how to get it.
    """
    name = "fashion-mnist" if size is None else f"fashion-mnist-{size}"
    require(FASHION_MNIST.is_dir(), name, HOW_TO_GET_IT, f"no folder {FASHION_MNIST}", FileNotFoundError)
    return load_folder(FASHION_MNIST, name, given_labels, size)


def resized(images: UInt8[np.ndarray, "image height width"], size: int) -> UInt8[np.ndarray, "image size size"]:
    """Smaller images, shape ``(image, size, size)``: padded with zeros to a multiple of the size, and each tile replaced by its rounded mean."""
    factors = [-(-side // size) for side in images.shape[1:]]
    missing = [size * factor - side for factor, side in zip(factors, images.shape[1:])]
    filled = np.pad(images, [(0, 0), *((each // 2, each - each // 2) for each in missing)])
    tiles = filled.reshape(len(images), size, factors[0], size, factors[1])
    return np.round(tiles.mean((2, 4), dtype=np.float32)).astype(np.uint8)


def _found(folder: Path, name: str) -> Path:
    """The path of a file of this name, or with ``.idx`` instead of ``-idx``, gzipped or not."""
    names = [name, name.replace("-idx", ".idx")]
    paths = [folder / f"{each}{end}" for each in names for end in ("", ".gz")]
    path = next((path for path in paths if path.is_file()), None)
    require(path is not None, str(folder), f"the file {name}, or {name}.gz", "a folder without", FileNotFoundError)
    assert path is not None
    return path


def _images(path: Path) -> UInt8[np.ndarray, "image height width"]:
    array = read_idx(path)
    words = f"{array.dtype} of shape {array.shape}"
    require(array.dtype == np.uint8 and array.ndim == 3 and array.size > 0, str(path), "8-bit images, shape (image, height, width)", words)
    return array


def _labels(path: Path, count: int) -> Integer[np.ndarray, "image"]:
    array = read_idx(path)
    words = f"{array.dtype} of shape {array.shape}"
    require(array.dtype.kind in "iu" and array.shape == (count,), str(path), f"{count} labels, one for each image", words)
    return array
