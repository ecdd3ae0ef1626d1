r"""The bound two ways on the same paths, term by term.

On a path z_1 … z_N of the forward chain NumPyro's ``Trace_ELBO`` adds up log-ratios of densities, and the analytic decomposition
KLs. Where both are normal, q = N(a, s²) and p = N(b, t²), and z = a + s ξ, a log-ratio and a KL differ by a known term of mean zero,

    log p(z) − log q(z) = − KL(q ‖ p) − Σ_i [ s_i (a_i − b_i) ξ_i / t_i²  −  (1 − s_i²/t_i²)(ξ_i² − 1)/2 ],

so that after its subtraction the two agree up to rounding: a missing or wrong term is detected, however large the Monte Carlo error is.
The densities, a, s, b and t come from the sites of the programs; the KLs come from :func:`probdiff.elbo_terms`. Computed in float64.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import distributions as dist
from numpyro import handlers

from probdiff._checks import PyTree, require_key, require_type
from probdiff.chain.schedules import AbstractSchedule
from probdiff.diffusion import Diffusion
from probdiff.elbo.terms import elbo_terms
from probdiff.programs.sites import Data

ROUNDING = 1e-6  # relative to the sum of a term and 1 nat: rounding in float64 is a thousand times smaller


class CommonPaths(NamedTuple):
    """The terms of the bound of each datum on one path, computed two ways, in nats: shape ``(datum,)``; the step KLs, n = 2 … N, ``(step, datum)``.

    Attributes:
        analytic: ``prior_kl``, ``step_kl`` and ``reconstruction`` by the analytic decomposition.
        traced: The same from the log densities of the programs, minus their terms of mean zero.

    Example:
        >>> import numpy as np, probdiff
        >>> terms = {"prior_kl": np.array([0.1]), "step_kl": np.array([[2.0], [1.0]]), "reconstruction": np.array([-1.0])}
        >>> other = terms | {"step_kl": np.array([[2.0], [1.5]])}
        >>> paths = probdiff.diagnostics.CommonPaths(analytic=terms, traced=other)
        >>> paths.agree, paths.wrong, paths.largest
        (False, ['KL of step 3'], 0.5)
    """

    analytic: dict[str, np.ndarray]
    traced: dict[str, np.ndarray]

    @property
    def differences(self) -> dict[str, np.ndarray]:
        """Analytic minus traced, by term."""
        return {name: self.analytic[name] - self.traced[name] for name in self.analytic}

    @property
    def largest(self) -> float:
        """The largest absolute difference, nats."""
        return max((float(np.abs(each).max()) for each in self.differences.values() if each.size), default=0.0)

    @property
    def wrong(self) -> list[str]:
        """The names of the terms that differ by more than rounding in float64, as text."""
        names = []
        for name, difference in self.differences.items():
            bad = ~(np.abs(difference) <= ROUNDING * (1 + np.abs(self.traced[name]))).all(-1)
            if name == "step_kl":
                names += [f"KL of step {n}" for n in 2 + np.flatnonzero(bad)]
            elif bad:
                names.append({"prior_kl": "prior KL"}.get(name, name))
        return names

    @property
    def agree(self) -> bool:
        """Whether all terms agree up to rounding."""
        return not self.wrong


def compare_on_common_paths(
    diffusion: Diffusion, x: Data, *, context: PyTree = None, key: PRNGKeyArray
) -> CommonPaths | None:
    """Each term of the bound by the analytic decomposition and by the programs' log densities, on one path for each datum.

    Args:
        diffusion: The model.
        x: Data, shape ``(datum, dim)``; a few are enough, as the comparison has no Monte Carlo error.
        context: Of a conditional model: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key.

    Returns:
        :class:`CommonPaths`; None if the steps of the model are not normal or their KLs are sampled.

    Raises:
        ValueError, TypeError: If the data do not suit the model.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> paths = probdiff.diagnostics.compare_on_common_paths(diffusion, jax.numpy.zeros((3, 2)), key=jax.random.key(1))
        >>> paths.agree, paths.largest < 1e-9  # nats
        (True, True)
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.evaluated().given(context)
    x = diffusion.read_data(x)
    require_key(key)
    if not diffusion.kernel.closed_form:
        return None  # its log-ratios have no closed-form KL to be compared with
    with jax.enable_x64(True):
        diffusion = jax.tree.map(_in_float64, diffusion)
        data = jnp.asarray(_in_float64(np.asarray(x)))
        eps, xi = _path_noise(diffusion.schedule, diffusion.likelihood.encode(data), key)
        terms = elbo_terms(diffusion, data, noise=eps[None])
        analytic = {"prior_kl": terms.prior_kl, "step_kl": terms.step_kl[0], "reconstruction": terms.reconstruction[0]}
        traced = _traced(diffusion, data, eps, xi)
    return None if traced is None else CommonPaths(*jax.tree.map(np.asarray, (analytic, traced)))


def _in_float64(leaf: Any) -> Any:
    is_float = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(np.float64) if is_float else leaf


def _path_noise(
    schedule: AbstractSchedule, x0: Float[Array, "datum dim"], key: PRNGKeyArray
) -> tuple[Float[Array, "num_steps datum dim"], Float[Array, "num_steps datum dim"]]:
    r"""The noise ε_n in z_n of a path, and the noise ξ of the same path drawn from z_N downwards, both for n = 1 … N.

    Given z_n and x_0, :math:`\epsilon_{n-1} = \kappa_n \epsilon_n + \sqrt{1-\kappa_n^2}\, \xi_{n-1}` with
    :math:`\kappa_n^2 = \alpha_n (1-\bar\alpha_{n-1}) / (1-\bar\alpha_n)`; :math:`\epsilon_N = \xi_N`.
    """
    xi = jax.random.normal(key, (schedule.num_steps, *x0.shape), x0.dtype)
    variance = jnp.asarray(schedule.one_minus_alpha_bar, x0.dtype)
    kept = jnp.sqrt(jnp.asarray(schedule.alpha, x0.dtype)[1:] * variance[:-1] / variance[1:])
    added = jnp.sqrt(jnp.asarray(schedule.beta, x0.dtype)[1:] / variance[1:])

    def back(eps: Array, each: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        kept, added, xi = each
        eps = kept * eps + added * xi
        return eps, eps

    earlier = jax.lax.scan(back, xi[-1], (kept, added, xi[:-1]), reverse=True)[1]
    return jnp.concatenate([earlier, xi[-1:]]), xi


@eqx.filter_jit
def _traced(
    diffusion: Diffusion, x: jax.Array, eps: Float[Array, "num_steps datum dim"], xi: Float[Array, "num_steps datum dim"]
) -> dict[str, jax.Array] | None:
    """The terms by the programs, given the path; None if the sites are not normal."""
    x0 = diffusion.likelihood.encode(x)
    signal, noise = (jnp.asarray(t, x0.dtype)[:, None, None] for t in (diffusion.schedule.signal_scale, diffusion.schedule.noise_scale))
    given = {"z": (signal * x0 + noise * eps)[::-1]}
    model, guide = (
        handlers.trace(handlers.seed(handlers.substitute(program, given), 0)).get_trace(x)
        for program in (diffusion.model, diffusion.posterior_guide)
    )
    sites = model["z"]["fn"], guide["z"]["fn"]
    if not all(isinstance(site, dist.Independent) and isinstance(site.base_dist, dist.Normal) for site in sites):
        return None
    p, q = (site.base_dist for site in sites)
    log_ratio = sites[0].log_prob(given["z"]) - sites[1].log_prob(given["z"])
    xi, ratio = xi[::-1], jnp.square(q.scale / p.scale)
    mean_zero = q.scale * (q.loc - p.loc) * xi / jnp.square(p.scale) - (1 - ratio) * (jnp.square(xi) - 1) / 2
    # In the programs' order: z_N first.
    kl = -log_ratio - mean_zero.sum(-1)
    reconstruction = model["x"]["fn"].log_prob(x)
    return {"prior_kl": kl[0], "step_kl": kl[1:][::-1], "reconstruction": reconstruction}
