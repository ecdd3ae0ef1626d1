"""A network for small images: residual 3×3 convolutions, with a separate bias for every pixel."""

from collections.abc import Sequence
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
    flattened,
)

AT_ONCE = 64  # images at a time, on CPU: their hidden layers then stay in the cache


class _Convolution(eqx.Module):
    """A 3×3 convolution that keeps the size of an image, shape ``(*batch, height, width, channels)``.

    It is one matrix product: inside a loop, on CPU, XLA's own convolution takes many times as long.
    """

    weight: Float[Array, "3 3 inputs outputs"]
    bias: Float[Array, "outputs"]

    def __init__(self, inputs: int, outputs: int, key: PRNGKeyArray) -> None:
        bound = (9 * inputs) ** -0.5
        weight_key, bias_key = jax.random.split(key)
        self.weight = jax.random.uniform(weight_key, (3, 3, inputs, outputs), minval=-bound, maxval=bound)
        self.bias = jax.random.uniform(bias_key, (outputs,), minval=-bound, maxval=bound)

    def __call__(self, image: Float[Array, "*batch height width inputs"]) -> Float[Array, "*batch height width outputs"]:
        height, width, inputs = image.shape[-3:]
        padded = jnp.pad(image, [(0, 0)] * (image.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
        shifted = [padded[..., i : i + height, j : j + width, :] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, -1) @ self.weight.reshape(9 * inputs, -1) + self.bias


class ConvNet(AbstractEmbeddedNetwork):
    """Residual convolutional network on images of one channel, told the noise level by an embedding of its log-SNR.

    The resolution stays the same: in an image of 8×8 every pixel depends on every other after four convolutions. In each block the
    embedding scales and shifts the hidden layer, and every pixel has a separate bias, so that the network can depend on the position.

    Args:
        shape: Height and width; data are images in row-major order, of dimension height × width.
        key: JAX key for the initial weights.
        channels: Width of the hidden layers.
        num_blocks: Number of residual blocks of two convolutions.
        dropout: Probability of dropping a hidden channel of a pixel while training.
        outputs: Outputs for each pixel, on a new last axis; None for one, shaped like the input.
        context_dim: For a conditional model, the number of covariates: ``context`` of shape ``(datum, context_dim)``, of about mean 0 and
            standard deviation 1, embedded along with the noise level. None for a model without a context.

    Raises:
        ValueError, TypeError: If a size is not a positive integer, or ``dropout`` is not a probability below 1.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> network = probdiff.networks.ConvNet((4, 4), key=jax.random.key(0), channels=2, num_blocks=1)
        >>> network(jnp.zeros((3, 16)), jnp.zeros(3)).shape  # images of 4×4 pixels
        (3, 16)
    """

    shape: tuple[int, int] = eqx.field(static=True)
    embed: LogSNREmbedding
    embed_context: ContextEmbedding | None
    read: _Convolution
    place: Float[Array, "height width channels"]
    blocks: list["_Block"]
    write: eqx.nn.Linear
    write_place: Float[Array, "height width output"]
    dropout: float = eqx.field(static=True)
    outputs: int | None = eqx.field(static=True)
    context_dim: int | None = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        *,
        key: PRNGKeyArray,
        channels: Whole = 64,
        num_blocks: Whole = 3,
        dropout: float | int = 0.0,
        outputs: Whole | None = None,
        context_dim: Whole | None = None,
    ) -> None:
        require(np.shape(shape) == (2,), "shape", "(height, width)", repr(shape))
        for name, value in (("shape", shape[0]), ("shape", shape[1]), ("channels", channels), ("num_blocks", num_blocks)):
            require_count(name, value)
        for name, size in (("outputs", outputs), ("context_dim", context_dim)):
            require_count(name, 1 if size is None else size)
        require(num_blocks <= MOST_BLOCKS, "num_blocks", f"at most {MOST_BLOCKS}", num_blocks)
        require(isinstance(dropout, float | int) and 0 <= dropout < 1, "dropout", "0 <= dropout < 1", repr(dropout))
        require_key(key)
        keys = jax.random.split(key, 3 + num_blocks)
        height, width = shape
        self.shape = int(height), int(width)
        channels, num_blocks = int(channels), int(num_blocks)
        outputs, context_dim = (None if size is None else int(size) for size in (outputs, context_dim))
        self.embed = LogSNREmbedding(keys[0])
        self.embed_context = None if context_dim is None else ContextEmbedding(context_dim, jax.random.fold_in(key, 1))
        self.read = _Convolution(1, channels, keys[1])
        self.place = jnp.zeros((*self.shape, channels))
        self.blocks = [_Block(self.shape, channels, key) for key in keys[3:]]
        self.write = jax.tree.map(jnp.zeros_like, eqx.nn.Linear(channels, outputs or 1, key=keys[2]))
        self.write_place = jnp.zeros((*self.shape, outputs or 1))
        self.dropout = dropout
        self.outputs = outputs
        self.context_dim = context_dim

    @property
    def dim(self) -> int:
        """Dimension of the data, height × width."""
        return self.shape[0] * self.shape[1]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name, without the key."""
        return {
            "shape": self.shape,
            "channels": self.place.shape[-1],
            "num_blocks": len(self.blocks),
            "dropout": self.dropout,
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
        if key is None and log_snr.size > AT_ONCE and jax.default_backend() == "cpu":
            rows = flattened(z.ndim - 1, (z, log_snr, context))
            output = jax.lax.map(lambda row: self(*row[:2], context=row[2]), rows, batch_size=AT_ONCE)
            return output.reshape(*z.shape, *output.shape[2:])
        embedding = self.embedding(log_snr, context)[..., None, None, :]
        image = z.reshape(*z.shape[:-1], *self.shape, 1)
        h = self.read(image) + self.place
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        for block, block_key in zip(self.blocks, keys):
            h = block(h, embedding, self.dropout, block_key)
        output = (along_last_axis(self.write, jax.nn.silu(h)) + self.write_place).reshape(*z.shape, -1)
        return output[..., 0] if self.outputs is None else output


class _Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    modulate: eqx.nn.Linear
    place: Float[Array, "height width channels"]
    up: _Convolution
    down: _Convolution

    def __init__(self, shape: tuple[int, int], channels: int, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(channels)
        self.modulate = eqx.nn.Linear(EMBEDDING, 2 * channels, key=keys[0])
        self.place = jnp.zeros((*shape, channels))
        self.up = _Convolution(channels, channels, keys[1])
        self.down = _Convolution(channels, channels, keys[2])

    def __call__(
        self,
        h: Float[Array, "*batch height width channels"],
        embedding: Float[Array, "*batch 1 1 embedding"],
        dropout: float | int,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "*batch height width channels"]:
        scale, shift = jnp.split(along_last_axis(self.modulate, embedding), 2, -1)
        inner = self.up(along_last_axis(self.norm, h)) + self.place
        inner = jax.nn.silu(inner * (1 + scale) + shift)
        inner = eqx.nn.Dropout(dropout)(inner, key=key, inference=key is None)
        return h + self.down(inner)
