r"""The terms of one estimate that were drawn, and their weighted sum.

The part of the estimate that is sampled is

    Σ_rows [excess_n − c_n · control_n] / p_n

over the rows (n, ε) that were drawn for each datum, with p_n the probability of a row and c_n the coefficient of its control variate.

Source: Nichol and Dhariwal (2021), arXiv:2102.09672, section 3.3, for importance sampling of the steps.
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from probdiff._chunks import even_chunk, inputs_at_once, sum_in_chunks
from probdiff.chain.reverse import SampledStep
from probdiff.chain.schedules import TableByDim, at_step
from probdiff.diffusion import Diffusion
from probdiff.elbo.variance_reduction import AbstractControl, PosteriorNoise, RowNoise


class AbstractTerm(eqx.Module):
    """The terms of a sum over the steps.

    To write your own, define the three methods.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> from probdiff.elbo.objective import StepObjective
        >>> class SquaredError(probdiff.elbo.AbstractTerm):
        ...     def kl_weight(self, diffusion):
        ...         return diffusion.schedule.alpha_bar**0
        ...     def noise_free_bound(self, diffusion, x, x0):
        ...         return jnp.zeros(len(x))
        ...     def __call__(self, diffusion, step):
        ...         return jnp.square(step.noise.mean - step.prediction).sum(-1)
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0 * z)
        >>> objective = StepObjective(diffusion, SquaredError(), steps="all")
        >>> bool(objective.loss(jax.random.key(0), {}, diffusion.model, diffusion.guide, jnp.zeros((1000, 1))) / 1000 > 4)
        True
    """

    @abc.abstractmethod
    def kl_weight(self, diffusion: Diffusion) -> TableByDim:
        """The weight, at least approximate, of squared errors of the noise at each step, shape ``(num_steps,)`` or ``(num_steps, dim)``."""

    @abc.abstractmethod
    def noise_free_bound(self, diffusion: Diffusion, x: jax.Array, x0: jax.Array) -> jax.Array:
        """The estimate for a network that knows the noise, in nats, shape ``(datum,)``."""

    @abc.abstractmethod
    def __call__(self, diffusion: Diffusion, step: SampledStep) -> jax.Array:
        """The terms of steps n, which are subtracted from :meth:`noise_free_bound`: in nats, shape ``(row, datum)`` like the steps."""


class SampledTerms(eqx.Module):
    """The sampled terms of one estimate: steps and inverse probabilities of shape ``(row, datum)``, their noise, and the parts of the estimator."""

    term: AbstractTerm
    n: jax.Array
    inverse_probability: jax.Array
    weight: jax.Array
    noise: Callable[[jax.Array], jax.Array]
    conditional_noise: PosteriorNoise | None
    control: AbstractControl | None
    coefficient: jax.Array
    x: jax.Array
    x0: jax.Array
    network_key: jax.Array | None
    extra_key: jax.Array

    def evaluate(self, diffusion: Diffusion, rows: jax.Array) -> tuple[jax.Array, Callable[[], tuple[jax.Array, ...]]]:
        """The terms of some rows, minus their control variates, divided by their probabilities, shape ``(row, datum)``.

        Also a function that returns the statistics from which the estimator learns.
        """
        n, eps, inverse_probability = self.n[rows], self.noise(rows), self.inverse_probability[rows]
        key = None if self.network_key is None else jax.random.fold_in(self.network_key, rows[0])

        def extra_noise() -> jax.Array:
            return RowNoise(self.extra_key, self.x0, 1)(rows)

        step = diffusion.sampled_step(self.x, self.x0, n, eps, key, self.conditional_noise, extra_noise)

        def terms(prediction: jax.Array) -> jax.Array:
            return self.term(diffusion, step._replace(prediction=prediction))

        term = terms(step.prediction)
        control = jnp.zeros_like(term)
        if self.control is not None:
            control = self.control.value(jax.lax.stop_gradient(step.z), n, eps)

        def seen() -> tuple[jax.Array, ...]:
            """The arguments of :meth:`Learner.updated` after the state."""
            gradient = jax.grad(lambda p: terms(p).sum())(step.prediction)
            squared = jnp.square(gradient).sum(range(n.ndim, gradient.ndim))
            return n, *jax.tree.map(jax.lax.stop_gradient, (inverse_probability, term, control, squared))

        return inverse_probability * (term - at_step(self.coefficient, n, term.dtype) * control), seen

    def sums(self, diffusion: Diffusion, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weighted sum over the chosen rows and the data, and the sum over the rows of each datum; rows past the last do not count."""
        inside = jnp.minimum(chosen, len(self.n) - 1)
        values = self.evaluate(diffusion, inside)[0]
        per_datum = jnp.where((inside == chosen)[:, None], values, 0).sum(0)
        return (self.weight * per_datum).sum(), per_datum


def sum_terms(diffusion: Diffusion, terms: SampledTerms) -> tuple[jax.Array, jax.Array, Callable[[], tuple[jax.Array, ...]] | None]:
    """The weighted sum over rows and data, and the sum over the rows of each datum; for rows in one chunk (always for two), also the function of statistics."""
    size = len(terms.n)
    chunk = even_chunk(size, max(2, inputs_at_once(diffusion.network) // len(terms.x)))
    if chunk < size:
        return *sum_in_chunks(diffusion, terms, size, chunk), None
    values, seen = terms.evaluate(diffusion, jnp.arange(chunk))
    per_datum = values.sum(0)
    return (terms.weight * per_datum).sum(), jax.lax.stop_gradient(per_datum), seen
