r"""The labels of data by Bayes' rule on the bounds of a conditional model.

p(c | x) ∝ p(x | c) p(c), with the bound in place of log p(x | c). For most labels few network evaluations suffice to exclude them. Evaluations are therefore
made in rounds, for those labels of each datum that may still be the best. Source of the idea: Li et al. (2023), arXiv:2303.16203, section 3.2 and
algorithm 2; Clark and Jaini (2023), arXiv:2303.15233, section 3. There the steps are weighted equally or by hand; here they have the weights of the bound.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray
from scipy import special

from probdiff._checks import (
    Number,
    Numbers,
    PyTree,
    Whole,
    require,
    require_count,
    require_finite,
    require_key,
    require_type,
)
from probdiff._chunks import blocks, joined
from probdiff._context import named, num_rows, same_rows
from probdiff.diagnostics.contexts import DATA_AT_ONCE, CommonTerms, Terms
from probdiff.diffusion import Diffusion
from probdiff.programs.sites import Data

TERMS = 8  # steps of each datum and label, in a draw
GROWTH = 4  # a round has one draw, and one more for every four earlier draws


class Classification(NamedTuple):
    """The result of :func:`~probdiff.classify`.

    Attributes:
        posterior: The probability of each label, from the bounds and the prior, shape ``(datum, label)``. The probability of a label that was dropped early is
            as uncertain as at that time.
        error: An approximate upper bound on the probability, given the Monte Carlo error, that another label has the larger bound plus log prior; shape ``(datum,)``.
        is_decided: Whether all labels but one were dropped, shape ``(datum,)``.
        num_evaluations: Network evaluations for all labels together, shape ``(datum,)``.

    Example:
        >>> import numpy as np, probdiff
        >>> posterior = np.array([[0.9, 0.1], [0.4, 0.6]])  # two data, two labels
        >>> found = probdiff.diagnostics.Classification(posterior, np.array([0.001, 0.2]), np.array([True, False]), np.array([64, 1000]))
        >>> found
        Classification of 2 data among 2 labels: 1 decided, 532 network evaluations a datum
        >>> found.label.tolist()
        [0, 1]
    """

    posterior: Float[np.ndarray, "datum label"]
    error: Float[np.ndarray, "datum"]
    is_decided: Bool[np.ndarray, "datum"]
    num_evaluations: Int[np.ndarray, "datum"]

    @property
    def label(self) -> Int[np.ndarray, "datum"]:
        """The most probable label of each datum, as its position among the labels, shape ``(datum,)``."""
        return self.posterior.argmax(1)

    def __repr__(self) -> str:
        """The number of decided data, and of network evaluations."""
        data, labels = self.posterior.shape
        return (
            f"Classification of {data} data among {labels} labels: {self.is_decided.sum()} decided, "
            f"{self.num_evaluations.mean():.0f} network evaluations a datum"
        )


def classify(
    diffusion: Diffusion,
    x: Data,
    labels: PyTree,
    *,
    prior: Numbers | None = None,
    key: PRNGKeyArray,
    num_evaluations: Whole = 1000,
    error_level: Number = 0.01,
    progress: bool = False,
) -> Classification:
    r"""The posterior over the labels of each datum, by the bounds of a conditional model.

    In each round, of 8 random steps plus a quarter of all earlier ones, the bound of a datum is estimated under every remaining label, on common random numbers. Then
    labels are dropped whose bound is significantly below the best, by Student's t on the difference; a datum is decided when one label remains. The error level is
    divided among labels and rounds, so that the label with the largest bound is dropped with at most about this probability. (It need not be the true label: the bound
    is not the likelihood, and the model is not the true distribution.)

    Args:
        diffusion: The model.
        x: Data, shape ``(datum, dim)``.
        labels: At least two contexts, as for :meth:`~probdiff.Diffusion.given`, all different: a sequence such as ``range(10)``, or an array or a tree of arrays whose leading
            axis is the label.
        prior: Probability of each label up to a factor, positive, shape ``(label,)``; equal if not given.
        key: JAX key.
        num_evaluations: Largest number of network evaluations for a datum, all labels together. The evaluations from which the
            probabilities of the steps are learned, on at most 32 of the data, are not limited by it but are counted in the result.
        error_level: Probability that the label with the largest bound is dropped, 0 to 1; with 0 no label is dropped.
        progress: Show a progress bar.

    Returns:
        A :class:`Classification`.

    Raises:
        ValueError, TypeError: If the data or the labels do not suit the model, or an argument is out of range.

    Example:
        >>> import jax, numpy as np, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0], [[1.0]], slope=[[3.0]])
        >>> exact = probdiff.Diffusion(schedule, normal.network(schedule), reverse_variance="forward")  # p(x | c) = N(3c, 1)
        >>> labels, x = np.array([[-1.0], [1.0]]), np.array([[-3.0], [3.0]], np.float32)
        >>> probdiff.classify(exact, x, labels, key=jax.random.key(0)).label.tolist()
        [0, 1]
    """
    require_type("diffusion", diffusion, Diffusion)
    given = _given_labels(diffusion.evaluated(), labels)
    num_labels = num_rows(given.context)
    x = given.take(np.zeros(np.shape(x)[:1] or 1, int)).read_data(x)
    log_prior = np.zeros(num_labels) if prior is None else _log_prior(prior, num_labels)
    require_key(key)
    require_count("num_evaluations", num_evaluations)
    enough = f"at least {TERMS} for each label, {TERMS * num_labels}"
    require(num_evaluations >= TERMS * num_labels, "num_evaluations", enough, num_evaluations)
    require(isinstance(error_level, Number) and 0 <= error_level <= 1, "error_level", "0 <= error_level <= 1", repr(error_level))
    rows = np.broadcast_to(np.arange(num_labels), (len(x), num_labels))
    pilot_key, key = jax.random.split(key)
    terms = CommonTerms(given, x, rows, TERMS, False, pilot_key)
    found = [
        _classified(terms, data, log_prior, key, int(num_evaluations), float(error_level))
        for data in blocks(len(x), DATA_AT_ONCE, unit="datum", desc="labels", progress=progress)
    ]
    log_odds, error, is_decided, spent = joined(found, len(x))
    return Classification(special.softmax(log_odds, 1), error, is_decided, spent + terms.num_pilot)


def _given_labels(diffusion: Diffusion, labels: Any) -> Diffusion:
    """The model given the labels, checked."""
    labels = np.asarray(labels) if isinstance(labels, Sequence) else labels
    with named("labels"):
        given = diffusion.given(labels)
    require(given.context is not None, "labels", "contexts, one for each label", None)
    count = num_rows(given.context)
    require(count >= 2, "labels", "at least two", count)
    same = np.argwhere(np.triu(same_rows(given.context), 1))
    require(len(same) == 0, "labels", "different labels", f"two that are the same, at {same[:1].tolist()}")
    return given


def _log_prior(prior: Numbers, num_labels: int) -> Float[np.ndarray, "label"]:
    """The logarithm of the normalised prior."""
    try:
        prior = np.asarray(prior, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"prior: Expected numbers, shape ({num_labels},); got {type(prior).__name__}") from None
    require(prior.shape == (num_labels,), "prior", f"shape ({num_labels},), one for each label", f"shape {prior.shape}")
    require_finite("prior", prior)
    require(np.all(prior > 0), "prior", "positive numbers; leave out a label that is impossible", prior)
    return np.log(prior / prior.sum())


def _classified(
    terms: CommonTerms, data: Int[np.ndarray, "datum"], log_prior: Float[np.ndarray, "label"], key: PRNGKeyArray, most: int, error_level: float
) -> tuple[np.ndarray, ...]:
    """For some data: log-odds against the best label, an approximate upper bound on the probability that another label is better, whether the datum is decided, and the number of evaluations."""
    left = np.ones((len(data), len(log_prior)), bool)
    log_odds, better = np.zeros(left.shape), np.ones(left.shape)
    spent = np.zeros(len(data), int)
    seen: list[Terms] = []
    for number in itertools.count(1):
        before = len(seen)
        for _ in range(1 + before // GROWTH):
            cost = terms.num_terms * left.sum(1)
            is_open = (left.sum(1) > 1) & (spent + cost <= most)
            if is_open.any():
                spent += np.where(is_open, cost, 0)
                seen.append(terms.draw(jax.random.fold_in(key, len(seen)), data, left & is_open[:, None]))
        if len(seen) == before:
            break
        log_odds, better = _against_best(np.concatenate(seen), left, log_prior)
        # Over all rounds the levels add up to the error level.
        left &= better >= error_level / (len(log_prior) - 1) * 6 / (np.pi * number) ** 2
    return log_odds, np.minimum(better.sum(1) - 1, 1.0), left.sum(1) == 1, spent


def _against_best(
    terms: Terms, left: Bool[np.ndarray, "datum label"], log_prior: Float[np.ndarray, "label"]
) -> tuple[Float[np.ndarray, "datum label"], Float[np.ndarray, "datum label"]]:
    """The log-odds of each label against the best remaining label, and the probability that it is the better one (1 for the best label itself)."""
    own = np.where(left, np.nanmean(terms, 0) + log_prior, -np.inf)
    best = own.argmax(1)[:, None]
    difference = terms - np.take_along_axis(terms, best[None], 2)
    count = np.isfinite(difference).sum(0)
    error = np.nanstd(difference, 0, ddof=1) / np.sqrt(count)
    log_odds = np.nanmean(difference, 0) + log_prior - log_prior[best]
    better = special.stdtr(count - 1, log_odds / np.maximum(error, np.finfo(float).tiny))
    np.put_along_axis(better, best, 1.0, 1)
    return log_odds, better
