"""Files that are there whole or not at all, and that are read without being trusted.

A file is written under another name, flushed to the disk and renamed. Arrays are kept as ``.npz`` with a SHA-256 of all
that comes before it as the last 32 bytes (NumPy and zip do not mind). Nothing that is read is ever executed, and nothing is
allocated that the file does not hold.
"""

import hashlib
import io
import json
import math
import os
import zipfile

import numpy as np

from probdiff._checks import require

MAX_BYTES = 2**32  # of a file that is read, and of what a compressed one grows to
MAX_JSON = 2**20
DIGEST = 32


def replace(path, write):
    """Give ``path`` the contents that ``write(temporary)`` writes: all of them, or what was there before."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path):
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path, content):
    """Write bytes, all or none."""
    replace(path, lambda temporary: temporary.write_bytes(content))


def save_arrays(path, arrays):
    """Write arrays by name, with their checksum. Equal arrays give equal files."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    content = buffer.getvalue()
    write_bytes(path, content + hashlib.sha256(content).digest())


def load_arrays(path):
    """The arrays that :func:`save_arrays` wrote, by name.

    Raises:
        ValueError: If a single bit is not as it was written; FileNotFoundError if there is no such file.
    """
    content = _read(path)
    whole = len(content) > DIGEST and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]
    require(whole, str(path), "an intact file", f"{len(content)} bytes that do not match their checksum")
    return read_npz(path, content[:-DIGEST])


def is_intact(path):
    """Whether :func:`load_arrays` would find every bit as it was written."""
    try:
        load_arrays(path)
    except (ValueError, OSError):
        return False
    return True


def read_npz(path, content=None):
    """The arrays of any ``.npz`` file by name, compressed or not.

    Raises:
        ValueError: If it is damaged, holds something else than arrays of numbers, or would grow beyond ``MAX_BYTES``.
    """
    content = _read(path) if content is None else content
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            require(size <= MAX_BYTES, "size", f"at most {MAX_BYTES} bytes of arrays", size)
            return {
                member.filename.removesuffix(".npy"): _read_array(io.BytesIO(archive.read(member)), member.file_size)
                for member in members
            }
    except Exception as error:  # zipfile, zlib and NumPy each have their own errors for a damaged file
        raise ValueError(f"{path}: Expected an intact .npz file; got: {error}") from None


def read_npy(path):
    """The array of a ``.npy`` file.

    Raises:
        ValueError: If it is damaged or holds something else than an array of numbers.
    """
    content = _read(path)
    try:
        return _read_array(io.BytesIO(content), len(content))
    except Exception as error:  # as above
        raise ValueError(f"{path}: Expected an intact .npy file; got: {error}") from None


def _read_array(file, size):
    """An array in NumPy's format, of ``size`` bytes with its header."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    require(version in readers, "array", "format version 1.0 or 2.0", version)
    shape, _, dtype = readers[version](file)
    require(not dtype.hasobject, "array", "numbers", f"dtype {dtype}, which could execute what it holds")
    expected = math.prod(shape) * dtype.itemsize
    require(
        expected == size - file.tell() and min(shape, default=0) >= 0,
        "array",
        f"{expected} bytes, for {dtype} of shape {shape}",
        size - file.tell(),
    )
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _read(path, largest=MAX_BYTES):
    size = os.stat(path).st_size
    require(size <= largest, str(path), f"a file of at most {largest} bytes", f"{size} bytes")
    with open(path, "rb") as file:
        return file.read(largest)


def write_json(path, document):
    """Write a JSON document, all or none."""
    write_bytes(path, (json.dumps(document, indent=2) + "\n").encode())


def read_json(path):
    """A JSON object, as a dict.

    Raises:
        ValueError: If the file does not hold one; FileNotFoundError if there is none.
    """
    try:
        document = json.loads(_read(path, MAX_JSON).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: Expected a JSON document; got: {error}") from None
    require(isinstance(document, dict), str(path), "a JSON object", type(document).__name__)
    return document
