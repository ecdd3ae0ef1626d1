"""The parts of networks for images: 3×3 convolutions as matrix products, and residual blocks of two convolutions."""

import abc
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

from probdiff._checks import Whole, require, require_count, require_key
from probdiff.networks.base import EMBEDDING, AbstractEmbeddedNetwork, Prediction, along_last_axis, flattened

AT_ONCE = 64  # images at a time, on CPU: their hidden layers then stay in the cache
PRODUCTS = (None, "bfloat16")


def _rounded(x: Float[Array, "*shape"], products: str | None) -> Float[Array, "*shape"]:
    """The factor of a product in the precision ``products``; float64 is not rounded."""
    return x if products is None or x.dtype == jnp.float64 else x.astype(products)


def product(x: Float[Array, "*batch inputs"], weight: Float[Array, "inputs outputs"], products: str | None) -> Float[Array, "*batch outputs"]:
    """``x @ weight`` of factors rounded by :func:`_rounded`, also in the derivatives."""
    # As a product of two matrices, whose derivatives are fast, too.
    rows = _rounded(x.reshape(-1, x.shape[-1]), products)
    return (rows @ weight.astype(rows.dtype)).astype(x.dtype).reshape(*x.shape[:-1], -1)


def along_channels(layer: eqx.nn.Linear, image: Float[Array, "*batch inputs"], products: str | None) -> Float[Array, "*batch outputs"]:
    """A linear layer on the last axis, the channels."""
    assert layer.bias is not None
    return product(image, layer.weight.T, products) + layer.bias


SHIFTS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]


def _shifted(image: Array, down: int, right: int) -> Array:
    """The image shifted by some pixels, with zeros from outside."""
    zero = jnp.zeros((), image.dtype)
    return jax.lax.pad(image, zero, [(0, 0, 0)] * (image.ndim - 3) + [(down, -down, 0), (right, -right, 0), (0, 0, 0)])


def _convolved(image: Array, weight: Array, products: str | None) -> Array:
    # Rounded before the neighbours are copied, so that the copies take half the memory.
    patches = jnp.concatenate([_shifted(_rounded(image, products), -i, -j) for i, j in SHIFTS], -1)
    return product(patches, weight.reshape(-1, weight.shape[-1]), products).astype(image.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def convolve(
    image: Float[Array, "*batch height width inputs"], weight: Float[Array, "3 3 inputs outputs"], products: str | None = None
) -> Float[Array, "*batch height width outputs"]:
    """The 3×3 convolution of images, shape ``(*batch, height, width, inputs)``, that keeps their size.

    The 3×3 neighbours of each pixel are multiplied by the filters in one matrix product: inside a loop, on CPU, XLA's own convolution takes many times as long.
    """
    return _convolved(image, weight, products)


@convolve.defjvp
def _convolve_jvp(products: str | None, primals: Any, tangents: Any) -> Any:
    (image, weight), (d_image, d_weight) = primals, tangents
    # The derivative with respect to the image multiplies first and then adds the neighbours. The value is the same, but the transpose of this form is
    # again one product of neighbours and filters, whereas the transpose of the form above would add nine arrays.
    filters = jnp.moveaxis(weight.reshape(9, *weight.shape[2:]), 0, 1).reshape(weight.shape[2], -1)
    parts = jax.lax.split(product(_rounded(d_image, products), filters, products), (weight.shape[-1],) * 9, axis=d_image.ndim - 1)
    along_image = functools.reduce(jnp.add, (_shifted(part, -i, -j) for part, (i, j) in zip(parts, SHIFTS)))
    return _convolved(image, weight, products), along_image.astype(image.dtype) + _convolved(image, d_weight, products)


class Convolution(eqx.Module):
    """A 3×3 convolution that keeps the size of an image, shape ``(*batch, height, width, channels)``."""

    weight: Float[Array, "3 3 inputs outputs"]
    bias: Float[Array, "outputs"]

    def __init__(self, inputs: int, outputs: int, key: PRNGKeyArray) -> None:
        bound = (9 * inputs) ** -0.5
        weight_key, bias_key = jax.random.split(key)
        self.weight = jax.random.uniform(weight_key, (3, 3, inputs, outputs), minval=-bound, maxval=bound)
        self.bias = jax.random.uniform(bias_key, (outputs,), minval=-bound, maxval=bound)

    def __call__(
        self, image: Float[Array, "*batch height width inputs"], products: str | None = None
    ) -> Float[Array, "*batch height width outputs"]:
        """The images, convolved."""
        return convolve(image, self.weight, products) + self.bias


class Block(eqx.Module):
    """A residual block of two convolutions; the embedding scales and shifts the hidden layer, in which every pixel has a separate bias."""

    norm: eqx.nn.LayerNorm
    modulate: eqx.nn.Linear
    place: Float[Array, "height width channels"]
    up: Convolution
    down: Convolution

    def __init__(self, shape: tuple[int, int], channels: int, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(channels)
        self.modulate = eqx.nn.Linear(EMBEDDING, 2 * channels, key=keys[0])
        self.place = jnp.zeros((*shape, channels))
        self.up = Convolution(channels, channels, keys[1])
        self.down = Convolution(channels, channels, keys[2])

    def __call__(
        self,
        h: Float[Array, "*batch height width channels"],
        embedding: Float[Array, "*batch 1 1 embedding"],
        dropout: float | int,
        key: PRNGKeyArray | None,
        products: str | None = None,
    ) -> Float[Array, "*batch height width channels"]:
        """The hidden layer after the block, same shape ``(*batch, height, width, channels)``, given the embedding."""
        scale, shift = jnp.split(along_last_axis(self.modulate, embedding), 2, -1)
        inner = self.up(along_last_axis(self.norm, h), products) + self.place
        inner = jax.nn.silu(inner * (1 + scale) + shift)
        inner = eqx.nn.Dropout(dropout)(inner, key=key, inference=key is None)
        return h + self.down(inner, products)


class AbstractImageNetwork(AbstractEmbeddedNetwork):
    """A network for images of one channel, flattened in row-major order."""

    shape: eqx.AbstractVar[tuple[int, int]]
    outputs: eqx.AbstractVar[int | None]

    @property
    def dim(self) -> int:
        """Dimension of the data, height × width."""
        return self.shape[0] * self.shape[1]

    @abc.abstractmethod
    def of_images(
        self, image: Float[Array, "*batch height width 1"], embedding: Float[Array, "*batch 1 1 embedding"], key: PRNGKeyArray | None
    ) -> Float[Array, "*batch height width output"]:
        """The outputs for each pixel."""

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
        output = self.of_images(z.reshape(*z.shape[:-1], *self.shape, 1), embedding, key).reshape(*z.shape, -1)
        return output[..., 0] if self.outputs is None else output


def check_arguments(
    shape: Any, key: Any, channels: Whole, num_blocks: Whole, dropout: float | int, outputs: Whole | None, context_dim: Whole | None, most: int
) -> None:
    """Refuse arguments that no network for images accepts."""
    require(np.shape(shape) == (2,), "shape", "(height, width)", repr(shape))
    for name, value in (("shape", shape[0]), ("shape", shape[1]), ("channels", channels), ("num_blocks", num_blocks)):
        require_count(name, value)
    for name, size in (("outputs", outputs), ("context_dim", context_dim)):
        require_count(name, 1 if size is None else size)
    require(num_blocks <= most, "num_blocks", f"at most {most}", num_blocks)
    require(isinstance(dropout, float | int) and 0 <= dropout < 1, "dropout", "0 <= dropout < 1", repr(dropout))
    require_key(key)
