r"""The audit of a network that was trained elsewhere: its bound, the terms of the bound, and errors of convention.

Most errors are measured in nats, by the gain of the bound by the repair on the same data and the same noise. They are reported if the gain is more
than five of its standard errors *and* more than 0.01 nats (0.014 bits) a dimension; 0.05 nats if a factor is fitted, 0.1 if a range is. An output that is not
finite, random or dependent on the batch and a context that is ignored are reported whatever their cost. The readings of the network
(:mod:`probdiff.diagnostics.readings`) are compared with each other; all other errors are measured under the best reading.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from probdiff._checks import PyTree, Whole, require, require_count, require_key, require_type
from probdiff.chain.forward import prior_kl
from probdiff.chain.reverse import GaussianKernel
from probdiff.diagnostics.agreement import TwoWays, compute_both_ways
from probdiff.diagnostics.audit_result import Audit, Finding
from probdiff.diagnostics.datatree import inspect_terms, to_datatree
from probdiff.diagnostics.equal_calls import compare_equal_calls
from probdiff.diagnostics.readings import (
    ANSWERS,
    BEYOND,
    EARLY,
    LATE,
    NORMALS,
    OTHERS_CONTEXT,
    OWN,
    RANGE,
    RANGE_BY_DIM,
    REVERSED,
    SCALED,
    STANDARD_NORMALS,
    Reading,
    ReadingComparison,
    compare_readings,
)
from probdiff.diffusion import Diffusion
from probdiff.elbo.estimate import Estimate
from probdiff.programs.sites import Data

RANDOM = "random output"
SURE = 5.0  # standard errors
# The gain that a repair must exceed, in nats a dimension; larger if it has fitted numbers, which improve any network of few iterations.
WORTH, WORTH_OF_FACTOR, WORTH_OF_RANGE = 0.01, 0.05, 0.1
SAME = 1e-5  # relative: rounding of an excess in float32
STEP_WORDS = {
    EARLY: "The network counts the steps from 0: called with n − 1 instead of n, it has the larger bound",
    LATE: "The network is called with a step too low: called with n + 1 instead of n, it has the larger bound",
    REVERSED: "The network counts the steps from the noisy end: called with N + 1 − n instead of n, it has the larger bound",
}


def audit(
    diffusion: Diffusion, x: Data, *, context: PyTree = None, key: PRNGKeyArray, num_draws: Whole = 8, progress: bool = False
) -> Audit:
    """Audit a network that was trained elsewhere, perhaps by other conventions: its bound on data, and errors in its use.

    It looks for a prior KL that is not small; steps out of order or off by one; a prediction that is a multiple of the noise, minus the
    noise, v, x_0 or a score; another range of the data; a context that is ignored; predictions that depend on other data of the batch; an output that is
    random or not finite; reverse variances that are worse than both choices of Ho et al. (2020). Most are reported
    if the repair gains more than five standard errors and 0.01 nats a dimension (:mod:`probdiff.diagnostics.findings`); incomplete training is not an error. A shift by
    one step matters little if there are many: at N = 1000 it is not detected, and does no harm.

    The cost is about that of eleven bounds with all steps, and of one sample for each datum.

    Args:
        diffusion: The model that contains the network.
        x: Data of the kind that the network was trained on, preferably held out; shape ``(datum, dim)``, at least two, a hundred or more to detect
            small errors.
        context: Of a conditional model: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key.
        num_draws: Draws of the noise for each datum, at least two.
        progress: Show progress bars.

    Returns:
        An :class:`Audit`.

    Raises:
        ValueError, TypeError: If the data do not suit the model, or there are fewer than two data or draws.

    Example:
        >>> import jax, numpy as np, probdiff
        >>> oracle, schedule = probdiff.oracles.GaussianOracle([0.0], [[0.2]]), probdiff.log_snr_schedule(10)
        >>> network = oracle.network(schedule)
        >>> x = oracle.sample(np.random.default_rng(0), 64).astype(np.float32)
        >>> wrong = probdiff.Diffusion(schedule, lambda z, n: -network(z, n), reverse_variance="forward")
        >>> [finding.name for finding in probdiff.audit(wrong, x, key=jax.random.key(0)).findings]
        ['predicts minus the noise']
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.evaluated().given(context)
    x = diffusion.read_data(x)
    require_key(key)
    require_count("num_draws", num_draws)
    require(num_draws >= 2, "num_draws", "at least 2, for an error", num_draws)
    require(len(x) >= 2, "x", "at least two data", len(x))
    bound_key, call_key, reading_key = jax.random.split(key, 3)
    both = compute_both_ways(diffusion, x, key=bound_key, num_draws=num_draws, progress=progress)
    step_kl = np.asarray(both.terms.step_kl, np.float64).mean(0)
    compared, gained, findings = None, None, [*_not_finite(both)]
    if not findings and diffusion.kernel.prediction == "noise":
        compared = compare_readings(diffusion, x, key=reading_key, num_draws=num_draws, progress=progress)
        calls = [*_calls(diffusion, x, call_key)]
        # (If the output is random, another reading may merely have less noise.)
        random = any(finding.name == RANDOM for finding in calls)
        best = Reading(OWN, OWN) if random else _best(compared)
        gained, worse = _optimal_variance(compared, best)
        findings += [*([] if random else _misread(compared, best)), *_context(diffusion, compared), *worse]
        findings += [*_prior(compared.models[best.asked], x), *calls]
    elif not findings:
        findings += _prior(diffusion, x)
    return Audit(
        findings=sorted(findings, key=lambda finding: -finding.nats),
        two_ways=both,
        step_kl=step_kl.mean(-1),
        step_kl_error=step_kl.std(-1, ddof=1) / np.sqrt(len(x)),
        inspection=inspect_terms(to_datatree(both.terms), None if diffusion.likelihood.levels is None else x.shape[1]),
        readings={} if compared is None else {reading: Estimate.of(each) for reading, each in compared.gains.items() if reading != Reading(OWN, OWN)},
        slopes=None if compared is None else compared.slopes,
        variance=gained,
        levels=diffusion.likelihood.levels,
        dim=x.shape[1],
        schedule=diffusion.schedule,
    )


def _stands_out(gain: Float[np.ndarray, "datum"], dim: int, worth: float = WORTH) -> Estimate | None:
    """The gain, if it is significant and above the limit; otherwise None."""
    estimate = Estimate.of(gain)
    return estimate if estimate.mean > max(SURE * estimate.error, worth * dim) else None


def _best(compared: ReadingComparison) -> Reading:
    """The reading with the largest gain; the model's own, if no gain is significant.

    For a poor network, a reading with smaller predictions would gain: a reading must therefore predict the noise as well as independent normals do. Steps
    are off by one only if a shift by two loses again; a factor is reported only if most ranges of steps have it. A reading with more fitted
    numbers must gain more than one with fewer.
    """
    gains, dim = compared.gains, compared.dim
    own, scaled, whole, by_dim = (Reading(*each) for each in ((OWN, OWN), (OWN, SCALED), (RANGE, OWN), (RANGE_BY_DIM, OWN)))
    candidates = [r for r in gains if r.asked in (OWN, EARLY, LATE, REVERSED) and r.answer in (OWN, *ANSWERS) and _is_as_good_as_normals(compared, r)]
    for r in [r for r in candidates if r.asked in BEYOND]:
        if not _stands_out(gains[r] - gains[r._replace(asked=BEYOND[r.asked])], dim):
            candidates.remove(r)
    best = max(candidates, key=lambda reading: gains[reading].mean(), default=own)
    best = best if _stands_out(gains[best], dim) else own
    slopes, factor = compared.slopes.slope, compared.slopes.median
    is_factor = np.median(np.abs(slopes - factor)) < abs(factor - 1) / 2
    for r, worth in (*([(scaled, WORTH_OF_FACTOR)] if is_factor else []), (whole, WORTH_OF_RANGE), (by_dim, WORTH_OF_RANGE)):
        if r in gains and _predicts(compared, r) and _stands_out(gains[r] - gains[best], dim, worth):
            best = r
    return best


def _predicts(compared: ReadingComparison, reading: Reading, share: float = 0.5) -> bool:
    """Whether a reading predicts at least a given fraction of the noise that independent normals predict."""
    return bool(compared.explained(reading).mean() > share * compared.explained(Reading(OWN, NORMALS)).mean())


def _is_as_good_as_normals(compared: ReadingComparison, reading: Reading) -> bool:
    """Whether a reading predicts as much of the noise as independent normals, up to a hundredth; as v, also more of the noise than v = 0."""
    more = Estimate.of(compared.explained(reading) - compared.explained(Reading(OWN, STANDARD_NORMALS)))
    return _predicts(compared, reading, 0.99) and ("v" not in reading.answer.split() or more.mean > SURE * more.error)


def _misread(compared: ReadingComparison, best: Reading) -> Iterator[Finding]:
    """The errors of the model's own reading: in how the network is called, and in the meaning of its output, each measured given the other."""
    gains, normals = compared.gains, Reading(OWN, NORMALS)
    if not _predicts(compared, best) and (gain := _stands_out(gains[normals], compared.dim)):
        shares = (f"{max(0, compared.explained(reading).mean()):.1%}" for reading in (best, normals))
        words = "The network predicts {} of the noise, independent normals with the means and variances of the data {}: it is not trained, or its output is misinterpreted"
        yield Finding("predicts no noise", words.format(*shares), *gain[:2])
    if best.answer != OWN:
        gain = _stands_out(gains[best] - gains[Reading(best.asked, OWN)], compared.dim)
        if gain and best.answer == SCALED:
            parts = ", ".join(f"{slope:.3f}" for slope in compared.slopes.slope)
            words = f"The prediction is off by a factor: the noise is {compared.slopes.median:.3f} times the prediction ({parts} in ranges of steps from n = 1 on)"
            yield Finding("off by a scale", words, *gain[:2])
        elif gain:
            yield Finding(f"predicts {best.answer}", f"The network predicts {best.answer}, and is taken to predict {_taken_for(compared)}", *gain[:2])
    if best.asked != OWN:
        gain = _stands_out(gains[best] - gains[Reading(OWN, best.answer)], compared.dim)
        if gain and best.asked in STEP_WORDS:
            name = "steps out of order" if best.asked == REVERSED else "off by a step"
            yield Finding(name, STEP_WORDS[best.asked], *gain[:2])
        elif gain:
            yield Finding("range of the data", _range(compared, best.asked), *gain[:2])


def _taken_for(compared: ReadingComparison) -> str:
    """The meaning that the model gives to the output of the network."""
    name = type(compared.models[OWN].network).__name__
    return {"VHead": "v", "X0Head": "x_0"}.get(name, f"the quantity for a {name}" if name.endswith("Head") else "the noise")


def _range(compared: ReadingComparison, asked: str) -> str:
    """The range of the data that the network was trained on, beside the present range, as text."""
    likelihood: Any = compared.models[asked].likelihood
    samples = compared.samples
    a, b = np.asarray(likelihood.scale), np.asarray(likelihood.shift)
    same = np.ptp(a) == np.ptp(b) == 0
    words = f"{a[0]:.3g} · x_0 {'+' if b[0] >= 0 else '−'} {abs(b[0]):.3g}" if same else f"a · x_0 + b with a from {a.min():.3g} to {a.max():.3g} and b from {b.min():.3g} to {b.max():.3g}"
    return f"The network was trained on data of another range: its samples have mean {samples.mean():.3g}, and the encoded data x_0 should be {words}"


def _not_finite(both: TwoWays) -> Iterator[Finding]:
    """Terms that are not finite."""
    bad = ~np.isfinite(np.concatenate([both.terms.reconstruction[:, None], both.terms.step_kl], 1))
    if bad.any():
        steps = 1 + np.flatnonzero(bad.any((0, 2)))
        where = f"n = {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from n = {steps[0]} to {steps[-1]}"
        words = f"The terms of {where} are not finite, for {bad[:, steps - 1].mean():.1%} of the predictions there"
        yield Finding("output not finite", words, float("inf"), float("nan"))


def _prior(diffusion: Diffusion, x: Data) -> Iterator[Finding]:
    """A chain that ends before the data are noise."""
    kl = np.asarray(prior_kl(diffusion.schedule, diffusion.likelihood.encode(x)), np.float64)
    gain, dim = _stands_out(kl, diffusion.likelihood.encoded_dim(x.shape[1])), diffusion.likelihood.encoded_dim(x.shape[1])
    if gain:
        last = float(np.asarray(diffusion.schedule.log_snr)[-1])
        words = f"The chain ends before the data are noise: the KL of q(z_N | x_0) to N(0, I) is {gain.mean / dim:.3g} nats a dimension, at a log-SNR of {last:.1f}"
        yield Finding("prior KL", words, *gain[:2])


def _context(diffusion: Diffusion, compared: ReadingComparison) -> Iterator[Finding]:
    """A context that changes nothing."""
    if OTHERS_CONTEXT not in compared.models:
        return
    leaves = zip(*(jax.tree.leaves(compared.models[name].context) for name in (OWN, OTHERS_CONTEXT)))
    varies = any(bool(jnp.any(own != other)) for own, other in leaves)
    excess = compared.excesses[Reading(OWN, OWN)].nats.sum(0)
    gain = compared.gains[Reading(OTHERS_CONTEXT, OWN)]
    if varies and (np.abs(gain) <= SAME * np.abs(excess)).all():
        words = f"The context is ignored: given the context of another datum, the bound changes by {np.abs(gain).max():.1g} nats at most"
        yield Finding("context ignored", words, 0.0, 0.0)


def _calls(diffusion: Diffusion, x: Data, key: PRNGKeyArray) -> Iterator[Finding]:
    """Predictions that should be equal and are not; a random prediction also differs for a datum alone."""
    differences = compare_equal_calls(diffusion, diffusion.likelihood.encode(x), key=key)
    twice, alone = differences["twice"], differences["alone"]
    if twice.is_there:
        words = f"The output is random, as with dropout: the same call twice differs by {twice.relative:.1%} of the prediction"
        yield Finding(RANDOM, words, *twice.nats[:2])
    elif alone.is_there:
        words = f"The data of a batch depend on each other, as with batch statistics: alone, a datum's prediction differs by {alone.relative:.1%}"
        yield Finding("coupled batch", words, *alone.nats[:2])


def _optimal_variance(compared: ReadingComparison, best: Reading) -> tuple[Estimate, list[Finding]]:
    r"""The gain by the optimal reverse variances under the best reading; a finding, if β̃_n and β_n are both better as well.

    At :math:`v_n = \tilde\beta_n e^r` the KL of a step is :math:`\tfrac d2 (e^{-r} - 1 + r) + e^{-r} \tilde w_n \|\epsilon - \hat\epsilon\|^2`, which
    is least at :math:`e^r = 1 + 2 \tilde w_n m_n`, :math:`m_n` being the mean squared error of a dimension; the value from one half of the data is used for
    the other half.
    """
    model, (nats, squared_error), dim = compared.models[best.asked], compared.excesses[best], compared.dim
    kernel, schedule, halves = model.kernel, model.schedule, np.arange(nats.shape[1]) % 2
    own = (np.asarray(kernel.constants(schedule, dim), np.float64)[1:, None] + nats[1:]).sum(0)
    weight = np.asarray(GaussianKernel("posterior").kl_weight(schedule), np.float64)[1:, None]
    least = np.zeros_like(own)
    for half in (0, 1):
        here, there = (squared_error[1:, halves == each] for each in (half, 1 - half))
        r = np.log1p(2 * weight * there.mean(1, keepdims=True) / dim)
        least[halves == half] = (dim / 2 * (np.expm1(-r) + r) + np.exp(-r) * weight * here).sum(0)
    gains = []
    for name in ("posterior", "forward"):
        textbook = GaussianKernel(name)
        constants, weights = (np.asarray(each, np.float64)[1:, None] for each in (textbook.constants(schedule, dim), textbook.kl_weight(schedule)))
        gains.append(own - (constants + weights * squared_error[1:]).sum(0))
    gain, worse = Estimate.of(own - least), all(_stands_out(each, dim) for each in gains)
    words = "The reverse variances are worse than β̃_n and than β_n; the gain is that of the optimal ones for the network"
    return gain, [Finding("reverse variance", words, *gain[:2])] if worse else []
