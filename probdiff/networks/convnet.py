"""A network for small images: residual 3×3 convolutions, with a separate bias for every pixel.

Source: He et al. (2016), arXiv:1603.05027, for residual blocks with their normalisation first.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from probdiff._checks import Whole
from probdiff.networks.base import MOST_BLOCKS, ContextEmbedding, LogSNREmbedding, along_last_axis, zero_linear
from probdiff.networks.convolution import AbstractImageNetwork, Block, Convolution, check_arguments


class ConvNet(AbstractImageNetwork):
    """Residual convolutional network on images of one channel, told the noise level by an embedding of its log-SNR.

    The resolution stays the same: in an image of 8×8 every output depends on every pixel after seven convolutions, the default number. In each block the
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
    read: Convolution
    place: Float[Array, "height width channels"]
    blocks: list[Block]
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
        check_arguments(shape, key, channels, num_blocks, dropout, outputs, context_dim, MOST_BLOCKS)
        keys = jax.random.split(key, 3 + num_blocks)  # (one is spare, so that the weights of a key stay as they were)
        height, width = shape
        self.shape = int(height), int(width)
        channels, num_blocks = int(channels), int(num_blocks)
        outputs, context_dim = (None if size is None else int(size) for size in (outputs, context_dim))
        self.embed = LogSNREmbedding(keys[0])
        self.embed_context = None if context_dim is None else ContextEmbedding(context_dim, jax.random.fold_in(key, 1))
        self.read = Convolution(1, channels, keys[1])
        self.place = jnp.zeros((*self.shape, channels))
        self.blocks = [Block(self.shape, channels, key) for key in keys[3:]]
        self.write = zero_linear(channels, outputs or 1)
        self.write_place = jnp.zeros((*self.shape, outputs or 1))
        self.dropout = dropout
        self.outputs = outputs
        self.context_dim = context_dim

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

    def of_images(
        self, image: Float[Array, "*batch height width 1"], embedding: Float[Array, "*batch 1 1 embedding"], key: PRNGKeyArray | None
    ) -> Float[Array, "*batch height width output"]:
        """The outputs for each pixel."""
        h = self.read(image) + self.place
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        for block, block_key in zip(self.blocks, keys):
            h = block(h, embedding, self.dropout, block_key)
        return along_last_axis(self.write, jax.nn.silu(h)) + self.write_place
