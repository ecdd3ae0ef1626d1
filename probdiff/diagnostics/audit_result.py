"""The result of an audit, and its text."""

import dataclasses
import textwrap
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from probdiff.chain.schedules import AbstractSchedule
from probdiff.diagnostics.agreement import TwoWays
from probdiff.diagnostics.datatree import to_datatree
from probdiff.diagnostics.readings import Reading
from probdiff.diagnostics.tables import LABELS, WIDTH
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.terms import bits_per_dim


class Finding(NamedTuple):
    """An error in a model, found by an audit.

    Attributes:
        name: The kind of error, a fixed short text.
        sentence: The measurement, in a sentence.
        nats: The gain of the bound by the repair, nats per datum; infinite if there is no bound, 0 for an ignored context.
        error: Standard error of the gain over data.

    Example:
        >>> from probdiff.diagnostics import Finding
        >>> Finding("off by a step", "The network counts the steps from 0", nats=0.4, error=0.02).name
        'off by a step'
    """

    name: str
    sentence: str
    nats: float
    error: float


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result of :func:`~probdiff.audit`. It is printed as a table; values are in nats per datum.

    Attributes:
        findings: The errors found, a list of :class:`Finding`, the most costly first; empty if none was found.
        two_ways: The bound by its terms and by ``Trace_ELBO``, :class:`TwoWays`.
        step_kl, step_kl_error: KL of each step n = 2 … N and its standard error over data, shape ``(num_steps - 1,)``.
        inspection: The summary of the terms by :func:`~probdiff.diagnostics.inspect_terms`.
        readings: The gain of the bound by other readings of the network, a dict from :class:`Reading` to ``Estimate``; mostly negative. Empty
            if the terms are not all finite or the kernel needs another prediction than the noise.
        slopes: The best factor of ε̂, :class:`Slopes`; None in that case.
        variance: The gain of the bound by the optimal reverse variances, an ``Estimate``; None in that case.
        levels: Number of levels of data on a grid, so that bits/dim are defined; None for data with a density.
        dim: Number of dimensions.
        schedule: The noise schedule.

    Example:
        >>> import jax, numpy as np, probdiff
        >>> normal, schedule = probdiff.oracles.GaussianOracle([0.0], [[0.2]]), probdiff.log_snr_schedule(10)
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule), reverse_variance="forward")
        >>> found = probdiff.audit(diffusion, normal.sample(np.random.default_rng(0), 16).astype(np.float32), key=jax.random.key(0), num_draws=2)
        >>> found.findings, found.step_kl.shape
        ([], (9,))
    """

    findings: list[Finding]
    two_ways: TwoWays
    step_kl: Float[np.ndarray, "step"]
    step_kl_error: Float[np.ndarray, "step"]
    inspection: dict[str, Any]
    readings: dict[Reading, Estimate]
    slopes: Any
    variance: Estimate | None
    levels: int | None
    dim: int
    schedule: AbstractSchedule

    @property
    def elbo(self) -> Estimate:
        """The bound, nats per datum."""
        return self.two_ways.analytic

    @property
    def bits_per_dim(self) -> Estimate | None:
        """The code length in bits per dimension, of data on a grid."""
        if self.levels is None:
            return None
        mean, *errors = (float(bits_per_dim(each, self.dim)) for each in self.elbo)
        return Estimate(mean, *map(abs, errors))

    @property
    def sound(self) -> bool:
        """Whether nothing was found, and the bound is the same both ways."""
        return not self.findings and self.two_ways.agree

    def plot(self, title: str = "") -> Any:
        """A figure: the KL of each step."""
        from probdiff.diagnostics.plots import plot_step_kl

        return plot_step_kl(to_datatree(self.two_ways.terms), self.schedule, title)

    def to_dict(self) -> dict[str, Any]:
        """All results, a dict for JSON."""
        bits, (difference, error) = self.bits_per_dim, self.two_ways.difference
        both = {"analytic": self.elbo._asdict(), "trace_elbo": self.two_ways.trace._asdict(), "difference": difference, "difference_error": error}
        slopes = self.slopes and [{"steps": list(s), "slope": c, "error": e} for s, c, e in zip(*(list(each) for each in self.slopes))]
        return {
            "sound": self.sound,
            "findings": [finding._asdict() for finding in self.findings],
            "elbo": self.elbo._asdict(),
            "bits_per_dim": bits and bits._asdict(),
            "two_ways": both | {"agree": self.two_ways.agree},
            "terms": self.inspection["table"].to_dict("index"),
            "step_kl": self.step_kl.tolist(),
            "step_kl_error": self.step_kl_error.tolist(),
            "readings": [reading._asdict() | gain._asdict() for reading, gain in self.readings.items()],
            "slopes": slopes,
            "variance": self.variance and self.variance._asdict(),
            "num_items": self.inspection["num_items"],
            "num_draws": self.inspection["num_draws"],
            "dim": self.dim,
            "num_steps": self.schedule.num_steps,
        }

    def __repr__(self) -> str:
        """The table, and the findings."""
        return format_audit(self)


def format_audit(audit: Audit) -> str:
    """An :class:`Audit` as text of 80 columns: the terms of the bound, the bound two ways, and the findings."""
    table, both = audit.inspection["table"], audit.two_ways
    lines = [
        f"Audit on {audit.inspection['num_items']} data of {audit.dim} dimensions, N = {audit.schedule.num_steps} steps",
        f"{'':38}{'nats':>12}{'± s.e.':>10}{'share':>9}",
    ]
    for name, row in table.iterrows():
        label = LABELS.get(str(name), str(name).replace("step_kl[", "KL of steps ").rstrip("]"))
        share = f"{row['share']:9.1%}" if row["share"] >= 0 else ""
        lines.append(f"{label:38}{row['nats']:12.4f}{row['error_over_items']:10.4f}{share}")
    if audit.bits_per_dim is not None:
        lines.append(f"{'bits/dim':38}{audit.bits_per_dim.mean:12.4f}{audit.bits_per_dim.error:10.4f}")
    difference, error = both.difference
    lines += [
        f"{LABELS['trace_elbo']:38}{both.trace.mean:12.4f}{both.trace.error:10.4f}",
        f"{'difference (± Monte Carlo error)':38}{difference:12.4f}{error:10.4f}   {'they agree' if both.agree else 'THEY DISAGREE'}",
    ]
    if audit.variance is not None:
        lines.append(f"{'the best reverse variances would gain':38}{audit.variance.mean:12.4f}{audit.variance.error:10.4f}")
    words = [f"{i}. {found.name}: {found.sentence} ({_gain(found)})" for i, found in enumerate(audit.findings, 1)]
    lines += ["", f"What is wrong: {'' if words else 'nothing was found'}".rstrip()]
    return "\n".join([*lines, *(line for each in words for line in textwrap.wrap(each, WIDTH, subsequent_indent="   "))])


def _gain(found: Finding) -> str:
    """The gain by a repair, as text."""
    return f"{found.nats:.4g} ± {found.error:.2g} nats" if np.isfinite(found.nats) else "there is no bound"
