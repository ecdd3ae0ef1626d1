"""Work cut in pieces: how much at a time, so that what is at hand stays in a processor's cache and memory does not grow with the whole."""

import equinox as eqx
import jax
import jax.numpy as jnp

from probdiff._checks import is_trainable

HIDDEN_VALUES = 2**19


def inputs_at_once(network):
    """How many inputs of a network to evaluate at a time: its hidden layers then stay in the cache of a processor.

    Taken from the longest side of its weights. On an accelerator, which wants as many as there are, 65 536.
    """
    if jax.default_backend() != "cpu":
        return 2**16
    weights = [leaf.shape for leaf in jax.tree.leaves(network) if is_trainable(leaf) and leaf.ndim >= 2]
    widest = max((max(shape) for shape in weights), default=1)
    return min(4096, max(256, HIDDEN_VALUES // widest))


def even_chunk(size, largest):
    """The size of the fewest chunks, none larger than ``largest`` (or 1), that ``size`` can be cut in evenly."""
    return -(-size // max(1, -(-size // max(1, largest))))


def parts(size, largest):
    """The number of parts that ``size`` rows are cut in, and a function from a part to its rows and which of them are new.

    The last part is moved back to end with the last row, so nothing is padded.
    """
    chunk = even_chunk(size, largest)

    def rows(k):
        first = jnp.minimum(k * chunk, size - chunk)
        each = first + jnp.arange(chunk)
        return each, each >= k * chunk

    return -(-size // chunk) if size else 0, rows


def filled(function, size, largest, out):
    """``out`` with ``function(i)`` at row i, for ``size`` rows, at most ``largest`` rows at a time, in place."""
    count, rows = parts(size, largest)

    def body(k, out):
        each, _ = rows(k)
        return jax.lax.dynamic_update_slice_in_dim(out, function(each), each[0], 0)

    return jax.lax.fori_loop(0, count, body, out) if count else out


@eqx.filter_custom_vjp
def sum_in_chunks(diffusion, rows, chunk):
    """:func:`sum_terms`, ``chunk`` rows at a time.

    Where it is differentiated, each chunk's gradient is taken along with its value and added up: the cost is that of
    one pass back and forth, and memory does not grow with the number of rows.
    """
    return _over_chunks(_chunk_value, diffusion, rows, chunk)


@sum_in_chunks.def_fwd
def _sum_forward(perturbed, diffusion, rows, chunk):
    def value_and_gradient(diffusion, *arguments):
        params, constants = eqx.partition(diffusion, is_trainable)

        def value(params):
            return _chunk_value(eqx.combine(params, constants), *arguments)

        return jax.value_and_grad(value, has_aux=True)(params)

    return _over_chunks(value_and_gradient, diffusion, rows, chunk)


@sum_in_chunks.def_bwd
def _sum_backward(gradient, cotangent, perturbed, diffusion, *arguments):
    return jax.tree.map(lambda g: (cotangent[0] * g).astype(g.dtype), gradient)


def _over_chunks(function, diffusion, rows, chunk):
    def value(first):
        return function(diffusion, rows, first + jnp.arange(chunk))

    def add(total, first):
        return jax.tree.map(jnp.add, total, value(first)), None

    first = jnp.arange(0, len(rows.n), chunk)
    return jax.lax.scan(add, value(first[0]), first[1:])[0]


def _chunk_value(diffusion, rows, chosen):
    """The sums over the chosen rows, of which those past the last do not count."""
    inside = jnp.minimum(chosen, len(rows.n) - 1)
    values = rows.evaluate(diffusion, inside)[0]
    per_datum = jnp.where((inside == chosen)[:, None], values, 0).sum(0)
    return per_datum.sum(), per_datum
