"""The bound computed two ways on the same data, and whether they agree: on average, and term by term on common paths."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from probdiff._checks import PyTree, Whole, require, require_count, require_key, require_type
from probdiff._devices import Devices
from probdiff.diagnostics.common_paths import CommonPaths, compare_on_common_paths
from probdiff.diffusion import Diffusion
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.importance import path_elbo
from probdiff.elbo.terms import ELBOTerms, elbo_terms
from probdiff.programs.sites import Data

Z_AGREE = 3.0
POWER_90 = 1.2816  # quantile of the standard normal
COMMON = 4  # data whose terms are compared on common paths


class TwoWays(NamedTuple):
    """The analytic decomposition and NumPyro's ``Trace_ELBO`` on the same data.

    Attributes:
        terms: The analytic terms, :class:`~probdiff.elbo.ELBOTerms`.
        path: ``Trace_ELBO`` of every datum on sampled paths, shape ``(draw, datum)``, nats.
        common: Each term computed both ways on the same paths, for the first four data, :class:`CommonPaths`; None if the KLs
            are sampled or the steps are not normal.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0 * z)
        >>> x = jax.numpy.zeros((3, 2))
        >>> terms = probdiff.elbo_terms(diffusion, x, key=jax.random.key(1), num_draws=4)
        >>> path = probdiff.elbo.path_elbo(diffusion, x, key=jax.random.key(2), num_draws=4)
        >>> both = probdiff.diagnostics.TwoWays(terms, path)
        >>> abs(both.z) < 5, both.detectable > 0
        (True, True)
    """

    terms: ELBOTerms
    path: np.ndarray
    common: CommonPaths | None = None

    @property
    def analytic(self) -> Estimate:
        """:class:`Estimate` of the bound from the analytic terms."""
        return Estimate.of_draws(self.terms.elbo)

    @property
    def trace(self) -> Estimate:
        """:class:`Estimate` of the bound from ``Trace_ELBO``."""
        return Estimate.of_draws(self.path)

    @property
    def difference(self) -> tuple[float, float]:
        """Analytic minus path estimate, nats per datum, and its Monte Carlo standard error."""
        a, b = self.analytic, self.trace
        return a.mean - b.mean, float(np.hypot(a.monte_carlo_error, b.monte_carlo_error))

    @property
    def z(self) -> float:
        """The difference in units of its Monte Carlo standard error; 0 if both estimates are exactly equal."""
        difference, error = self.difference
        return difference / error if error > 0 else (0.0 if difference == 0 else float(np.copysign(np.inf, difference)))

    @property
    def detectable(self) -> float:
        """The difference, in nats, that would have been detected with a probability of 90 %: 4.3 times its standard error."""
        return (Z_AGREE + POWER_90) * self.difference[1]

    @property
    def agree(self) -> bool:
        """Whether the difference is at most three standard errors, and every term agrees on common paths."""
        return bool(abs(self.z) <= Z_AGREE) and (self.common is None or self.common.agree)


def compute_both_ways(
    diffusion: Diffusion,
    x: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_draws: Whole,
    devices: Devices = None,
    progress: bool = False,
) -> TwoWays:
    """The bound on ``x`` by the analytic terms and by ``Trace_ELBO``, and their terms on common paths: a :class:`TwoWays`.

    Args:
        diffusion: A trained Diffusion.
        x: Data, shape ``(datum, dim)``.
        context: Of a conditional model: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key.
        num_draws: Draws per datum for each of the two estimates, at least 2.
        devices: Number of devices (or a list of them) that share the data.
        progress: Show progress bars.

    Raises:
        ValueError, TypeError: If the data do not suit the model, or there are fewer than two draws.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0 * z)
        >>> x = jax.random.normal(jax.random.key(1), (4, 2))
        >>> both = probdiff.diagnostics.compute_both_ways(diffusion, x, key=jax.random.key(2), num_draws=4)
        >>> both.common.agree, both.path.shape  # each term is the same on the same path, up to rounding
        (True, (4, 4))
    """
    require_count("num_draws", num_draws)
    require(num_draws >= 2, "num_draws", "at least 2, for an error", num_draws)
    require_key(key)
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.given(context)
    terms_key, path_key, common_key = jax.random.split(key, 3)
    options: Any = {"num_draws": num_draws, "devices": devices, "progress": progress}
    terms = elbo_terms(diffusion, x, key=terms_key, **options)
    path = path_elbo(diffusion, x, key=path_key, **options)
    few = diffusion.take(slice(COMMON))
    return TwoWays(terms, path, compare_on_common_paths(few, x[:COMMON], key=common_key))
