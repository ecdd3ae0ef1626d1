r"""The bound and the likelihood of a linear-Gaussian chain in closed form.

With a :class:`~probdiff.oracles.LinearNetwork` and a normal likelihood every term of the bound, and :math:`\log p_\theta(x)` itself, are
computed here in float64 NumPy, from means and covariances: no sampling, and no code shared with the programs.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Real

from probdiff._checks import AnyArray, PyTree, require
from probdiff.chain.reverse import AbstractKernel
from probdiff.chain.schedules import AbstractSchedule
from probdiff.likelihoods import AbstractLikelihood, NormalLikelihood
from probdiff.networks.base import Network
from probdiff.oracles.distributions import log_normal
from probdiff.oracles.networks import ConditionalLinearNetwork, LinearNetwork


@runtime_checkable
class _Model(Protocol):
    """The parts of a Diffusion that the closed forms need (the class itself is not imported)."""

    schedule: AbstractSchedule
    kernel: AbstractKernel
    likelihood: AbstractLikelihood
    context: Any

    def given(self, context: Any) -> "_Model": ...

    def with_context(self, context: Any) -> "_Model": ...

    @property
    def network(self) -> Network: ...


def exact_terms(diffusion: _Model, x: Real[AnyArray, "datum dim"], *, context: PyTree = None) -> dict[str, Float[np.ndarray, "..."]]:
    """Every term of the bound of a diffusion with a :class:`LinearNetwork`, in closed form.

    Args:
        diffusion: A Diffusion with a LinearNetwork and a NormalLikelihood.
        x: Data, shape ``(datum, dim)``.
        context: Of a conditional model, shape ``(datum, context_dim)``.

    Returns:
        A dict of float64 arrays, in nats: ``prior_kl`` and ``reconstruction`` and ``elbo``, shape ``(datum,)``, and
        ``step_kl``, shape ``(step, datum)``, n = 2 … N.

    Raises:
        TypeError, ValueError: If the network, the likelihood or the reverse variance (not ``"posterior"`` or ``"forward"``) does not suit.

    Example:
        >>> import numpy as np, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0], [[1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule), reverse_variance="forward")
        >>> exact = probdiff.oracles.exact_terms(diffusion, np.zeros((1, 1)))
        >>> exact["step_kl"].shape, round(exact["elbo"].item(), 4)  # the bound is log N(0; 0, 1): it has no gap
        ((4, 1), -0.9189)
    """
    diffusion = _given(diffusion, context)
    schedule, x0, log_jacobian = _encoded(diffusion, x)
    dim = x0.shape[1]
    identity = np.eye(dim)
    final = schedule.alpha_bar[-1]
    prior_kl = (final * (x0**2).sum(1) - dim * (final + np.log1p(-final))) / 2
    step_kls = []
    for n in range(1, schedule.num_steps + 1):
        signal, noise = np.sqrt(schedule.alpha_bar[n - 1]), np.sqrt(1 - schedule.alpha_bar[n - 1])
        alpha, beta = schedule.alpha[n - 1], schedule.beta[n - 1]
        gain, offset = _reverse_mean(diffusion, n)
        previous = schedule.alpha_bar[n - 2] if n > 1 else 1.0
        # The mean of q(z_{n-1} | z_n, x0) minus the mean of p, as from_x0 @ x0 + from_eps @ eps - offset.
        z_weight = np.sqrt(alpha) * (1 - previous) / noise**2 * identity - gain
        from_x0 = signal * z_weight + np.sqrt(previous) * beta / noise**2 * identity
        from_eps = noise * z_weight
        distance = ((x0 @ from_x0.T - offset) ** 2).sum(1) + (from_eps**2).sum()
        variance = _reverse_variance(diffusion, n)
        if n == 1:
            reconstruction = -dim / 2 * np.log(2 * np.pi * variance) - distance / (2 * variance) - log_jacobian
        else:
            ratio = beta * (1 - previous) / noise**2 / variance
            step_kls.append(distance / (2 * variance) + dim / 2 * (ratio - 1 - np.log(ratio)))
    step_kl = np.reshape(step_kls, (schedule.num_steps - 1, len(x0)))
    elbo = reconstruction - step_kl.sum(0) - prior_kl
    return {"prior_kl": prior_kl, "step_kl": step_kl, "reconstruction": reconstruction, "elbo": elbo}


def exact_moments(diffusion: _Model, *, context: PyTree = None) -> tuple[Float[np.ndarray, "*datum dim"], Float[np.ndarray, "dim dim"]]:
    r"""Mean and covariance of :math:`p_\theta(x)`, which is normal, of a diffusion with a :class:`LinearNetwork`; in the user's units.

    The reverse chain is propagated as a Gaussian from z_N to x. Given a context of shape ``(datum, context_dim)``, the mean has shape ``(datum, dim)``.

    Example:
        >>> import probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0], [[1.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule), reverse_variance="forward")
        >>> mean, covariance = probdiff.oracles.exact_moments(diffusion)
        >>> round(covariance.item(), 4)  # the variance of the data: the chain is reversed exactly
        1.0
    """
    diffusion = _given(diffusion, context)
    likelihood, dim = _parts(diffusion)
    mean, covariance = np.zeros(dim), np.eye(dim)
    for n in range(diffusion.schedule.num_steps, 0, -1):
        gain, offset = _reverse_mean(diffusion, n)
        mean = mean @ gain.T + offset
        covariance = gain @ covariance @ gain.T + _reverse_variance(diffusion, n) * np.eye(dim)
    scale = np.broadcast_to(likelihood.scale, dim)
    return np.asarray(likelihood.loc) + scale * mean, covariance * np.outer(scale, scale)


def exact_log_prob(diffusion: _Model, x: Real[AnyArray, "datum dim"], *, context: PyTree = None) -> Float[np.ndarray, "datum"]:
    r""":math:`\log p_\theta(x)` of a diffusion with a :class:`LinearNetwork`, in nats, shape ``(datum,)``, from :func:`exact_moments`.

    Example:
        >>> import numpy as np, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0], [[4.0]])
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))
        >>> x = np.zeros((1, 1))
        >>> bound = probdiff.oracles.exact_terms(diffusion, x)["elbo"]
        >>> bool(bound < probdiff.oracles.exact_log_prob(diffusion, x))
        True
    """
    mean, covariance = exact_moments(diffusion, context=context)
    return np.asarray(log_normal(np.asarray(x, np.float64) - mean, np.zeros(len(covariance)), covariance))


def _given(diffusion: _Model, context: PyTree) -> _Model:
    """The model given a context, without rounding the context."""
    return diffusion if context is None else diffusion.given(context).with_context(np.asarray(context, np.float64))


def _encoded(
    diffusion: _Model, x: Real[AnyArray, "datum dim"]
) -> tuple[AbstractSchedule, Float[np.ndarray, "datum dim"], np.float64]:
    likelihood, _ = _parts(diffusion)
    x = np.asarray(x, np.float64)
    scale = np.broadcast_to(likelihood.scale, x.shape[1:])
    return diffusion.schedule, (x - np.asarray(likelihood.loc)) / scale, np.log(scale).sum()


def _parts(diffusion: _Model) -> tuple[NormalLikelihood, int]:
    """The likelihood and the dimension of a diffusion that has closed forms."""
    network, likelihood, variance = diffusion.network, diffusion.likelihood, diffusion.kernel.name
    linear = isinstance(network, LinearNetwork | ConditionalLinearNetwork)
    require(linear, "diffusion.network", "a LinearNetwork", type(network).__name__, TypeError)
    normal = isinstance(likelihood, NormalLikelihood)
    require(normal, "diffusion.likelihood", "a NormalLikelihood", type(likelihood).__name__, TypeError)
    require(variance in ("posterior", "forward"), "diffusion", "reverse_variance 'posterior' or 'forward'", repr(variance))
    assert isinstance(network, LinearNetwork | ConditionalLinearNetwork) and isinstance(likelihood, NormalLikelihood)
    return likelihood, network.dim


def _reverse_mean(diffusion: _Model, n: int) -> tuple[Float[np.ndarray, "dim dim"], Float[np.ndarray, "*datum dim"]]:
    """Gain and offset of the reverse mean at step n, gain @ z_n + offset; given a context, each datum has its own offset."""
    schedule, network = diffusion.schedule, diffusion.network
    assert isinstance(network, LinearNetwork | ConditionalLinearNetwork)
    per_eps = schedule.beta[n - 1] / np.sqrt(1 - schedule.alpha_bar[n - 1])
    gain = (np.eye(network.dim) - per_eps * network.weight[n - 1]) / np.sqrt(schedule.alpha[n - 1])
    bias = network.bias[n - 1]
    if isinstance(network, ConditionalLinearNetwork):
        bias = bias + np.asarray(diffusion.context, np.float64) @ network.context_weight[n - 1].T
    return gain, -per_eps * bias / np.sqrt(schedule.alpha[n - 1])


def _reverse_variance(diffusion: _Model, n: int) -> np.float64:
    beta, alpha_bar = (np.asarray(table, np.float64) for table in (diffusion.schedule.beta, diffusion.schedule.alpha_bar))
    if n == 1 or diffusion.kernel.name == "forward":
        return beta[n - 1]
    return beta[n - 1] * (1 - alpha_bar[n - 2]) / (1 - alpha_bar[n - 1])
