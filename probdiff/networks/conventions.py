r"""Adapters for networks that were written and trained under the conventions of other libraries and papers.

    inputs                                            prediction                                  adapter
    a timestep t = n − 1, or a number for each step   the noise; others with a head               :func:`from_timesteps`
    γ = −log SNR (VDM)                                the noise                                   :func:`from_vdm`
    x = z/√ᾱ and σ (EDM's denoiser, k-diffusion)      the data, D(x; σ)                           :func:`from_denoiser`
    c_in x and c_noise (inside EDM)                   F, with D = c_skip x + c_out F              :func:`from_edm`

The schedules of these libraries are in :mod:`probdiff.chain.conventions`. Predictions of other quantities need a head: :class:`~probdiff.networks.VHead`,
:class:`~probdiff.networks.X0Head`, :class:`~probdiff.networks.ClipHead`, :class:`~probdiff.networks.VarianceHead`.

Sources: as in :mod:`probdiff.chain.conventions`.
"""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

from probdiff._checks import Number, Numbers, PyTree, require, require_finite
from probdiff.networks.base import AbstractNetwork, AbstractWrapper, Network, Prediction, evaluate, signal_and_noise
from probdiff.networks.heads import AbstractHead, X0Head

Told = tuple[Float[Array, "*batch dim"], Real[Array, "*batch"] | None]


class AbstractAdapter(AbstractWrapper):
    """A network around a callable with other inputs than z and n.

    To write your own, define :meth:`inputs`; the network can then be evaluated at any noise level.
    """

    network: eqx.AbstractVar[Network]

    @abc.abstractmethod
    def inputs(
        self, z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"], n: Int[Array, "*batch"] | None
    ) -> Told:
        """The two inputs of the callable: one computed from ``z``, of the same shape, and one from its noise level, shape ``batch``."""

    @property
    def inside(self) -> tuple[Network]:
        """The callable."""
        return (self.network,)

    @property
    def is_told_step(self) -> bool:
        """False: the callable is told a function of the noise level."""
        return False

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        *,
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Prediction:
        """The prediction of the callable for ``z``, shape ``(*batch, dim)``, of log-SNR ``log_snr`` after ``n`` steps, both of shape ``batch``."""
        given, time = self.inputs(z, log_snr, n)
        return evaluate(self.network, given, log_snr, time, key, context)


class AtTimesteps(AbstractAdapter):
    """The result of :func:`from_timesteps`: a network told a number for each step."""

    network: Network
    timesteps: np.ndarray | None

    @property
    def is_told_step(self) -> bool:
        """True."""
        return True

    def inputs(
        self, z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"], n: Int[Array, "*batch"] | None
    ) -> Told:
        """z, and the timestep of the step; NaN for z if there is no such timestep."""
        if n is None or self.timesteps is None:
            return z, n - 1 if n is not None else None
        table = jnp.asarray(self.timesteps)
        return jnp.where((n <= len(table))[..., None], z, jnp.nan), table[n - 1]


class AtGamma(AbstractAdapter):
    """The result of :func:`from_vdm`: a network told γ = −log SNR."""

    network: Network

    def inputs(
        self, z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"], n: Int[Array, "*batch"] | None
    ) -> Told:
        """z and γ."""
        return z, -log_snr


class AtSigma(AbstractAdapter):
    """A network in variance-exploding coordinates, network(x, σ)."""

    network: Network

    def inputs(
        self, z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"], n: Int[Array, "*batch"] | None
    ) -> Told:
        """x = z/√ᾱ and σ."""
        return z / signal_and_noise(log_snr)[0], jnp.exp(-log_snr / 2)


class Preconditioned(AbstractAdapter):
    """A network of EDM, F(c_in x, c_noise), for x of variance ``sigma_data``² + σ²."""

    network: Network
    sigma_data: float = eqx.field(static=True)

    def inputs(
        self, z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"], n: Int[Array, "*batch"] | None
    ) -> Told:
        """c_in x = x/√(σ² + σ_data²) and c_noise = ¼ log σ."""
        signal, noise = signal_and_noise(log_snr)  # (x = z/√ᾱ and σ = noise/signal, in which √ᾱ cancels)
        return z / jnp.hypot(noise, self.sigma_data * signal), -log_snr / 8


class EDMHead(AbstractHead):
    r"""The network predicts F of EDM's preconditioning, :math:`\hat x_0 = c_{skip} x + c_{out} F`.

    With :math:`c_{skip} = \sigma_d^2/(\sigma^2+\sigma_d^2)` and :math:`c_{out} = \sigma \sigma_d/\sqrt{\sigma^2+\sigma_d^2}` the noise is
    :math:`\hat\epsilon = (\sigma x/\sqrt{\sigma^2+\sigma_d^2} - \sigma_d F)/\sqrt{\sigma^2+\sigma_d^2}`, without cancellation for small σ.

    Args:
        network: A :class:`Preconditioned`.
    """

    network: Preconditioned

    def noise(
        self, prediction: Float[Array, "*batch dim"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise in ``z`` if the data are :math:`c_{skip} x + c_{out} F`."""
        signal, noise = signal_and_noise(log_snr)
        data = self.network.sigma_data * signal
        total = jnp.hypot(noise, data)
        return (noise * z / total - data * prediction) / total


def from_timesteps(network: Network, timesteps: Numbers | None = None) -> AtTimesteps:
    """The ε-network around a callable that is told a timestep, as in diffusers and improved-diffusion.

    Args:
        network: A callable ``network(z, t)`` with t of the shape of the batch; it may accept ``key=`` and ``context=`` by name. Its prediction is the noise,
            or another quantity, which a head around the result converts to noise.
        timesteps: The timesteps of steps 1 … N, N numbers; 0 … N − 1 if not given. For a chain with fewer steps than in training, give the
            remaining timesteps; for a network trained on rescaled timesteps, ``1000 / N * np.arange(N)``.

    Raises:
        ValueError, TypeError: If ``network`` is not such a callable, or the timesteps are not N numbers.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> network = probdiff.networks.from_timesteps(lambda z, t: z * t[..., None])
        >>> probdiff.Diffusion(probdiff.cosine_schedule(4), network, dim=1).predict_noise(jnp.ones((2, 1)), jnp.array([1, 4])).ravel()
        Array([0., 3.], dtype=float32)
    """
    _require_callable(network, "network(z, t)")
    if timesteps is None:
        return AtTimesteps(network, None)
    times = np.asarray(timesteps)
    numbers = times.ndim == 1 and times.size > 0 and times.dtype.kind in "iuf"
    require(numbers, "timesteps", "N numbers", f"shape {times.shape} of {times.dtype}")
    require_finite("timesteps", times)
    return AtTimesteps(network, times if times.dtype.kind == "f" else times.astype(np.int32))


def from_vdm(network: Network) -> AtGamma:
    r"""The ε-network for a network of a variational diffusion model, which is told :math:`\gamma = -\log SNR`.

    Source: Kingma et al. (2021), arXiv:2107.00630, section 3.4 and appendix A.

    Args:
        network: A callable ``network(z, gamma) -> eps_hat``; it may accept ``key=`` and ``context=`` by name.

    Raises:
        ValueError, TypeError: If ``network`` is not such a callable.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.chain.vdm_schedule(lambda t: 10 * t - 5, 11)
        >>> network = probdiff.networks.from_vdm(lambda z, gamma: z * gamma[..., None])
        >>> probdiff.Diffusion(schedule, network, dim=1).predict_noise(jnp.ones((1, 1)), 11)
        Array([[5.]], dtype=float32)
    """
    _require_callable(network, "network(z, gamma)")
    return AtGamma(network)


def from_denoiser(network: Network) -> X0Head:
    r"""The ε-network for a denoiser D(x; σ) of variance-exploding noise, as in EDM and k-diffusion.

    :math:`\hat\epsilon = (x - D(x; \sigma))/\sigma` with :math:`x = z/\sqrt{\bar\alpha}`. For small σ the difference loses precision, with an error of about 1e-7/σ in float32;
    :func:`from_edm`, for the network inside the denoiser of EDM, does not. Source: Karras et al. (2022), arXiv:2206.00364, eqs. 2 and 3.

    Args:
        network: A callable ``network(x, sigma)`` that returns the predicted data, shaped like x; it may accept ``key=`` and ``context=`` by name.

    Raises:
        ValueError, TypeError: If ``network`` is not such a callable.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> network = probdiff.networks.from_denoiser(lambda x, sigma: x / (1 + sigma[..., None] ** 2))  # data are N(0, 1)
        >>> model = probdiff.Diffusion(probdiff.chain.edm_schedule(8), network, dim=1)
        >>> bool(jnp.allclose(model.predict_noise(jnp.ones((1, 1)), 5), model.schedule.noise_scale[4], rtol=1e-5))
        True
    """
    _require_callable(network, "network(x, sigma)")
    return X0Head(AtSigma(network))


def from_edm(network: Network, sigma_data: Number = 0.5) -> EDMHead:
    r"""The ε-network for EDM's :math:`F_\theta(c_{in} x; c_{noise})`, the network inside the denoiser :math:`D = c_{skip} x + c_{out} F_\theta`.

    :math:`c_{in} = 1/\sqrt{\sigma^2+\sigma_d^2}`, :math:`c_{noise} = \tfrac14 \log \sigma`, and :math:`c_{skip}` and :math:`c_{out}` as in :class:`EDMHead`.
    Source: Karras et al. (2022), arXiv:2206.00364, eq. 7 and table 1.

    Args:
        network: A callable ``network(scaled_x, c_noise)`` that returns F, shaped like x; it may accept ``key=`` and ``context=`` by name.
        sigma_data: :math:`\sigma_d`, the standard deviation of the encoded training data.

    Raises:
        ValueError, TypeError: If ``network`` is not such a callable, or ``sigma_data`` is not positive.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> network = probdiff.networks.from_edm(lambda x, c_noise: 0 * x)  # exact if the data are N(0, 0.5²)
        >>> model = probdiff.Diffusion(probdiff.chain.edm_schedule(8), network, dim=1)
        >>> noise, signal = model.schedule.noise_scale[4], model.schedule.signal_scale[4]
        >>> bool(jnp.allclose(model.predict_noise(jnp.ones((1, 1)), 5), noise / (noise**2 + 0.25 * signal**2), rtol=1e-5))
        True
    """
    _require_callable(network, "network(scaled_x, c_noise)")
    good = isinstance(sigma_data, Number) and 0 < sigma_data < np.inf
    require(good, "sigma_data", "a positive number", repr(sigma_data))
    return EDMHead(Preconditioned(network, float(sigma_data)))


def _require_callable(network: Any, words: str) -> None:
    """Refuse an object that is not callable, and a network that is told the log-SNR already."""
    require(callable(network), "network", f"a callable {words}", type(network).__name__, TypeError)
    foreign = not isinstance(network, AbstractNetwork)
    require(foreign, "network", f"a callable {words}", f"a {type(network).__name__}, which is told the log-SNR")
