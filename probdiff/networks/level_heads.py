"""Heads for data at known points, levels of a grid or categories: the network predicts probabilities, and the noise follows from the mean of the points.

Source: Austin et al. (2021), arXiv:2107.03006, section 3.3, for a prediction of the probabilities of x_0.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._checks import PyTree, Whole, require, require_count, require_type
from probdiff._static import Static
from probdiff.likelihoods import AbstractLikelihood
from probdiff.networks.base import Network, signal_and_noise
from probdiff.networks.heads import AbstractHead

WIDEST_SUM = 0.7  # in levels: a normal that is wider is as good as continuous


class CategoricalHead(AbstractHead):
    r"""For data on a grid: the network predicts a probability for each level of each dimension.

    The network's logits are for the information of the *other* dimensions; the information of z_n in the same dimension is known exactly and is added,

        log p(v | z_n) = logit_v − (z_n − √ᾱ_n v)² / (2 (1−ᾱ_n)) + const,

    with v on the grid of :class:`~probdiff.DiscretizedNormalLikelihood`. :math:`\hat x_0` is the mean of this
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


class LevelMixtureHead(AbstractHead):
    r"""For data on a fine grid: the network predicts, for each dimension, a mixture of normals on the levels, with extra weight on the two ends.

    The mixture describes the information of the *other* dimensions,

        p(v) ∝ Σ_k π_k N(v; m_k, s_k²) + π_first [v = −1] + π_last [v = 1],   v on the grid of L levels from −1 to 1,

    and the information of z_n in the same dimension is added exactly, by the factor N(z_n; √ᾱ_n v, 1−ᾱ_n). :math:`\hat x_0` is the mean of the product: in
    closed form where a component is wide, and as a sum over the seven nearest levels where the component is narrow. A :class:`CategoricalHead` needs L outputs for each dimension,
    this head 3 K + 2. The ends have their own weights because many pixels are black or white; in the discretised mixture of Salimans et al. (2017),
    arXiv:1701.05517, section 2.1, the tails beyond the grid have this role.

    Args:
        network: Returns :meth:`outputs` numbers for each dimension, on a new last axis: K logits, K means (relative to K evenly spread points), K log scales
            (relative to −1), and the logits of the first and the last level.
        levels: Number of levels L.
        components: Number K of normals.

    Raises:
        ValueError: If there are fewer than two levels, or no components.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> outputs = probdiff.networks.LevelMixtureHead.outputs(components=2)
        >>> network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1, outputs=outputs)
        >>> head = probdiff.networks.LevelMixtureHead(network, levels=256, components=2)
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), head, probdiff.DiscretizedNormalLikelihood(256))
        >>> outputs, diffusion.predict_noise(jnp.zeros((4, 2)), 3).shape
        (8, (4, 2))
    """

    levels: int = eqx.field(static=True)
    components: int = eqx.field(static=True)

    def __init__(self, network: Network, levels: Whole, components: Whole = 3) -> None:
        super().__init__(network)
        for name, value in (("levels", levels), ("components", components)):
            require_count(name, value)
        require(levels >= 2, "levels", "at least 2", levels)
        self.levels, self.components = int(levels), int(components)

    @staticmethod
    def outputs(components: Whole) -> int:
        """The number of outputs that the network must have for each dimension."""
        return 3 * int(components) + 2

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"network": self.network, "levels": self.levels, "components": self.components}

    def output_shape(self, z: Float[Array, "*batch dim"]) -> tuple[int, ...]:
        """The shape that the network must return for ``z``."""
        return (*z.shape, self.outputs(self.components))

    def noise(
        self, prediction: Float[Array, "*batch dim output"], z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise in ``z`` if the data are the mean of the levels."""
        signal, noise = (scale[..., None] for scale in signal_and_noise(log_snr))
        count, spacing, own = self.components, 2 / (self.levels - 1), z[..., None]
        logit, mean, log_scale, of_ends = jnp.split(prediction, [count, 2 * count, 3 * count], -1)
        # If all outputs are 0, the normals lie side by side and cover the grid.
        mean = mean + jnp.linspace(-1, 1, 2 * count + 1, dtype=z.dtype)[1::2]
        variance = jnp.exp(2 * jnp.clip(log_scale - 1, np.log(spacing / 4), 1.0))
        total = signal**2 * variance + noise**2
        # The product of each normal and the factor of z is normal, too.
        scale = jnp.sqrt(variance / total) * noise / spacing
        level = ((mean * noise**2 + variance * signal * own) / total + 1) / spacing
        level, log_sum = _on_grid(level, scale, self.levels)
        of_normals = logit - jnp.square(own - signal * mean) / (2 * total) - jnp.log(total) / 2 + log_sum
        ends = jnp.array([-1.0, 1.0], z.dtype)
        of_ends = of_ends - jnp.square(own - signal * ends) / (2 * noise**2) - jnp.log(noise)
        weight = jax.nn.softmax(jnp.concatenate([of_normals, of_ends], -1), -1)
        x0 = (weight[..., :count] * (level * spacing - 1)).sum(-1) + weight[..., -1] - weight[..., -2]
        return (z - signal[..., 0] * x0) / noise[..., 0]


def _on_grid(
    mean: Float[Array, "*shape"], scale: Float[Array, "*shape"], levels: int
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The mean of a normal restricted to 0, 1, …, levels − 1, and the logarithm of the sum of its density there.

    A wide normal is not truncated, only its mean is clipped to the range; the logarithm of its sum is taken as 0.
    """
    # By Poisson's summation formula the relative difference between the sum over all integers and the integral is 2 exp(−2π² scale²): 1e-4 at the limit.
    is_narrow = scale < WIDEST_SUM
    narrow = jnp.minimum(scale, WIDEST_SUM)
    nearest = jnp.clip(jnp.round(jax.lax.stop_gradient(mean)), 0, levels - 1)
    offset = jnp.arange(-3, 4, dtype=mean.dtype)
    level = nearest[..., None] + offset
    distance = (level - mean[..., None]) / narrow[..., None]
    log_density = jnp.where((level < 0) | (level >= levels), -jnp.inf, -jnp.square(distance) / 2)
    log_sum = jax.nn.logsumexp(log_density, -1)
    within = nearest + (jnp.exp(log_density - log_sum[..., None]) * offset).sum(-1)
    log_sum = log_sum - jnp.log(narrow * np.sqrt(2 * np.pi))
    return jnp.where(is_narrow, within, jnp.clip(mean, 0, levels - 1)), jnp.where(is_narrow, log_sum, 0.0)


class ColumnHead(AbstractHead):
    r"""For a table: for each column the prediction that suits the column's likelihood.

    For columns with a density the network predicts the noise as for a :class:`DensityHead`. For columns whose encoded values are known points :math:`c_v`
    (categories, levels of a grid) it predicts the parameter a of an exponential family on the points, to which the information
    of z_n in the same column is added exactly,

        log p(v | z_n) = a · c_v − ‖z_n − √ᾱ_n c_v‖² / (2 (1−ᾱ_n)) + const;

    :math:`\hat x_0` is the mean of this distribution, which may lie between the points. For categories, a is the vector of logits up to a factor.

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
