r"""The bounds of the same data under different contexts, on common random numbers.

The part of the bound that depends on the context is minus the sum of the excesses (:mod:`probdiff.elbo.analytic`). It is estimated by terms −excess_n / p_n at
random steps n. The terms of one datum have the same steps and the same noise under every context, so that the variation that all contexts share
cancels in their difference. The probabilities p_n are learned from the differences:
log-SNRs at which the contexts lead to the same prediction are rarely drawn.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from probdiff._checks import AnyArray, PyTree, Whole, require, require_count, require_key, require_type
from probdiff._chunks import blocks, joined
from probdiff._context import named
from probdiff.chain.schedules import per_step
from probdiff.diffusion import Diffusion
from probdiff.elbo.analytic import BoundTerm
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.steps import STEPS, Learner
from probdiff.programs.sites import Data

DATA_AT_ONCE = 256
PAIRS_AT_ONCE = 64  # pairs of a datum and a context, whose terms are evaluated together
PILOT = 32  # data from which the probabilities of the steps are first learned
STEPS_IN_DRAW = 32  # steps of each datum in a draw

Terms = Float[np.ndarray, "term datum context"]


class CommonTerms:
    """Terms of the bounds of data under several contexts; each term estimates the whole bound, up to a constant of the datum.

    Args:
        diffusion: The model prepared for evaluation, given all contexts, in any number of rows.
        x: Data, shape ``(datum, dim)``.
        rows: The rows of the contexts of each datum, shape ``(datum, context)``.
        num_terms: Number of terms in a draw: their steps are spread evenly.
        all_steps: Whether all N steps are evaluated, instead of random ones.
        key: JAX key for the draws from which the probabilities of the steps are first learned.

    Attributes:
        num_pilot: Network evaluations of these draws, shape ``(datum,)``.
    """

    def __init__(
        self, diffusion: Diffusion, x: Data, rows: Int[np.ndarray, "datum context"], num_terms: int, all_steps: bool, key: PRNGKeyArray
    ) -> None:
        num_steps = diffusion.schedule.num_steps
        self.diffusion: Diffusion = diffusion
        self.x: jax.Array = jnp.asarray(x)
        self.rows: Int[np.ndarray, "datum context"] = rows
        self.all_steps: bool = all_steps
        self.num_terms: int = num_steps if all_steps else num_terms
        weight = per_step(np.asarray(diffusion.kernel.kl_weight(diffusion.schedule), np.float64))
        self._learner = Learner(diffusion.schedule.fixed(), tuple(weight.tolist()), centred=False)
        self._learned = self._learner.initial()
        self.num_pilot: Int[np.ndarray, "datum"] = np.zeros(len(rows), int)
        if not self.all_steps:
            some = np.unique(np.linspace(0, len(rows) - 1, PILOT).astype(int))
            self.draw(key, some, np.ones((len(some), rows.shape[1]), bool))
            self.num_pilot[some] = self.num_terms * rows.shape[1]

    def draw(self, key: PRNGKeyArray, data: Int[np.ndarray, "some"], wanted: Bool[np.ndarray, "some context"]) -> Terms:
        """Terms of some data, shape ``(term, some, context)``, whose mean over terms is one draw of the bound; NaN where no term is requested.

        The steps and the noise of a datum depend on the key and on its index alone. The probabilities of the steps for the next draw are learned from the terms.
        """
        probability = None if self.all_steps else _probability(self._learner, self._learned)
        pairs = np.argwhere(wanted)
        n, inverse_probability = np.ones((self.num_terms, len(data)), np.int32), np.ones((self.num_terms, len(data)))
        excess = np.full((self.num_terms, *wanted.shape), np.nan)
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            i, c = pairs[np.minimum(start + np.arange(PAIRS_AT_ONCE), len(pairs) - 1)].T
            rows = data[i], self.rows[data[i], c]
            n[:, i], inverse_probability[:, i], excess[:, i, c] = _excess(self.diffusion, self.x, key, rows, probability, self.num_terms)
        if self.all_steps:
            return -self.num_terms * excess
        self._learned = _learned(self._learner, self._learned, n, inverse_probability, excess)
        return -inverse_probability[..., None] * excess


@eqx.filter_jit
def _learned(
    learner: Learner,
    learned: dict[str, Array],
    n: Int[AnyArray, "term datum"],
    inverse_probability: Float[AnyArray, "term datum"],
    excess: Float[AnyArray, "term datum context"],
) -> dict[str, Array]:
    """The learned state after the differences between the contexts of a datum at each step; NaN is ignored."""
    there = jnp.isfinite(excess)
    apart = jnp.where(there, excess - jnp.nanmean(excess, -1, keepdims=True), 0)
    count = there * inverse_probability[..., None]
    nothing = jnp.zeros_like(apart)
    return learner.updated(learned, jnp.broadcast_to(n[..., None], apart.shape), count, apart, nothing, nothing)


@eqx.filter_jit
def _probability(learner: Learner, learned: dict[str, Array]) -> Float[Array, "num_steps"]:
    """The probabilities of the steps."""
    return learner.probability(learned, "value", jnp.zeros(learner.schedule.num_steps))


@eqx.filter_jit
def _excess(
    diffusion: Diffusion,
    x: Array,
    key: PRNGKeyArray,
    rows: tuple[Int[AnyArray, "pair"], Int[AnyArray, "pair"]],
    probability: Float[Array, "num_steps"] | None,
    num_terms: int,
) -> tuple[Int[Array, "term pair"], Float[Array, "term pair"], Float[Array, "term pair"]]:
    """Steps, their inverse probabilities and their excesses, for pairs of a datum and a context, both given by row."""
    steps, num_steps = STEPS["all" if probability is None else "stratified_importance"], diffusion.schedule.num_steps
    data, contexts = rows
    x, diffusion = x[data], diffusion.take(contexts)
    x0 = diffusion.likelihood.encode(x)

    def draw(number: Int[Array, ""]) -> tuple[Array, ...]:
        own = jax.random.split(jax.random.fold_in(key, number), 3)  # whatever the context
        n, inverse_probability = steps.draw(own[0], 1 if probability is None else num_terms, num_steps, probability)
        noise = (jax.random.normal(each, (num_terms, x0.shape[1]), x0.dtype) for each in own[1:])
        return n.ravel(), inverse_probability.ravel(), *noise

    n, inverse_probability, eps, extra = jax.vmap(draw, out_axes=1)(jnp.asarray(data))
    step = diffusion.sampled_step(x, x0, n, eps, extra_noise=lambda: extra)
    return n, inverse_probability, BoundTerm()(diffusion, step)


class ContextDifference(NamedTuple):
    """The result of :func:`compare_contexts`, nats.

    Attributes:
        draws: Independent estimates of the difference of the bounds of each datum, shape ``(draw, datum)``.
        num_evaluations: Network evaluations for each datum, on average.

    Example:
        >>> import numpy as np, probdiff
        >>> draws = np.array([[1.0, 2.0], [3.0, 2.0]])  # two draws of two data
        >>> found = probdiff.diagnostics.ContextDifference(draws, num_evaluations=20.0)
        >>> found.difference.tolist(), found.error.tolist()
        ([2.0, 2.0], [1.0, 0.0])
    """

    draws: Float[np.ndarray, "draw datum"]
    num_evaluations: float

    @property
    def difference(self) -> Float[np.ndarray, "datum"]:
        """The difference of each datum, shape ``(datum,)``."""
        return self.draws.mean(0)

    @property
    def error(self) -> Float[np.ndarray, "datum"]:
        """The Monte Carlo standard error of each difference, shape ``(datum,)``."""
        return self.draws.std(0, ddof=1) / np.sqrt(len(self.draws))

    @property
    def estimate(self) -> Estimate:
        """The mean difference and its two errors."""
        return Estimate.of_draws(self.draws)

    def __repr__(self) -> str:
        """The mean difference, its errors and the number of network evaluations."""
        mean, error, noise = self.estimate
        words = f"ContextDifference of {self.draws.shape[1]} data: {mean:.3f} ± {error:.3f} nats over data, of which {noise:.3f} is noise"
        return f"{words} ({self.num_evaluations:.0f} network evaluations a datum)"


def compare_contexts(
    diffusion: Diffusion,
    x: Data,
    first: PyTree,
    second: PyTree,
    *,
    key: PRNGKeyArray,
    num_draws: Whole = 8,
    progress: bool = False,
) -> ContextDifference:
    r"""The bound on log p(x | c₁) minus the bound on log p(x | c₂), datum by datum, on common random numbers.

    A difference of bounds is not a bound: each bound has a gap of its own. It bounds neither log p(x | c₁) − log p(x | c₂)
    nor, with a prior, the log-odds of the contexts.

    A draw has 32 random steps for each datum, spread evenly, with probabilities that are learned from some of the data. For the same error this needs fewer
    network evaluations than all N steps, as the predictions under both contexts agree at most steps. If N is at most 32, a draw has all steps.

    Args:
        diffusion: The model.
        x: Data, shape ``(datum, dim)``.
        first, second: c₁ and c₂, each with a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key.
        num_draws: Number of draws, at least two.
        progress: Show a progress bar.

    Returns:
        A :class:`ContextDifference`.

    Raises:
        ValueError, TypeError: If the data or a context do not suit the model.

    Example:
        >>> import jax, numpy as np, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0], [[1.0]], slope=[[3.0]])
        >>> exact = probdiff.Diffusion(schedule, normal.network(schedule), reverse_variance="forward")  # p(x | c) = N(3c, 1)
        >>> x, first, second = np.full((1, 1), 3.0, np.float32), np.ones((1, 1)), np.zeros((1, 1))
        >>> found = probdiff.diagnostics.compare_contexts(exact, x, first, second, key=jax.random.key(0))
        >>> 2 < found.difference.item() < 7  # log N(3; 3, 1) − log N(3; 0, 1) = 4.5
        True
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.evaluated()
    given = []
    for name, context in (("first", first), ("second", second)):
        require(context is not None, name, "a context", None)
        with named(name):
            given.append(diffusion.given(context))
            x = given[-1].read_data(x)
    require_key(key)
    require_count("num_draws", num_draws)
    require(num_draws >= 2, "num_draws", "at least two", num_draws)
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(each.context for each in given))
    rows = np.arange(len(x))[:, None] + [0, len(x)]
    pilot_key, key = jax.random.split(key)
    terms = CommonTerms(diffusion.given(both), x, rows, STEPS_IN_DRAW, diffusion.schedule.num_steps <= STEPS_IN_DRAW, pilot_key)
    found = []
    for data in blocks(len(x), DATA_AT_ONCE, unit="datum", desc="bounds under two contexts", progress=progress):
        drawn = [terms.draw(jax.random.fold_in(key, i), data, np.ones((len(data), 2), bool)).mean(0) for i in range(num_draws)]
        found.append(np.stack([each[:, 0] - each[:, 1] for each in drawn], 1))
    evaluations = 2 * terms.num_terms * num_draws + terms.num_pilot.mean()
    return ContextDifference(joined(found, len(x)).T, float(evaluations))
