r"""Heads, which convert the prediction of a network to the noise.

A head is an ε-network around a network that predicts another quantity. In :math:`z_n = \sqrt{\bar\alpha_n} x_0 +
\sqrt{1-\bar\alpha_n}\, \epsilon` the data, the noise and the velocity v are affine functions of each other, given z_n; so the programs, the
bound and the samplers use only :math:`\hat\epsilon`. A network without a head predicts ε.

Source: Salimans and Ho (2022), arXiv:2202.00512, section 4, for the predictions of x_0 and of v.
"""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._checks import Number, PyTree, require
from probdiff.likelihoods import AbstractLikelihood
from probdiff.networks.base import AbstractWrapper, Network, evaluate, require_shape, signal_and_noise


class AbstractHead(AbstractWrapper):
    """An ε-network around another network of either kind, whose prediction it converts to the noise.

    To write your own, define :meth:`noise`; and ``output_shape`` if the prediction is not shaped like ``z``.

    Attributes:
        network: The network, with the options of :mod:`probdiff.networks.base`.

    Example:
        >>> import jax, probdiff
        >>> class Negated(probdiff.networks.AbstractHead):
        ...     def noise(self, prediction, z, log_snr):
        ...         return -prediction
        >>> probdiff.Diffusion(probdiff.cosine_schedule(5), Negated(lambda z, n: z), dim=2).predict_noise(jax.numpy.ones(2), 3).tolist()
        [-1.0, -1.0]
    """

    network: Network

    def __init__(self, network: Network) -> None:
        require(callable(network), "network", "a callable network(z, n)", type(network).__name__, TypeError)
        self.network = network

    @abc.abstractmethod
    def noise(
        self, prediction: Float[Array, "*output"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise in ``z``, shape ``(*batch, dim)``, of log-SNR ``log_snr``, shape ``batch``, that follows from a prediction."""

    def output_shape(self, z: Float[Array, "*batch dim"]) -> tuple[int, ...]:
        """The shape that the network must return for ``z``."""
        return z.shape

    def check_likelihood(self, likelihood: AbstractLikelihood) -> None:
        """Refuse a likelihood that the head does not suit."""

    @property
    def inside(self) -> tuple[Network]:
        """The network."""
        return (self.network,)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"network": self.network}

    def output(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Float[Array, "*output"]:
        """The network's prediction, after a check of its shape."""
        output = evaluate(self.network, z, log_snr, n, key, context)
        return require_shape(output, self.output_shape(z), f"for a {type(self).__name__}").astype(z.dtype)

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        *,
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Float[Array, "*batch dim"]:
        """Predict the noise in ``z``, shape ``(*batch, dim)``, of log-SNR ``log_snr`` after ``n`` steps, both of shape ``batch``, given ``context``."""
        return self.noise(self.output(z, log_snr, n, key, context), z, log_snr)


class X0Head(AbstractHead):
    r"""The network predicts the data: :math:`\hat\epsilon = (z - \sqrt{\bar\alpha}\,\hat x_0) / \sqrt{1-\bar\alpha}`.

    Args:
        network: Returns :math:`\hat x_0`, shaped like ``z``.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.cosine_schedule(5)
        >>> diffusion = probdiff.Diffusion(schedule, probdiff.networks.X0Head(lambda z, n: 0 * z), dim=2)  # the data are 0: z is noise
        >>> bool(jnp.allclose(diffusion.predict_noise(jnp.ones(2), 3), 1 / schedule.noise_scale[2]))
        True
    """

    def noise(
        self, prediction: Float[Array, "*batch dim"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise in ``z`` if the data are the predicted data."""
        signal, noise = signal_and_noise(log_snr)
        return (z - signal * prediction) / noise


class VHead(AbstractHead):
    r"""The network predicts the velocity :math:`v = \sqrt{\bar\alpha}\,\epsilon - \sqrt{1-\bar\alpha}\,x_0`:
    :math:`\hat\epsilon = \sqrt{\bar\alpha}\,\hat v + \sqrt{1-\bar\alpha}\, z`.

    Source: Salimans and Ho (2022), arXiv:2202.00512, section 4 and appendix D.

    Args:
        network: Returns :math:`\hat v`, shaped like ``z``.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.cosine_schedule(5)
        >>> diffusion = probdiff.Diffusion(schedule, probdiff.networks.VHead(lambda z, n: 0 * z), dim=2)
        >>> bool(jnp.allclose(diffusion.predict_noise(jnp.ones(2), 3), schedule.noise_scale[2]))
        True
    """

    def noise(
        self, prediction: Float[Array, "*batch dim"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise in ``z`` if the velocity is the predicted velocity."""
        signal, noise = signal_and_noise(log_snr)
        return signal * prediction + noise * z


class DensityHead(AbstractHead):
    r"""For data with a density: the network predicts the noise divided by a factor that falls with the noise level, :math:`\hat\epsilon = (1-\bar\alpha)^{1/4}\,\hat y`.

    The exact prediction is :math:`-s`, with :math:`s = \sqrt{1-\bar\alpha}`, times a score, and is nearly 0 if the noise is much smaller than the scale of the data. For a
    smooth density it falls like s. At a jump of the density the score is of order 1/s within a distance of s, which has probability
    of order s: the root mean square falls like :math:`\sqrt s`, the factor here. The error of the network is then proportional to the
    size of the exact prediction, instead of the same at every step.

    Args:
        network: Returns :math:`\hat y`, shaped like ``z``.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.cosine_schedule(5)
        >>> diffusion = probdiff.Diffusion(schedule, probdiff.networks.DensityHead(lambda z, n: z), dim=2)
        >>> bool(jnp.allclose(diffusion.predict_noise(jnp.ones(2), 3), schedule.noise_scale[2] ** 0.5))
        True
    """

    def noise(
        self, prediction: Float[Array, "*batch dim"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise: the prediction times the factor."""
        return jnp.sqrt(signal_and_noise(log_snr)[1]) * prediction


class ClipHead(AbstractHead):
    r"""A network whose prediction of the data, :math:`\hat x_0`, is clipped to the range [−bound, bound] of the data.

    :math:`\hat\epsilon` is the noise that follows from the clipped data. Other libraries clip in every step of a sampler (``clip_sample``, ``clip_denoised``); where
    nothing is clipped, the prediction is unchanged. Source: Ho et al. (2020), arXiv:2006.11239, published code.

    Args:
        network: An ε-network, such as another head.
        bound: The largest absolute value of encoded data, positive: 1 for a grid in [−1, 1].

    Raises:
        ValueError: If ``bound`` is not a positive number.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> head = probdiff.networks.ClipHead(lambda z, n: -3.0 * z)
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(10), head, dim=2)
        >>> probdiff.inference.twists.predicted_x0(diffusion, jnp.array([2.0, -2.0]), jnp.array(5)).round(3)
        Array([ 1., -1.], dtype=float32)
    """

    bound: float = eqx.field(static=True)

    def __init__(self, network: Network, bound: Number = 1.0) -> None:
        super().__init__(network)
        require(isinstance(bound, Number) and 0 < bound < np.inf, "bound", "a positive number", repr(bound))
        self.bound = float(bound)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"network": self.network, "bound": self.bound}

    def noise(
        self, prediction: Float[Array, "*batch dim"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise in ``z`` if the data are the predicted data, clipped to their range."""
        signal, noise = signal_and_noise(log_snr)
        x0 = (z - noise * prediction) / signal
        # (The difference is exactly 0 where nothing is clipped.)
        return prediction + signal * (x0 - jnp.clip(x0, -self.bound, self.bound)) / noise


class VarianceHead(AbstractHead):
    r"""The network predicts the variance of each reverse step along with the noise; for :class:`~probdiff.chain.PredictedVarianceKernel`.

    Each dimension has a second output r, which interpolates the log variance between :math:`\tilde\beta_n` (r = −1) and :math:`\beta_n` (r = 1):
    :math:`\log v = s \log \beta_n + (1-s) \log \tilde\beta_n` with s = (r + 1)/2. Functions that need the noise only, such as the probability flow, use
    the first output. Source: Nichol and Dhariwal (2021), arXiv:2102.09672, section 3.1 (where r has no name; in the published code it is −1 to 1).

    Args:
        network: An ε-network, or heads around a network with another prediction, ``VarianceHead(ClipHead(VHead(network)))``; the innermost
            network returns two outputs for each dimension, of shape ``(*batch, 2 · dim)``, all of the first and then all of the second (as for images
            of 2 C channels), or of shape ``(*batch, dim, 2)`` (as returned by ``MLP(…, outputs=2)``).

    Raises:
        ValueError: In use, if a head inside needs more than one output for each dimension, or the innermost network does not return two.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> head = probdiff.networks.VarianceHead(lambda z, n: jnp.concatenate([0.5 * z, jnp.ones_like(z)], -1))
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(10), head, dim=2, reverse_variance="predicted")
        >>> diffusion.predict(jnp.ones((3, 2)), 5)[0]
        Array([[0.5, 1. ],
               [0.5, 1. ]], dtype=float32)
    """

    def output(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Float[Array, "*batch 2 dim"]:
        """Both outputs of the innermost network, one after the other, shape ``(*batch, 2, dim)``."""
        innermost = self.network
        for head in self._heads():
            shaped = head.output_shape(z) == z.shape
            require(shaped, "network", "a network or a head with one output a dimension", f"a {type(head).__name__}")
            innermost = head.network
        output = evaluate(innermost, z, log_snr, n, key, context)
        flat, last = (*z.shape[:-1], 2 * z.shape[-1]), (*z.shape, 2)
        got = getattr(output, "shape", type(output).__name__)
        require(got in (flat, last), "network(z, n)", f"shape {flat} or {last}, for a VarianceHead", got)
        return (output.reshape(*z.shape[:-1], 2, z.shape[-1]) if got == flat else jnp.moveaxis(output, -1, -2)).astype(z.dtype)

    def noise(
        self, prediction: Float[Array, "*batch 2 dim"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise in ``z`` from the first output and the heads inside."""
        found = prediction[..., 0, :]
        for head in reversed(self._heads()):
            found = head.noise(found, z, log_snr)
        return found

    def noise_and_share(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        *,
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Float[Array, "*batch dim 2"]:
        """The noise and s = (r + 1)/2, on a new last axis; arguments as for the head itself."""
        prediction = self.output(z, log_snr, n, key, context)
        return jnp.stack([self.noise(prediction, z, log_snr), (prediction[..., 1, :] + 1) / 2], -1)

    def check_likelihood(self, likelihood: AbstractLikelihood) -> None:
        """Refuse a likelihood that a head inside does not suit."""
        for head in self._heads():
            head.check_likelihood(likelihood)

    def _heads(self) -> list[AbstractHead]:
        """The heads inside, from the outermost on."""
        found, network = [], self.network
        while isinstance(network, AbstractHead):
            found.append(network)
            network = network.network
        return found
