"""Trees of arrays as files, and checkpoints: the state of a fit, and the state saved before it.

A file is a line of JSON that describes its contents, the leaves as serialised by equinox, and a checksum. The line is needed because
equinox must know shapes and dtypes before it reads; the checksum and the renaming of :mod:`probdiff.storage.files` are not in equinox.
"""

import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from probdiff._checks import require
from probdiff.storage.files import is_intact, read_checked, replace, write_checked
from probdiff.training import FitState


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, typed keys as integers."""
    return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]


def save_tree(path: Path, tree: Any, **about: Any) -> None:
    """Write a tree of arrays, all or nothing; ``about`` is for JSON. Equal trees give equal files."""
    leaves, file = _leaves(tree), io.BytesIO()
    about["leaves"] = [[str(leaf.dtype), *leaf.shape] for leaf in leaves]
    file.write(json.dumps(about, sort_keys=True).encode() + b"\n")
    eqx.tree_serialise_leaves(file, leaves)
    write_checked(path, file.getvalue())


def read_leaves(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Description and leaves of a tree that :func:`save_tree` wrote.

    Raises:
        ValueError: If the checksum does not match, or the file has other contents; FileNotFoundError if there is no such file.
    """
    file = io.BytesIO(read_checked(path))
    try:
        if file.getvalue().startswith(b"PK"):
            return _read_npz_leaves(file)
        about = json.loads(file.readline())
        like = [jax.ShapeDtypeStruct(shape, dtype) for dtype, *shape in about.pop("leaves")]
        with jax.enable_x64(True):  # for files that were written in float64
            return about, eqx.tree_deserialise_leaves(file, like)
    except Exception as error:  # equinox, JAX and NumPy raise errors of different classes
        raise ValueError(f"{path}: Expected arrays of probdiff; got: {error}") from None


def _read_npz_leaves(file: io.BytesIO) -> tuple[dict[str, Any], list[Any]]:
    """The same from the format of probdiff 0.1, an ``.npz`` file."""
    with np.load(file, allow_pickle=False) as arrays:
        names = sorted(name for name in arrays if name.startswith("leaf_"))
        names += [name for name in ("losses", "validation") if name in arrays]
        about = {"settings": json.loads(arrays["settings"].tobytes())} if "settings" in arrays else {}
        return about, [arrays[name] for name in names]


def load_tree(path: Path, template: Any, wider: bool = False) -> tuple[Any, dict[str, Any]]:
    """A tree that :func:`save_tree` wrote, and its description.

    Args:
        path: Path of the file.
        template: A tree of the same structure, shapes and dtypes; its NumPy arrays are histories, which
            may have more rows in the file.
        wider: Accept arrays of lower precision than those of ``template``: no number changes.

    Raises:
        ValueError: If the file is damaged, of another model, or was written in another precision.
    """
    about, found = read_leaves(path)
    return _restored(path, found, template, wider), about


def _restored(path: Path, found: list[Any], template: Any, wider: bool = False) -> Any:
    """The leaves of a file, or some of them, as a tree like ``template``."""
    expected = _leaves(template)
    fits = len(found) == len(expected) and all(_form(a, b) == _form(b, b) for a, b in zip(found, expected))
    require(fits, str(path), "the arrays of this model and optimiser", "arrays of other shapes or another number of them: the file is of a run with other options")
    for a, b in zip(found, expected):
        x64 = a.dtype.itemsize > b.dtype.itemsize
        got = f"{a.dtype}: the fit had JAX_ENABLE_X64={int(x64)}; set it so and try again"
        fits = a.dtype == b.dtype or (wider and not x64)
        require(fits, str(path), f"arrays of {b.dtype}, the precision that JAX is set to", got)
    old, structure = jax.tree.flatten(template)
    return jax.tree.unflatten(structure, map(_like, found, old))


def _form(leaf: Any, like: Any) -> tuple[Any, ...]:
    """The kind and shape in which a leaf must agree with the template; of a history, the number of rows is free."""
    return leaf.dtype.kind, leaf.ndim, leaf.shape[int(isinstance(like, np.ndarray)) :]


def _like(new: Any, old: Any) -> Any:
    if _is_key(old):
        return jax.random.wrap_key_data(jnp.asarray(new), impl=jax.random.key_impl(old))
    return np.asarray(new) if isinstance(old, np.ndarray) else jnp.asarray(new, old.dtype)


class Checkpoint:
    """A file in which :func:`~probdiff.fit` saves its state and from which it resumes; the previous state is kept.

    The file holds everything that determines the further updates, and no times (except of a fit with ``minutes``): equal fits give equal files. It is replaced as a
    whole, with a checksum; the previous file becomes ``NAME.previous.eqx``, unless it is damaged. If the file is damaged, or
    belongs to another model or optimiser, the previous one is used, with a warning. If neither exists, the files of
    probdiff 0.1 are read, ``NAME.npz`` and ``NAME.previous.npz``.

    Args:
        path: Path of the file, ``NAME.eqx``.

    Example:
        >>> import jax, probdiff, tempfile
        >>> checkpoint = probdiff.storage.Checkpoint(tempfile.mkdtemp() + "/fit.eqx")
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1))
        >>> x = jax.random.normal(jax.random.key(1), (8, 2))
        >>> fit = probdiff.fit(diffusion, x, iterations=2, batch_size=4, checkpoint=checkpoint, progress=False)
        >>> checkpoint.num_iterations
        2
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path = Path(path)
        self.previous: Path = self.path.with_suffix(f".previous{self.path.suffix}")
        older = [self.path.with_suffix(suffix) for suffix in (".npz", ".previous.npz")]
        self._paths = list(dict.fromkeys([self.path, self.previous, *older]))

    def save(self, state: FitState) -> None:
        """Save a :class:`~probdiff.training.FitState`."""
        if is_intact(self.path):
            replace(self.previous, lambda temporary: shutil.copyfile(self.path, temporary))
        save_tree(self.path, state._replace(settings=None), settings=state.settings, iterations=len(state.losses))

    def exists(self) -> bool:
        """Whether there is a file to resume from."""
        return any(path.exists() for path in self._paths)

    @property
    def num_iterations(self) -> int:
        """The number of iterations of the saved fit; 0 if there is none."""
        return self._first(lambda path: len(read_leaves(path)[1][-2]), warn=False) or 0

    @property
    def minutes(self) -> float:
        """The minutes that the saved fit has spent, if it was limited by time; otherwise, and if there is none, 0."""
        return self._first(lambda path: read_leaves(path)[0]["settings"].get("seconds", 0.0) / 60, warn=False) or 0.0

    def load_best(self, template: Any) -> Any:
        """The averaged parameters with the best validation bound so far, a tree like ``template``, the parameters of the model; None before the first validation.

        Another process can load them while the fit continues.
        """

        def best(path: Path) -> Any:
            # (A FitState ends with them, their bound, the losses and the validations.)
            *leaves, _, _, validation = read_leaves(path)[1]
            return _restored(path, leaves[len(leaves) - len(jax.tree.leaves(template)) :], template, wider=True) if len(validation) else None

        return self._first(best, warn=False)

    def require_intact(self) -> None:
        """Raise a ValueError that names the checkpoints, if there are some and none is intact."""
        self._first(read_checked, warn=False)

    def load(self, template: FitState) -> FitState | None:
        """The saved state, or None if there is none yet.

        Raises:
            ValueError: If there are checkpoints, but none is intact and of the structure of ``template``.
        """

        def restored(path: Path) -> FitState:
            state, about = load_tree(path, template._replace(settings=None))
            return state._replace(settings=about["settings"])

        return self._first(restored)

    def _first(self, read: Callable[[Path], Any], warn: bool = True) -> Any:
        """``read(path)`` for the first path that can be read; None if there is no file."""
        problems = []
        for path in self._paths:
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
