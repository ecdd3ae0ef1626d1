"""Several networks as one.

Source: Lakshminarayanan et al. (2017), arXiv:1612.01474, for ensembles of networks that differ by their seeds.
"""

import functools
import operator
from collections.abc import Iterable

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._checks import PyTree, require
from probdiff.networks.base import AbstractWrapper, Network, predict_noise


class Ensemble(AbstractWrapper):
    r"""The mean of several ε-networks, such as networks fitted from different seeds.

    A step KL is convex in the predicted noise, so that the KLs of the mean are at most the mean of the KLs. The gain is proportional to the
    variance between the networks, each of which has overfitted the training data in its own way.

    Args:
        networks: ε-networks on data of one dimension, at least one.

    Raises:
        ValueError, TypeError: If ``networks`` is empty, has entries that are not callable, or has networks of different dimensions.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> networks = [probdiff.MLP(2, key=key, hidden=8) for key in jax.random.split(jax.random.key(0), 3)]
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.networks.Ensemble(networks))
        >>> diffusion.predict_noise(jnp.zeros((4, 2)), 1).shape
        (4, 2)
    """

    networks: list[Network]

    def __init__(self, networks: Iterable[Network]) -> None:
        self.networks = list(networks)
        good = self.networks and all(map(callable, self.networks))
        require(good, "networks", "a list of callables network(z, n)", repr(networks))
        dims = {dim for network in self.networks if (dim := getattr(network, "dim", None)) is not None}
        require(len(dims) <= 1, "networks", "networks of one dimension", f"dimensions {sorted(dims)}")

    @property
    def inside(self) -> list[Network]:
        """The networks."""
        return self.networks

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        *,
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Float[Array, "*batch dim"]:
        """The mean prediction of the noise in ``z``, shape ``(*batch, dim)``, of log-SNR ``log_snr`` after ``n`` steps, both of shape ``batch``."""
        keys = [None] * len(self.networks) if key is None else jax.random.split(key, len(self.networks))
        predicted = (predict_noise(network, z, log_snr, n, k, context) for network, k in zip(self.networks, keys))
        return functools.reduce(operator.add, predicted) / len(self.networks)
