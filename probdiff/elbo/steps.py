r"""How the steps n of an estimator are drawn, and the statistics of the terms from which their probabilities are learned.

A one-step estimator draws n from :math:`p_n` and divides the term by :math:`p_n`. Its variance is least at
:math:`p_n \propto` root mean square of the term (for the bound itself) or of the term's gradient (for training);
the gradient with respect to :math:`\hat\epsilon` is used in place of the gradient with respect to all parameters, as it costs nothing.
Source: Katharopoulos and Fleuret (2018), arXiv:1803.00942, section 3; Nichol and Dhariwal (2021), arXiv:2102.09672,
section 3.3.

The mean squares are learned from the terms that were drawn *before*, as functions of log-SNR, so that each estimate
is unbiased, conditionally on all earlier draws.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff.chain.schedules import NoiseSchedule, at_step

BINS = 32
DECAY = 0.995
UNIFORM_SHARE = 0.05


def independent_uniforms(key: PRNGKeyArray, size: int) -> Float[Array, "size"]:
    """``size`` independent uniform points of [0, 1)."""
    return jax.random.uniform(key, (size,))


def stratified_uniforms(key: PRNGKeyArray, size: int) -> Float[Array, "size"]:
    """``size`` points, each uniform on [0, 1), together evenly spread: a lattice with a random shift.

    Source: Kingma et al. (2021), arXiv:2107.00630, appendix I.1.
    """
    return (jax.random.uniform(key) + jnp.arange(size) / size) % 1


class AbstractSteps(eqx.Module):
    """The steps that an estimator evaluates for each datum.

    To write your own, define :meth:`num_rows` and :meth:`draw`, and the three properties where their defaults do not hold.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> class LastStep(probdiff.elbo.AbstractSteps):  # biased: no other step is ever drawn
        ...     def num_rows(self, num_steps):
        ...         return 1
        ...     def draw(self, key, size, num_steps, probability=None):
        ...         return jnp.full((1, size), num_steps), jnp.ones((1, size))
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0 * z)
        >>> elbo = probdiff.AnalyticELBO(diffusion, steps=LastStep())
        >>> elbo.loss(jax.random.key(1), {}, diffusion.model, diffusion.guide, jnp.zeros((4, 2))).shape
        ()
    """

    @property
    def is_learned(self) -> bool:
        """Whether the probabilities of the steps are learned."""
        return False

    @property
    def is_random(self) -> bool:
        """Whether the steps are drawn; otherwise all N are evaluated."""
        return True

    @property
    def is_stratified(self) -> bool:
        """Whether the steps of a batch are spread evenly."""
        return False

    @abc.abstractmethod
    def num_rows(self, num_steps: int) -> int:
        """How many terms there are for each datum."""

    @abc.abstractmethod
    def draw(
        self, key: jax.Array, size: int, num_steps: int, probability: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Steps and their inverse probabilities, both of shape ``(row, size)``.

        Args:
            key: JAX key.
            size: Number of data.
            num_steps: N.
            probability: The probabilities of the steps, shape ``(num_steps,)``, if they are learned; otherwise None.
        """


class AllSteps(AbstractSteps):
    """Every step once for each datum."""

    @property
    def is_random(self) -> bool:
        """False."""
        return False

    def num_rows(self, num_steps: int) -> int:
        """N."""
        return num_steps

    def draw(
        self, key: PRNGKeyArray, size: int, num_steps: int, probability: Float[Array, "num_steps"] | None = None
    ) -> tuple[Int[Array, "row size"], Float[Array, "row size"]]:
        """Steps and their inverse probabilities (1, as every step is evaluated), both of shape ``(num_steps, size)``."""
        n = jnp.broadcast_to(jnp.arange(1, num_steps + 1)[:, None], (num_steps, size))
        return n, jnp.ones(n.shape)


class OneStep(AbstractSteps):
    """One random step for each datum.

    Args:
        uniforms: How uniform numbers are drawn, one per datum: :func:`independent_uniforms` or :func:`stratified_uniforms`.
        learned: Whether the probabilities of the steps are learned; otherwise they are 1/N.
    """

    uniforms: Callable[[jax.Array, int], jax.Array] = eqx.field(static=True)
    learned: bool = eqx.field(static=True, default=False)

    @property
    def is_learned(self) -> bool:
        """Whether the probabilities of the steps are learned."""
        return self.learned

    @property
    def is_stratified(self) -> bool:
        """Whether the steps of a batch are spread evenly."""
        return self.uniforms is stratified_uniforms

    def num_rows(self, num_steps: int) -> int:
        """A single term for each datum."""
        return 1

    def draw(
        self, key: PRNGKeyArray, size: int, num_steps: int, probability: Float[Array, "num_steps"] | None = None
    ) -> tuple[Int[Array, "row size"], Float[Array, "row size"]]:
        """Steps and their inverse probabilities, both of shape ``(1, size)``."""
        uniform = self.uniforms(key, size)
        if probability is None:
            n = jnp.clip(jnp.floor(num_steps * uniform).astype(jnp.int32) + 1, 1, num_steps)
            return n[None], jnp.full((1, size), float(num_steps))
        upper = jnp.cumsum(probability)
        # The lengths of the intervals, as rounded in working precision, are the probabilities.
        upper = upper.at[-1].set(1.0)
        n = jnp.clip(jnp.searchsorted(upper, uniform, side="right").astype(jnp.int32), 0, num_steps - 1) + 1
        return n[None], 1 / jnp.diff(upper, prepend=0.0)[n - 1][None]


STEPS: dict[str, AbstractSteps] = {
    "all": AllSteps(),
    "uniform": OneStep(independent_uniforms),
    "stratified": OneStep(stratified_uniforms),
    "importance": OneStep(independent_uniforms, learned=True),
    "stratified_importance": OneStep(stratified_uniforms, learned=True),
}


@dataclasses.dataclass(frozen=True)
class Learner:
    r"""The state that an estimator learns: decayed moments of its terms, in bins of log-SNR (n = 1 has a bin of its own).

    Terms are measured in units of their value for standard normal data and the exact network,
    :math:`w_n \bar\alpha_n`, which is also the initial guess. The state is a dict of arrays of shape
    ``(bin,)``: ``visits``, how many uniformly drawn terms a bin has seen; ``term`` and ``control``, their sums;
    ``term_term``, ``term_control`` and ``control_control``, the sums of the products; ``gradient``, the sum of the squared
    gradients.

    Args:
        schedule: The noise schedule.
        kl_weight: :math:`w_n` of the kernel, as a tuple. A step of weight 0 has no term: it is not drawn and has no control variate.
        centred: Whether moments are about the mean of the bin: where the steps of a batch are spread evenly, the differences
            between the means of the bins add no variance.
    """

    schedule: NoiseSchedule
    kl_weight: tuple[float, ...]
    centred: bool
    bins: np.ndarray = dataclasses.field(init=False, compare=False)
    values: np.ndarray = dataclasses.field(init=False, compare=False)
    gradients: np.ndarray = dataclasses.field(init=False, compare=False)
    has_term: np.ndarray = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        log_snr = self.schedule.log_snr
        place = (log_snr[0] - log_snr) / (log_snr[0] - log_snr[-1]) if len(log_snr) > 1 else np.zeros(1)
        bins = 1 + np.minimum((BINS * place).astype(int), BINS - 1)
        bins[0] = 0
        weight = np.asarray(self.kl_weight)
        has_term = weight > 0
        values, gradients = weight * self.schedule.alpha_bar, weight * self.schedule.signal_scale
        tables = {"bins": bins, "values": values, "gradients": gradients, "has_term": has_term}
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    def initial(self) -> dict[str, jax.Array]:
        """The state before any term was drawn."""
        return {name: jnp.zeros(BINS + 1) for name in STATE}

    def updated(
        self,
        state: Mapping[str, jax.Array],
        n: Int[Array, "*batch"],
        inverse_probability: Float[Array, "*batch"],
        term: Float[Array, "*batch"],
        control: Float[Array, "*batch"],
        squared_gradient: Float[Array, "*batch"],
    ) -> dict[str, jax.Array]:
        """The state after the terms of steps ``n`` were drawn; all arguments are arrays of one shape."""
        dtype = state["visits"].dtype
        count = (inverse_probability / self.schedule.num_steps).astype(dtype)
        unit, slope = (at_step(np.where(table > 0, table, 1), n, dtype) for table in (self.values, self.gradients))
        term, control = term / unit, control / unit
        seen = {
            "visits": jnp.ones_like(count),
            "term": term,
            "control": control,
            "term_term": term * term,
            "term_control": term * control,
            "control_control": control * control,
            "gradient": squared_gradient / jnp.square(slope),
        }
        bins = jnp.asarray(self.bins)[n - 1]
        return {
            name: DECAY * state[name] + jnp.zeros_like(state[name]).at[bins].add(count * value)
            for name, value in seen.items()
        }

    def coefficient(self, state: Mapping[str, jax.Array]) -> Float[Array, "num_steps"]:
        """The coefficient of the control variate at each step, shape ``(num_steps,)``; 1 before any term was drawn."""
        slope, power = self._moment(state, "term", "control"), self._moment(state, "control", "control")
        guess = 1 / (state["visits"] + 1)
        return ((slope + guess) / (power + guess))[self.bins] * self.has_term

    def probability(
        self, state: Mapping[str, jax.Array], adapt_to: str, coefficient: Float[Array, "num_steps"]
    ) -> Float[Array, "num_steps"]:
        """Probabilities of the steps, shape ``(num_steps,)``.

        Args:
            state: The state.
            adapt_to: ``"value"`` or ``"gradient"``.
            coefficient: Coefficient of the control variate that is subtracted, shape ``(num_steps,)``; 0 for none.
        """
        return PROBABILITIES[adapt_to](self, state, coefficient)

    def _for_value(
        self, state: Mapping[str, jax.Array], coefficient: Float[Array, "num_steps"]
    ) -> Float[Array, "num_steps"]:
        pairs = (("term", "term"), ("term", "control"), ("control", "control"))
        term, both, control = (self._moment(state, *pair)[self.bins] for pair in pairs)
        return self._normalised(self.values, term - 2 * coefficient * both + jnp.square(coefficient) * control)

    def _for_gradient(
        self, state: Mapping[str, jax.Array], coefficient: Float[Array, "num_steps"]
    ) -> Float[Array, "num_steps"]:
        return self._normalised(self.gradients, self._mean(state, "gradient")[self.bins])

    def _moment(self, state: Mapping[str, jax.Array], a: str, b: str) -> jax.Array:
        product = self._mean(state, f"{a}_{b}")
        return product - self._mean(state, a) * self._mean(state, b) if self.centred else product

    def _mean(self, state: Mapping[str, jax.Array], name: str) -> jax.Array:
        """Mean over the terms of each bin and one additional term equal to the initial guess."""
        return (state[name] + 1) / (state["visits"] + 1)

    def _normalised(self, unit: np.ndarray, mean_square: jax.Array) -> Float[Array, "num_steps"]:
        drawn = self.has_term if self.has_term.any() else np.ones_like(self.has_term)
        size = jnp.asarray(np.where(self.has_term, unit, drawn), mean_square.dtype)
        size = size * jnp.sqrt(jnp.maximum(mean_square, 1e-12))
        return (1 - UNIFORM_SHARE) * size / size.sum() + UNIFORM_SHARE * drawn / drawn.sum()


STATE = ("visits", "term", "control", "term_term", "term_control", "control_control", "gradient")
PROBABILITIES = {"value": Learner._for_value, "gradient": Learner._for_gradient}
