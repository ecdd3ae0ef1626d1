r"""ε-networks: what predicts the noise in :math:`z_n`.

A network is told how noisy z is in one of two ways:

* a module of :class:`AbstractNetwork`, such as all that are here, is told the noise level: ``network(z, log_snr)``, with the log-SNR
  :math:`\log \bar\alpha_n/(1-\bar\alpha_n)`. It needs no schedule, and can be asked between the steps of a chain;
* any other callable is told the step: ``network(z, n) -> eps_hat``, with ``n`` int32.

``z`` has shape ``(*batch, dim)``, the other shape ``batch``, and the result is shaped like ``z``. Floating-point JAX arrays of an equinox
module are trained; NumPy arrays in it are constants, which no optimiser and no weight decay moves. Four things are optional:

* ``key=``: a network that takes it by name is given one while training (dropout), never in evaluation;
  one key for the whole batch, so ``jax.vmap`` inside the network, not around it;
* ``context=``: a network that takes it by name is that of a conditional model, p(x | c). It is given the covariates or labels c of each
  datum, an array or a tree of arrays, with the batch axes of ``z`` in front: ``(*batch, …)``;
* ``network.dim``: the dimension of the data, needed to generate;
* ``network.context_dim``: of a context that is a vector, its dimension, needed for the wrappers of :mod:`probdiff.networks.context`.

:func:`evaluate` is the one place that knows the two ways apart.
"""

import abc
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real
from numpyro.primitives import Messenger

from probdiff._checks import PyTree, require

TIME_HARMONICS = 8
EMBEDDING = 32
CONTEXT_HIDDEN = 64
MOST_BLOCKS = 1000
Network = Callable[..., Array]  # of either kind
ONE_EXAMPLE = (
    "network: Expected network(z, n) with z of shape (*batch, dim) and n of shape batch, here {}; got one for a single example, "
    "z of shape ({},): give probdiff.networks.batched(network)"
)
Prediction = Float[Array, "*batch dim"] | Float[Array, "*batch dim output"] | Float[Array, "*batch outputs"]


class AbstractNetwork(eqx.Module):
    """A network that is told the noise level.

    To write your own, give ``dim`` and :meth:`__call__`, with or without ``key`` and ``context``.

    Attributes:
        dim: Dimension of the data; None if the network takes any.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> class Shrink(probdiff.networks.AbstractNetwork):
        ...     dim: None = None
        ...     def __call__(self, z, log_snr):
        ...         return z * jnp.exp(-log_snr / 2)[..., None]
        >>> probdiff.Diffusion(probdiff.cosine_schedule(5), Shrink(), dim=2).predict_noise(jnp.ones((4, 2)), 3).shape
        (4, 2)
    """

    if TYPE_CHECKING:  # a property, to a type checker, as it may be overridden by one and is no argument of ``__init__``

        @property
        def dim(self) -> int | None:
            """Dimension of the data."""
    else:
        dim: eqx.AbstractVar[int | None]

    @abc.abstractmethod
    def __call__(self, z: Float[Array, "*batch dim"], log_snr: Float[Array, "*batch"]) -> Prediction:
        """Predict the noise in ``z``, shape ``(*batch, dim)``, of log-SNR ``log_snr``, shape ``batch``: shaped like ``z``."""

    @property
    def is_told_step(self) -> bool:
        """Whether there is a network inside that must be told the step."""
        return False

    @property
    def is_conditional(self) -> bool:
        """Whether it must be given a context: by default, whether it takes one by name."""
        return takes(self, "context")

    def check_context(self, context: PyTree) -> None:
        """Refuse a context that does not suit the network, ``(datum, …)``; only its shapes and types may be looked at. By default, none."""


class AbstractWrapper(AbstractNetwork):
    """A network around others, of either kind: the step is passed on to those that are told it."""

    @property
    @abc.abstractmethod
    def inside(self) -> Sequence[Network]:
        """The networks that this one is around."""

    @property
    def dim(self) -> int | None:
        """Dimension of the data, if a network inside knows it."""
        return self._of_inside("dim")

    @property
    def context_dim(self) -> int | None:
        """Dimension of the context, if a network inside knows it."""
        return self._of_inside("context_dim")

    def _of_inside(self, name: str) -> int | None:
        return next((value for network in self.inside if (value := getattr(network, name, None)) is not None), None)

    @property
    def is_told_step(self) -> bool:
        """Whether one of the networks inside is."""
        return any(map(is_told_step, self.inside))

    @property
    def is_conditional(self) -> bool:
        """Whether one of the networks inside is."""
        return any(map(is_conditional, self.inside))

    def check_context(self, context: PyTree) -> None:
        """Refuse a context that does not suit a network inside."""
        for network in self.inside:
            check_context(network, context)

    @abc.abstractmethod
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


def is_told_step(network: Network) -> bool:
    """Whether a network must be told the step, and cannot be asked between steps."""
    return network.is_told_step if isinstance(network, AbstractNetwork) else True


def is_conditional(network: Network) -> bool:
    """Whether a network must be given a context."""
    return network.is_conditional if isinstance(network, AbstractNetwork) else takes(network, "context")


def check_context(network: Network, context: PyTree) -> None:
    """Refuse a context that does not suit a network; one of the user's own takes what it likes."""
    if isinstance(network, AbstractNetwork):
        network.check_context(context)


def takes(network: Callable[..., Any], name: str) -> bool:
    """Whether the network accepts ``key=`` or ``context=`` by name; ``**kwargs`` does not say so."""
    try:
        return name in inspect.signature(network).parameters
    except (TypeError, ValueError):
        return False


def evaluate(
    network: Network,
    z: Float[Array, "*batch dim"],
    log_snr: Float[Array, "*batch"],
    n: Real[Array, "*batch"] | None = None,
    key: PRNGKeyArray | None = None,
    context: PyTree = None,
    *,
    method: str | None = None,
) -> Any:
    """Call a network of either kind.

    Args:
        network: The network.
        z: Latents, shape ``(*batch, dim)``.
        log_snr: Their log-SNR, shape ``batch``.
        n: Their step, or what the network is told in its place, shape ``batch``; None between steps.
        key: Passed on if the network takes one; give one only while training.
        context: Passed on if the network takes one, a tree of arrays of shape ``(*batch, …)``.
        method: Name of the method to call in the place of the network itself.

    Returns:
        What the network returned, not checked yet (:func:`require_shape`).
    Raises:
        ValueError: If the network must be told the step, and there is none.
    """
    call = network if method is None else getattr(network, method)
    given = {"key": key, "context": context}
    options = {name: value for name, value in given.items() if value is not None and takes(call, name)}
    with _NoParamSites():
        if isinstance(network, AbstractWrapper):
            return call(z, log_snr, n=n, **options)
        if isinstance(network, AbstractNetwork):
            return call(z, log_snr, **options)
        require(n is not None, "network", "an AbstractNetwork, to be asked between steps", f"a {type(network).__name__}, which is told the step")
        return _call_at_step(call, z, n, **options)


class _NoParamSites(Messenger):
    """Refuses a network that asks NumPyro for its parameters: it is called in loops, in which NumPyro has no ``param`` sites, and outside of programs."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """NumPyro's call for each message."""
        require(
            msg["type"] not in ("param", "mutable"),
            "network",
            "one that holds its parameters: a module of equinox or Flax NNX itself, or probdiff.networks.from_apply(module.apply, params) "
            "of Flax linen or Haiku",
            f"one with the NumPyro site {msg['name']!r}, as flax_module, nnx_module and eqx_module make",
        )


def _call_at_step(call: Network, z: Float[Array, "*batch dim"], n: Real[Array, "*batch"] | None, **options: Any) -> Any:
    """``call(z, n, **options)``; one that is written for a single example is told apart, and named with the remedy."""
    try:
        output = call(z, n, **options)
    except NotImplementedError:
        raise  # by name, already
    except Exception as error:
        if _takes_one_example(call, z, **options):
            raise ValueError(ONE_EXAMPLE.format(tuple(z.shape), z.shape[-1])) from error
        raise
    if getattr(output, "shape", ())[: z.ndim - 1] != z.shape[:-1] and _takes_one_example(call, z, **options):
        raise ValueError(ONE_EXAMPLE.format(tuple(z.shape), z.shape[-1]))
    return output


def _takes_one_example(call: Network, z: Float[Array, "*batch dim"], **options: Any) -> bool:
    """Whether a network takes z of shape ``(dim,)`` and one step, and gives something of that shape; it is traced, not run."""
    first = (0,) * (z.ndim - 1)
    options |= jax.tree.map(lambda leaf: leaf[first], {name: value for name, value in options.items() if name == "context"})
    try:
        output = jax.eval_shape(call, z[first], jnp.ones((), jnp.int32), **options)
    except Exception:
        return False
    return z.ndim > 1 and getattr(output, "shape", ())[:1] == z.shape[-1:]


def predict_noise(
    network: Network,
    z: Float[Array, "*batch dim"],
    log_snr: Float[Array, "*batch"],
    n: Int[Array, "*batch"] | None = None,
    key: PRNGKeyArray | None = None,
    context: PyTree = None,
) -> Float[Array, "*batch dim"]:
    """:func:`evaluate` an ε-network, and check what comes back.

    Raises:
        ValueError: If the result is not shaped like ``z``.
    """
    return require_shape(evaluate(network, z, log_snr, n, key, context), z.shape, "the shape of z").astype(z.dtype)


def require_shape(output: Any, shape: tuple[int, ...], words: str) -> Array:
    """The output of a network, whose shape is checked."""
    got = getattr(output, "shape", type(output).__name__)
    require(got == shape, "network(z, n)", f"shape {shape}, {words}", got)
    return output


def signal_and_noise(log_snr: Float[Array, "*batch"]) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    r"""√ᾱ and √(1−ᾱ) at some log-SNR, with an axis for the dimensions."""
    signal, noise = (jnp.exp(jax.nn.log_sigmoid(sign * log_snr) / 2)[..., None] for sign in (1, -1))
    return signal, noise


class LogSNREmbedding(eqx.Module):
    """The embedding of a noise level: a small perceptron on sinusoids of the log-SNR."""

    layers: list[eqx.nn.Linear]

    def __init__(self, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 2)
        self.layers = [eqx.nn.Linear(size, EMBEDDING, key=k) for size, k in zip((2 * TIME_HARMONICS, EMBEDDING), keys)]

    def __call__(self, log_snr: Float[Array, "*batch"]) -> Float[Array, "*batch embedding"]:
        """The embedding, shape ``(*batch, EMBEDDING)``, of a log-SNR of shape ``batch``."""
        h = sinusoids(log_snr, np.geomspace(0.05, 5, TIME_HARMONICS))
        for layer in self.layers:
            h = jax.nn.silu(along_last_axis(layer, h))
        return h


class ContextEmbedding(eqx.Module):
    """The embedding of a vector of covariates: a small perceptron."""

    layers: list[eqx.nn.Linear]

    def __init__(self, context_dim: int, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 2)
        sizes = ((context_dim, CONTEXT_HIDDEN), (CONTEXT_HIDDEN, EMBEDDING))
        self.layers = [eqx.nn.Linear(*size, key=k) for size, k in zip(sizes, keys)]

    def __call__(self, context: Float[Array, "*batch context_dim"]) -> Float[Array, "*batch embedding"]:
        """The embedding, shape ``(*batch, EMBEDDING)``, of covariates of shape ``(*batch, context_dim)``."""
        return along_last_axis(self.layers[1], jax.nn.silu(along_last_axis(self.layers[0], context)))


class AbstractEmbeddedNetwork(AbstractNetwork):
    """A network whose noise level and covariates, if it has any, are embedded together."""

    embed: eqx.AbstractVar[LogSNREmbedding]
    embed_context: eqx.AbstractVar[ContextEmbedding | None]
    context_dim: eqx.AbstractVar[int | None]

    @property
    def is_conditional(self) -> bool:
        """Whether there is a ``context_dim``."""
        return self.context_dim is not None

    def check_context(self, context: PyTree) -> None:
        """Refuse anything but an array of shape ``(datum, context_dim)``."""
        if self.context_dim is not None:
            expected = f"an array of shape (datum, {self.context_dim}), as the network has context_dim={self.context_dim}"
            got = f"shape {context.shape}" if eqx.is_array(context) else type(context).__name__
            require(eqx.is_array(context) and context.shape[1:] == (self.context_dim,), "context", expected, got)

    def embedding(
        self, log_snr: Float[Array, "*batch"], context: Real[Array, "*batch context_dim"] | None
    ) -> Float[Array, "*batch embedding"]:
        """The embedding of both, shape ``(*batch, EMBEDDING)``."""
        embedding = self.embed(log_snr)
        if self.embed_context is None:
            return embedding
        assert context is not None  # the Diffusion says so
        return embedding + self.embed_context(context.astype(embedding.dtype))


def flattened(num_axes: int, tree: PyTree) -> PyTree:
    """The arrays of a tree with their first ``num_axes`` axes, those of a batch, as one."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[num_axes:]), tree)


def along_last_axis(layer: Callable[[Array], Array], x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    """Apply an equinox layer, which takes one vector, along the last axis of ``x``."""
    return jnp.vectorize(layer, signature="(i)->(o)")(x)


def sinusoids(x: Float[Array, "*shape"], frequencies: Float[np.ndarray, "frequency"]) -> Float[Array, "*shape 2*frequency"]:
    """Sines and cosines of ``x`` at each frequency, on a new last axis."""
    angles = x[..., None] * jnp.asarray(frequencies, x.dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
