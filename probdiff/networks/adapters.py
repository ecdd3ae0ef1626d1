"""Adapters for networks with another interface than in :mod:`probdiff.networks.base`: of one example, or of another JAX library."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff._checks import PyTree, require
from probdiff.networks.base import AbstractWrapper, Network, Prediction, evaluate, flattened


class Batched(AbstractWrapper):
    """The result of :func:`batched`: a network of one example or of rows, mapped over all batch axes."""

    network: Network

    @property
    def inside(self) -> tuple[Network]:
        """The network of one example or of rows."""
        return (self.network,)

    def __call__(
        self,
        z: Float[Array, "*batch dim"],
        log_snr: Float[Array, "*batch"],
        *,
        n: Int[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Prediction:
        """Predict the noise in each ``z`` separately, with its own dropout if ``key`` is given; a network of rows is called once, on all of them."""
        flat, log_snr, n, context = flattened(z.ndim - 1, (z, log_snr, n, context))
        keys = None if key is None else jax.random.split(key, len(flat))
        one = jax.vmap(lambda z, log_snr, n, key, context: evaluate(self.network, z, log_snr, n, key, context))
        try:
            output = one(flat, log_snr, n, keys, context)
        except Exception as error:
            try:  # a network of rows, such as jax.vmap(f)
                output = evaluate(self.network, flat, log_snr, n, key, context)
            except Exception:
                raise error from None
        return output.reshape(*z.shape[:-1], *output.shape[1:])


def batched(network: Network) -> Batched:
    """Map a network that is written for one example, or for one batch axis, over any batch axes.

    Args:
        network: A callable ``network(z, n) -> eps_hat`` with z of shape ``(dim,)``, n an int32 of shape ``()`` and the prediction shaped like
            z, as usual in equinox; or an :class:`AbstractNetwork` of one example. ``key=`` (dropout) and ``context=`` are then also of
            one example. Or a network of rows, such as ``jax.vmap(f)``: z of shape ``(row, dim)`` and n of shape ``(row,)``.

    Returns:
        The network, for z of shape ``(*batch, dim)``. Its parameters are the parameters of ``network``.

    Raises:
        TypeError: If ``network`` is not callable.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> network = probdiff.networks.batched(lambda z, n: z / (1 + n))  # of one z, shape (dim,)
        >>> probdiff.Diffusion(probdiff.cosine_schedule(5), network, dim=2).predict_noise(jnp.ones((3, 2)), 3).shape
        (3, 2)
    """
    require(callable(network), "network", "a callable network(z, n)", type(network).__name__, TypeError)
    return Batched(network)


def from_apply(apply: Callable[..., Array], params: PyTree) -> jax.tree_util.Partial:
    """A network of a library that separates functions from parameters, such as Flax linen and Haiku.

    Args:
        apply: A function ``apply(params, z, n) -> eps_hat`` of a batch: ``module.apply`` of Flax linen,
            ``haiku.without_apply_rng(transformed).apply``, or one of your own. If it accepts ``key=`` or ``context=`` by name, they are passed as to any network
            (:mod:`probdiff.networks.base`): dropout of Flax linen is
            ``lambda params, z, n, *, key=None: module.apply(params, z, n, key is not None, rngs=None if key is None else {"dropout": key})``, in Haiku
            ``lambda params, z, n, *, key=None: transformed.apply(params, key, z, n, key is not None)``, where the last argument of the modules is
            whether dropout is on.
        params: A tree of arrays, of NumPy or of JAX; the floating-point arrays are trained.

    Returns:
        The network ``network(z, n)``, a tree whose leaves are ``params``.

    Raises:
        TypeError: If ``apply`` is not callable.
        ValueError: If there is nothing to train in ``params``, or it contains other collections of Flax linen than ``"params"``, such as ``"batch_stats"``,
            which must not be trained.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> network = probdiff.networks.from_apply(lambda params, z, n: params["scale"] * z, {"scale": jnp.array(0.5)})
        >>> probdiff.Diffusion(probdiff.cosine_schedule(10), network, dim=2).trainable().network.args[0]
        {'scale': Array(0.5, dtype=float32, weak_type=True)}
    """
    require(callable(apply), "apply", "a callable apply(params, z, n)", type(apply).__name__, TypeError)
    others = sorted(set(params) - {"params"}) if isinstance(params, Mapping) and "params" in params else []
    remedy = 'lambda params, z, n: apply({**others, "params": params}, z, n) keeps the others constant'
    require(not others, "params", 'the collection "params" of Flax linen alone', f"{others} beside it: {remedy}")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf) if _is_floating(leaf) else leaf, params)
    require(any(map(_is_floating, jax.tree.leaves(params))), "params", "a tree with floating-point arrays, to be trained", repr(params)[:60])
    return jax.tree_util.Partial(apply, params)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
