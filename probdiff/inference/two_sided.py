r"""Bounds on both sides of the log evidence, on observations that are simulated from the model itself.

Sequential Monte Carlo gives an unbiased estimate of :math:`p_\theta(y)`, whose log is too small in expectation. If y was simulated along with a path z_1 … z_N and x, the path is a draw from
the posterior, and particles that include this path throughout (conditional sequential Monte Carlo, resampled by independent draws) give an estimate whose log is too large in
expectation. :math:`\log p_\theta(y)` is between the two: a small distance shows that there are enough particles.

Sources: Grosse, Ghahramani and Adams (2015), arXiv:1511.02543, section 3; Andrieu, Doucet and Holenstein (2010), doi:10.1111/j.1467-9868.2009.00736.x, section 4.3.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real
from numpyro import handlers

from probdiff._checks import PyTree, Whole, require, require_count, require_key
from probdiff._chunks import blocks, joined
from probdiff.diffusion import Diffusion
from probdiff.inference.observations import AbstractObservation
from probdiff.inference.particles import Problem, evidence, make_problem
from probdiff.inference.twists import AbstractTwist


class EvidenceBounds(NamedTuple):
    r"""Bounds on :math:`\log p_\theta(y)` of each simulated y, nats.

    Attributes:
        x: The data drawn from the model, shape ``(datum, dim)``.
        lower, upper: Bounds from below and from above in expectation, shape ``(datum,)``.

    Example:
        >>> import numpy as np
        >>> from probdiff.inference import EvidenceBounds
        >>> bounds = EvidenceBounds(x=np.zeros((2, 1)), lower=np.array([-1.2, -0.8]), upper=np.array([-1.0, -0.8]))
        >>> float((bounds.upper - bounds.lower).mean().round(3))  # nats
        0.1
    """

    x: Real[np.ndarray, "datum dim"]
    lower: Float[np.ndarray, "datum"]
    upper: Float[np.ndarray, "datum"]

    def __repr__(self) -> str:
        """The means of both bounds and of their difference, with errors over the data."""
        rows = (("log p(y), at least", self.lower), ("log p(y), at most", self.upper), ("distance", self.upper - self.lower))
        lines = [f"{name:20}{each.mean():10.4f} ± {each.std(ddof=1) / np.sqrt(len(each)):.4f}" for name, each in rows]
        return "\n".join([f"{len(self.x)} observations simulated from the model; nats, ± standard error over them", *lines])


def evidence_bounds(
    diffusion: Diffusion,
    observation: AbstractObservation,
    *,
    key: PRNGKeyArray,
    num_data: Whole,
    num_particles: Whole,
    twist: AbstractTwist | str = "tweedie",
    context: PyTree = None,
    progress: bool = False,
) -> EvidenceBounds:
    r"""Draw data from the model and observations of them, and bound their log evidence from below and from above.

    Args:
        diffusion, twist, context: As for :func:`~probdiff.inference.smc`.
        observation: The kind of observation: a :class:`~probdiff.inference.LinearGaussian` or :class:`~probdiff.inference.Inpainting`, whose y is ignored.
        key: JAX key.
        num_data: Number of observations, at least 2.
        num_particles: Number of particles, at least 2.
        progress: Show a progress bar.

    Returns:
        :class:`EvidenceBounds`.

    Raises:
        ValueError, TypeError: If the observation does not suit the model, or an argument is out of range. NotImplementedError if it cannot be simulated.

    Example:
        >>> import jax, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> kind = probdiff.inference.LinearGaussian([[1.0, -1.0]], y=[0.0], scale=0.5)
        >>> bounds = probdiff.inference.evidence_bounds(diffusion, kind, key=jax.random.key(0), num_data=2, num_particles=8)
        >>> bounds.x.shape, bounds.lower.shape, bounds.upper.shape
        ((2, 2), (2,), (2,))
    """
    problem = make_problem(diffusion, observation, twist, context)
    for name, value in (("num_data", num_data), ("num_particles", num_particles)):
        require_count(name, value)
        require(value >= 2, name, "at least 2", value)
    require_key(key)
    keys = jax.random.split(key, int(num_data))
    cut = blocks(int(num_data), 1, unit="datum", desc="bounds of the evidence", progress=progress)
    found = [[np.asarray(part)[None] for part in _bounds(problem, int(num_particles), keys[rows[0]])] for rows in cut]
    return EvidenceBounds(*joined(found, int(num_data)))


@eqx.filter_jit
def _bounds(problem: Problem, size: int, key: PRNGKeyArray) -> tuple[Real[Array, "dim"], Float[Array, ""], Float[Array, ""]]:
    """One datum from the model, and both bounds of an observation of it."""
    model_key, y_key, lower_key, upper_key = jax.random.split(key, 4)
    trace = handlers.trace(handlers.seed(problem.diffusion.model, model_key)).get_trace(None, num_data=1)
    x, latents = trace["x"]["value"][0], trace["z"]["value"][::-1, 0]  # in the order of the steps
    given = eqx.tree_at(lambda problem: problem.observation, problem, problem.observation.simulated(x, y_key))
    lower = evidence(given, size, lower_key)
    upper = evidence(given, size, upper_key, (jnp.asarray(latents), x))
    return x, lower, upper
