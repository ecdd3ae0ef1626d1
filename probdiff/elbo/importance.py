r"""Tighter bounds from the same paths: importance-weighted below, and above where x is drawn from the model.

With log weights :math:`\log w_k = \log p_\theta(x, z^k) - \log q(z^k | x)` of paths :math:`z^k`,

    lower, K paths from q:                        E log 1/K Σ_k w_k  ≤  log p_θ(x)      (K = 1: the ELBO)
    upper, one path from p_θ(z | x), K−1 from q:  E log 1/K Σ_k w_k  ≥  log p_θ(x)

A path from :math:`p_\theta(z | x)` is at hand exactly when x was generated along with it.
Sources: Burda et al. (2016), arXiv:1509.00519, eq. 8; Sobolev and Vetrov (2019), arXiv:1910.03115, theorem 1, with
q for the auxiliary distribution.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from scipy.special import logsumexp

from probdiff._checks import Number, PyTree, Whole, require, require_count, require_key, require_type
from probdiff._chunks import EACH, MOST_NUMBERS, blocks, joined, take
from probdiff._sharding import Devices, data_mesh, gather, replicate, shard
from probdiff.diffusion import Diffusion
from probdiff.programs.sites import Data

FEWEST_DRAWS = 25


def path_elbo(
    diffusion: Diffusion,
    x: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_draws: Whole,
    devices: Devices = None,
    progress: bool = False,
) -> Float[np.ndarray, "draw datum"]:
    r"""NumPyro's ``Trace_ELBO`` of every datum by itself, with the forward guide: :math:`\log p - \log q` of paths.

    Args:
        diffusion: A trained Diffusion.
        x: Data, shape ``(datum, dim)``.
        context: Of a conditional model: a row for each datum, as for :meth:`Diffusion.given`.
        key: JAX key.
        num_draws: Number of sampled paths per datum.
        devices: Number of devices (or a list of them) that share the data.
        progress: Show a progress bar.

    Returns:
        Nats, shape ``(draw, datum)``.

    Example:
        >>> import jax, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0], [[1.0]])
        >>> exact = probdiff.Diffusion(schedule, normal.network(schedule), reverse_variance="forward")
        >>> elbo = probdiff.elbo.path_elbo(exact, jax.numpy.zeros((3, 1)), key=jax.random.key(0), num_draws=4)
        >>> elbo.shape, bool(abs(elbo + 0.9189).max() < 1e-3)  # every path gives log N(0; 0, 1)
        ((4, 3), True)
    """

    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.evaluated().given(context)
    x = diffusion.read_data(x)
    require_count("num_draws", num_draws)
    require_key(key)
    mesh = data_mesh(devices)
    diffusion, x, key = replicate((diffusion, jnp.asarray(x), key), mesh)

    @jax.jit
    def evaluate(keys: jax.Array, data: Any) -> jax.Array:
        keys, (x, context) = shard((keys, data), mesh)
        return gather(path_log_weight(diffusion.with_context(context), x, keys), mesh)

    # A row is a path of one datum; the values of its latents are all kept at once.
    keys = jax.vmap(lambda key: jax.random.split(key, len(x)))(jax.random.split(key, int(num_draws)))
    size, largest = num_draws * len(x), MOST_NUMBERS // (diffusion.schedule.num_steps * diffusion.likelihood.encoded_dim(x.shape[1]))
    cut = blocks(size, largest, unit="path", desc="Trace_ELBO on sampled paths", progress=progress)
    keys = keys.reshape(size, *keys.shape[2:])
    data = x, diffusion.context
    found = [np.asarray(evaluate(keys[rows], take(data, rows % len(x)))) for rows in cut]
    return joined(found, size).reshape(num_draws, len(x))


def path_log_weight(diffusion: Diffusion, x: Data, keys: jax.Array) -> Float[Array, "datum"]:
    r""":math:`\log p_\theta(x, z | c) - \log q(z | x)` of one path z of each datum; it can be differentiated with respect to parameters and context.

    Args:
        diffusion: The model, given a context if it is conditional.
        x: Data, shape ``(datum, dim)``; not checked.
        keys: A JAX key for each datum, shape ``(datum,)``.

    Returns:
        Nats, shape ``(datum,)``.
    """

    def one(key: PRNGKeyArray, datum: Any) -> jax.Array:
        x, context = take(datum, None)
        given = diffusion.with_context(context)
        with handlers.block():  # whatever program this is called in
            return -Trace_ELBO().loss(key, {}, given.model, given.guide, x)

    return jax.vmap(one)(keys, (x, diffusion.context))


def iwae(
    diffusion: Diffusion,
    x: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_particles: Whole,
    num_draws: Whole = 1,
    progress: bool = False,
) -> Float[np.ndarray, "draw datum"]:
    """The importance-weighted bound of every datum; it rises to log p(x) with the number of particles.

    NumPyro's ``RenyiELBO(alpha=0, num_particles=K)`` on a single datum has the same expectation.

    Args:
        diffusion: The model.
        x: Data, shape ``(datum, dim)``.
        context: Of a conditional model: a row for each datum, as for :meth:`Diffusion.given`.
        key: JAX key.
        num_particles: Paths K in each bound: N K network evaluations for each datum and draw.
        num_draws: Number of independent bounds per datum.
        progress: Show a progress bar.

    Returns:
        Nats, shape ``(draw, datum)``.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> x = jax.numpy.zeros((3, 2))
        >>> probdiff.iwae(diffusion, x, key=jax.random.key(1), num_particles=10, num_draws=2).shape
        (2, 3)
    """
    require_type("diffusion", diffusion, Diffusion)
    require_count("num_particles", num_particles)
    require_count("num_draws", num_draws)
    log_weights = path_elbo(diffusion, x, context=context, key=key, num_draws=num_particles * num_draws, progress=progress)
    return log_mean_exp(log_weights.reshape(num_draws, num_particles, -1), 1)


def log_mean_exp(log_weights: Any, axis: int) -> np.ndarray:
    """The log of the mean of exp(``log_weights``), in float64."""
    return logsumexp(np.asarray(log_weights, np.float64), axis) - np.log(np.shape(log_weights)[axis])


def pareto_khat(log_weights: Any) -> Float[np.ndarray, "datum"]:
    """The Pareto shape k̂ of the largest importance weights p/q of each datum (PSIS), by ArviZ.

    k̂ says whether the importance-weighted estimate of p(x) can be trusted (up to :func:`khat_limit`) from this many draws. It does *not*
    measure the gap of the bound: weights with a light tail, k̂ < 0, can have any variance.
    Source: Vehtari et al. (2024), arXiv:1507.02646.

    Args:
        log_weights: log p − log q, shape ``(draw, datum)``, from :func:`path_elbo`.

    Returns:
        Shape ``(datum,)``; −inf where all weights are equal: the guide is the exact posterior. NaN throughout if there
        are fewer than 25 draws: the tail is then too short.

    Example:
        >>> import numpy as np, probdiff
        >>> log_weights = np.random.default_rng(0).normal(size=(1000, 2)) * [0.1, 10.0]
        >>> (probdiff.pareto_khat(log_weights) > 0.7).tolist()  # the second datum's weights cannot be trusted
        [False, True]
    """
    import arviz  # noqa: F401  (registers the accessor)
    import xarray as xr

    log_weights = np.asarray(log_weights, np.float64)
    require(log_weights.ndim == 2, "log_weights", "shape (draw, datum)", f"shape {log_weights.shape}")
    vary = np.ptp(log_weights, axis=0) > 1e-6 * (1 + np.abs(log_weights).max(0))
    khat = np.full(log_weights.shape[1], -np.inf)
    if len(log_weights) < FEWEST_DRAWS:
        khat[:] = np.nan
    elif vary.any():
        # ArviZ takes the negated log weights.
        array = xr.DataArray(-log_weights[:, vary], dims=("sample", "datum"))
        khat[vary] = array.azstats.psislw(dim="sample")[1].values
    return khat


def khat_limit(num_draws: Whole) -> float:
    """The limit that k̂ must not exceed for an estimate from so many draws to be trusted: min(1 − 1/log₁₀ S, 0.7); 0.7 from 2155 draws on.

    Source: Vehtari et al. (2024), arXiv:1507.02646, section 3.2.4.
    """
    return min(1 - 1 / float(np.log10(num_draws)), 0.7)


def khat_error(khat: Number, num_draws: Whole) -> float:
    """About the standard error of k̂ itself: (1 + k̂)/√M, as of a fit to the M = min(S/5, 3√S) largest of S weights.

    That is the error of the maximum likelihood estimate for many M. Source: Smith (1987), Annals of Statistics 15, 1174.
    """
    return float((1 + khat) / np.sqrt(min(num_draws / 5, 3 * np.sqrt(num_draws))))


class Sandwich(NamedTuple):
    """Bounds on both sides of log p_θ(x), for data drawn from the model.

    Attributes:
        x: The data, shape ``(datum, dim)``.
        lower: For each number of paths K, the lower bound in nats, shape ``(datum,)``; K = 1 is the ELBO.
        upper: For each K, the upper bound in nats, shape ``(datum,)``.

    Example:
        >>> import numpy as np, probdiff
        >>> one, five = np.array([-3.0, -2.0]), np.array([-2.9, -1.9])
        >>> print(probdiff.elbo.Sandwich(x=np.zeros((2, 1)), lower={1: one, 5: five}, upper={}))
        2 data drawn from the model; nats per datum, ± standard error over data
        lower, K = 1         -2.5000 ± 0.5000
        lower, K = 5         -2.4000 ± 0.5000   + 0.1000 ± 0.0000
    """

    x: jax.Array
    lower: dict[int, np.ndarray]
    upper: dict[int, np.ndarray]

    def __repr__(self) -> str:
        """The bounds from below to above, each with its error and its paired distance to the one before."""
        rows = [(f"lower, K = {k}", self.lower[k]) for k in sorted(self.lower)]
        rows += [(f"upper, K = {k}", self.upper[k]) for k in sorted(self.upper, reverse=True)]
        lines = [f"{len(self.x)} data drawn from the model; nats per datum, ± standard error over data"]
        for i, (name, values) in enumerate(rows):
            line = f"{name:18}{values.mean():10.4f} ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}"
            if i:
                step = values - rows[i - 1][1]
                line += f"   + {step.mean():.4f} ± {step.std(ddof=1) / np.sqrt(len(step)):.4f}"
            lines.append(line)
        return "\n".join(lines)


def sandwich(
    diffusion: Diffusion,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_data: Whole | None = None,
    num_particles: Whole | Sequence[int] = (1, 10, 100),
    progress: bool = False,
) -> Sandwich:
    r"""Draw data from the model, and bound their log-likelihood from below and from above.

    Each datum is generated with its path, an exact draw of :math:`p_\theta(z | x)`. Every bound is one draw for each
    datum; those of different K share their paths. The bounds hold for data drawn from the model, and for no others.

    Args:
        diffusion: The model.
        context: Of a conditional model, as for :meth:`Diffusion.given`: one datum is drawn for each row.
        key: JAX key.
        num_data: Number of data to draw, at least 2; not needed with a context.
        num_particles: Numbers of paths K, or one number.
        progress: Show a progress bar.

    Returns:
        A :class:`Sandwich`.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> bounds = probdiff.sandwich(diffusion, key=jax.random.key(1), num_data=8, num_particles=(1, 10))
        >>> bool(bounds.lower[1].mean() < bounds.upper[1].mean())
        True
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.evaluated().given(context)
    if num_data is not None:
        require_count("num_data", num_data)
    num_data = diffusion.data_shape(None, num_data)[0]
    require_key(key)
    counts = np.atleast_1d(num_particles).tolist()
    require(counts, "num_particles", "at least one number", "none")
    for count in counts:
        require_count("num_particles", count)
    require(num_data >= 2, "num_data", "at least 2, for an error", num_data)
    model_key, path_key = jax.random.split(key)
    x, own = _generate(diffusion, model_key, num_data)
    below = path_elbo(diffusion, x, key=path_key, num_draws=max(counts), progress=progress)
    lower = {k: log_mean_exp(below[:k], 0) for k in counts}
    upper = {k: log_mean_exp(np.concatenate([own[None], below[: k - 1]]), 0) for k in counts}
    return Sandwich(x, lower, upper)


def _generate(diffusion: Diffusion, key: PRNGKeyArray, num_data: Whole) -> tuple[jax.Array, np.ndarray]:
    """Data from the model, and log p(x, z) − log q(z | x) of the path that each came from."""

    def one(key: PRNGKeyArray, context: PyTree) -> tuple[jax.Array, jax.Array]:
        given = diffusion.with_context(context)
        with handlers.seed(rng_seed=key):
            model = handlers.trace(given.model).get_trace(None, num_data=1)
            x = model["x"]["value"]
            on_path = handlers.substitute(given.posterior_guide, {"z": model["z"]["value"]})
            guide = handlers.trace(on_path).get_trace(x)
        log_p = sum(model[name]["fn"].log_prob(model[name]["value"]).sum() for name in ("z", "x"))
        return x[0], log_p - guide["z"]["fn"].log_prob(guide["z"]["value"]).sum()

    of_one = take(diffusion.context, EACH)
    x, log_weight = jax.jit(jax.vmap(one))(jax.random.split(key, int(num_data)), of_one)
    return x, np.asarray(log_weight, np.float64)
