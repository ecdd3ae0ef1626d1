"""Constants of a module as a hashable value, for its static fields, which JAX does not trace."""

import hashlib
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np


class Static:
    """A tree without JAX arrays, equal to another if structures and leaves are equal.

    NumPy arrays in it keep their float64 and are never traced: as leaves of a module they would become float32 tracers that are treated
    as trainable. Leaves that cannot be hashed are compared by identity.

    Args:
        tree: Any tree of constants: NumPy arrays, numbers, functions.
    """

    def __init__(self, tree: Any) -> None:
        leaves, structure = jax.tree.flatten(tree)
        self.tree = tree
        self._identity = structure, tuple(map(_identity, leaves))
        self._hash = hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Static) and self._identity == other._identity)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Static({type(self.tree).__name__})"


def _identity(leaf: Any) -> Hashable:
    if isinstance(leaf, np.ndarray):
        return leaf.shape, leaf.dtype.str, hashlib.sha256(np.ascontiguousarray(leaf)).digest()
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return type(leaf), leaf
