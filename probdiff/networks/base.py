r"""ε-networks: what predicts the noise in :math:`z_n`.

An ε-network is any callable ``network(z, n) -> eps_hat`` with ``z`` of shape ``(*batch, dim)``, ``n`` int32 of shape
``batch`` and the result shaped like ``z``: an equinox module, whose floating-point JAX arrays are trained, or a plain
function. Three things are optional:

* ``network(z, n, key=…)``: a network that takes ``key=`` is given one while training (dropout), never in evaluation;
  one key for the whole batch, so ``jax.vmap`` inside the network, not around it;
* ``network.dim``: the dimension of the data, needed to generate;
* ``network.on_schedule(schedule)``: returns the network for that schedule; called once, by ``Diffusion``.

NumPy arrays in a module are constants: no optimiser and no weight decay moves them.
"""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from probdiff._checks import require
from probdiff.chain.schedules import at_step

TIME_HARMONICS = 8
EMBEDDING = 32
MOST_BLOCKS = 1000


def takes_key(network):
    """Whether the network accepts ``key=``, by name or through ``**kwargs``."""
    try:
        parameters = inspect.signature(network).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "key" or p.kind is p.VAR_KEYWORD for p in parameters)


def with_schedule(network, schedule):
    """The network on a schedule, if it wants to know."""
    return network.on_schedule(schedule) if hasattr(network, "on_schedule") else network


def predict_noise(network, z, n, key=None):
    """Call an ε-network and check what comes back.

    Args:
        network: The ε-network.
        z: Latents, shape ``(*batch, dim)``.
        n: Step, an integer or an integer array that broadcasts to ``batch``.
        key: Passed on if given; give one only while training.

    Raises:
        ValueError: If the result is not shaped like ``z``.
    """
    n = jnp.broadcast_to(jnp.asarray(n, jnp.int32), z.shape[:-1])
    eps_hat = eqx.nn.inference_mode(network)(z, n) if key is None else network(z, n, key=key)
    got = getattr(eps_hat, "shape", type(eps_hat).__name__)
    require(got == z.shape, "network(z, n)", f"shape {z.shape}, the shape of z", got)
    return eps_hat.astype(z.dtype)


def predict_levels(network, z, n, key=None):
    """Ask a :class:`~probdiff.networks.CategoricalHead` for log p(v | z_n) of every level, shape ``(*z.shape, levels)``.

    Arguments as for :func:`predict_noise`.
    """
    network = network if key is not None else eqx.nn.inference_mode(network)
    return network.log_probabilities(z, jnp.broadcast_to(jnp.asarray(n, jnp.int32), z.shape[:-1]), key=key)


class LogSNREmbedding(eqx.Module):
    """The embedding of a step: a small perceptron on sinusoids of its log-SNR.

    Before ``Diffusion`` has told it the schedule, −2 log n stands in for the log-SNR.
    """

    mlp: eqx.nn.MLP
    schedule: object

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(2 * TIME_HARMONICS, EMBEDDING, EMBEDDING, 1, jax.nn.silu, jax.nn.silu, key=key)
        self.schedule = None

    def on_schedule(self, schedule):
        """This embedding of the log-SNR of ``schedule``."""
        return eqx.tree_at(lambda e: e.schedule, self, schedule, is_leaf=lambda leaf: leaf is self.schedule)

    def __call__(self, n, dtype):
        """The embedding of steps ``n``, shape ``(*batch, EMBEDDING)``."""
        log_snr = -2 * jnp.log(n.astype(dtype)) if self.schedule is None else at_step(self.schedule.log_snr, n, dtype)
        return batched(self.mlp, sinusoids(log_snr, np.geomspace(0.05, 5, TIME_HARMONICS)))


def batched(layer, x):
    """Apply an equinox layer, which takes one vector, along the last axis of ``x``."""
    return jnp.vectorize(layer, signature="(i)->(o)")(x)


def sinusoids(x, frequencies):
    """Sines and cosines of ``x`` at each frequency, on a new last axis."""
    angles = x[..., None] * jnp.asarray(frequencies, x.dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
