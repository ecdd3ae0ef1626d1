r"""ε-networks, which predict the noise in :math:`z_n`.

The second argument of a network is the noise level of z, in one of two forms:

* a module of :class:`AbstractNetwork`, such as all networks of this package, is told the log-SNR
  :math:`\log \bar\alpha_n/(1-\bar\alpha_n)`: ``network(z, log_snr)``. It needs no schedule, and can be evaluated between the steps of a chain;
* any other callable is told the step: ``network(z, n) -> eps_hat``, with ``n`` int32.

``z`` has shape ``(*batch, dim)``, the second argument shape ``batch``, and the result is shaped like ``z``. Floating-point JAX arrays of an equinox
module are trained; NumPy arrays in it are constants, which no optimiser and no weight decay changes. Four things are optional:

* ``key=``: a network that accepts it by name is given a key in training (dropout), never in evaluation.
  There is one key for the whole batch, so that ``jax.vmap`` belongs inside the network, not around it;
* ``context=``: a network that accepts it by name makes the model conditional, p(x | c). The context is the covariates or labels c of each
  datum, an array or a tree of arrays, with the batch axes of ``z`` in front: ``(*batch, …)``;
* ``network.dim``: the dimension of the data, needed to generate;
* ``network.context_dim``: the dimension of a context that is a vector, needed for the wrappers of :mod:`probdiff.networks.context`.

Every call of a network, in either form, is made by ``evaluate``.
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
OTHER_AXES = (
    "network: Expected network(z, n) with z of shape (*batch, dim) and n of shape batch, here {}; got one for {}: give probdiff.networks.batched(network)"
)
Prediction = Float[Array, "*batch dim"] | Float[Array, "*batch dim output"] | Float[Array, "*batch outputs"]


class AbstractNetwork(eqx.Module):
    """A network that is told the log-SNR.

    To write your own, define ``dim`` and :meth:`__call__`, with or without ``key`` and ``context``.

    Attributes:
        dim: Dimension of the data; None if the network accepts any.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> class Shrink(probdiff.networks.AbstractNetwork):
        ...     dim: None = None
        ...     def __call__(self, z, log_snr):
        ...         return z * jnp.exp(-log_snr / 2)[..., None]
        >>> probdiff.Diffusion(probdiff.cosine_schedule(5), Shrink(), dim=2).predict_noise(jnp.ones((4, 2)), 3).shape
        (4, 2)
    """

    if TYPE_CHECKING:  # for type checkers a property: subclasses may define it as one, and it is no argument of ``__init__``

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
        """Whether a network inside must be told the step."""
        return False

    @property
    def is_conditional(self) -> bool:
        """Whether the network needs a context: by default, whether it accepts one by name."""
        return takes(self, "context")

    def check_context(self, context: PyTree) -> None:
        """Refuse a context, of shape ``(datum, …)``, that does not suit the network; its values may be traced. By default, no context is refused."""


class AbstractWrapper(AbstractNetwork):
    """A network around others, of either kind: the step is passed on to networks that are told the step."""

    @property
    @abc.abstractmethod
    def inside(self) -> Sequence[Network]:
        """The networks inside this one."""

    @property
    def dim(self) -> int | None:
        """Dimension of the data, if a network inside has it."""
        return self._of_inside("dim")

    @property
    def context_dim(self) -> int | None:
        """Dimension of the context, if a network inside has it."""
        return self._of_inside("context_dim")

    def _of_inside(self, name: str) -> int | None:
        return next((value for network in self.inside if (value := getattr(network, name, None)) is not None), None)

    @property
    def is_told_step(self) -> bool:
        """Whether one of the networks inside must be told the step."""
        return any(map(is_told_step, self.inside))

    @property
    def is_conditional(self) -> bool:
        """Whether one of the networks inside needs a context."""
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
    """Whether a network must be told the step, and cannot be evaluated between steps."""
    return network.is_told_step if isinstance(network, AbstractNetwork) else True


def is_conditional(network: Network) -> bool:
    """Whether a network needs a context."""
    return network.is_conditional if isinstance(network, AbstractNetwork) else takes(network, "context")


def check_context(network: Network, context: PyTree) -> None:
    """Refuse a context that does not suit a network; a network of the user's own checks its context itself."""
    if isinstance(network, AbstractNetwork):
        network.check_context(context)


def takes(network: Callable[..., Any], name: str) -> bool:
    """Whether the network accepts ``key=`` or ``context=`` by name; ``**kwargs`` does not count."""
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
        n: Their step, or the number that replaces it for the network, shape ``batch``; None between steps.
        key: Passed on if the network accepts one; only for training.
        context: Passed on if the network accepts one, a tree of arrays of shape ``(*batch, …)``.
        method: Name of the method to call instead of the network itself.

    Returns:
        The output of the network, whose shape is not checked yet (:func:`require_shape`).

    Raises:
        ValueError: If the network must be told the step, and ``n`` is None.
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
    """Refuses a network that has NumPyro ``param`` sites: networks are called in loops, which cannot have such sites, and outside programs."""

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
    """``call(z, n, **options)``; for a network written for a single example, or for one batch axis, the error names the remedy."""
    try:
        output = call(z, n, **options)
    except NotImplementedError:
        raise  # by name, already
    except Exception as error:
        if other := _axes_it_takes(call, z, **options):
            raise ValueError(OTHER_AXES.format(tuple(z.shape), other)) from error
        raise
    shape = getattr(output, "shape", ())
    if shape[: z.ndim - 1] != z.shape[:-1] and (other := _axes_it_takes(call, z, **options)):
        raise ValueError(OTHER_AXES.format(tuple(z.shape), other))
    return output


def _axes_it_takes(call: Network, z: Float[Array, "*batch dim"], **options: Any) -> str | None:
    """In words, the shape of z that a network takes instead, if it is ``(dim,)`` or ``(rows, dim)``; the network is traced, not run."""
    dim, context = z.shape[-1], options.get("context")
    alone, rows = (0,) * (z.ndim - 1), (0,) * (z.ndim - 2)
    given = [
        (f"a single example, z of shape ({dim},)", alone, z.ndim > 1),
        (f"one batch axis, z of shape (rows, {dim})", rows, z.ndim > 2),
    ]
    for words, first, fewer in given:
        part = options | ({} if context is None else {"context": jax.tree.map(lambda leaf, first=first: leaf[first], context)})
        try:
            output = jax.eval_shape(call, z[first], jnp.ones(z[first].shape[:-1], jnp.int32), **part)
        except Exception:
            continue
        if fewer and getattr(output, "shape", ())[: z[first].ndim] == z[first].shape:
            return words
    return None


def predict_noise(
    network: Network,
    z: Float[Array, "*batch dim"],
    log_snr: Float[Array, "*batch"],
    n: Int[Array, "*batch"] | None = None,
    key: PRNGKeyArray | None = None,
    context: PyTree = None,
) -> Float[Array, "*batch dim"]:
    """Evaluate an ε-network, and check the shape of the result.

    Raises:
        ValueError: If the result is not shaped like ``z``.
    """
    return require_shape(evaluate(network, z, log_snr, n, key, context), z.shape, "the shape of z").astype(z.dtype)


def require_shape(output: Any, shape: tuple[int, ...], words: str) -> Array:
    """The output of a network, after a check of its shape."""
    got = getattr(output, "shape", type(output).__name__)
    require(got == shape, "network(z, n)", f"shape {shape}, {words}", got)
    return output


def signal_and_noise(log_snr: Float[Array, "*batch"]) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    r"""√ᾱ and √(1−ᾱ) from the log-SNR, with an axis for the dimensions."""
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
    """A network that embeds the noise level together with the covariates, if there are any."""

    embed: eqx.AbstractVar[LogSNREmbedding]
    embed_context: eqx.AbstractVar[ContextEmbedding | None]
    context_dim: eqx.AbstractVar[int | None]

    @property
    def is_conditional(self) -> bool:
        """Whether the network has a ``context_dim``."""
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
        """The sum of the embeddings of the noise level and of the covariates, shape ``(*batch, EMBEDDING)``."""
        embedding = self.embed(log_snr)
        if self.embed_context is None:
            return embedding
        assert context is not None  # the Diffusion raises the error
        return embedding + self.embed_context(context.astype(embedding.dtype))


def flattened(num_axes: int, tree: PyTree) -> PyTree:
    """The arrays of a tree with their first ``num_axes`` axes, the batch axes, merged into one."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[num_axes:]), tree)


def zero_linear(inputs: int, outputs: int) -> eqx.nn.Linear:
    """A linear layer of zeros, for which no random numbers are drawn."""
    layer = eqx.filter_eval_shape(eqx.nn.Linear, inputs, outputs, key=jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layer)


def along_last_axis(layer: Callable[[Array], Array], x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    """Apply an equinox layer, which takes one vector, along the last axis of ``x``."""
    return jnp.vectorize(layer, signature="(i)->(o)")(x)


def sinusoids(x: Float[Array, "*shape"], frequencies: Float[np.ndarray, "frequency"]) -> Float[Array, "*shape 2*frequency"]:
    """Sines and cosines of ``x`` at each frequency, on a new last axis."""
    angles = x[..., None] * jnp.asarray(frequencies, x.dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
