"""A noise schedule that is fitted along with the model."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from probdiff._checks import Number, Whole, require, require_count
from probdiff.chain.schedules import AbstractSchedule, ScheduleTables

KNOTS = 32  # largest number of linear pieces of the log-SNR
EVEN_SHARE = 0.05  # of the range of the log-SNR, spread evenly over the pieces for all parameters, so that no step vanishes


class LearnedSchedule(AbstractSchedule):
    r"""A schedule whose log-SNR falls from a learned start to a learned end in a learned shape.

    The log-SNR is piecewise linear in n, each piece with a positive share of the range. The initial schedule is
    :func:`~probdiff.log_snr_schedule`. The tables are JAX arrays that can be differentiated with respect to the parameters.
    :meth:`fixed` gives the :class:`~probdiff.NoiseSchedule` of the present parameters, which replaces the schedule outside training.

    With many steps the bound hardly depends on the shape, but the variance of a one-step estimate does:
    see ``AnalyticELBO(…, schedule_loss="variance")``. Source: Kingma et al. (2021), arXiv:2107.00630: section 3.2 and appendix H for a
    schedule that is learned (there by a monotonic network), section 5.1 and appendix I.2 for the bound and the variance.

    Args:
        num_steps: N, at least 2.
        log_snr_max: Log-SNR after the first step, to start from.
        log_snr_min: Log-SNR after the last step, to start from.

    Attributes:
        start: Log-SNR after the first step.
        log_range: Logarithm of the difference between the first and the last log-SNR.
        logits: Logits of the share of the range that belongs to each piece, shape ``(piece,)``.

    Raises:
        ValueError: If ``num_steps`` is less than 2, or the log-SNR does not decrease.

    Example:
        >>> import jax, probdiff
        >>> schedule = probdiff.LearnedSchedule(num_steps=10)
        >>> diffusion = probdiff.Diffusion(schedule, probdiff.MLP(2, key=jax.random.key(0), hidden=8))  # trained along with the network
        >>> round(schedule.fixed().log_snr[0].item(), 2)
        10.0
    """

    start: Float[Array, ""]
    log_range: Float[Array, ""]
    logits: Float[Array, "piece"]
    num_steps: int = eqx.field(static=True)
    ends: tuple[float, float] = eqx.field(static=True)

    def __init__(self, num_steps: Whole, log_snr_max: Number = 10.0, log_snr_min: Number = -8.0) -> None:
        require_count("num_steps", num_steps)
        require(num_steps >= 2, "num_steps", "at least 2 for a schedule that is learned", num_steps)
        require(
            np.isfinite(log_snr_min) and np.isfinite(log_snr_max) and log_snr_min < log_snr_max,
            "log_snr_max, log_snr_min",
            "finite, log_snr_min < log_snr_max",
            f"{log_snr_max}, {log_snr_min}",
        )
        self.start = jnp.asarray(float(log_snr_max))
        self.log_range = jnp.asarray(float(np.log(log_snr_max - log_snr_min)))
        self.logits = jnp.zeros(min(KNOTS, num_steps - 1))
        self.num_steps = int(num_steps)
        self.ends = float(log_snr_max), float(log_snr_min)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"num_steps": self.num_steps, "log_snr_max": self.ends[0], "log_snr_min": self.ends[1]}

    def tables(self) -> ScheduleTables:
        """The :class:`ScheduleTables`, from differences of log-SNR in working precision."""
        pieces = len(self.logits)
        share = (1 - EVEN_SHARE) * jax.nn.softmax(self.logits) + EVEN_SHARE / pieces
        covered = np.clip(np.linspace(0, pieces, self.num_steps)[:, None] - np.arange(pieces), 0, 1)
        # How far the log-SNR has fallen at each step, and since the step before: two products, as a difference would cancel.
        fallen, fall = (
            jnp.exp(self.log_range) * jnp.matmul(jnp.asarray(matrix, share.dtype), share, precision="highest")
            for matrix in (covered, np.diff(covered, axis=0))
        )
        return ScheduleTables.from_log_snr(self.start - fallen, fall)
