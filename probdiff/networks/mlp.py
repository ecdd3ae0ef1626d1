"""A residual multilayer perceptron."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

from probdiff._checks import Whole, require, require_count, require_key
from probdiff.networks.base import (
    EMBEDDING,
    MOST_BLOCKS,
    AbstractEmbeddedNetwork,
    ContextEmbedding,
    LogSNREmbedding,
    Prediction,
    along_last_axis,
    sinusoids,
    zero_linear,
)

MOST_HARMONICS = 24  # the highest frequency is the limit of float32


class MLP(AbstractEmbeddedNetwork):
    r"""Residual multilayer perceptron, told the noise level by a sinusoidal embedding of its log-SNR.

    In each block the embedding shifts and scales the hidden layer. Beside the blocks there is a skip connection: a combination, different
    at each noise level, of z and its harmonics is added to the output, dimension by dimension. If z is nearly all
    noise, the noise is nearly z itself; if the noise is finer than the grid of the data, z and the nearest level determine it. Covariates also enter
    the skip connection, by a learned linear regression of the data on them: for Gaussian data whose mean is linear in the covariates, with independent
    residuals, the skip connection alone is exact.

    Args:
        dim: Dimension of the data.
        key: JAX key for the initial weights.
        hidden: Width of the hidden layers.
        num_blocks: Number of residual blocks.
        dropout: Probability of dropping a hidden unit while training.
        num_harmonics: Number of sine and cosine pairs of each input that the network is also given, 0 to 24; pair k = 0, 1, … has
            angular frequency :math:`\pi 2^k`. Source: Kingma et al. (2021), arXiv:2107.00630, appendix C.
        outputs: Outputs for each dimension, on a new last axis (for a :class:`~probdiff.networks.CategoricalHead`, the number of
            levels), without the skip connection; None for one, shaped like the input.
        context_dim: For a conditional model, the number of covariates: ``context`` of shape ``(datum, context_dim)``, of about mean 0 and
            standard deviation 1. They are inputs beside z, and are embedded along with the noise level. None for a model without a context.

    Raises:
        ValueError, TypeError: If a size is not a positive integer, ``num_harmonics`` is out of range, or ``dropout`` is not a probability below 1.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> network = probdiff.MLP(2, key=jax.random.key(0), hidden=8)
        >>> network(jnp.zeros((3, 2)), jnp.zeros(3)).shape  # told the log-SNR
        (3, 2)
    """

    dim: int = eqx.field(static=True)
    embed: LogSNREmbedding
    embed_context: ContextEmbedding | None
    read: eqx.nn.Linear
    blocks: list["_Block"]
    write: eqx.nn.Linear
    skip: eqx.nn.Linear | None
    regress: eqx.nn.Linear | None
    dropout: float = eqx.field(static=True)
    hidden: int = eqx.field(static=True)
    num_harmonics: int = eqx.field(static=True)
    outputs: int | None = eqx.field(static=True)
    context_dim: int | None = eqx.field(static=True)

    def __init__(
        self,
        dim: Whole,
        *,
        key: PRNGKeyArray,
        hidden: Whole = 128,
        num_blocks: Whole = 3,
        dropout: float | int = 0.0,
        num_harmonics: Whole = 0,
        outputs: Whole | None = None,
        context_dim: Whole | None = None,
    ) -> None:
        for name, value in (("dim", dim), ("hidden", hidden), ("num_blocks", num_blocks)):
            require_count(name, value)
        for name, size in (("outputs", outputs), ("context_dim", context_dim)):
            require_count(name, 1 if size is None else size)
        require(num_blocks <= MOST_BLOCKS, "num_blocks", f"at most {MOST_BLOCKS}", num_blocks)
        harmonics = isinstance(num_harmonics, int | np.integer) and 0 <= num_harmonics <= MOST_HARMONICS
        require(harmonics, "num_harmonics", f"an integer, 0 to {MOST_HARMONICS}", repr(num_harmonics))
        require(isinstance(dropout, float | int) and 0 <= dropout < 1, "dropout", "0 <= dropout < 1", repr(dropout))
        require_key(key)
        keys = jax.random.split(key, 4 + num_blocks)  # (two are spare, so that the weights of a key stay as they were)
        dim, hidden, num_harmonics = int(dim), int(hidden), int(num_harmonics)
        outputs, context_dim = (None if size is None else int(size) for size in (outputs, context_dim))
        self.dim = dim
        self.hidden = hidden
        self.num_harmonics = num_harmonics
        self.outputs = outputs
        self.context_dim = context_dim
        self.embed = LogSNREmbedding(keys[0])
        self.embed_context = None if context_dim is None else ContextEmbedding(context_dim, jax.random.fold_in(key, 1))
        self.regress = None if context_dim is None else eqx.nn.Linear(context_dim, dim, key=jax.random.fold_in(key, 2))
        inputs = dim * (1 + 2 * num_harmonics + (context_dim is not None))
        self.read = eqx.nn.Linear(inputs + (context_dim or 0), hidden, key=keys[1])
        self.blocks = [_Block(hidden, key) for key in keys[4:]]
        self.write = zero_linear(hidden, dim * (outputs or 1))
        self.skip = zero_linear(EMBEDDING, inputs) if outputs is None else None
        self.dropout = dropout

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name, without the key."""
        return {
            "dim": self.dim,
            "hidden": self.hidden,
            "num_blocks": len(self.blocks),
            "dropout": self.dropout,
            "num_harmonics": self.num_harmonics,
            "outputs": self.outputs,
            "context_dim": self.context_dim,
        }

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        *,
        key: PRNGKeyArray | None = None,
        context: Real[Array, "*batch context_dim"] | None = None,
    ) -> Prediction:
        """Predict for ``z`` of shape ``(*batch, dim)``, log-SNR ``log_snr``, shape ``batch``, and covariates, ``(*batch, context_dim)``."""
        embedding = self.embedding(log_snr, context)
        inputs = jnp.concatenate([z[..., None], sinusoids(z, np.pi * 2.0 ** np.arange(self.num_harmonics))], -1)
        covariates = []
        if self.regress is not None:
            assert context is not None  # the Diffusion raises the error
            covariates = [context.astype(z.dtype)]
            inputs = jnp.concatenate([inputs, along_last_axis(self.regress, covariates[0])[..., None]], -1)
        h = along_last_axis(self.read, jnp.concatenate([inputs.reshape(*z.shape[:-1], -1), *covariates], -1))
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        for block, block_key in zip(self.blocks, keys):
            h = block(h, embedding, self.dropout, block_key)
        output = along_last_axis(self.write, jax.nn.silu(h))
        if self.skip is None:
            return output.reshape(*z.shape, self.outputs)
        short_cut = jnp.sum(inputs * along_last_axis(self.skip, embedding).reshape(inputs.shape), -1)
        return output + short_cut


class _Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    modulate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, hidden: int, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(hidden)
        self.modulate = eqx.nn.Linear(EMBEDDING, 2 * hidden, key=keys[0])
        self.up = eqx.nn.Linear(hidden, hidden, key=keys[1])
        self.down = eqx.nn.Linear(hidden, hidden, key=keys[2])

    def __call__(
        self,
        h: Float[Array, "*batch hidden"],
        embedding: Float[Array, "*batch embedding"],
        dropout: float | int,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "*batch hidden"]:
        scale, shift = jnp.split(along_last_axis(self.modulate, embedding), 2, -1)
        inner = jax.nn.silu(along_last_axis(self.up, along_last_axis(self.norm, h)) * (1 + scale) + shift)
        return h + along_last_axis(self.down, eqx.nn.Dropout(dropout)(inner, key=key, inference=key is None))
