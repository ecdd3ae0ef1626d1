r"""The probability flow: the ordinary differential equation whose solutions have the marginals of the forward chain.

With the log-SNR λ as time, :math:`\bar\alpha = sigmoid(\lambda)`, and an ε-network in continuous time,

    dz/dλ = ½ √(1−ᾱ) (√(1−ᾱ) z − ε̂(z, λ)),        log q(z_1) = log q(z_N) + ∫ ∇·(dz/dλ) dλ  from λ_1 to λ_N

(in variance-exploding coordinates x = z/√ᾱ, dx/dσ = ε̂). A network told the log-SNR is evaluated between the steps; one told the step is interpolated linearly in λ.

The flow is another model than the reverse chain :math:`p_\theta`, with the same network. Its density of z_1 contains two approximations: the interpolation, if there is one, and the
base distribution N(0, I) in place of q(z_N). It is not the density of the data either, as z_1 has the noise of the first step. :func:`~probdiff.flow_likelihood` reports the three errors separately.

Sources: Song et al. (2021), arXiv:2011.13456, eqs. 13 and 39; Karras et al. (2022), arXiv:2206.00364, eq. 1, with σ as time; Grathwohl et al. (2019), arXiv:1810.01367, section 3.1, for Hutchinson's estimator.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from numpy.typing import ArrayLike

from probdiff._checks import Number, PyTree, Whole, require, require_count, require_finite, require_key, require_type
from probdiff._chunks import EACH, blocks, inputs_at_once, joined, repeat, take
from probdiff.chain.forward import forward_marginal, prior_kl
from probdiff.diffusion import Diffusion
from probdiff.programs.sites import Data

__all__ = ["FlowLikelihood", "flow_likelihood", "flow_log_prob"]
MAX_STEPS = 100_000
LOOSER = 10  # factor on the tolerances, to estimate the error of the solver
Eps = Callable[[jax.Array, jax.Array], jax.Array]


def in_continuous_time(diffusion: Diffusion, every: int = 1) -> Eps:
    """The ε-network of a model, a function ``eps(z, log_snr)`` of one ``z`` of shape ``(dim,)``.

    Args:
        diffusion: A trained Diffusion.
        every: If the network is interpolated, use only each ``every``-th step, and the last.

    Example:
        >>> import probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0.5 * z)  # told the step
        >>> type(probdiff.flow.in_continuous_time(diffusion)).__name__
        'Interpolated'
    """
    return Interpolated(diffusion, every) if diffusion.is_told_step else diffusion.predict_noise_at


class Interpolated(eqx.Module):
    """The network of a model, if it is told the step, interpolated between the steps of the chain, linearly in log-SNR.

    Args:
        diffusion: A trained Diffusion.
        every: Use only each ``every``-th step, and the last.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> eps = probdiff.flow.Interpolated(probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0.5 * z))
        >>> eps(jnp.ones(2), jnp.array(0.0)).tolist()
        [0.5, 0.5]
    """

    diffusion: Diffusion
    every: int = eqx.field(static=True, default=1)

    def __call__(self, z: Float[Array, "dim"], log_snr: Float[Array, ""]) -> Float[Array, "dim"]:
        """Predict the noise in ``z`` of shape ``(dim,)``, by two evaluations of the network."""
        num_steps = self.diffusion.schedule.num_steps
        steps = np.union1d(np.arange(1, num_steps + 1, self.every), num_steps)
        times, time = jnp.asarray(-self.diffusion.schedule.log_snr[steps - 1], z.dtype), -log_snr
        left = jnp.clip(jnp.searchsorted(times, time, side="right") - 1, 0, len(steps) - 2)
        ends = jnp.stack([left, left + 1])
        start, end = times[ends]
        eps_hat = self.diffusion.predict_noise(jnp.stack([z, z]), jnp.asarray(steps)[ends])
        share = jnp.clip((time - start) / (end - start), 0, 1)
        return (1 - share) * eps_hat[0] + share * eps_hat[1]


def velocity(eps: Eps, z: Float[Array, "dim"], log_snr: Float[Array, ""]) -> Float[Array, "dim"]:
    """dz/dλ of the flow of ``eps(z, log_snr)``, shaped like ``z``.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> probdiff.flow.velocity(lambda z, log_snr: 0 * z, jnp.ones(2), jnp.array(0.0)).round(3).tolist()
        [0.25, 0.25]
    """
    noise = jnp.exp(jax.nn.log_sigmoid(-log_snr) / 2)
    return noise / 2 * (noise * z - eps(z, log_snr))


def solve(
    field: Callable[[jax.Array, Any], Any],
    state: Any,
    start: float,
    end: float,
    *,
    rtol: Number | jax.Array,
    atol: Number | jax.Array,
    steps: int | None = None,
) -> tuple[Any, jax.Array]:
    """The state at log-SNR ``end`` of d state/dλ = ``field(λ, state)``, and the number of evaluations of ``field``.

    The solver is an adaptive method of fifth order with these tolerances, or Heun's method with ``steps`` equal steps.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> end, evaluations = probdiff.flow.solve(lambda time, y: -y, jnp.ones(1), 0.0, 1.0, rtol=1e-4, atol=1e-4)
        >>> round(end.item(), 2)  # exp(−1)
        0.37
    """
    dtype = jax.tree.leaves(state)[0].dtype
    if start == end:
        return state, jnp.zeros((), jnp.int32)
    if steps is not None:
        times = jnp.asarray(np.linspace(start, end, steps + 1), dtype)

        def heun(state: Any, ends: tuple[Array, Array]) -> tuple[Any, None]:
            time, length = ends[0], ends[1] - ends[0]
            first = field(time, state)
            second = field(ends[1], jax.tree.map(lambda leaf, slope: leaf + length * slope, state, first))
            return jax.tree.map(lambda leaf, a, b: leaf + length / 2 * (a + b), state, first, second), None

        return jax.lax.scan(heun, state, (times[:-1], times[1:]))[0], jnp.asarray(2 * steps, jnp.int32)
    import diffrax  # imported here, because the import is slow

    controller = diffrax.PIDController(rtol=jnp.asarray(rtol), atol=jnp.asarray(atol))
    term, span = diffrax.ODETerm(lambda time, state, _: field(jnp.asarray(time), state)), (jnp.asarray(start, dtype), jnp.asarray(end, dtype))
    solution = diffrax.diffeqsolve(term, diffrax.Tsit5(), *span, None, state, stepsize_controller=controller, max_steps=MAX_STEPS)
    return jax.tree.map(lambda leaf: leaf[0], solution.ys), 6 * solution.stats["num_steps"]


@eqx.filter_jit
def _to_base(
    diffusion: Diffusion,
    every: int,
    z: Float[Array, "datum dim"],
    ends: tuple[float, float],
    directions: Float[Array, "datum direction dim"],
    scale: Number,
    rtol: Number | jax.Array,
    atol: Number | jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """z_N, the integral of the divergence and the number of evaluations of ε̂, for each z_1.

    The divergence is ``scale`` × Σ v·Jv over the ``directions`` v, shape ``(datum, direction, dim)``.
    """

    def one(z: Float[Array, "dim"], directions: Float[Array, "direction dim"], context: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
        eps = in_continuous_time(diffusion.with_context(context), every)

        def field(time: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
            value, jvp = jax.linearize(lambda z: velocity(eps, z, time), state[0])
            return value, scale * jnp.sum(directions * jax.vmap(jvp)(directions))

        (end, change), count = solve(field, (z, jnp.zeros((), z.dtype)), *ends, rtol=rtol, atol=atol)
        return end, change, count

    return jax.vmap(one)(z, directions, take(diffusion.context, EACH))


def flow_log_prob(
    diffusion: Diffusion,
    z: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray | None = None,
    num_probes: Whole | None = None,
    base: Callable[[np.ndarray], ArrayLike] | None = None,
    rtol: Number | jax.Array = 1e-5,
    atol: Number | jax.Array = 1e-5,
    progress: bool = False,
) -> Float[np.ndarray, "datum"]:
    r"""The flow's log-density of :math:`z_1`, from base N(0, I) at :math:`z_N`.

    Args:
        diffusion: The model.
        z: :math:`z_1`, shape ``(datum, dim)``.
        context: Of a conditional model: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key of the probes; not used with the exact divergence.
        num_probes: None for the exact divergence, ``dim`` Jacobian-vector products for each evaluation of the network; or the
            number of random directions of Hutchinson's estimator, for large ``dim``: unbiased for the log-density.
        base: A function that returns the log density in nats of :math:`z_N` of shape ``(datum, dim)``; that of N(0, I) if not given.
        rtol, atol: Tolerances of the solver for each step.
        progress: Show a progress bar.

    Returns:
        Nats, shape ``(datum,)``, float64. For the log-density of the data in the user's units see :func:`~probdiff.flow_likelihood`.

    Raises:
        ValueError, TypeError: If an argument does not fit the model.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianMixture([1.0], [[0.0]], [[1.0]])
        >>> exact = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> round(probdiff.flow.flow_log_prob(exact, jnp.zeros((1, 1))).item(), 3)  # log N(0; 0, 1)
        -0.919
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.evaluated().given(context)
    z = jnp.asarray(z)
    suits = z.ndim == 2 and len(z) > 0 and diffusion.dim in (None, z.shape[1])
    require(suits, "z", f"shape (datum, {diffusion.dim or 'dim'})", f"shape {z.shape}")
    require(jnp.issubdtype(z.dtype, jnp.floating), "z", "floats", f"dtype {z.dtype}", TypeError)
    require_finite("z", z)
    _check_probes(key, num_probes)
    require_tolerances(rtol, atol)
    diffusion.require_context(len(z))
    return _flow(diffusion, 1, base, z, key, num_probes, rtol, atol, progress)[0]


def _check_probes(key: PRNGKeyArray | None, num_probes: Whole | None) -> None:
    if num_probes is not None:
        require_count("num_probes", num_probes)
        require_key(key)


def require_tolerances(rtol: Number | jax.Array, atol: Number | jax.Array) -> None:
    """Refuse tolerances that are not between 0 and 1.

    Example:
        >>> import probdiff
        >>> probdiff.flow.require_tolerances(rtol=1.0, atol=1e-4)
        Traceback (most recent call last):
        ValueError: rtol: Expected a number between 0 and 1; got 1.0
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        require(0 < value < 1, name, "a number between 0 and 1", value)


def _flow(
    diffusion: Diffusion,
    every: int,
    base: Callable[[np.ndarray], ArrayLike] | None,
    z: Float[Array, "datum dim"],
    key: PRNGKeyArray | None,
    num_probes: Whole | None,
    rtol: Number | jax.Array,
    atol: Number | jax.Array,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-densities of z_1, and the number of evaluations of ε̂ for each."""
    size, dim = z.shape
    if num_probes is None:
        directions, scale = jnp.broadcast_to(jnp.eye(dim, dtype=z.dtype), (size, dim, dim)), 1.0
    else:
        directions, scale = jax.random.rademacher(cast(jax.Array, key), (size, int(num_probes), dim), z.dtype), 1 / num_probes
    ends = tuple(diffusion.schedule.log_snr[[0, -1]].tolist())
    rtol, atol = jnp.asarray(rtol, z.dtype), jnp.asarray(atol, z.dtype)  # arrays, so that other values need no new compilation
    found = []
    for rows in blocks(size, inputs_at_once(diffusion.network) // directions.shape[1], unit="datum", desc="flow", progress=progress):
        some = diffusion.take(rows)
        z_end, change, count = _to_base(some, every, z[rows], ends, directions[rows], scale, rtol, atol)
        end = np.asarray(z_end)
        log_prob = (_standard_normal(end) if base is None else np.asarray(base(end))) + np.asarray(change, np.float64)
        found.append((log_prob, count))
    return joined(found, size)


def _standard_normal(z: np.ndarray) -> np.ndarray:
    return -np.square(z.astype(np.float64)).sum(-1) / 2 - z.shape[-1] / 2 * np.log(2 * np.pi)


class FlowLikelihood(NamedTuple):
    r"""The log-likelihood of the data under the probability flow, and estimates of the errors of its approximations and of the solver.

    Attributes:
        log_q: The flow's log-density of :math:`z_1 \sim q(z_1 | x_0)`, nats, shape ``(draw, datum)``.
        log_prob: A lower bound, in expectation over draws, on the log-likelihood of x under the flow followed by the model's last step:
            log_q − log q(z_1 | x_0) + log p(x | z_1); nats in the user's units, shape ``(draw, datum)``.
        interpolation: Estimated error of ``log_q`` from the interpolation of ε̂ between the steps, shape ``(draw, datum)``: a third of the change when only
            every second step is used (the error is of second order in the distance of the steps). NaN where N < 3; 0 for a network that is told the log-SNR.
        base: The prior KL, shape ``(datum,)``, nats. Its mean over the data is an upper bound on the mean error from
            N(0, I) in place of :math:`q(z_N)`.
        smoothing: The error from σ_1, if ``log_q`` with its Jacobian were taken as the log density of x: ``log_prob`` minus
            that log density, shape ``(draw, datum)``.
        solver: Estimated error of ``log_q`` from the solver: the change with tolerances ten times as large, about the error at these tolerances, shape
            ``(draw, datum)``. An interpolated network has a kink at every step, so that the error falls slowly with the tolerances: at the
            default, 1e-5, it was 4e-4 nats at most for the exact network of the moons.
        num_evaluations: Approximate number of evaluations of the network along each path of the flow, shape ``(draw, datum)``.

    Example:
        >>> import numpy as np, probdiff
        >>> part = np.ones((1, 2))  # one draw of two data
        >>> found = probdiff.flow.FlowLikelihood(-part, -part, 0 * part, 0 * part[0], 0 * part, 0 * part, 60 * part)
        >>> print(repr(found).splitlines()[0])
        2 data, 1 draws of z_1 each; nats per datum, ± standard error over data
    """

    log_q: np.ndarray
    log_prob: np.ndarray
    interpolation: np.ndarray
    base: np.ndarray
    smoothing: np.ndarray
    solver: np.ndarray
    num_evaluations: np.ndarray

    def __repr__(self) -> str:
        """A table of means, each with its standard error over the data."""
        rows = (
            ("log-likelihood by the flow (lower bound)", self.log_prob),
            ("  log q(z_1)", self.log_q),
            ("  error from interpolation, estimated", self.interpolation),
            ("  error from the solver, estimated, absolute value", np.abs(self.solver)),
            ("  error from the base N(0, I), at most", self.base[None]),
            ("  error from σ_1, if log q(z_1) is taken as log p(x)", self.smoothing),
        )
        draws, size = self.log_q.shape
        lines = [f"{size} data, {draws} draws of z_1 each; nats per datum, ± standard error over data"]
        for name, values in rows:
            mean = values.mean(0)
            error = mean.std(ddof=1) / np.sqrt(size) if size > 1 else np.nan
            lines.append(f"{name:52}{mean.mean():12.5f} ± {error:.5f}")
        lines.append(f"{self.num_evaluations.mean():.0f} network evaluations along a flow")
        lines.append("The flow is another model than the reverse chain: the ELBO and IWAE bound another likelihood.")
        return "\n".join(lines)


def flow_likelihood(
    diffusion: Diffusion,
    x: Data,
    *,
    context: PyTree = None,
    key: PRNGKeyArray,
    num_draws: Whole = 1,
    num_probes: Whole | None = None,
    rtol: Number | jax.Array = 1e-5,
    atol: Number | jax.Array = 1e-5,
    progress: bool = False,
) -> FlowLikelihood:
    r"""The log-likelihood of data by the probability flow, and the errors of its three approximations and of the solver.

    The flow gives a density of :math:`z_1`, which has the noise of the first step. In a bound on the data this density replaces the prior:
    :math:`\log p(x) \ge E[\log q(z_1) - \log q(z_1|x_0) + \log p_\theta(x|z_1)]`, for continuous data and for data on a grid.

    Args:
        diffusion: The model.
        x: Data as the user has it, shape ``(datum, dim)``.
        context: Of a conditional model: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        key: JAX key of :math:`z_1` and of the probes.
        num_draws: Number of :math:`z_1` for each datum.
        num_probes, rtol, atol, progress: As for :func:`~probdiff.flow.flow_log_prob`.

    Returns:
        A :class:`FlowLikelihood`. The reverse chain is another model: a difference between its ELBO and this likelihood is not an error of either.

    Raises:
        ValueError, TypeError: If the data do not suit the model, or an argument is out of range.

    Example:
        >>> import jax, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianMixture([1.0], [[0.0]], [[1.0]])
        >>> exact = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> found = probdiff.flow_likelihood(exact, jax.numpy.zeros((3, 1)), key=jax.random.key(0), num_draws=2)
        >>> found.log_prob.shape, bool(abs(found.log_prob + 0.9189).max() < 1e-3)  # log N(0; 0, 1)
        ((2, 3), True)
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.evaluated().given(context)
    x = diffusion.read_data(x)
    require_count("num_draws", num_draws)
    require_key(key)
    _check_probes(key, num_probes)
    require_tolerances(rtol, atol)
    eps_key, probe_key = jax.random.split(key)
    schedule, x = diffusion.schedule, jnp.asarray(x)
    x0 = diffusion.likelihood.encode(x)
    eps = jax.random.normal(eps_key, (int(num_draws), *x0.shape), x0.dtype)
    first = jnp.ones((num_draws, len(x)), jnp.int32)
    step = diffusion.sampled_step(x, x0, first, eps)
    z = step.z

    def density(every: int = 1, looser: Number = 1) -> list[np.ndarray]:
        flat = z.reshape(-1, z.shape[-1])
        of_draws = diffusion.with_context(repeat(diffusion.context, num_draws))
        found = _flow(of_draws, every, None, flat, probe_key, num_probes, looser * rtol, looser * atol, progress)
        return [each.reshape(first.shape) for each in found]

    log_q, count = density()
    coarse = log_q
    if diffusion.is_told_step:
        coarse = density(every=2)[0] if schedule.num_steps > 2 else np.full_like(log_q, np.nan)
    noising = np.asarray(forward_marginal(schedule, x0, 1).log_prob(z), np.float64)
    last_step = np.asarray(diffusion.log_likelihood(step), np.float64)
    dim = x0.shape[-1]
    to_data = diffusion.likelihood.log_jacobian(dim) + dim / 2 * np.log(schedule.alpha_bar[0])
    log_prob = log_q - noising + last_step
    return FlowLikelihood(
        log_q=log_q,
        log_prob=log_prob,
        interpolation=(coarse - log_q) / 3,
        base=np.asarray(prior_kl(schedule, x0), np.float64),
        smoothing=log_prob - (log_q + to_data),
        solver=density(looser=LOOSER)[0] - log_q,
        num_evaluations=(1 + diffusion.is_told_step) * count,
    )
