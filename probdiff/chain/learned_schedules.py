r"""A noise schedule with parameters: the guide is fitted along with the model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from probdiff._checks import require, require_count
from probdiff.chain.schedules import NoiseSchedule

KNOTS = 32
EVEN_SHARE = 0.05  # of the range that is spread evenly whatever the parameters, so that no step vanishes


class ScheduleTables(eqx.Module):
    """The tables of a schedule as JAX arrays; the attributes of :class:`~probdiff.NoiseSchedule`."""

    beta: jax.Array
    alpha: jax.Array
    alpha_bar: jax.Array
    one_minus_alpha_bar: jax.Array
    signal: jax.Array
    noise: jax.Array
    log_snr: jax.Array
    sigma: jax.Array
    posterior_variance: jax.Array

    @property
    def num_steps(self):
        """The number of steps N."""
        return len(self.beta)


class LearnedSchedule(eqx.Module):
    r"""A schedule whose log-SNR falls from a learned start to a learned end in a learned shape.

    The log-SNR is piecewise linear in n between knots, each piece a positive share of the range. It starts as
    :func:`~probdiff.log_snr_schedule`. It has the tables of a :class:`~probdiff.NoiseSchedule`, as JAX arrays that can be differentiated
    with respect to the parameters. :meth:`fixed` makes a ``NoiseSchedule`` of it, which is what evaluations use.

    With many steps the bound hardly depends on the shape, but the variance of a one-step estimate does:
    see ``AnalyticELBO(…, shape="variance")``. Source: Kingma et al. (2021), arXiv:2107.00630, section 4 and appendix H.

    Args:
        num_steps: N, at least 2.
        log_snr_max: Log-SNR after the first step, to start from.
        log_snr_min: Log-SNR after the last step, to start from.

    Attributes:
        start: Log-SNR after the first step.
        log_range: Log of how far it falls.
        shape: Logits of the shares of the pieces.
    """

    start: jax.Array
    log_range: jax.Array
    shape: jax.Array
    num_steps: int = eqx.field(static=True)
    ends: tuple = eqx.field(static=True)

    def __init__(self, num_steps, log_snr_max=10.0, log_snr_min=-8.0):
        require_count("num_steps", num_steps)
        require(num_steps >= 2, "num_steps", "at least 2 for a schedule that is learned", num_steps)
        require(
            np.isfinite([log_snr_min, log_snr_max]).all() and log_snr_min < log_snr_max,
            "log_snr_max, log_snr_min",
            "finite, log_snr_min < log_snr_max",
            f"{log_snr_max}, {log_snr_min}",
        )
        self.start = jnp.asarray(float(log_snr_max))
        self.log_range = jnp.asarray(float(np.log(log_snr_max - log_snr_min)))
        self.shape = jnp.zeros(min(KNOTS, num_steps - 1))
        self.num_steps = int(num_steps)
        self.ends = float(log_snr_max), float(log_snr_min)

    @property
    def arguments(self):
        """The arguments that this schedule was made with."""
        return {"num_steps": self.num_steps, "log_snr_max": self.ends[0], "log_snr_min": self.ends[1]}

    def tables(self):
        """The :class:`ScheduleTables`, from differences of log-SNR in working precision."""
        pieces = len(self.shape)
        share = (1 - EVEN_SHARE) * jax.nn.softmax(self.shape) + EVEN_SHARE / pieces
        covered = np.clip(np.linspace(0, pieces, self.num_steps)[:, None] - np.arange(pieces), 0, 1)
        # How far the log-SNR has fallen at each step, and since the step before: two products, as a difference would cancel.
        fallen, fall = (
            jnp.exp(self.log_range) * jnp.matmul(jnp.asarray(matrix, share.dtype), share, precision="highest")
            for matrix in (covered, np.diff(covered, axis=0))
        )
        log_snr = self.start - fallen
        log_alpha_bar, log_noise = jax.nn.log_sigmoid(log_snr), jax.nn.log_sigmoid(-log_snr)
        noise = jnp.exp(log_noise)
        # 1 − SNR_n / SNR_{n−1} = β_n / (1 − ᾱ_n) = β̃_n / (1 − ᾱ_{n−1})
        lost = -jnp.expm1(-fall)
        return ScheduleTables(
            beta=jnp.concatenate([noise[:1], lost * noise[1:]]),
            alpha=jnp.exp(jnp.diff(log_alpha_bar, prepend=jnp.zeros_like(log_snr[:1]))),
            alpha_bar=jnp.exp(log_alpha_bar),
            one_minus_alpha_bar=noise,
            signal=jnp.exp(log_alpha_bar / 2),
            noise=jnp.exp(log_noise / 2),
            log_snr=log_snr,
            sigma=jnp.exp(-log_snr / 2),
            posterior_variance=jnp.concatenate([jnp.zeros_like(noise[:1]), lost * noise[:-1]]),
        )

    def __getattr__(self, name):
        if name in ScheduleTables.__dataclass_fields__:
            return getattr(self.tables(), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def fixed(self):
        """The :class:`~probdiff.NoiseSchedule` of the present log-SNR, also while JAX is tracing something else."""
        with jax.ensure_compile_time_eval():
            log_snr = self.log_snr
        return NoiseSchedule.from_log_snr(np.asarray(log_snr, np.float64))


def require_schedule(schedule):
    """Refuse anything but a schedule."""
    kinds = NoiseSchedule | LearnedSchedule | ScheduleTables
    require(isinstance(schedule, kinds), "schedule", "a NoiseSchedule", type(schedule).__name__, TypeError)
