r"""Cases in which everything is known: what the programs and the estimators are held against.

For Gaussian data the best ε-network is linear, :math:`\hat\epsilon = A_n z + b_n`. With *any* linear network the
reverse chain is linear-Gaussian, so that every term of the bound and :math:`\log p_\theta(x)` have closed forms. They
are computed here in float64 NumPy, from means and covariances: no sampling, and no code shared with the programs.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from probdiff.checks import require, require_finite
from probdiff.likelihoods import NormalLikelihood


class LinearNetwork(eqx.Module):
    r"""The ε-network :math:`\hat\epsilon = A_n z + b_n`; constant, nothing in it is trained.

    Args:
        weight: :math:`A_n`, shape ``(num_steps, dim, dim)``.
        bias: :math:`b_n`, shape ``(num_steps, dim)``.
    """

    weight: np.ndarray
    bias: np.ndarray

    @property
    def dim(self):
        """Dimension of the data."""
        return self.bias.shape[-1]

    def __call__(self, z, n):
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` after ``n`` steps, shape ``batch``."""
        weight, bias = jnp.asarray(self.weight, z.dtype)[n - 1], jnp.asarray(self.bias, z.dtype)[n - 1]
        return jnp.einsum("...ij,...j->...i", weight, z) + bias


class GaussianOracle:
    """Gaussian data :math:`x_0 ~ N(m, S)`.

    Args:
        mean: m, shape ``(dim,)``.
        covariance: S, shape ``(dim, dim)``, positive definite.
    """

    def __init__(self, mean, covariance):
        self.mean = np.asarray(mean, np.float64)
        self.covariance = np.asarray(covariance, np.float64)
        require_finite("mean", self.mean)
        require(self.mean.ndim == 1, "mean", "shape (dim,)", f"shape {self.mean.shape}")
        require(
            self.covariance.shape == 2 * self.mean.shape,
            "covariance",
            f"shape {2 * self.mean.shape}",
            f"shape {self.covariance.shape}",
        )
        symmetric = np.allclose(self.covariance, self.covariance.T)
        require(
            symmetric and np.linalg.eigvalsh(self.covariance).min() > 0,
            "covariance",
            "a positive definite matrix",
            self.covariance,
        )

    def network(self, schedule, scale=1.0):
        r"""The network with the smallest expected error, :math:`E[\epsilon | z_n]`, times ``scale``."""
        dim = len(self.mean)
        alpha_bar = schedule.alpha_bar[:, None, None]
        noise = schedule.one_minus_alpha_bar[:, None, None]
        weight = np.sqrt(noise) * np.linalg.inv(alpha_bar * self.covariance + noise * np.eye(dim))
        bias = -weight @ self.mean * np.sqrt(schedule.alpha_bar)[:, None]
        return LinearNetwork(scale * weight, scale * bias)

    def sample(self, rng, size):
        """``size`` draws of the data from a NumPy generator, shape ``(size, dim)``."""
        return rng.multivariate_normal(self.mean, self.covariance, size)


def exact_terms(diffusion, x):
    """Every term of the bound of a diffusion with a :class:`LinearNetwork`, in closed form.

    Args:
        diffusion: A Diffusion with a LinearNetwork and a NormalLikelihood.
        x: Data, shape ``(datum, dim)``.

    Returns:
        A dict of float64 arrays, in nats: ``prior_kl`` and ``reconstruction`` and ``elbo``, shape ``(datum,)``, and
        ``step_kl``, shape ``(step, datum)``, n = 2 … N.
    """
    schedule, x0, log_jacobian = _encoded(diffusion, x)
    dim = x0.shape[1]
    identity = np.eye(dim)
    final = schedule.alpha_bar[-1]
    prior_kl = (final * (x0**2).sum(1) - dim * (final + np.log1p(-final))) / 2
    step_kl = []
    for n in range(1, schedule.num_steps + 1):
        signal, noise = np.sqrt(schedule.alpha_bar[n - 1]), np.sqrt(1 - schedule.alpha_bar[n - 1])
        alpha, beta = schedule.alpha[n - 1], schedule.beta[n - 1]
        gain, offset = _reverse_mean(diffusion, n)
        previous = schedule.alpha_bar[n - 2] if n > 1 else 1.0
        # Mean of q(z_{n-1} | z_n, x0) minus that of p, as from_x0 @ x0 + from_eps @ eps - offset.
        z_weight = np.sqrt(alpha) * (1 - previous) / noise**2 * identity - gain
        from_x0 = signal * z_weight + np.sqrt(previous) * beta / noise**2 * identity
        from_eps = noise * z_weight
        distance = ((x0 @ from_x0.T - offset) ** 2).sum(1) + (from_eps**2).sum()
        variance = _reverse_variance(diffusion, n)
        if n == 1:
            reconstruction = -dim / 2 * np.log(2 * np.pi * variance) - distance / (2 * variance) - log_jacobian
        else:
            ratio = beta * (1 - previous) / noise**2 / variance
            step_kl.append(distance / (2 * variance) + dim / 2 * (ratio - 1 - np.log(ratio)))
    step_kl = np.reshape(step_kl, (schedule.num_steps - 1, len(x0)))
    elbo = reconstruction - step_kl.sum(0) - prior_kl
    return {"prior_kl": prior_kl, "step_kl": step_kl, "reconstruction": reconstruction, "elbo": elbo}


def exact_log_prob(diffusion, x):
    r""":math:`\log p_\theta(x)` of a diffusion with a :class:`LinearNetwork`, in nats, shape ``(datum,)``.

    The reverse chain is propagated as a Gaussian from z_N to x.
    """
    schedule, x0, log_jacobian = _encoded(diffusion, x)
    dim = x0.shape[1]
    mean, covariance = np.zeros(dim), np.eye(dim)
    for n in range(schedule.num_steps, 0, -1):
        gain, offset = _reverse_mean(diffusion, n)
        mean = gain @ mean + offset
        covariance = gain @ covariance @ gain.T + _reverse_variance(diffusion, n) * np.eye(dim)
    residual = x0 - mean
    mahalanobis = (residual * np.linalg.solve(covariance, residual.T).T).sum(1)
    return -(mahalanobis + np.linalg.slogdet(2 * np.pi * covariance)[1]) / 2 - log_jacobian


def _encoded(diffusion, x):
    require(
        isinstance(diffusion.network, LinearNetwork),
        "diffusion.network",
        "a LinearNetwork",
        type(diffusion.network).__name__,
        TypeError,
    )
    require(
        isinstance(diffusion.likelihood, NormalLikelihood),
        "diffusion.likelihood",
        "a NormalLikelihood",
        type(diffusion.likelihood).__name__,
        TypeError,
    )
    x = np.asarray(x, np.float64)
    scale = np.broadcast_to(diffusion.likelihood.scale, x.shape[1:])
    return diffusion.schedule, (x - np.asarray(diffusion.likelihood.loc)) / scale, np.log(scale).sum()


def _reverse_mean(diffusion, n):
    """Gain and offset of the reverse mean at step n: gain @ z_n + offset."""
    schedule, network = diffusion.schedule, diffusion.network
    per_eps = schedule.beta[n - 1] / np.sqrt(1 - schedule.alpha_bar[n - 1])
    gain = (np.eye(network.dim) - per_eps * network.weight[n - 1]) / np.sqrt(schedule.alpha[n - 1])
    return gain, -per_eps * network.bias[n - 1] / np.sqrt(schedule.alpha[n - 1])


def _reverse_variance(diffusion, n):
    schedule = diffusion.schedule
    if n == 1 or diffusion.kernel.reverse_variance == "forward":
        return schedule.beta[n - 1]
    return schedule.beta[n - 1] * (1 - schedule.alpha_bar[n - 2]) / (1 - schedule.alpha_bar[n - 1])
