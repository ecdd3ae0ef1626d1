r"""The bound of a whole data set from random steps.

The bound of a data set is a mean over data whose bounds differ; a Monte Carlo error far below the standard error over the data is wasted work.
Therefore each datum is evaluated at some random steps and not at all N: with learned probabilities, and the steps of each datum spread evenly, so that
most of the remaining variance comes from the noise. The prior KL is exact, and the reconstruction, of step 1, is always evaluated.

Source: Kingma et al. (2021), arXiv:2107.00630, appendix I.1, for steps that are spread evenly.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from probdiff._checks import Number, PyTree, Whole, require, require_key, require_type
from probdiff._chunks import blocks, joined, repeat
from probdiff._devices import Devices, data_mesh, gather, replicate, shard, to_default_device
from probdiff.chain.forward import prior_kl
from probdiff.chain.reverse import SampledStep
from probdiff.chain.schedules import per_step
from probdiff.diffusion import Diffusion
from probdiff.elbo.analytic import BoundTerm
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.objective import Learned, StepObjective
from probdiff.programs.sites import Data

STEPS = 32  # of each datum, in one draw, at most
RECONSTRUCTIONS = 4  # draws of the noise at n = 1, in one draw, at most
DRAWS = 2  # in one round
DATA_AT_ONCE = 128

Parts = tuple[Float[Array, "*draw datum"], Float[Array, "*draw datum"], Float[Array, "*draw datum"]]


class PartOfBound(BoundTerm):
    """The reconstruction, or minus the sum of the step KLs, in the form that a :class:`~probdiff.elbo.objective.StepObjective` sums.

    Args:
        first: Whether the part is the reconstruction, the term of n = 1.
        weight: The weight w_n of squared errors of the noise at each step, as numbers, so that compiled functions are used again.
    """

    first: bool = eqx.field(static=True)
    weight: tuple[float, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, diffusion: Diffusion, first: bool) -> "PartOfBound":
        """This part of a model's bound; the steps of the other part have weight 0."""
        weight = np.array(per_step(np.asarray(diffusion.kernel.kl_weight(diffusion.schedule), np.float64)))
        weight[slice(1, None) if first else 0] = 0
        return cls(first, tuple(weight.tolist()))

    def kl_weight(self, diffusion: Diffusion) -> Float[np.ndarray, "num_steps"]:
        """The table :attr:`weight`."""
        return np.array(self.weight)

    def noise_free_bound(self, diffusion: Diffusion, x: Data, x0: Float[Array, "datum dim"]) -> Float[Array, "datum"]:
        """This part of the bound for a network that knows the noise, in nats, shape ``(datum,)``."""
        if self.first:
            return self._reconstruction(diffusion, x, x0)
        constant = diffusion.kernel.constants(diffusion.schedule, x0.shape[-1]).sum()
        return -jnp.broadcast_to(jnp.asarray(constant, x0.dtype), len(x0))

    def __call__(self, diffusion: Diffusion, step: SampledStep) -> Float[Array, "row datum"]:
        """The excess of the terms of this part, in nats, shape ``(row, datum)``."""
        if self.first:
            return jnp.where(step.n == 1, self._first_excess(diffusion, step), 0)
        return jnp.where(step.n == 1, 0, diffusion.kernel.excess(diffusion.schedule, step))


class DataSetELBO(NamedTuple):
    """The bound of a data set from random steps, in nats.

    Attributes:
        prior_kl: KL[q(z_N | x_0) ‖ N(0, I)], shape ``(datum,)``; exact.
        step_kls: Unbiased estimates of Σ step KL, shape ``(draw, datum)``.
        reconstructions: Unbiased estimates of E log p(x | z_1), shape ``(draw, datum)``.
        num_evaluations: Network evaluations for each datum in all draws together.

    Example:
        >>> import numpy as np, probdiff
        >>> part = np.ones((2, 3))  # two draws of three data
        >>> bound = probdiff.elbo.DataSetELBO(prior_kl=part[0], step_kls=4 * part, reconstructions=-part, num_evaluations=72)
        >>> bound.estimate.mean
        -6.0
    """

    prior_kl: Float[np.ndarray, "datum"]
    step_kls: Float[np.ndarray, "draw datum"]
    reconstructions: Float[np.ndarray, "draw datum"]
    num_evaluations: Whole

    @property
    def step_kl(self) -> Float[np.ndarray, "datum"]:
        """Σ step KL of each datum, mean over draws, in nats, shape ``(datum,)``."""
        return self.step_kls.mean(0)

    @property
    def reconstruction(self) -> Float[np.ndarray, "datum"]:
        """log p(x | z_1) of each datum, mean over draws, in nats, shape ``(datum,)``."""
        return self.reconstructions.mean(0)

    @property
    def draws(self) -> Float[np.ndarray, "draw datum"]:
        """The bound, −prior_kl − step_kls + reconstructions, shape ``(draw, datum)``."""
        return self.reconstructions - self.step_kls - self.prior_kl

    @property
    def elbo(self) -> Float[np.ndarray, "datum"]:
        """The bound of each datum, mean over draws, shape ``(datum,)``."""
        return self.draws.mean(0)

    @property
    def estimate(self) -> Estimate:
        """The mean bound and its two errors; the Monte Carlo error is slightly overestimated, as the steps are also spread evenly over the data."""
        return Estimate.of_draws(self.draws)


def data_set_elbo(
    diffusion: Diffusion,
    x: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    noise_share: Number = 0.2,
    devices: Devices = None,
    progress: bool = False,
) -> DataSetELBO:
    """The bound of a data set, with a Monte Carlo error of about a given fraction of the standard error over the data.

    The initial probabilities of the steps and the number of draws are learned from the first data; these draws are not part of the result,
    which is unbiased. No datum has more than N network evaluations for its step KLs, unless two draws need more.

    Args:
        diffusion: The model.
        x: Data, shape ``(datum, dim)``, at least two.
        context: Of a conditional model: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key.
        noise_share: The Monte Carlo error to aim at, in units of the standard error over the data; positive.
        devices: Number of devices (or a list of them) that share the data.
        progress: Show a progress bar.

    Returns:
        A :class:`DataSetELBO`.

    Raises:
        ValueError, TypeError: If the data do not suit the model, or ``noise_share`` is not positive.

    Example:
        >>> import jax, probdiff
        >>> x = jax.random.normal(jax.random.key(0), (6, 2))
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(1), hidden=8))
        >>> bound = probdiff.elbo.data_set_elbo(diffusion, x, key=jax.random.key(2))
        >>> bound.elbo.shape
        (6,)
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.evaluated().given(context)
    x = diffusion.read_data(x)
    require_key(key)
    require(len(x) >= 2, "x", "at least two data", len(x))
    require(noise_share > 0, "noise_share", "a positive number", noise_share)
    mesh = data_mesh(devices)
    pilot_key, key = jax.random.split(key)
    diffusion, x, pilot_key, key = replicate((diffusion, jnp.asarray(x), pilot_key, key), mesh)
    terms = tuple(PartOfBound.of(diffusion, first) for first in (False, True))
    state: list[Learned] = replicate([objective.initial_state for objective in _objectives(diffusion, terms)], mesh)
    counts, rounds, found = (min(STEPS, diffusion.schedule.num_steps), RECONSTRUCTIONS), 0, []
    for rows in blocks(len(x), DATA_AT_ONCE, unit="datum", desc="bound of the data, at random steps", progress=progress):
        some = diffusion.take(rows)
        if not rounds:
            for each in jax.random.split(pilot_key):
                state, pilot = _round(some, terms, x[rows], each, counts, state, mesh)
            needed = _rounds_needed(_to_host(pilot, mesh), diffusion.schedule.num_steps, float(noise_share))
            counts, rounds = _smaller(counts, needed, len(x)), int(np.ceil(needed))
        parts = []
        for each in jax.random.split(jax.random.fold_in(key, rows[0]), rounds):
            state, part = _round(some, terms, x[rows], each, counts, state, mesh)
            parts.append(_to_host(part, mesh))
        found.append([np.concatenate(draws).T for draws in zip(*parts)])  # the data first
    prior, step_kls, reconstructions = (each.T for each in joined(found, len(x)))
    return DataSetELBO(prior[0], step_kls, reconstructions, rounds * DRAWS * sum(counts))


def _to_host(parts: Parts, mesh: Mesh | None) -> list[np.ndarray]:
    return [np.asarray(part, np.float64) for part in to_default_device(parts, mesh)]


def _rounds_needed(pilot: list[np.ndarray], num_steps: int, noise_share: float) -> float:
    """The number of rounds of draws that the bound needs, possibly below 1, estimated from one round of some of the data."""
    prior, step_kls, reconstructions = pilot
    draws = reconstructions - step_kls - prior
    noise = draws.var(0, ddof=1).mean()  # of a single draw
    over_data = max(0.0, draws.mean(0).var(ddof=1) - noise / DRAWS)
    wanted = noise_share**2 * over_data
    most = max(1.0, num_steps // (STEPS * DRAWS))
    return float(min(most, noise / DRAWS / wanted)) if wanted > 0 else float(most)


def _smaller(counts: tuple[int, int], rounds: float, num_data: int) -> tuple[int, int]:
    """The numbers of evaluations of a draw, halved as long as a single round remains enough; by halves, as each pair of numbers is compiled.

    The steps of a datum are spread evenly, so that half as many have up to four times the variance. Only for many data: the Monte Carlo error is estimated
    from differences of two draws, imprecisely if there are few data of few evaluations.
    """
    steps, reconstructions = counts
    while 4 * rounds <= 1 and steps > 1 and num_data * steps >= 2 * STEPS * DATA_AT_ONCE:
        steps, reconstructions, rounds = -(-steps // 2), -(-reconstructions // 2), 4 * rounds
    return steps, reconstructions


def _objectives(diffusion: Diffusion, terms: tuple[PartOfBound, ...]) -> list[StepObjective]:
    return [StepObjective(diffusion, term, "stratified_importance", control="linear", adapt_to="value") for term in terms]


@eqx.filter_jit
def _round(
    diffusion: Diffusion,
    terms: tuple[PartOfBound, ...],
    x: Float[Array, "datum dim"],
    key: PRNGKeyArray,
    counts: tuple[int, int],
    state: list[Learned],
    mesh: Mesh | None,
) -> tuple[list[Learned], Parts]:
    """A few draws of the three parts of each datum's bound, and the learned state after them.

    ``counts`` are the network evaluations for each datum and draw, of the step KLs and of the reconstruction.
    """
    objectives = _objectives(diffusion, terms)
    prior = prior_kl(diffusion.schedule, diffusion.likelihood.encode(x))
    # Copies of a datum are far apart in the batch: the steps of each datum are then spread evenly.
    copies = [shard(repeat((x, diffusion.context), count), mesh) for count in counts]

    def draw(state: list[Learned], key: PRNGKeyArray) -> tuple[list[Learned], Parts]:
        drawn = [
            objective.of(diffusion.with_context(context)).per_datum_and_learned(own_key, data, learned)
            for objective, own_key, (data, context), learned in zip(objectives, jax.random.split(key), copies, state)
        ]
        minus_kl, reconstruction = (values.reshape(-1, len(x)).mean(0) for values, _ in drawn)
        return [learned for _, learned in drawn], (prior, -minus_kl, reconstruction)

    return gather(jax.lax.scan(draw, state, jax.random.split(key, DRAWS)), mesh)
