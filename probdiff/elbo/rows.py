"""The rows (n, ε) of an estimate of the analytic bound, and their sum, in chunks where there are many.

A chunk's gradient is taken along with its value, so that working memory does not grow with the number of rows.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from probdiff.chain.schedules import at_step
from probdiff.elbo.analytic import PosteriorNoise, sampled_noise
from probdiff.elbo.control import LinearControl
from probdiff.elbo.terms import even_chunk, predict
from probdiff.elbo.variance_reduction import PathNoise, RowNoise
from probdiff.networks.base import is_trainable, rows_at_once


class Rows(eqx.Module):
    """The rows of one estimate: steps and weights of shape ``(row, datum)``, their noise, and what is done with them."""

    term: Callable
    n: jax.Array
    weight: jax.Array
    noise: RowNoise | PathNoise
    known: PosteriorNoise | None
    control: LinearControl | None
    coefficient: jax.Array
    x: jax.Array
    x0: jax.Array
    network_key: jax.Array | None
    more_key: jax.Array

    def evaluate(self, diffusion, rows):
        """The corrected, weighted terms of some rows, shape ``(row, datum)``; and what can be learned from them."""
        n, eps = self.n[rows], self.noise(rows)
        key = None if self.network_key is None else jax.random.fold_in(self.network_key, rows[0])
        z, prediction = predict(diffusion, self.x0, n, eps, key)
        known = (sampled_noise if self.known is None else self.known)(diffusion.schedule, z, n, eps)

        def more():
            return RowNoise(self.more_key, self.x0, 1)(rows)

        def terms(prediction):
            return self.term(diffusion, self.x, self.x0, n, z, known, prediction, more)

        term = terms(prediction)
        control = jnp.zeros_like(term) if self.control is None else self.control.value(jax.lax.stop_gradient(z), n, eps)
        corrected = term - at_step(self.coefficient, n, term.dtype) * control
        return self.weight[rows] * corrected, functools.partial(_seen, n, self.weight[rows], term, control, terms, prediction)


def _seen(n, weight, term, control, terms, prediction):
    """What :meth:`Learner.updated` takes."""
    gradient = jax.grad(lambda p: terms(p).sum())(prediction)
    seen = weight, term, control, jnp.square(gradient).sum(range(n.ndim, gradient.ndim))
    return n, *jax.tree.map(jax.lax.stop_gradient, seen)


def sum_rows(diffusion, rows):
    """The sum over rows and data, and that over rows of each datum; and, of one or two rows, what can be learned."""
    chunk = even_chunk(len(rows.n), max(2, rows_at_once(diffusion.network) // len(rows.x)))
    if chunk < len(rows.n):
        return *_sum_in_chunks(diffusion, rows, chunk), None
    values, seen = rows.evaluate(diffusion, jnp.arange(chunk))
    per_datum = values.sum(0)
    return per_datum.sum(), jax.lax.stop_gradient(per_datum), seen


@eqx.filter_custom_vjp
def _sum_in_chunks(diffusion, rows, chunk):
    """:func:`sum_rows`, ``chunk`` rows at a time.

    Where it is differentiated, each chunk's gradient is taken along with its value and added up: the cost is that of
    one pass back and forth, and memory does not grow with the number of rows.
    """
    return _over_chunks(_chunk_value, diffusion, rows, chunk)


@_sum_in_chunks.def_fwd
def _sum_forward(perturbed, diffusion, rows, chunk):
    def value_and_gradient(diffusion, *arguments):
        params, constants = eqx.partition(diffusion, is_trainable)

        def value(params):
            return _chunk_value(eqx.combine(params, constants), *arguments)

        return jax.value_and_grad(value, has_aux=True)(params)

    return _over_chunks(value_and_gradient, diffusion, rows, chunk)


@_sum_in_chunks.def_bwd
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
