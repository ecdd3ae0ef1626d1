r"""Noise schedules: how much noise the forward chain has added after each step.

The chain is :math:`q(z_n | z_{n-1}) = N(\sqrt{\alpha_n} z_{n-1}, \beta_n I)` with
:math:`\alpha_n = 1 - \beta_n` and :math:`\bar\alpha_n = \prod_{i \le n} \alpha_i`, for steps
n = 1 … N. Arrays over steps hold step n at ``[n - 1]``.

Tables are float64 NumPy arrays whatever JAX's precision; they are cast when they are looked up.
They are constants: neither an optimiser nor weight decay can change them. The tables of a :class:`~probdiff.LearnedSchedule`, in contrast, are
JAX arrays, functions of its parameters: the guide is then fitted along with the model.

Source: Ho et al. (2020), arXiv:2006.11239, eqs. 2 and 4.
"""

import abc
from types import ModuleType
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Float64, Integer

from probdiff._checks import AnyArray, Numbers, Whole, is_trainable, require
from probdiff._static import Static

Table = Float[AnyArray, "num_steps"]
TableByDim = Table | Float[AnyArray, "num_steps dim"]


class ScheduleTables(eqx.Module):
    """The tables of a schedule, each of shape ``(num_steps,)``; :class:`AbstractSchedule` defines each.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> probdiff.chain.ScheduleTables.from_log_snr(jnp.array([2.0, 0.0])).alpha_bar.round(2)
        Array([0.88, 0.5 ], dtype=float32)
    """

    beta: Table
    alpha: Table
    alpha_bar: Table
    one_minus_alpha_bar: Table
    signal_scale: Table
    noise_scale: Table
    log_snr: Table
    sigma: Table
    posterior_variance: Table

    @classmethod
    def from_log_snr(
        cls, log_snr: Float[Array, "num_steps"], fall: Float[Array, "num_steps-1"] | None = None
    ) -> "ScheduleTables":
        """The tables as JAX arrays, differentiable functions of the log-SNR.

        Args:
            log_snr: Shape ``(num_steps,)``, decreasing.
            fall: Decrease of the log-SNR at steps 2 … N, shape ``(num_steps - 1,)``, if known more precisely than by differences of ``log_snr``.
        """
        fall = -jnp.diff(log_snr) if fall is None else fall
        log_alpha_bar, log_noise = jax.nn.log_sigmoid(log_snr), jax.nn.log_sigmoid(-log_snr)
        noise = jnp.exp(log_noise)
        # 1 − SNR_n / SNR_{n−1} = β_n / (1 − ᾱ_n) = β̃_n / (1 − ᾱ_{n−1})
        lost = -jnp.expm1(-fall)
        return cls(
            beta=jnp.concatenate([noise[:1], lost * noise[1:]]),
            alpha=jnp.exp(jnp.diff(log_alpha_bar, prepend=jnp.zeros_like(log_snr[:1]))),
            alpha_bar=jnp.exp(log_alpha_bar),
            one_minus_alpha_bar=noise,
            signal_scale=jnp.exp(log_alpha_bar / 2),
            noise_scale=jnp.exp(log_noise / 2),
            log_snr=log_snr,
            sigma=jnp.exp(-log_snr / 2),
            posterior_variance=jnp.concatenate([jnp.zeros_like(noise[:1]), lost * noise[:-1]]),
        )


class AbstractSchedule(eqx.Module):
    r"""A noise schedule: the variances :math:`\beta_n` of a forward chain, and the tables that follow from them.

    Every schedule without parameters can be a :class:`NoiseSchedule`. To write your own schedule with parameters, such as
    :class:`~probdiff.LearnedSchedule`, define ``num_steps`` and :meth:`tables`, which returns
    ``ScheduleTables.from_log_snr(log_snr)`` with the log-SNR of each step computed from the module's JAX arrays.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, probdiff
        >>> class Straight(probdiff.chain.AbstractSchedule):
        ...     ends: jax.Array
        ...     num_steps: int = eqx.field(static=True)
        ...     def tables(self):
        ...         return probdiff.chain.ScheduleTables.from_log_snr(jnp.linspace(*self.ends, self.num_steps))
        >>> Straight(jnp.array([6.0, -6.0]), 4).log_snr.round(2)
        Array([ 6.,  2., -2., -6.], dtype=float32)
    """

    if TYPE_CHECKING:  # for type checkers a property: subclasses may define it as one, and it is no argument of ``__init__``

        @property
        def num_steps(self) -> int:
            """The number of steps N."""
    else:
        num_steps: eqx.AbstractVar[int]

    @abc.abstractmethod
    def tables(self) -> ScheduleTables:
        """The tables, computed from the parameters that the schedule has now."""

    @property
    def beta(self) -> Table:
        r""":math:`\beta_n`, strictly between 0 and 1, shape ``(num_steps,)`` like the tables that follow."""
        return self.tables().beta

    @property
    def alpha(self) -> Table:
        r""":math:`\alpha_n = 1 - \beta_n`."""
        return self.tables().alpha

    @property
    def alpha_bar(self) -> Table:
        r""":math:`\bar\alpha_n`, the squared signal coefficient of :math:`q(z_n | x_0)`."""
        return self.tables().alpha_bar

    @property
    def one_minus_alpha_bar(self) -> Table:
        r""":math:`1 - \bar\alpha_n`, the variance of :math:`q(z_n | x_0)`."""
        return self.tables().one_minus_alpha_bar

    @property
    def signal_scale(self) -> Table:
        r""":math:`\sqrt{\bar\alpha_n}`, the factor of the data in z_n."""
        return self.tables().signal_scale

    @property
    def noise_scale(self) -> Table:
        r""":math:`\sqrt{1-\bar\alpha_n}`, the factor of the noise in z_n."""
        return self.tables().noise_scale

    @property
    def log_snr(self) -> Table:
        r""":math:`\log \bar\alpha_n / (1 - \bar\alpha_n)`, the log signal-to-noise ratio."""
        return self.tables().log_snr

    @property
    def sigma(self) -> Table:
        r""":math:`\sigma_n = \sqrt{(1-\bar\alpha_n)/\bar\alpha_n}`, increasing: the ratio of noise to signal.

        The standard deviation of the noise in variance-exploding coordinates, :math:`x_n = z_n / \sqrt{\bar\alpha_n}` (:mod:`probdiff.chain.score`).
        """
        return self.tables().sigma

    @property
    def posterior_variance(self) -> Table:
        r""":math:`\tilde\beta_n = \beta_n (1-\bar\alpha_{n-1})/(1-\bar\alpha_n)`, the variance of :math:`q(z_{n-1} | z_n, x_0)`.

        Zero at n = 1, where :math:`z_0 = x_0` is known. Source: Ho et al. (2020), arXiv:2006.11239, eq. 7.
        """
        return self.tables().posterior_variance

    def tabulated(self) -> "AbstractSchedule":
        """The same schedule with its tables computed once, not at every access."""
        return TabulatedSchedule(self.tables())

    def fixed(self) -> "NoiseSchedule":
        """The :class:`NoiseSchedule` of the present log-SNR. It can be called while JAX traces another function, but not with parameters that are traced."""
        with jax.ensure_compile_time_eval():
            log_snr = self.log_snr
        return NoiseSchedule.from_log_snr(np.asarray(log_snr, np.float64))

    @property
    def is_trained(self) -> bool:
        """Whether the schedule has parameters: the guide is then fitted along with the model."""
        return any(is_trainable(leaf) for leaf in jax.tree.leaves(self))


class TabulatedSchedule(AbstractSchedule):
    """A schedule whose tables have been computed, as JAX arrays."""

    values: ScheduleTables

    @property
    def num_steps(self) -> int:
        """The number of steps N."""
        return len(self.values.beta)

    def tables(self) -> ScheduleTables:
        """The tables."""
        return self.values

    def tabulated(self) -> AbstractSchedule:
        """This schedule itself."""
        return self


class NoiseSchedule(AbstractSchedule):
    r"""A schedule of fixed variances :math:`\beta_n`.

    Immutable and hashable (two schedules with the same ``beta`` are equal): a static part of every compiled function, with
    float64 NumPy tables. Build one with :meth:`from_betas`, :meth:`from_sigmas`, :meth:`from_log_snr`,
    :func:`~probdiff.linear_schedule`, :func:`~probdiff.cosine_schedule`, :func:`~probdiff.log_snr_schedule` or :func:`~probdiff.geometric_schedule`.

    Example:
        >>> import probdiff
        >>> schedule = probdiff.NoiseSchedule.from_betas([0.1, 0.2, 0.3])
        >>> schedule.num_steps, schedule.alpha_bar.round(3)
        (3, array([0.9  , 0.72 , 0.504]))
    """

    _tables: Static = eqx.field(static=True)

    def __init__(self, beta: Float64[np.ndarray, "num_steps"]) -> None:
        """Use :meth:`from_betas`."""
        log_alpha_bar = np.cumsum(np.log1p(-beta))
        noise = -np.expm1(log_alpha_bar)
        log_snr = log_alpha_bar - np.log(noise)
        tables = ScheduleTables(
            beta=beta,
            alpha=1 - beta,
            alpha_bar=np.exp(log_alpha_bar),
            one_minus_alpha_bar=noise,
            signal_scale=np.exp(log_alpha_bar / 2),
            noise_scale=np.sqrt(noise),
            log_snr=log_snr,
            sigma=np.exp(-log_snr / 2),
            posterior_variance=beta * np.concatenate([[0.0], noise[:-1]]) / noise,
        )
        for table in jax.tree.leaves(tables):
            table.setflags(write=False)
        self._tables = Static(tables)

    def tables(self) -> ScheduleTables:
        """The tables, float64."""
        return self._tables.tree

    def tabulated(self) -> AbstractSchedule:
        """This schedule itself."""
        return self

    def fixed(self) -> "NoiseSchedule":
        """This schedule itself."""
        return self

    @classmethod
    def from_betas(cls, betas: Numbers) -> "NoiseSchedule":
        r"""Schedule with given variances.

        Args:
            betas: :math:`\beta_1 … \beta_N`, shape ``(num_steps,)``, each strictly between 0 and 1.

        Raises:
            ValueError: If the array is empty, not 1-D, not finite, or leaves (0, 1); TypeError if it is not of numbers.
        """
        beta = _numbers("betas", betas)
        _require_each("betas", beta, (beta > 0) & (beta < 1), "0 < beta < 1 at every step")
        return cls(beta)

    @classmethod
    def from_sigmas(cls, sigmas: Numbers) -> "NoiseSchedule":
        r"""Schedule with given noise levels of variance-exploding noising, :math:`x_n = x_0 + \sigma_n \epsilon`.

        The chain is the same in other coordinates, :math:`z_n = \sqrt{\bar\alpha_n} x_n` with
        :math:`\bar\alpha_n = 1 / (1 + \sigma_n^2)`, so that
        :math:`\beta_n = (\sigma_n^2 - \sigma_{n-1}^2) / (1 + \sigma_n^2)`, :math:`\sigma_0 = 0`.
        Source: Song et al. (2021), arXiv:2011.13456, appendix B and C, for the two kinds of noising.

        Args:
            sigmas: Standard deviations :math:`\sigma_1 < … < \sigma_N`, shape ``(num_steps,)``, positive.

        Raises:
            ValueError: If the array is empty, not 1-D, not finite, not positive or not increasing, or if two levels
                are too close or too far apart for float64; TypeError if it is not of numbers.
        """
        sigma = _numbers("sigmas", sigmas)
        _require_each("sigmas", sigma, np.isfinite(sigma) & (sigma > 0), "positive finite numbers")
        previous = np.concatenate([[0.0], sigma[:-1]])
        _require_each("sigmas", sigma, sigma > previous, "numbers that increase with the step")
        with np.errstate(over="ignore", invalid="ignore"):
            beta = (sigma - previous) * (sigma + previous) / (1 + sigma**2)
        _require_each("sigmas", sigma, (beta > 0) & (beta < 1), "levels whose beta float64 tells from 0 and from 1")
        return cls(beta)

    @classmethod
    def from_log_snr(cls, log_snr: Numbers) -> "NoiseSchedule":
        r"""Schedule with given log-SNR, :math:`\bar\alpha_n = sigmoid(log\_snr_n)`.

        Args:
            log_snr: Shape ``(num_steps,)``, decreasing.

        Raises:
            ValueError: If the array is empty, not 1-D, not finite or not decreasing, or if float64 rounds a
                :math:`\beta_n` to 0 or 1; TypeError if it is not of numbers.
        """
        values = _numbers("log_snr", log_snr)
        previous = np.concatenate([[np.inf], values[:-1]])
        decreasing = np.isfinite(values) & (values < previous)
        _require_each("log_snr", values, decreasing, "finite numbers that decrease with the step")
        return cls.from_betas(-np.expm1(np.diff(-np.logaddexp(0, -values), prepend=0.0)))

    @property
    def num_steps(self) -> int:
        """The number of steps N."""
        return len(self.beta)

    def __repr__(self) -> str:
        return f"NoiseSchedule(num_steps={self.num_steps}, log_snr={self.log_snr[0]:.2f} … {self.log_snr[-1]:.2f})"


def _numbers(name: str, values: Numbers) -> Float64[np.ndarray, "num_steps"]:
    """A non-empty 1-D float64 array."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: Expected a non-empty 1-D array of numbers; got {values!r:.80}") from None
    require(array.ndim == 1 and array.size > 0, name, "a non-empty 1-D array", f"shape {array.shape}")
    return array


def _require_each(
    name: str, values: Float64[np.ndarray, "num_steps"], good: Bool[np.ndarray, "num_steps"], expected: str
) -> None:
    """Refuse ``values``, an array over steps, unless all are ``good``, naming the first step that is not."""
    bad = np.flatnonzero(~good)
    if bad.size:
        require(False, name, expected, f"{values[bad[0]]} at step n = {bad[0] + 1}")


def at_step(
    table: Float[AnyArray, "num_steps *dims"], n: Whole | Integer[AnyArray, "..."], dtype: DTypeLike
) -> Float[Array, "..."]:
    """Entry of step n, as a JAX array of ``dtype``; NaN for a step outside 1 … N, as traced steps cannot be checked.

    Args:
        table: Array over steps, shape ``(num_steps, …)``.
        n: 1-based step, an integer or an integer array of any shape.
        dtype: Floating dtype of the result.
    """
    table = jnp.asarray(table, dtype)
    return table.at[n - 1].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def at_dims(table: TableByDim, n: Whole | Integer[AnyArray, "..."], dtype: DTypeLike) -> Float[Array, "... #dim"]:
    """:func:`at_step` with an axis for the dimensions, of length 1 unless the table has them: ``(num_steps[, dim])``."""
    entry = at_step(table, n, dtype)
    return entry if table.ndim == 2 else entry[..., None]


def per_step(table: TableByDim) -> Table:
    """A table over steps, averaged over the dimensions if it has them."""
    return table.mean(-1) if table.ndim == 2 else table


def array_module(*arrays: AnyArray) -> ModuleType:
    """numpy if all arrays are NumPy arrays, which are constants; otherwise jax.numpy."""
    return np if all(isinstance(array, np.ndarray) for array in arrays) else jnp


def require_schedule(schedule: AbstractSchedule) -> None:
    """Refuse anything but a schedule."""
    require(isinstance(schedule, AbstractSchedule), "schedule", "a NoiseSchedule", type(schedule).__name__, TypeError)
