"""Weighted particles of a posterior, and their evidence."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, Real
from numpy.typing import ArrayLike
from scipy.special import logsumexp, softmax

from probdiff._checks import Whole, require_count, require_key

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

COLLAPSED = 0.01  # warn below this effective sample size, as a fraction of the particles


class Posterior(NamedTuple):
    r"""The posterior of x given y, the result of :func:`~probdiff.inference.smc`.

    Attributes:
        samples: Particles in the user's units, shape ``(particle, dim)``; several runs are concatenated.
        log_weights: The log of their weights, up to a constant, shape ``(particle,)``.
        log_evidence: The log of an unbiased estimate of :math:`p_\theta(y)`, nats (the log is too small in expectation); for several runs, the log of the mean estimate.
        log_evidence_error: Standard error of ``log_evidence``, from independent runs; NaN for one run.
        ess: Effective sample size of the weights at each step, at z_n in ``[n - 1]``, shape ``(num_steps,)``; the mean over several runs. The first entry is the effective sample
            size of the final particles.
        num_runs: Number of independent runs.

    Example:
        >>> import jax, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> observation = probdiff.inference.LinearGaussian([[1.0, -1.0]], y=[0.4], scale=0.5)
        >>> posterior = probdiff.inference.smc(diffusion, observation, key=jax.random.key(0), num_particles=16)
        >>> posterior.resample(jax.random.key(1), 5).shape, posterior.weights.sum().round(6).item()
        ((5, 2), 1.0)
    """

    samples: Real[np.ndarray, "particle dim"]
    log_weights: Float[np.ndarray, "particle"]
    log_evidence: float
    log_evidence_error: float
    ess: Float[np.ndarray, "step"]
    num_runs: int

    @classmethod
    def of_runs(cls, runs: Sequence[Any]) -> "Posterior":
        """Combine independent runs, with a warning if their particles have collapsed."""
        total, error = log_mean_with_error([run.log_evidence for run in runs])
        # Within a run the weights sum to its evidence; if it is 0, they are 0 already.
        missing = [run.log_evidence - logsumexp(run.log_weights) if np.isfinite(run.log_evidence) else 0.0 for run in runs]
        log_weights = np.concatenate([run.log_weights + change for run, change in zip(runs, missing)])
        samples, ess = np.concatenate([run.samples for run in runs]), np.mean([run.ess for run in runs], 0)
        size = len(samples) // len(runs)
        if size > 1 and not ess.min() >= COLLAPSED * size:
            step = int(np.argmin(ess)) + 1
            warnings.warn(
                f"smc: the particles have collapsed: at step n = {step} their effective sample size is {ess.min():.1f} of {size}. The samples are few, and the "
                "evidence is uncertain; take more particles, or another twist",
                stacklevel=3,
            )
        return cls(samples, log_weights, float(total), float(error), ess, len(runs))

    @property
    def weights(self) -> Float[np.ndarray, "particle"]:
        """The normalised weights, shape ``(particle,)``."""
        return softmax(self.log_weights)

    @property
    def mean(self) -> Float[np.ndarray, "dim"]:
        """The weighted mean of the particles, shape ``(dim,)``."""
        return self.weights @ self.samples

    def resample(self, key: PRNGKeyArray, num_samples: Whole) -> Real[np.ndarray, "num_samples dim"]:
        """Particles drawn by their weights, with replacement: shape ``(num_samples, dim)``."""
        require_key(key)
        require_count("num_samples", num_samples)
        return self.samples[np.asarray(jax.random.categorical(key, jnp.asarray(self.log_weights), shape=(int(num_samples),)))]

    def to_datatree(self) -> "xr.DataTree":
        """For ArviZ: ``posterior`` has ``x`` with dimensions (chain, draw, dim), resampled to equal weights, one chain for each run.

        Group ``sample_stats`` has ``ess`` by step; ``particles`` has the weighted particles with their log weights; the attributes of ``posterior`` are
        ``log_evidence`` and its error.
        """
        import xarray as xr

        size = len(self.samples) // self.num_runs
        parts = [self._replace(samples=x, log_weights=w) for x, w in zip(self.samples.reshape(self.num_runs, size, -1), self.log_weights.reshape(self.num_runs, size))]
        drawn = np.stack([part.resample(jax.random.key(k), size) for k, part in enumerate(parts)])
        groups = {
            "posterior": xr.Dataset({"x": (("chain", "draw", "dim"), drawn)}, {"chain": np.arange(self.num_runs), "draw": np.arange(size)}),
            "sample_stats": xr.Dataset({"ess": ("step", self.ess)}, {"step": np.arange(1, len(self.ess) + 1)}),
            "particles": xr.Dataset({"x": (("particle", "dim"), self.samples), "log_weight": ("particle", self.log_weights)}),
        }
        groups["posterior"].attrs.update(log_evidence=self.log_evidence, log_evidence_error=self.log_evidence_error)
        groups["sample_stats"]["ess"].attrs.update(long_name="effective sample size of the weights at z_n")
        return xr.DataTree.from_dict(groups)

    def plot(self, title: str = "") -> "Figure":
        """A figure: the first two dimensions of the weighted particles, and the effective sample size by step."""
        from probdiff.diagnostics.plots import plot_posterior

        return plot_posterior(self.samples, self.weights, self.ess, title)

    def __repr__(self) -> str:
        """A few lines: evidence, particles, effective sample sizes."""
        error = "" if np.isnan(self.log_evidence_error) else f" ± {self.log_evidence_error:.4f}"
        return (
            f"Posterior of {len(self.samples)} particles in {self.num_runs} run{'s' * (self.num_runs > 1)}, {self.samples.shape[1]} dimensions\n"
            f"log p(y) of the model: {self.log_evidence:.4f}{error} nats\n"
            f"effective sample size {self.ess[0]:.0f} at the end, {self.ess.min():.0f} at the least (step n = {int(np.argmin(self.ess)) + 1})"
        )


def log_mean_with_error(log_evidences: ArrayLike) -> tuple[np.ndarray | np.float64, np.ndarray | np.float64]:
    """The log of the mean estimate over independent runs, the first axis, and its standard error: NaN for one run, and if the mean is 0."""
    log_evidences = np.asarray(log_evidences, np.float64)
    count = len(log_evidences)
    total = logsumexp(log_evidences, 0) - np.log(count)
    known = np.isfinite(total)
    ratio = np.exp(np.where(known, log_evidences - np.where(known, total, 0), np.nan))
    error = ratio.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.full(np.shape(total), np.nan)
    return total, error
