r"""The decomposition of the gap between the bound and a known density of the data.

    E log p(x) − E L(x)  =  irreducible gap + Σ_n network_n

The *irreducible gap* is the gap of the same chain with the exact network :math:`\epsilon^*_n(z) = E[\epsilon | z_n = z]`: the cost of N
Gaussian steps, of the prior and of the reverse variances, which no network can avoid. The network adds at step n
:math:`w_n E\|\hat\epsilon - \epsilon^*\|^2`, because :math:`\epsilon - \epsilon^*` is orthogonal to every function of
:math:`z_n`; at n = 1 this holds under a normal likelihood.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._checks import PyTree, require, require_key, require_type
from probdiff._chunks import EVALUATIONS, blocks, joined, over_steps, take
from probdiff.chain.schedules import at_dims
from probdiff.diffusion import Diffusion
from probdiff.elbo.analytic import AnalyticELBO
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.terms import elbo_terms
from probdiff.likelihoods import NormalLikelihood
from probdiff.programs.sites import Data

BLOCKS, DIGITS = 8, 4  # in the text: ranges of steps, and decimals


@dataclasses.dataclass(frozen=True)
class GapDecomposition:
    """The result of :func:`gap_decomposition`. It is printed as a table; all values are in nats per datum.

    Attributes:
        entropy: Differential entropy of the data and its (numerical) error.
        gap: E log p − ELBO, an ``Estimate``, paired per datum.
        irreducible: The gap with the exact ε-network.
        network: The gap that the network adds, summed over the steps.
        network_per_step, network_per_step_error: The gap that the network adds at each step n = 1 … N, and its standard error, shape ``(num_steps,)``.
        residual: gap − irreducible − network, paired per datum: 0 up to its error.
        prior_kl, step_kl, reconstruction: The terms of the bound, ``Estimate``; ``step_kl`` is their sum over steps.
        log_snr: Log-SNR of each step, shape ``(num_steps,)``.
        num_items: Number of data.

    Example:
        >>> import jax, numpy as np, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0], [[1.0]])
        >>> exact = probdiff.Diffusion(schedule, normal.network(schedule), reverse_variance="forward")
        >>> x = np.random.default_rng(0).normal(size=(4, 1))
        >>> gap = probdiff.diagnostics.gap_decomposition(exact, normal, x, key=jax.random.key(0))
        >>> gap.num_items, abs(gap.network.mean) < 1e-6  # the exact network adds nothing to the gap
        (4, True)
    """

    entropy: tuple[float, float]
    gap: Estimate
    irreducible: Estimate
    network: Estimate
    network_per_step: np.ndarray
    network_per_step_error: np.ndarray
    residual: Estimate
    prior_kl: Estimate
    step_kl: Estimate
    reconstruction: Estimate
    log_snr: np.ndarray
    num_items: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, a dict for JSON."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else getattr(value, "_asdict", lambda v=value: v)()
            for name, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "GapDecomposition":
        """The decomposition from the result ``document`` of :meth:`to_dict`, read back from JSON."""

        def read(value: Any) -> Any:
            return Estimate(**value) if isinstance(value, dict) else np.array(value) if isinstance(value, list) else value

        return cls(**{name: read(value) for name, value in document.items()} | {"entropy": tuple(document["entropy"])})

    def plot(self, title: str = "") -> Any:
        """A figure: the gap that the network adds at each step, and its running sum."""
        from probdiff.diagnostics.plots import plot_gap

        return plot_gap(self, title)

    def __repr__(self) -> str:
        """The decomposition as a table."""
        return format_gap(self)


def format_gap(decomposition: GapDecomposition) -> str:
    """A :class:`GapDecomposition` as text: parts that add up to the gap in the printed digits."""
    parts = {
        "irreducible gap, exact ε": decomposition.irreducible,
        "added by the network": decomposition.network,
        "rest: 0 but for its error": decomposition.residual,
    }
    nats = {name: round(part.mean, DIGITS) + 0.0 for name, part in parts.items()}  # no minus before a zero
    lines = [
        f"The gap of the bound taken apart, on {decomposition.num_items} data; log p(x) is exact, on average "
        f"minus the entropy, {-decomposition.entropy[0]:.4f}",
        f"{'':34}{'nats':>10}{'± s.e.':>9}",
        *(f"{name:34}{nats[name]:10.4f}{part.error:9.4f}" for name, part in parts.items()),
        f"{'gap: log p(x) − ELBO':34}{sum(nats.values()):10.4f}{decomposition.gap.error:9.4f}",
    ]
    per_step, num_steps = decomposition.network_per_step, len(decomposition.network_per_step)
    edges = np.unique(np.linspace(0, num_steps, min(BLOCKS, num_steps) + 1).astype(int))
    lines += ["", f"{'added by the network, by steps':34}{'log-SNR':>16}{'nats':>10}{'share':>8}"]
    for first, last in zip(edges, edges[1:]):
        added = per_step[first:last].sum()
        span = f"{decomposition.log_snr[first]:.1f} … {decomposition.log_snr[last - 1]:.1f}"
        lines.append(f"  n = {first + 1} … {last}".ljust(34) + f"{span:>16}{added:10.5f}" + (f"{added / per_step.sum():8.1%}" if per_step.any() else f"{'–':>8}"))
    return "\n".join(lines)


def gap_decomposition(
    diffusion: Diffusion, oracle: Any, x: Data, *, context: PyTree = None, key: PRNGKeyArray, progress: bool = False
) -> GapDecomposition:
    """Decompose the gap between the bound of a model and the known log density of the data.

    Args:
        diffusion: The model, with a NormalLikelihood.
        oracle: The true distribution of the data (see :mod:`probdiff.oracles.distributions`); ``dataset.oracle`` of a data set.
        x: Data drawn from the oracle, shape ``(datum, dim)``, at least two.
        context: Of a conditional model and oracle: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key. Model and exact network are evaluated on the same noise.
        progress: Show progress bars.

    Returns:
        A :class:`GapDecomposition`.

    Raises:
        ValueError, TypeError: If the data do not suit the model, the model has another likelihood, its reverse kernel needs more than the noise
            from the network, or the oracle has no density.

    Example:
        >>> import jax, numpy as np, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0], [[1.0]])
        >>> off = probdiff.Diffusion(schedule, normal.network(schedule, scale=0.9), reverse_variance="forward")
        >>> x = np.random.default_rng(0).normal(size=(4, 1))
        >>> gap = probdiff.diagnostics.gap_decomposition(off, normal, x, key=jax.random.key(0))
        >>> gap.network.mean > 1, abs(gap.residual.mean) < 5 * gap.residual.error  # nats
        (True, True)
    """
    require_type("diffusion", diffusion, Diffusion)
    likelihood: Any = diffusion.likelihood
    kind = type(likelihood).__name__
    require(isinstance(likelihood, NormalLikelihood), "diffusion.likelihood", "a NormalLikelihood", kind, TypeError)
    kernel = diffusion.kernel
    require(kernel.prediction == "noise", "diffusion", "a reverse kernel that asks for the noise alone", kernel.name)
    known = all(hasattr(oracle, name) for name in ("log_prob", "entropy", "standardized"))
    require(known, "oracle", "a distribution out of probdiff.oracles", type(oracle).__name__, TypeError)
    diffusion = diffusion.evaluated().given(context)
    x = diffusion.read_data(x)
    require(len(x) >= 2, "x", "at least two data", len(x))
    require_key(key)
    require(oracle.dim == x.shape[1], "oracle", f"{x.shape[1]} dimensions, as the data have", oracle.dim)
    log_p = oracle.log_prob(np.asarray(x), *(() if context is None else (context,)))
    require(np.isfinite(log_p).all(), "x", "data that the oracle may have drawn", "data where its density is 0")
    schedule = diffusion.schedule
    network = oracle.standardized(likelihood.loc, likelihood.scale).network(schedule)
    exact = diffusion.with_network(network)
    terms_key, bound_key, network_key = jax.random.split(key, 3)
    own = elbo_terms(diffusion, x, key=terms_key, reduce=True, progress=progress)
    x = jnp.asarray(x)
    gap, irreducible = (log_p - _bound(d, x, bound_key, progress) for d in (diffusion, exact))
    added = np.asarray(_network_cost(diffusion, exact, x, network_key), np.float64)
    return GapDecomposition(
        entropy=oracle.entropy(),
        gap=Estimate.of(gap),
        irreducible=Estimate.of(irreducible),
        network=Estimate.of(added.sum(0)),
        network_per_step=added.mean(1),
        network_per_step_error=added.std(1, ddof=1) / np.sqrt(len(x)),
        residual=Estimate.of(gap - irreducible - added.sum(0)),
        prior_kl=Estimate.of(own.prior_kl),
        step_kl=Estimate.of(np.asarray(own.step_kl.mean, np.float64).sum(0)),
        reconstruction=Estimate.of(own.reconstruction.mean),
        log_snr=np.asarray(schedule.log_snr),
        num_items=len(x),
    )


def _bound(diffusion: Diffusion, x: jax.Array, key: PRNGKeyArray, progress: bool) -> Float[np.ndarray, "datum"]:
    """All steps of every datum's bound, minus a control variate: the gap is small, so that its noise must be small as well."""
    objective = AnalyticELBO(diffusion, "all", control="linear")
    evaluate = jax.jit(lambda key, x, context: objective.of(diffusion.with_context(context)).per_datum(key, x))
    cut = blocks(len(x), EVALUATIONS // diffusion.schedule.num_steps, unit="datum", desc="bound", progress=progress)
    bounds = [
        np.asarray(evaluate(jax.random.fold_in(key, i), *take((x, diffusion.context), rows)), np.float64)
        for i, rows in enumerate(cut)
    ]
    return joined(bounds, len(x))


@eqx.filter_jit
def _network_cost(
    diffusion: Diffusion, exact: Diffusion, x: jax.Array, key: PRNGKeyArray
) -> Float[Array, "num_steps datum"]:
    """w_n ‖ε̂ − ε*‖² at one z_n for each step and datum, shape ``(num_steps, datum)``."""
    x0 = diffusion.likelihood.encode(x)
    weight = diffusion.kernel.kl_weight(diffusion.schedule)

    def one(n: Int[Array, ""]) -> Float[Array, "datum"]:
        eps = jax.random.normal(jax.random.fold_in(key, n), x0.shape, x0.dtype)
        step = diffusion.sampled_step(x, x0, n, eps)
        return (at_dims(weight, n, x0.dtype) * jnp.square(step.prediction - exact.predict_noise(step.z, n))).sum(-1)

    return over_steps(one, diffusion.schedule.num_steps, diffusion.network, len(x))
