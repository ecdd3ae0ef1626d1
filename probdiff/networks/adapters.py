"""Networks that are written in another way than :mod:`probdiff.networks.base` asks for."""

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from probdiff._checks import require
from probdiff.networks.base import AbstractWrapper, Network, Prediction, evaluate, flattened


class Batched(AbstractWrapper):
    """What :func:`batched` gives: a network of one example, mapped over all batch axes."""

    network: Network

    @property
    def inside(self) -> tuple[Network]:
        """The network of one example."""
        return (self.network,)

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        *,
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Prediction:
        """Predict the noise in each ``z`` by itself; with ``key``, each has its own dropout."""
        flat, log_snr, n, context = flattened(z.ndim - 1, (z, log_snr, n, context))
        keys = None if key is None else jax.random.split(key, len(flat))
        one = jax.vmap(lambda z, log_snr, n, key, context: evaluate(self.network, z, log_snr, n, key, context))
        output = one(flat, log_snr, n, keys, context)
        return output.reshape(*z.shape[:-1], *output.shape[1:])


def batched(network: Network) -> Batched:
    """A network that is written for one example, as one that takes a batch.

    Args:
        network: A callable ``network(z, n) -> eps_hat`` with z of shape ``(dim,)``, n an int32 of shape ``()`` and the prediction shaped like
            z, as equinox writes them; or an :class:`AbstractNetwork` of one example. Dropout, with ``key=``, and ``context=`` are those of
            one example.

    Returns:
        The network, for z of shape ``(*batch, dim)``. Its parameters are those of ``network``.

    Raises:
        TypeError: If ``network`` is not callable.
    """
    require(callable(network), "network", "a callable network(z, n)", type(network).__name__, TypeError)
    return Batched(network)
