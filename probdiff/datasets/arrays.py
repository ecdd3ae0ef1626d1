"""Files of NumPy arrays, which are not trusted: they are read without pickle, so that no code is executed."""

from pathlib import Path

import numpy as np

from probdiff._checks import require

MAX_BYTES = 2**32  # limit on arrays in a user's file or in the description of a model


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of any ``.npz`` file by name, compressed or not.

    Raises:
        ValueError: If it is damaged, or holds objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # zipfile, zlib and NumPy each have their own errors for a damaged file
        raise ValueError(f"{path}: Expected an intact .npz file; got: {error}") from None


def read_npy(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file.

    Raises:
        ValueError: If it is damaged, or holds objects.
    """
    try:
        with open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
            require(isinstance(array, np.ndarray) and not file.read(1), "file", "one array", "more")
            return array
    except Exception as error:  # as above
        raise ValueError(f"{path}: Expected an intact .npy file; got: {error}") from None
