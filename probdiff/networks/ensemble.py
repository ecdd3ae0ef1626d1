"""Several networks as one."""

import equinox as eqx
import jax

from probdiff._checks import require
from probdiff.networks.base import predict_noise, takes_key, with_schedule


class Ensemble(eqx.Module):
    r"""The mean of several ε-networks, such as those of fits that differ by their seeds.

    A step KL is convex in the predicted noise, so that the KLs of the mean are at most the mean of the KLs. What is gained is the
    variance between the networks: what each has learned of the training data alone.

    Args:
        networks: ε-networks on data of one dimension, at least one.
    """

    networks: list

    def __init__(self, networks):
        self.networks = list(networks)
        good = self.networks and all(map(callable, self.networks))
        require(good, "networks", "a list of callables network(z, n)", repr(networks))
        dims = {network.dim for network in self.networks if getattr(network, "dim", None) is not None}
        require(len(dims) <= 1, "networks", "networks of one dimension", f"dimensions {sorted(dims)}")

    @property
    def dim(self):
        """Dimension of the data, if a network knows it."""
        return next((network.dim for network in self.networks if getattr(network, "dim", None) is not None), None)

    def on_schedule(self, schedule):
        """This ensemble on a schedule."""
        return Ensemble([with_schedule(network, schedule) for network in self.networks])

    def __call__(self, z, n, *, key=None):
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` after ``n`` steps, shape ``batch``."""
        keys = [None] * len(self.networks) if key is None else jax.random.split(key, len(self.networks))
        given = [k if takes_key(network) else None for network, k in zip(self.networks, keys)]
        return sum(predict_noise(network, z, n, k) for network, k in zip(self.networks, given)) / len(self.networks)
