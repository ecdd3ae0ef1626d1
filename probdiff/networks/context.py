r"""Labels as a context, and the prediction of a network without its context.

Training with :class:`ContextDropout` gives two models: the conditional one, and the unconditional one, whose network is :func:`unconditional`.
A head is put around these wrappers: ``CategoricalHead(Embedding(ContextDropout(ConvNet(…, context_dim=16)), 10, key=key), levels)``.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._checks import Number, PyTree, Whole, is_concrete, require, require_count, require_key
from probdiff.networks.base import AbstractWrapper, Network, Prediction, evaluate, predict_noise


class _AbstractContextWrapper(AbstractWrapper):
    """A network around another network, for which it replaces the context by a vector."""

    network: eqx.AbstractVar[Network]

    @property
    def inside(self) -> tuple[Network]:
        """The network."""
        return (self.network,)

    @abc.abstractmethod
    def replaced(self, context: PyTree, batch: tuple[int, ...], key: PRNGKeyArray | None) -> PyTree:
        """The context for the network inside, which replaces ``context``, for latents of shape ``(*batch, dim)``."""

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        *,
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Prediction:
        """Predict the noise in ``z``, shape ``(*batch, dim)``, of log-SNR ``log_snr`` after ``n`` steps, both of shape ``batch``, given ``context``."""
        own, key = (None, None) if key is None else jax.random.split(key)
        return evaluate(self.network, z, log_snr, n, key, self.replaced(context, z.shape[:-1], own))


class Embedding(_AbstractContextWrapper):
    """A network whose context is a label; each label has a learned vector, the context of the network inside.

    The context of the model is the label of each datum, integers of shape ``(datum,)``.

    Args:
        network: A network with a ``context_dim``, such as ``MLP(…, context_dim=16)``.
        num_labels: Number of labels, 0 … num_labels − 1.
        key: JAX key for the initial vectors, which are standard normal.

    Raises:
        ValueError, TypeError: If the network has no ``context_dim``, or ``num_labels`` is not a positive integer.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, context_dim=3)
        >>> of_labels = probdiff.networks.Embedding(network, 10, key=jax.random.key(1))  # ten labels, each a vector of three numbers
        >>> of_labels(jnp.zeros((2, 2)), jnp.zeros(2), context=jnp.array([7, 3])).shape
        (2, 2)
    """

    network: Network
    vectors: Float[Array, "label context_dim"]

    def __init__(self, network: Network, num_labels: Whole, *, key: PRNGKeyArray) -> None:
        width = _width(network)
        require_count("num_labels", num_labels)
        require_key(key)
        self.network = network
        self.vectors = jax.random.normal(key, (int(num_labels), width))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name, without the key."""
        return {"network": self.network, "num_labels": len(self.vectors)}

    @property
    def context_dim(self) -> None:
        """None: the context is a label, not a vector."""

    def check_context(self, context: PyTree) -> None:
        """Refuse anything but labels, of shape ``(datum,)``; traced values are not checked."""
        expected = f"labels 0 … {len(self.vectors) - 1}, integers of shape (datum,)"
        require(eqx.is_array(context), "context", expected, type(context).__name__)
        require(jnp.issubdtype(context.dtype, jnp.integer), "context", expected, f"dtype {context.dtype}", TypeError)
        require(context.ndim == 1, "context", expected, f"shape {context.shape}")
        if is_concrete(context):
            labels = np.asarray(context)
            bad = np.flatnonzero((labels < 0) | (labels >= len(self.vectors)))
            require(bad.size == 0, "context", expected, f"{labels[bad[:1]]} at index {bad[:1]}")

    def replaced(self, context: PyTree, batch: tuple[int, ...], key: PRNGKeyArray | None) -> PyTree:
        """The vectors of labels of shape ``batch``; None for None."""
        return None if context is None else self.vectors[context]


class ContextDropout(_AbstractContextWrapper):
    r"""A network whose context is dropped at random in training, so that it can be evaluated without a context.

    A dropped context is replaced by a *null context*, a learned vector; the contexts of different latents are dropped independently. Thus the model learns
    p(x) along with p(x | c): the training loss is an average of both bounds, weighted by the probability. In evaluation nothing is dropped;
    without a context (``context=None``) all latents have the null context. Source: Ho and Salimans (2022), arXiv:2207.12598, algorithm 1.

    Args:
        network: A network with a ``context_dim``, such as ``MLP(…, context_dim=16)``. An :class:`Embedding` is put around this wrapper.
        probability: Probability of dropping a context, 0 ≤ probability < 1.

    Raises:
        ValueError, TypeError: If the network has no ``context_dim``, or ``probability`` is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, context_dim=3)
        >>> dropped = probdiff.networks.ContextDropout(network, probability=0.2)
        >>> dropped(jnp.zeros((4, 2)), jnp.zeros(4), context=jnp.ones((4, 3))).shape, dropped(jnp.zeros((4, 2)), jnp.zeros(4)).shape
        ((4, 2), (4, 2))
    """

    network: Network
    null: Float[Array, "context_dim"]
    probability: float = eqx.field(static=True)

    def __init__(self, network: Network, *, probability: Number = 0.1) -> None:
        width = _width(network)
        good = isinstance(probability, Number) and 0 <= probability < 1
        require(good, "probability", "0 <= probability < 1", repr(probability))
        self.network = network
        self.null = jnp.zeros(width)
        self.probability = float(probability)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"network": self.network, "probability": self.probability}

    def replaced(self, context: PyTree, batch: tuple[int, ...], key: PRNGKeyArray | None) -> PyTree:
        """The context, replaced by the null context if it is dropped or missing."""
        null = jnp.broadcast_to(self.null, (*batch, *self.null.shape))
        if context is None or key is None:
            return null if context is None else context
        dropped = jax.random.bernoulli(key, self.probability, batch)
        return jnp.where(dropped[..., None], null, context)


class _WithoutContext(_AbstractContextWrapper):
    """A :class:`ContextDropout` that is given no context."""

    network: ContextDropout

    @property
    def is_conditional(self) -> bool:
        """False."""
        return False

    def replaced(self, context: PyTree, batch: tuple[int, ...], key: PRNGKeyArray | None) -> None:
        """None."""


def unconditional(network: Network) -> Network:
    """The network of p(x), which needs no context: all contexts are the null context.

    ``fitted.with_network(unconditional(fitted.network))`` is the unconditional model, with a bound of its own.

    Args:
        network: A network that contains a :class:`ContextDropout`.

    Raises:
        ValueError: If the network contains no :class:`ContextDropout`.

    Example:
        >>> import jax, probdiff
        >>> network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, context_dim=3)
        >>> fitted = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.networks.ContextDropout(network))
        >>> of_all = fitted.with_network(probdiff.networks.unconditional(fitted.network))
        >>> fitted.is_conditional, of_all.is_conditional
        (True, False)
    """
    places = jax.tree.leaves(network, is_leaf=_is_dropout)
    require(any(map(_is_dropout, places)), "network", "one with a ContextDropout in it", type(network).__name__)
    return jax.tree.map(lambda place: _WithoutContext(place) if _is_dropout(place) else place, network, is_leaf=_is_dropout)


class Guided(AbstractWrapper):
    r"""The noise :math:`(1 + w)\, \hat\epsilon(z, c) - w\, \hat\epsilon(z)` for :func:`probdiff.samplers.guided`.

    Args:
        network: An ε-network that contains a :class:`ContextDropout`.
        weight: w.
    """

    network: Network
    without: Network
    weight: float = eqx.field(static=True)

    def __init__(self, network: Network, weight: Number) -> None:
        require(isinstance(weight, Number) and np.isfinite(weight), "weight", "a finite number", repr(weight))
        self.network = network
        self.without = unconditional(network)
        self.weight = float(weight)

    @property
    def inside(self) -> tuple[Network]:
        """The network."""
        return (self.network,)

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        *,
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Float[Array, "*batch dim"]:
        """Predict the noise in ``z``, shape ``(*batch, dim)``, of log-SNR ``log_snr`` after ``n`` steps, both of shape ``batch``, given ``context``."""
        given, without = (predict_noise(network, z, log_snr, n, key, context) for network in (self.network, self.without))
        return (1 + self.weight) * given - self.weight * without


def _is_dropout(place: object) -> bool:
    return isinstance(place, ContextDropout)


def _width(network: Network) -> int:
    """The ``context_dim`` of a network."""
    require(callable(network), "network", "a callable network(z, n)", type(network).__name__, TypeError)
    width = getattr(network, "context_dim", None)
    require(width is not None, "network", "one with a context_dim, whose context is a vector", f"{type(network).__name__} without")
    assert width is not None
    return width
