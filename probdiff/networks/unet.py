"""A U-Net: a network for images of more than a few hundred pixels, at two lower resolutions."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from probdiff._checks import Whole, require
from probdiff.networks.base import ContextEmbedding, LogSNREmbedding, along_last_axis, sinusoids, zero_linear
from probdiff.networks.convolution import (
    PRODUCTS,
    AbstractImageNetwork,
    Block,
    Convolution,
    along_channels,
    check_arguments,
)

MOST_BLOCKS = 100
HEADS = 4


class UNet(AbstractImageNetwork):
    r"""U-Net on images of one channel of any height and width, told the noise level by an embedding of its log-SNR.

    Each square of 2×2 pixels becomes the channels of one pixel at half the resolution. Residual blocks of 3×3 convolutions follow at half the resolution, twice as many of
    twice the width at a quarter, with self-attention in the middle, and again at half the resolution, with a skip connection. In each block the embedding scales and shifts
    the hidden layer, and every position has a separate bias. Images whose sides are not multiples of 4 are padded with zeros.

    Sources: Ronneberger et al. (2015), arXiv:1505.04597, for the shape; Ho et al. (2020), arXiv:2006.11239, appendix B, for blocks and attention; Kingma et al. (2021),
    arXiv:2107.00630, appendix C, for the Fourier features.

    Args:
        shape: Height and width; data are images in row-major order, of dimension height × width.
        key: JAX key for the initial weights.
        channels: Width at half the resolution, a multiple of 2.
        num_blocks: Number of residual blocks at half the resolution, before and after; at a quarter, twice as many.
        dropout: Probability of dropping a hidden channel of a pixel while training.
        outputs: Outputs for each pixel, on a new last axis; None for one, shaped like the input.
        context_dim: For a conditional model, the number of covariates: ``context`` of shape ``(datum, context_dim)``, of about mean 0 and
            standard deviation 1, embedded along with the noise level. None for a model without a context.
        fourier: Exponents k, 0 to 15, of the Fourier features :math:`\sin 2^k \pi z` and :math:`\cos 2^k \pi z` of each pixel, which are input channels beside z.
        products: ``"bfloat16"`` to compute matrix products in that precision, which is faster on some devices (:func:`has_fast_bfloat16`); None for the
            precision of ``z``. In float64 nothing is rounded.

    Raises:
        ValueError, TypeError: If an argument is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> network = probdiff.networks.UNet((8, 6), key=jax.random.key(0), channels=4, num_blocks=1)
        >>> network(jnp.zeros((3, 48)), jnp.zeros(3)).shape  # images of 8×6 pixels
        (3, 48)
    """

    shape: tuple[int, int] = eqx.field(static=True)
    embed: LogSNREmbedding
    embed_context: ContextEmbedding | None
    read: Convolution
    place: Float[Array, "half_height half_width channels"]
    down: list[Block]
    merge: eqx.nn.Linear
    middle: list[Block]
    attend: "_Attention"
    part: eqx.nn.Linear
    join: eqx.nn.Linear
    up: list[Block]
    norm: eqx.nn.LayerNorm
    write: eqx.nn.Linear
    write_place: Float[Array, "height width output"]
    dropout: float = eqx.field(static=True)
    outputs: int | None = eqx.field(static=True)
    context_dim: int | None = eqx.field(static=True)
    fourier: tuple[int, ...] = eqx.field(static=True)
    products: str | None = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        *,
        key: PRNGKeyArray,
        channels: Whole = 64,
        num_blocks: Whole = 2,
        dropout: float | int = 0.0,
        outputs: Whole | None = None,
        context_dim: Whole | None = None,
        fourier: Sequence[int] = (),
        products: str | None = None,
    ) -> None:
        check_arguments(shape, key, channels, num_blocks, dropout, outputs, context_dim, MOST_BLOCKS)
        require(channels % (HEADS // 2) == 0, "channels", f"a multiple of {HEADS // 2}", channels)
        whole = all(isinstance(k, int | np.integer) and 0 <= k < 16 for k in fourier)
        require(whole, "fourier", "integers from 0 to 15", repr(fourier))
        require(products in PRODUCTS, "products", f"one of {PRODUCTS}", repr(products))
        self.shape = int(shape[0]), int(shape[1])
        channels, num_blocks = int(channels), int(num_blocks)
        self.outputs, self.context_dim = (None if size is None else int(size) for size in (outputs, context_dim))
        self.dropout, self.fourier, self.products = dropout, tuple(map(int, fourier)), products
        half = (2 * -(-self.shape[0] // 4), 2 * -(-self.shape[1] // 4))
        quarter = (half[0] // 2, half[1] // 2)
        keys = iter(jax.random.split(key, 8 + 4 * num_blocks))
        self.embed = LogSNREmbedding(next(keys))
        self.embed_context = None if context_dim is None else ContextEmbedding(int(context_dim), next(keys))
        self.read = Convolution(4 * (1 + 2 * len(self.fourier)), channels, next(keys))
        self.place = jnp.zeros((*half, channels))
        self.down = [Block(half, channels, next(keys)) for _ in range(num_blocks)]
        self.merge = eqx.nn.Linear(4 * channels, 2 * channels, key=next(keys))
        self.middle = [Block(quarter, 2 * channels, next(keys)) for _ in range(2 * num_blocks)]
        self.attend = _Attention(2 * channels, next(keys))
        self.part = eqx.nn.Linear(2 * channels, 4 * channels, key=next(keys))
        self.join = eqx.nn.Linear(2 * channels, channels, key=next(keys))
        self.up = [Block(half, channels, next(keys)) for _ in range(num_blocks)]
        self.norm = eqx.nn.LayerNorm(channels)
        self.write = zero_linear(channels, 4 * (self.outputs or 1))
        self.write_place = jnp.zeros((*self.shape, self.outputs or 1))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name, without the key."""
        return {
            "shape": self.shape,
            "channels": self.place.shape[-1],
            "num_blocks": len(self.down),
            "dropout": self.dropout,
            "outputs": self.outputs,
            "context_dim": self.context_dim,
            "fourier": self.fourier,
            "products": self.products,
        }

    def of_images(
        self, image: Float[Array, "*batch height width 1"], embedding: Float[Array, "*batch 1 1 embedding"], key: PRNGKeyArray | None
    ) -> Float[Array, "*batch height width output"]:
        """The outputs for each pixel."""
        height, width = self.shape
        waves = sinusoids(image[..., 0], np.pi * 2.0 ** np.array(self.fourier))
        missing = [(0, 2 * half - side) for half, side in zip(self.place.shape, self.shape)]
        filled = jnp.pad(jnp.concatenate([image, waves], -1), [(0, 0)] * (image.ndim - 3) + [*missing, (0, 0)])
        blocks = len(self.down) + len(self.middle) + len(self.up)
        keys = iter([None] * blocks if key is None else jax.random.split(key, blocks))

        def through(blocks: list[Block], h: Array) -> Array:
            for block in blocks:
                h = block(h, embedding, self.dropout, next(keys), self.products)
            return h

        half = through(self.down, self.read(_gathered(filled), self.products) + self.place)
        quarter = along_channels(self.merge, _gathered(half), self.products)
        quarter = through(self.middle[: len(self.up)], quarter)
        quarter = through(self.middle[len(self.up) :], self.attend(quarter, self.products))
        coarse = _scattered(along_channels(self.part, quarter, self.products))
        half = through(self.up, along_channels(self.join, jnp.concatenate([half, coarse], -1), self.products))
        output = along_channels(self.write, jax.nn.silu(along_last_axis(self.norm, half)), self.products)
        return _scattered(output)[..., :height, :width, :] + self.write_place


class _Attention(eqx.Module):
    """Residual self-attention between all positions of an image."""

    norm: eqx.nn.LayerNorm
    ask: eqx.nn.Linear
    write: eqx.nn.Linear

    def __init__(self, channels: int, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 2)
        self.norm = eqx.nn.LayerNorm(channels)
        self.ask = eqx.nn.Linear(channels, 3 * channels, key=keys[0])
        self.write = eqx.nn.Linear(channels, channels, key=keys[1])

    def __call__(self, h: Float[Array, "*batch height width channels"], products: str | None) -> Float[Array, "*batch height width channels"]:
        """The hidden layer after the attention, same shape ``(*batch, height, width, channels)``."""
        asked = along_channels(self.ask, along_last_axis(self.norm, h), products)
        rows = asked.reshape(-1, h.shape[-3] * h.shape[-2], HEADS, 3 * (h.shape[-1] // HEADS))
        query, key, value = jnp.split(rows, 3, -1)
        return h + along_channels(self.write, jax.nn.dot_product_attention(query, key, value).reshape(h.shape), products)


def _gathered(image: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch height/2 width/2 4*channels"]:
    """Blocks of 2×2 pixels as the channels of one pixel."""
    *batch, height, width, channels = image.shape
    pairs = image.reshape(*batch, height // 2, 2, width // 2, 2, channels)
    return jnp.swapaxes(pairs, -4, -3).reshape(*batch, height // 2, width // 2, 4 * channels)


def _scattered(image: Float[Array, "*batch height width gathered"]) -> Float[Array, "*batch 2*height 2*width channels"]:
    """The inverse of :func:`_gathered`."""
    *batch, height, width, channels = image.shape
    pairs = image.reshape(*batch, height, width, 2, 2, channels // 4)
    return jnp.swapaxes(pairs, -4, -3).reshape(*batch, 2 * height, 2 * width, channels // 4)


def has_fast_bfloat16() -> bool:
    """Whether matrix products are faster in bfloat16 than in float32: on an accelerator, and on a processor with matrix instructions for bfloat16 (AMX).

    Example:
        >>> import probdiff
        >>> products = "bfloat16" if probdiff.networks.has_fast_bfloat16() else None  # of a UNet
    """
    if jax.default_backend() != "cpu":
        return True
    try:
        with open("/proc/cpuinfo") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return False
