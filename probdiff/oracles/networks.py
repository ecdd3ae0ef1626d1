r"""The exact ε-networks, :math:`E[\epsilon | z_n]`, of the distributions in :mod:`probdiff.oracles.distributions`.

They are used like any other ε-network, but are constant: nothing in them is trained. The networks of mixtures and of boxes are told the log-SNR.

Source: Efron (2011), doi:10.1198/jasa.2011.tm11181, for the conditional mean by the gradient of the density (Tweedie's formula).
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from probdiff._checks import Number, Whole
from probdiff.networks.base import AbstractNetwork

NODES = 40  # of the quadrature over a truncated normal
REACH = 8.5  # The density is neglected below exp(-REACH²/2) of its maximum.

# Accelerators round the factors of a product to fewer bits by default.
_einsum = functools.partial(jnp.einsum, precision="highest")


class _Linear(eqx.Module):
    weight: Float[np.ndarray, "num_steps dim dim"]
    bias: Float[np.ndarray, "num_steps dim"]

    @property
    def dim(self) -> int:
        """Dimension of the data."""
        return self.bias.shape[-1]

    def without_context(self, z: Float[Array, "*batch dim"], n: Whole | Int[Array, "*#batch"]) -> Float[Array, "*batch dim"]:
        """:math:`A_n z + b_n`, shaped like ``z``."""
        weight, bias = jnp.asarray(self.weight, z.dtype)[n - 1], jnp.asarray(self.bias, z.dtype)[n - 1]
        return _einsum("...ij,...j->...i", weight, z) + bias


class LinearNetwork(_Linear):
    r"""The ε-network :math:`\hat\epsilon = A_n z + b_n`; constant, nothing in it is trained.

    Args:
        weight: :math:`A_n`, shape ``(num_steps, dim, dim)``.
        bias: :math:`b_n`, shape ``(num_steps, dim)``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, probdiff
        >>> network = probdiff.oracles.LinearNetwork(weight=np.full((5, 1, 1), 0.5), bias=np.zeros((5, 1)))
        >>> network(jnp.array([2.0]), 3).item()
        1.0
    """

    def __call__(self, z: Float[Array, "*batch dim"], n: Whole | Int[Array, "*#batch"]) -> Float[Array, "*batch dim"]:
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` after ``n`` steps, shape ``batch``."""
        return self.without_context(z, n)


class ConditionalLinearNetwork(_Linear):
    r"""The ε-network :math:`\hat\epsilon = A_n z + b_n + C_n c` of a conditional model; constant, nothing in it is trained.

    Args:
        weight, bias: As for :class:`LinearNetwork`.
        context_weight: :math:`C_n`, shape ``(num_steps, dim, context_dim)``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, probdiff
        >>> half = np.full((5, 1, 1), 0.5)
        >>> network = probdiff.oracles.ConditionalLinearNetwork(weight=half, bias=np.zeros((5, 1)), context_weight=half)
        >>> network(jnp.array([2.0]), 3, context=jnp.array([4.0])).item()
        3.0
    """

    context_weight: Float[np.ndarray, "num_steps dim context_dim"]

    def __call__(
        self, z: Float[Array, "*batch dim"], n: Whole | Int[Array, "*#batch"], *, context: Real[Array, "*batch context_dim"]
    ) -> Float[Array, "*batch dim"]:
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` after ``n`` steps, shape ``batch``, given c of shape ``(*batch, context_dim)``."""
        weight = jnp.asarray(self.context_weight, z.dtype)[n - 1]
        return self.without_context(z, n) + _einsum("...ij,...j->...i", weight, context.astype(z.dtype))


class MixtureNetwork(AbstractNetwork):
    r""":math:`E[\epsilon | z_n]` of a mixture of Gaussians; constant, nothing in it is trained.

    Component k of :math:`q(z_n)` is :math:`N(\sqrt{\bar\alpha_n} m_k, C_k)`, :math:`C_k = \bar\alpha_n S_k +
    (1-\bar\alpha_n) I`. Given z and k, the mean of ε is :math:`\sqrt{1-\bar\alpha_n}\, C_k^{-1} (z -
    \sqrt{\bar\alpha_n} m_k)`; it is averaged over k given z. In the axes of :math:`S_k` every :math:`C_k` is diagonal.

    Args:
        log_weights: Log-probability of each component, shape ``(K,)``.
        means: :math:`m_k` in the axes of component k, shape ``(K, dim)``.
        variances: Eigenvalues of :math:`S_k`, shape ``(K, dim)``, or ``(1, dim)`` if all are the same.
        axes: Eigenvectors of :math:`S_k`, in columns, shape ``(K, dim, dim)``, or ``(1, dim, dim)``.
        scale: Factor of the result.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> mixture = probdiff.oracles.GaussianMixture([0.5, 0.5], [[-2.0], [2.0]], [[0.25]])
        >>> network = mixture.network(probdiff.cosine_schedule(5))  # a MixtureNetwork
        >>> network(jnp.zeros((3, 1)), jnp.zeros(3)).shape  # told the log-SNR
        (3, 1)
    """

    log_weights: Float[np.ndarray, "K"]
    means: Float[np.ndarray, "K dim"]
    variances: Float[np.ndarray, "#K dim"]
    axes: Float[np.ndarray, "#K dim dim"]
    scale: Number = eqx.field(static=True)

    @property
    def dim(self) -> int:
        """Dimension of the data."""
        return self.means.shape[-1]

    def __call__(self, z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` and log-SNR ``log_snr``, shape ``batch``."""
        constants = (self.log_weights, self.means, self.variances, self.axes)
        log_weights, means, variances, axes = (jnp.asarray(a, z.dtype) for a in constants)
        signal, noise = _signal_and_noise(log_snr)
        precision = 1 / (signal**2 * variances + noise**2)
        residual = _einsum("...i,kij->...kj", z, axes) - signal * means
        eps = noise * precision * residual
        log_joint = log_weights - jnp.sum(precision * residual**2 - jnp.log(precision), -1) / 2
        return self.scale * _einsum("...kj,kij->...i", _given_z(log_joint) * eps, axes)


class BoxesNetwork(AbstractNetwork):
    r""":math:`E[\epsilon | z_n]` of data uniform on boxes; constant, nothing in it is trained.

    As :math:`\epsilon = (z - \sqrt{\bar\alpha_n} x_0) / \sqrt{1-\bar\alpha_n}`, ε given z and the box of :math:`x_0`
    is a standard normal confined to a box; it is averaged over the boxes given z.

    Args:
        centre: Centre of each box, shape ``(K, dim)``.
        half_width: Half of its width, shape ``(K, dim)``.
        scale: Factor of the result.

    Example:
        >>> import jax.numpy as jnp, numpy as np, probdiff
        >>> network = probdiff.oracles.BoxesNetwork(centre=np.zeros((1, 1)), half_width=np.ones((1, 1)), scale=1.0)
        >>> abs(network(jnp.zeros((1, 1)), jnp.zeros(1)).item()) < 1e-6  # by symmetry
        True
    """

    centre: Float[np.ndarray, "K dim"]
    half_width: Float[np.ndarray, "K dim"]
    scale: Number = eqx.field(static=True)

    @property
    def dim(self) -> int:
        """Dimension of the data."""
        return self.centre.shape[-1]

    def __call__(self, z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` and log-SNR ``log_snr``, shape ``batch``."""
        centre, half_width = (jnp.asarray(a, z.dtype) for a in (self.centre, self.half_width))
        signal, noise = _signal_and_noise(log_snr)
        log_mass, eps = _confined_normal((z[..., None, :] - signal * centre) / noise, signal * half_width / noise)
        return self.scale * jnp.sum(_given_z(log_mass.sum(-1)) * eps, -2)


def _confined_normal(
    centre: Float[Array, "*batch K dim"], half_width: Float[Array, "*#batch K dim"]
) -> tuple[Float[Array, "*batch K dim"], Float[Array, "*batch K dim"]]:
    r"""Log-probability, up to a constant, and mean of a standard normal confined to ``centre`` ± ``half_width``.

    Both are integrals over the part of the interval where the density is not negligible. They are computed by
    Gauss-Legendre quadrature, to about 1e-12, because :math:`(\phi(a)-\phi(b)) / (\Phi(b)-\Phi(a))` loses all digits
    in a narrow interval and is 0/0 in a tail.
    """
    node, weight = (jnp.asarray(a, centre.dtype) for a in np.polynomial.legendre.leggauss(NODES))
    # The interval, mirrored where needed, starts at the end of largest density, or left of 0 if it contains 0.
    end = jnp.abs(centre) - half_width
    start = jnp.maximum(end, -REACH)
    peak = jnp.maximum(start, 0)
    length = jnp.minimum(2 * half_width - (start - end), peak - start + REACH**2 / (peak + jnp.hypot(peak, REACH)))
    step, start = length[..., None] * (node + 1) / 2, start[..., None]
    density = weight * jnp.exp(-step * (start + step / 2))
    mass = density.sum(-1)
    mean = jnp.sum(density * (start + step), -1) / mass
    return jnp.log(length * mass) - start[..., 0] ** 2 / 2, jnp.where(centre < 0, -mean, mean)


def _given_z(log_joint: Float[Array, "*batch K"]) -> Float[Array, "*batch K 1"]:
    """Probability of each component given z, shape ``(*batch, K, 1)``, from its log-weights up to a constant.

    Where z is so far out that every square overflows, all components have the same probability.
    """
    return jax.nn.softmax(jnp.maximum(log_joint, jnp.finfo(log_joint.dtype).min), -1)[..., None]


def _signal_and_noise(log_snr: Float[Array, "*batch"]) -> tuple[Float[Array, "*batch 1 1"], Float[Array, "*batch 1 1"]]:
    """Square roots of alpha_bar and of 1 − alpha_bar at some log-SNR, with axes for component and dimension."""
    signal, noise = (jnp.exp(jax.nn.log_sigmoid(sign * log_snr) / 2)[..., None, None] for sign in (1, -1))
    return signal, noise
