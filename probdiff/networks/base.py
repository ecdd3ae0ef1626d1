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

from probdiff._checks import require, require_count
from probdiff.chain.schedules import at_step

TIME_HARMONICS = 8
EMBEDDING = 32
MOST_BLOCKS = 1000
HIDDEN_VALUES = 2**19
MOST_HARMONICS = 24  # the last then turns as fast as float32 resolves


def is_trainable(leaf):
    """Whether a leaf of a module is a parameter: a floating-point JAX array. (NumPy arrays are constants.)"""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def takes_key(network):
    """Whether the network accepts ``key=``, by name or through ``**kwargs``."""
    try:
        parameters = inspect.signature(network).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "key" or p.kind is p.VAR_KEYWORD for p in parameters)


def rows_at_once(network):
    """How many inputs of a network to evaluate at a time: its hidden layers then stay in the cache of a processor.

    Taken from the longest side of its weights. On an accelerator, which wants as many as there are, 65 536.
    """
    if jax.default_backend() != "cpu":
        return 2**16
    weights = [leaf.shape for leaf in jax.tree.leaves(network) if is_trainable(leaf) and leaf.ndim >= 2]
    widest = max((max(shape) for shape in weights), default=1)
    return min(4096, max(256, HIDDEN_VALUES // widest))


def told(network, schedule):
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


class LogSNREmbedding(eqx.Module):
    """What tells a network the step: a small perceptron on sinusoids of its log-SNR.

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
        return batched(self.mlp, _sinusoids(log_snr, np.geomspace(0.05, 5, TIME_HARMONICS)))


class MLP(eqx.Module):
    r"""Residual multilayer perceptron, told the step by a sinusoidal embedding of its log-SNR.

    In each block the embedding shifts and scales the hidden layer. Beside the blocks there is a short cut: the output
    has a step-dependent combination of z and its harmonics added to it, dimension by dimension. Where z is nearly all
    noise it is nearly its own noise; where the noise is finer than the grid of the data, the nearest level tells it.

    Args:
        dim: Dimension of the data.
        key: JAX key for the initial weights.
        hidden: Width of the hidden layers.
        num_blocks: Number of residual blocks.
        dropout: Probability of dropping a hidden unit while training.
        num_harmonics: Number of sine and cosine pairs of each input that the network is also given; the k-th has
            angular frequency :math:`\pi 2^k`. Source: Kingma et al. (2021), arXiv:2107.00630, appendix C.
        outputs: Outputs for each dimension, on a new last axis (for a :class:`~probdiff.CategoricalHead`, the number of
            levels), without the short cut; None for one, shaped like the input.
    """

    dim: int
    embed: LogSNREmbedding
    read: eqx.nn.Linear
    blocks: list
    write: eqx.nn.Linear
    skip: eqx.nn.Linear | None
    dropout: eqx.nn.Dropout
    hidden: int
    num_harmonics: int
    outputs: int | None

    def __init__(self, dim, *, key, hidden=128, num_blocks=3, dropout=0.0, num_harmonics=0, outputs=None):
        counts = (("dim", dim), ("hidden", hidden), ("num_blocks", num_blocks))
        for name, value in counts + ((("outputs", outputs),) if outputs is not None else ()):
            require_count(name, value)
        require(num_blocks <= MOST_BLOCKS, "num_blocks", f"at most {MOST_BLOCKS}", num_blocks)
        harmonics = isinstance(num_harmonics, int | np.integer) and 0 <= num_harmonics <= MOST_HARMONICS
        require(harmonics, "num_harmonics", f"an integer, 0 to {MOST_HARMONICS}", repr(num_harmonics))
        require(isinstance(dropout, float | int) and 0 <= dropout < 1, "dropout", "0 <= dropout < 1", repr(dropout))
        keys = jax.random.split(key, 4 + num_blocks)
        self.dim = int(dim)
        self.hidden = int(hidden)
        self.num_harmonics = num_harmonics
        self.outputs = outputs
        self.embed = LogSNREmbedding(keys[0])
        self.read = eqx.nn.Linear(dim * (1 + 2 * num_harmonics), hidden, key=keys[1])
        self.blocks = [_Block(hidden, key) for key in keys[4:]]
        self.write = jax.tree.map(jnp.zeros_like, eqx.nn.Linear(hidden, dim * (outputs or 1), key=keys[2]))
        skip = eqx.nn.Linear(EMBEDDING, dim * (1 + 2 * num_harmonics), key=keys[3])
        self.skip = jax.tree.map(jnp.zeros_like, skip) if outputs is None else None
        self.dropout = eqx.nn.Dropout(dropout)

    @property
    def arguments(self):
        """The arguments that this network was made with, without the key."""
        return {
            "dim": self.dim,
            "hidden": self.hidden,
            "num_blocks": len(self.blocks),
            "dropout": self.dropout.p,
            "num_harmonics": self.num_harmonics,
            "outputs": self.outputs,
        }

    def on_schedule(self, schedule):
        """This network, embedding the log-SNR of ``schedule``."""
        return eqx.tree_at(lambda mlp: mlp.embed, self, self.embed.on_schedule(schedule))

    def __call__(self, z, n, *, key=None):
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` after ``n`` steps, shape ``batch``."""
        embedding = self.embed(n, z.dtype)
        inputs = jnp.concatenate([z[..., None], _sinusoids(z, np.pi * 2.0 ** np.arange(self.num_harmonics))], -1)
        h = batched(self.read, inputs.reshape(*z.shape[:-1], -1))
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        for block, block_key in zip(self.blocks, keys):
            h = block(h, embedding, self.dropout, block_key)
        output = batched(self.write, jax.nn.silu(h))
        if self.skip is None:
            return output.reshape(*z.shape, self.outputs)
        short_cut = jnp.sum(inputs * batched(self.skip, embedding).reshape(inputs.shape), -1)
        return output + short_cut


class _Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    modulate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, hidden, key):
        keys = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(hidden)
        self.modulate = eqx.nn.Linear(EMBEDDING, 2 * hidden, key=keys[0])
        self.up = eqx.nn.Linear(hidden, hidden, key=keys[1])
        self.down = eqx.nn.Linear(hidden, hidden, key=keys[2])

    def __call__(self, h, embedding, dropout, key):
        scale, shift = jnp.split(batched(self.modulate, embedding), 2, -1)
        inner = jax.nn.silu(batched(self.up, batched(self.norm, h)) * (1 + scale) + shift)
        return h + batched(self.down, dropout(inner, key=key, inference=key is None))


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
        return Ensemble([told(network, schedule) for network in self.networks])

    def __call__(self, z, n, *, key=None):
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` after ``n`` steps, shape ``batch``."""
        keys = [None] * len(self.networks) if key is None else jax.random.split(key, len(self.networks))
        given = [k if takes_key(network) else None for network, k in zip(self.networks, keys)]
        return sum(predict_noise(network, z, n, k) for network, k in zip(self.networks, given)) / len(self.networks)


def batched(layer, x):
    """Apply an equinox layer, which takes one vector, along the last axis of ``x``."""
    return jnp.vectorize(layer, signature="(i)->(o)")(x)


def _sinusoids(x, frequencies):
    """Sines and cosines of ``x`` at each frequency, on a new last axis."""
    angles = x[..., None] * jnp.asarray(frequencies, x.dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
