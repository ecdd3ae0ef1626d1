"""The state of a fit as a file: everything that decides its future, whole or not there, and the one before it."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from probdiff._checks import require
from probdiff._files import is_intact, load_arrays, replace, save_arrays


def _is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def leaves_by_name(tree):
    """The leaves of a tree as arrays that ``.npz`` can hold, by name."""
    leaves = jax.tree.leaves(tree)
    return {f"leaf_{i:04}": jax.random.key_data(leaf) if _is_key(leaf) else leaf for i, leaf in enumerate(leaves)}


def restore(tree, arrays, path, wider=False):
    """``tree`` with its leaves taken from ``arrays``, which must have the same shapes and dtypes.

    Args:
        tree: A tree of arrays.
        arrays: The arrays by name, as :func:`leaves_by_name` gives them.
        path: Where they are from, for the message.
        wider: Take arrays of less precision than those of ``tree``, too: no number changes.

    Raises:
        ValueError: If they are those of another model, or were made in another precision.
    """
    expected, structure = jax.tree.flatten(tree)
    found = [arrays[name] for name in sorted(arrays) if name.startswith("leaf_")]
    template = list(leaves_by_name(tree).values())
    fits = len(found) == len(expected) and all(
        a.shape == b.shape and a.dtype.kind == b.dtype.kind for a, b in zip(found, template)
    )
    require(fits, str(path), "the arrays of this model and optimiser", "those of another configuration")
    for a, b in zip(found, template):
        x64 = a.dtype.itemsize > b.dtype.itemsize
        require(
            a.dtype == b.dtype or (wider and not x64),
            str(path),
            f"arrays of {b.dtype}, the precision that JAX is set to",
            f"{a.dtype}: the fit had JAX_ENABLE_X64={int(x64)}; set it so and try again",
        )
    found = [a.astype(b.dtype) for a, b in zip(found, template)]
    leaves = [
        jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else jnp.asarray(new)
        for new, old in zip(found, expected)
    ]
    return jax.tree.unflatten(structure, leaves)


class Checkpoint:
    """A file that :func:`~probdiff.fit` saves its state in and resumes from; the one before it is kept.

    It holds everything that decides the future of the fit, and no times: equal fits leave equal files. It is replaced as a
    whole, with a checksum; what was there before becomes ``NAME.previous.npz``, unless it is damaged. One that is damaged, or
    that is not of this model and optimiser, is passed over for the previous one, with a warning.

    Args:
        path: Path of an ``.npz`` file.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.previous = self.path.with_suffix(".previous.npz")

    def save(self, state):
        """Save a :class:`~probdiff.training.FitState`."""
        parts = state._asdict()
        settings = np.frombuffer(json.dumps(parts.pop("settings"), sort_keys=True).encode(), np.uint8)
        histories = {name: parts.pop(name) for name in ("losses", "validation")}
        if is_intact(self.path):
            replace(self.previous, lambda temporary: shutil.copyfile(self.path, temporary))
        save_arrays(self.path, histories | {"settings": settings} | leaves_by_name(tuple(parts.values())))

    def exists(self):
        """Whether there is anything to resume from."""
        return self.path.exists() or self.previous.exists()

    def require_intact(self):
        """Refuse to go on if there are checkpoints, and not one is intact: a ValueError that names them."""
        self._first(load_arrays, warn=False)

    def load(self, template):
        """The saved state, or None if there is none yet.

        Raises:
            ValueError: If there is no intact checkpoint of the kind of ``template``.
        """

        def restored(path):
            arrays = load_arrays(path)
            parts = template._asdict()
            del parts["settings"], parts["losses"], parts["validation"]
            values = restore(tuple(parts.values()), arrays, path)
            histories = {name: arrays[name] for name in ("losses", "validation")}
            settings = json.loads(arrays["settings"].tobytes())
            return type(template)(**dict(zip(parts, values)), **histories, settings=settings)

        return self._first(restored)

    def _first(self, read, warn=True):
        """``read(path)`` of the checkpoint, or else of the previous one; None if there is neither."""
        problems = []
        for path in (self.path, self.previous):
            try:
                found = read(path)
            except FileNotFoundError:
                continue
            except (ValueError, KeyError) as error:
                problems.append(str(error))
                continue
            if problems and warn:
                warnings.warn(f"{problems[0]}; going on from {path.name}", stacklevel=3)
            return found
        require(not problems, "checkpoint", "an intact one of this model", "; ".join(problems))
        return None
