"""Computations in chunks, so that the arrays of a chunk stay in a processor's cache, memory does not grow with the size of the whole, a
progress bar moves, and Ctrl-C interrupts."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from probdiff._checks import PyTree, Whole, is_trainable

HIDDEN_VALUES = 2**19  # outputs of one hidden layer that stay in the cache of a processor
FEWEST_INPUTS, MOST_INPUTS = 2**8, 2**12  # of a network at a time, on a processor,
ACCELERATOR_INPUTS = 2**16  # and on an accelerator, which is fastest with as many as possible
EVALUATIONS = 2**20  # evaluations of a network between two checks for Ctrl-C: about a second
EACH = (slice(None), None)  # for :func:`take`: each row as an array of one row, to be mapped over
MOST_NUMBERS = 2**24  # numbers in memory at once: of gradients, paths, distances to points


def inputs_at_once(network: Any) -> int:
    """The number of inputs of a network to evaluate at a time, so that its hidden layers stay in the cache of a processor.

    It is computed from the longest side of the weights.
    """
    if jax.default_backend() != "cpu":
        return ACCELERATOR_INPUTS
    weights = [leaf.shape for leaf in jax.tree.leaves(network) if is_trainable(leaf) and leaf.ndim >= 2]
    widest = max((max(shape) for shape in weights), default=1)
    return min(MOST_INPUTS, max(FEWEST_INPUTS, HIDDEN_VALUES // widest))


def take(tree: PyTree, rows: Any) -> PyTree:
    """Some rows of the arrays of a tree, such as data and their context: ``leaf[rows]``."""
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def repeat(tree: PyTree, count: Whole) -> PyTree:
    """The rows of the arrays of a tree, all of them ``count`` times over."""
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * int(count)), tree)


def even_chunk(size: int, largest: int) -> int:
    """The size of the fewest chunks, none larger than ``largest`` (or 1), that ``size`` can be cut in evenly."""
    return -(-size // max(1, -(-size // max(1, largest))))


def blocks(size: int, largest: int, *, unit: str, desc: str, progress: bool) -> Iterator[np.ndarray]:
    """The numbers 0 … ``size`` − 1 in blocks of one length, at most ``largest``, with a progress bar that moves after each.

    The last number is repeated to fill the last block; :func:`joined` drops the surplus results.
    """
    length = even_chunk(size, largest)
    with tqdm(total=size, unit=unit, desc=desc, disable=not progress) as bar:
        for start in range(0, size, length):
            yield np.minimum(start + np.arange(length), size - 1)
            bar.update(min(length, size - start))


def joined(results: list[Any], size: int) -> Any:
    """The results of :func:`blocks`, trees of arrays, put together along the first axis on the host."""
    return jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts])[:size], *results)


def parts(size: int, largest: int) -> tuple[int, Callable[[jax.Array], tuple[jax.Array, jax.Array]]]:
    """The number of parts that ``size`` rows are cut in, and a function from a part to its rows and which of them are new.

    The last part is moved back to end with the last row, so nothing is padded.
    """
    chunk = even_chunk(size, largest)

    def rows(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = jnp.minimum(k * chunk, size - chunk)
        each = first + jnp.arange(chunk)
        return each, each >= k * chunk

    return -(-size // chunk) if size else 0, rows


def filled(function: Callable[[jax.Array], jax.Array], size: int, largest: int, out: jax.Array) -> jax.Array:
    """``out`` with ``function(i)`` at row i, for ``size`` rows, at most ``largest`` rows at a time, in place."""
    count, rows = parts(size, largest)

    def body(k: jax.Array, out: jax.Array) -> jax.Array:
        each, _ = rows(k)
        return jax.lax.dynamic_update_slice_in_dim(out, function(each), each[0], 0)

    return jax.lax.fori_loop(0, count, body, out) if count else out


def over_steps(function: Callable[[jax.Array], Any], num_steps: int, network: Any, inputs: int) -> Any:
    """``function(n)`` for n = 1 … N, stacked; each call evaluates the network on ``inputs`` inputs."""
    return jax.lax.map(function, jnp.arange(1, num_steps + 1), batch_size=max(1, inputs_at_once(network) // inputs))


def checkpointed(function: Callable[..., jax.Array], largest: int, *arrays: jax.Array) -> jax.Array:
    """``function`` of arrays along their first axis, in equal parts of about ``largest`` inputs, and the rest.

    Intermediate values are computed again for the gradient: memory then does not grow with the number of parts.
    """
    size, rows = len(arrays[0]), math.prod(arrays[1].shape[1:-1])
    part = max(1, largest // rows)
    if size <= part:
        return function(*arrays)
    whole = size - size % part
    pieces = [array[:whole].reshape(-1, part, *array.shape[1:]) for array in arrays]
    found = jax.lax.map(lambda each: jax.checkpoint(function)(*each), tuple(pieces))
    found = found.reshape(whole, *found.shape[2:])
    return found if whole == size else jnp.concatenate([found, function(*(array[whole:] for array in arrays))])


@runtime_checkable
class Summands(Protocol):
    """The interface of terms that :func:`sum_in_chunks` adds up."""

    def sums(self, diffusion: Any, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sum over the chosen rows, a number; and another result, which is not differentiated."""


@eqx.filter_custom_vjp
def sum_in_chunks(diffusion: Any, terms: Summands, size: int, chunk: int) -> tuple[jax.Array, jax.Array]:
    """``terms.sums(diffusion, rows)`` added up over ``size`` rows, ``chunk`` at a time.

    Where it is differentiated with respect to the parameters of the diffusion, each chunk's gradient is taken along with its value
    and added up: the cost is that of one pass back and forth, and memory does not grow with the number of rows.
    """
    return _over_chunks(lambda rows: terms.sums(diffusion, rows), size, chunk)


@sum_in_chunks.def_fwd
def _sum_forward(perturbed: Any, diffusion: Any, terms: Summands, size: int, chunk: int) -> Any:
    params, constants = eqx.partition(diffusion, is_trainable)

    def value_and_gradient(rows: jax.Array) -> Any:
        return jax.value_and_grad(lambda params: terms.sums(eqx.combine(params, constants), rows), has_aux=True)(params)

    return _over_chunks(value_and_gradient, size, chunk)


@sum_in_chunks.def_bwd
def _sum_backward(gradient: Any, cotangent: Any, perturbed: Any, diffusion: Any, *arguments: Any) -> Any:
    return jax.tree.map(lambda g: (cotangent[0] * g).astype(g.dtype), gradient)


def _over_chunks(value: Callable[[jax.Array], Any], size: int, chunk: int) -> Any:
    def add(total: Any, first: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value(first + jnp.arange(chunk))), None

    first = jnp.arange(0, size, chunk)
    return jax.lax.scan(add, value(first[0] + jnp.arange(chunk)), first[1:])[0]
