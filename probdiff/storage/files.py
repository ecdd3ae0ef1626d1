"""Files that are complete or absent.

A file is written under another name, flushed to the disk and renamed; no library that we use does this. Where every bit matters, the file ends
with a SHA-256 checksum of its contents.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probdiff._checks import require

DIGEST = hashlib.sha256().digest_size


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Give ``path`` the contents that ``write(temporary)`` writes: completely, or else the old contents stay."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes, all or none."""
    replace(path, lambda temporary: temporary.write_bytes(content))


def write_checked(path: Path, content: bytes) -> None:
    """Write bytes and their checksum, all or none."""
    write_bytes(path, content + hashlib.sha256(content).digest())


def read_checked(path: Path) -> bytes:
    """The bytes that :func:`write_checked` wrote.

    Raises:
        ValueError: If the checksum does not match; FileNotFoundError if there is no such file.
    """
    content = path.read_bytes()
    whole = hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]
    require(whole, str(path), "an intact file", f"{len(content)} bytes that do not match their checksum")
    return content[:-DIGEST]


def is_intact(path: Path) -> bool:
    """Whether the checksum of a file matches."""
    try:
        read_checked(path)
    except (ValueError, OSError):
        return False
    return True


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document, all or none."""
    write_bytes(path, (json.dumps(document, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, as a dict.

    Raises:
        ValueError: If the file does not hold one; FileNotFoundError if there is none.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: Expected a JSON document; got: {error}") from None
    require(isinstance(document, dict), str(path), "a JSON object", type(document).__name__)
    return document
