r"""Reverse variances :math:`v_n` of a Gaussian kernel, relative to the variance :math:`\tilde\beta_n` of the forward posterior.

Each is called with the schedule and returns :math:`r_n = \log(v_n / \tilde\beta_n)`, shape ``(num_steps,)`` or, by dimension,
``(num_steps, dim)``; at n = 1, where :math:`v_1 = \beta_1`, it is 0 and is not used. The bound needs :math:`r_n`: computed
from :math:`v_n`, the constant of a step KL, :math:`\tfrac12 (e^{-r_n} - 1 + r_n)` per dimension, would lose its digits.

Source: Ho et al. (2020), arXiv:2006.11239, section 3.2, for the two choices between which a variance is learned; Nichol and Dhariwal (2021), arXiv:2102.09672, section 3.1.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from probdiff._checks import Whole, require, require_count
from probdiff.chain.schedules import AbstractSchedule, Table, TableByDim, array_module

KNOTS = 32


class AbstractReverseVariance(eqx.Module):
    """The variances of the reverse steps.

    To write your own, define ``__call__``; JAX arrays of the module are trained along with the network.

    Example:
        >>> import numpy as np, probdiff
        >>> class Twice(probdiff.chain.AbstractReverseVariance):
        ...     def __call__(self, schedule):
        ...         return np.full(schedule.num_steps, np.log(2.0))
        >>> kernel, schedule = probdiff.chain.GaussianKernel(Twice()), probdiff.cosine_schedule(10)
        >>> np.allclose(kernel.variance(schedule)[1:], 2 * schedule.posterior_variance[1:])
        True
    """

    @abc.abstractmethod
    def __call__(self, schedule: AbstractSchedule) -> TableByDim:
        r"""The table :math:`\log(v_n / \tilde\beta_n)`, shape ``(num_steps,)`` or ``(num_steps, dim)``; entry n = 1 is not used."""

    @classmethod
    def for_model(cls, schedule: AbstractSchedule | None, dim: Whole | None) -> "AbstractReverseVariance":
        """The initial variances for a model of this schedule and dimension."""
        return cls()

    @property
    def is_estimated(self) -> bool:
        """Whether :meth:`with_squared_error` changes anything: ``probdiff.fit`` then calls it at the end."""
        return False

    def with_squared_error(self, squared_error: Float[Array, "num_steps"]) -> "AbstractReverseVariance":
        """The variances of least KL for a network with these mean squared errors per dimension, one for each step, shape ``(num_steps,)``."""
        return self


class PosteriorVariance(AbstractReverseVariance):
    r""":math:`v_n = \tilde\beta_n`: the best if the data were one point. Ho et al. (2020), arXiv:2006.11239, section 3.2."""

    def __call__(self, schedule: AbstractSchedule) -> Table:
        """Zeros, shape ``(num_steps,)``."""
        return np.zeros(schedule.num_steps)


class ForwardVariance(AbstractReverseVariance):
    r""":math:`v_n = \beta_n`: the best for standard normal data. Ho et al. (2020), arXiv:2006.11239, section 3.2."""

    def __call__(self, schedule: AbstractSchedule) -> Table:
        r"""log((1−ᾱ_n)/(1−ᾱ_{n−1}))."""
        log_noise = 2 * array_module(schedule.noise_scale).log(schedule.noise_scale)
        return array_module(log_noise).concatenate([0 * log_noise[:1], log_noise[1:] - log_noise[:-1]])


class LearnedVariance(AbstractReverseVariance):
    r"""Between β̃_n and β_n in log space, by dimension: :math:`\log v_n = s \log \beta_n + (1-s) \log \tilde\beta_n`.

    s is ½ at first: the sigmoid of logits at no more than 32 knots, interpolated linearly over the steps. Source of the form: Nichol and Dhariwal
    (2021), arXiv:2102.09672, eq. 15 (where the network gives s).

    Attributes:
        logit: The logits, shape ``(knot, dim)``.
    """

    logit: Float[Array, "knot dim"]

    def __init__(self, schedule: AbstractSchedule, dim: Whole | None) -> None:
        require(dim is not None, "dim", "Diffusion(…, dim=…) or a network with .dim, for the variances to be learned", "neither")
        require_count("dim", dim)
        self.logit = jnp.zeros((min(KNOTS, schedule.num_steps), dim))

    @classmethod
    def for_model(cls, schedule: AbstractSchedule | None, dim: Whole | None) -> AbstractReverseVariance:
        """Half-way between β̃_n and β_n."""
        return cls(_given(schedule), dim)

    def __call__(self, schedule: AbstractSchedule) -> Float[Array, "num_steps dim"]:
        """Shape ``(num_steps, dim)``."""
        share = jax.nn.sigmoid(interpolation(schedule.num_steps, len(self.logit)) @ self.logit)
        return share * jnp.asarray(ForwardVariance()(schedule), share.dtype)[:, None]


class OptimalVariance(AbstractReverseVariance):
    r"""The reverse variance of least KL for a given network: :math:`v_n = \tilde\beta_n + \frac{\beta_n^2}{\alpha_n (1-\bar\alpha_n)} m_n`.

    :math:`m_n = E\|\epsilon - \hat\epsilon\|^2 / d` over the data minimises the expected KL of step n. It is not trained by gradient
    but computed: by ``probdiff.fit`` at its end, or by :func:`probdiff.elbo.optimal_variance`. Until then it has the value for standard
    normal data, :math:`m_n = \bar\alpha_n`, which gives :math:`v_n = \beta_n`.
    Source: Bao et al. (2022), arXiv:2201.06503, theorem 1, here for any network rather than the exact one.

    Attributes:
        squared_error: :math:`m_n`, shape ``(num_steps,)``.
    """

    squared_error: Float[Array, "num_steps"]

    def __init__(self, schedule: AbstractSchedule) -> None:
        self.squared_error = jnp.asarray(schedule.alpha_bar, jnp.zeros(()).dtype)

    @classmethod
    def for_model(cls, schedule: AbstractSchedule | None, dim: Whole | None) -> AbstractReverseVariance:
        """The reverse variance of least KL for standard normal data."""
        return cls(_given(schedule))

    def __call__(self, schedule: AbstractSchedule) -> Table:
        """Shape ``(num_steps,)``."""
        factor = schedule.beta[1:] / (schedule.alpha[1:] * schedule.noise_scale[:-1] ** 2)
        known = jax.lax.stop_gradient(self.squared_error)
        return jnp.concatenate([jnp.zeros_like(known[:1]), jnp.log1p(jnp.asarray(factor, known.dtype) * known[1:])])

    @property
    def is_estimated(self) -> bool:
        """True."""
        return True

    def with_squared_error(self, squared_error: Float[Array, "num_steps"]) -> AbstractReverseVariance:
        """The variances computed from these errors."""
        return eqx.tree_at(lambda variance: variance.squared_error, self, squared_error)


def _given(schedule: AbstractSchedule | None) -> AbstractSchedule:
    """The schedule, for variances that begin with its tables."""
    require(schedule is not None, "schedule", "GaussianKernel(name, schedule, dim) for variances that are learned or computed", "no schedule")
    assert schedule is not None
    return schedule


def interpolation(num_steps: int, knots: int) -> Float[np.ndarray, "num_steps knots"]:
    """The matrix that takes values at evenly spread knots to values at steps 1 … N, linearly: ``(num_steps, knots)``."""
    place = np.linspace(0, knots - 1, num_steps)
    return np.maximum(0.0, 1 - np.abs(place[:, None] - np.arange(knots)))


# The names that ``Diffusion(…, reverse_variance=…)`` takes.
REVERSE_VARIANCES: dict[str, type[AbstractReverseVariance]] = {
    "posterior": PosteriorVariance,
    "forward": ForwardVariance,
    "learned": LearnedVariance,
    "optimal": OptimalVariance,
}


def named_variance(name: str, schedule: AbstractSchedule | None, dim: Whole | None) -> AbstractReverseVariance:
    """The reverse variance that has this name.

    Raises:
        ValueError: If no reverse variance has the name.
    """
    known = isinstance(name, str) and name in REVERSE_VARIANCES
    require(known, "reverse_variance", f"one of {list(REVERSE_VARIANCES)} or an AbstractReverseVariance", repr(name))
    return REVERSE_VARIANCES[name].for_model(schedule, dim)


def variance_name(variance: AbstractReverseVariance) -> str:
    """The name of a reverse variance, or of its class if it has none."""
    return next((name for name, kind in REVERSE_VARIANCES.items() if type(variance) is kind), type(variance).__name__)
