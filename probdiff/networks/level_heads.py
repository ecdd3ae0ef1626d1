"""Heads for data at known points, levels of a grid or categories: the network predicts probabilities, and the noise is a mean over the points."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._checks import PyTree, Whole, require, require_count, require_type
from probdiff._static import Static
from probdiff.likelihoods import AbstractLikelihood
from probdiff.networks.base import Network, signal_and_noise
from probdiff.networks.heads import AbstractHead


class CategoricalHead(AbstractHead):
    r"""For data on a grid: the network predicts a probability for each level of each dimension.

    The network returns logits given the *other* dimensions; the information of z about its own dimension is known exactly and is added,

        log p(v | z_n) = logit_v − (z_n − √ᾱ_n v)² / (2 (1−ᾱ_n)) + const,

    with v on the grid of :class:`~probdiff.DiscretizedNormalLikelihood`. :math:`\hat x_0` is the mean of that
    distribution. If the noise is finer than the grid, the logits hardly matter.

    Args:
        network: Returns logits of shape ``(*z.shape, levels)``, such as ``MLP(…, outputs=levels)``.
        levels: Number of levels L.

    Raises:
        ValueError: If ``levels`` is not an integer of at least 2.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.cosine_schedule(5)
        >>> head = probdiff.networks.CategoricalHead(lambda z, n: jnp.zeros((*z.shape, 4)), levels=4)  # nothing is known of the other dimensions
        >>> diffusion = probdiff.Diffusion(schedule, head, probdiff.DiscretizedNormalLikelihood(4), dim=2)
        >>> jnp.exp(diffusion.log_probabilities(jnp.zeros(2), 3)).sum(-1).round(4).tolist()
        [1.0, 1.0]
    """

    levels: int = eqx.field(static=True)

    def __init__(self, network: Network, levels: Whole) -> None:
        super().__init__(network)
        require_count("levels", levels)
        require(levels >= 2, "levels", "at least 2", levels)
        self.levels = int(levels)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"network": self.network, "levels": self.levels}

    @property
    def grid(self) -> Float[Array, "level"]:
        """The encoded levels, from −1 to 1, shape ``(levels,)``."""
        return jnp.linspace(-1.0, 1.0, self.levels)

    def output_shape(self, z: Float[Array, "*batch dim"]) -> tuple[int, ...]:
        """The shape that the network must return for ``z``."""
        return (*z.shape, self.levels)

    def log_probabilities(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        *,
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Float[Array, "*batch dim level"]:
        """log p(v | z_n) of every level, normalised, shape ``(*z.shape, levels)``; arguments as for the head itself."""
        return self._normalised(self.output(z, log_snr, n, key, context), z, log_snr)

    def noise(
        self, prediction: Float[Array, "*batch dim level"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise in ``z`` if the data are the mean of the distribution over levels."""
        signal, noise = signal_and_noise(log_snr)
        mean = jnp.exp(self._normalised(prediction, z, log_snr)) @ self.grid.astype(z.dtype)
        return (z - signal * mean) / noise

    def _normalised(
        self, logits: Float[Array, "*batch dim level"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim level"]:
        signal, noise = signal_and_noise(log_snr)
        distance = (z[..., None] - signal[..., None] * self.grid.astype(z.dtype)) / noise[..., None]
        return jax.nn.log_softmax(logits - jnp.square(distance) / 2)


class ColumnHead(AbstractHead):
    r"""For a table: a prediction for each column that suits its likelihood.

    For columns with a density the network predicts the noise as for a :class:`DensityHead`. For columns whose encoded values are known points :math:`c_v`
    (categories, levels of a grid) it predicts the parameter a of an exponential family on the points, to which the information
    of z about its own column is added exactly,

        log p(v | z_n) = a · c_v − ‖z_n − √ᾱ_n c_v‖² / (2 (1−ᾱ_n)) + const;

    :math:`\hat x_0` is the mean of that distribution, which may be anything between the points. For categories, a is the vector of logits up to a factor.

    Args:
        network: Its prediction is shaped like ``z``.
        likelihood: The likelihood of the model.

    Raises:
        TypeError: If ``likelihood`` is not a likelihood.

    Example:
        >>> import jax, probdiff
        >>> table = probdiff.likelihoods.ColumnLikelihood({"age": probdiff.NormalLikelihood(), "sex": probdiff.likelihoods.CategoricalLikelihood(["f", "m"])})
        >>> network = probdiff.MLP(table.encoded_dim(2), key=jax.random.key(0), hidden=8, num_blocks=1)  # one dimension of age, two of sex
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.networks.ColumnHead(network, table), table)
        >>> diffusion.predict_noise(jax.numpy.zeros((4, 3)), 3).shape
        (4, 3)
    """

    _likelihood: Static

    def __init__(self, network: Network, likelihood: AbstractLikelihood) -> None:
        super().__init__(network)
        require_type("likelihood", likelihood, AbstractLikelihood)
        self._likelihood = Static(likelihood)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"network": self.network, "likelihood": self._likelihood.tree}

    def check_likelihood(self, likelihood: AbstractLikelihood) -> None:
        """Refuse any likelihood but the head's own."""
        same = Static(likelihood) == self._likelihood
        require(same, "likelihood", f"that of the ColumnHead, {self._likelihood.tree}", likelihood)

    def noise(
        self, prediction: Float[Array, "*batch dim"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise in ``z`` if each column has its predicted value."""
        signal, noise = signal_and_noise(log_snr)
        found, start = [], 0
        for dim, points in self._likelihood.tree.pieces(z.shape[-1]):
            own, said = (array[..., start : start + dim] for array in (z, prediction))
            start += dim
            if points is None:
                found.append(jnp.sqrt(noise) * said)
            else:
                found.append((own - signal * _mean_of_points(said, own, signal, noise, jnp.asarray(points, z.dtype))) / noise)
        return jnp.concatenate(found, -1)


def _mean_of_points(
    parameter: Float[Array, "*batch dim"],
    z: Float[Array, "*batch dim"],
    signal: Float[Array, "*batch 1"],
    noise: Float[Array, "*batch 1"],
    points: Float[Array, "point width"],
) -> Float[Array, "*batch dim"]:
    """The mean of the point of each column given z, where every column has ``width`` dimensions."""
    columns = (*z.shape[:-1], -1, 1, points.shape[1])
    distance = (z.reshape(columns) - signal[..., None, None] * points) / noise[..., None, None]
    log_p = jnp.sum(parameter.reshape(columns) * points - jnp.square(distance) / 2, -1)
    return (jax.nn.softmax(log_p) @ points).reshape(z.shape)
