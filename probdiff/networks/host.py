"""Networks that are computed outside JAX, such as modules of PyTorch, for evaluation. PyTorch is not imported here."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from probdiff._checks import PyTree, require
from probdiff.networks.base import flattened

NO_DERIVATIVE = (
    "network: Expected one that JAX can differentiate; got one of another library, which can only be evaluated. It has no gradient for a schedule that is "
    'learned around it, a twist of particles (except twist="none"), or the divergence of a flow. Train it in its own library, or write it in JAX: '
    "probdiff.networks.from_apply"
)


class HostNetwork(eqx.Module):
    """A network that is told the step, and is computed outside JAX.

    Attributes:
        function: A function ``function(z, n)`` of NumPy arrays of shape ``(rows, dim)`` and ``(rows,)``, with ``context=`` if it accepts one by name.
    """

    function: Callable[..., np.ndarray] = eqx.field(static=True)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function, whose signature is the network's."""
        return self.function

    def __call__(self, z: Float[Array, "*batch dim"], n: Real[Array, "*batch"], *, context: PyTree = None) -> Array:
        """The prediction in ``z`` after ``n`` steps, given ``context``."""
        return _on_host(self.function, z, n, {} if context is None else {"context": context})


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A function of rows, applied to arrays with any batch axes in the form of :func:`_words`; ``dtypes`` are the dtypes of the original arrays."""

    function: Callable[..., np.ndarray]
    dtypes: tuple[np.dtype, ...]

    def __call__(self, *words: Any) -> np.ndarray:
        leaves, structure = jax.tree.flatten(words)
        z, n, given = jax.tree.unflatten(structure, map(_numbers, map(np.asarray, leaves), self.dtypes))
        z_rows, n_rows, given = flattened(z.ndim - 1, (z, n, given))
        output = self.function(z_rows, n_rows, **given).astype(z.dtype)
        output = output.reshape(*z.shape[:-1], *output.shape[1:])
        return np.ascontiguousarray(output)[..., None].view(np.uint32) if z.dtype == np.float64 else output


def _words(array: Array) -> Array:
    """float64 as pairs of integers: JAX calls the host from another thread, and rounds to float32 if float64 is not enabled in that thread."""
    return jax.lax.bitcast_convert_type(array, jnp.uint32) if array.dtype == jnp.float64 else array


def _numbers(words: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(words).view(dtype)[..., 0] if dtype == np.float64 else words


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _on_host(function: Callable[..., np.ndarray], z: Array, n: Array, given: dict[str, PyTree]) -> Array:
    # The function is first called with two rows, for the shape of the output, and so that an error is raised here with a short message.
    two_z, two_n, two_given = jax.tree.map(lambda leaf: np.zeros((2, *leaf.shape[z.ndim - 1 :]), leaf.dtype), (z, n, given))
    output = function(two_z, two_n + 1, **two_given)
    rows_alike = output.ndim > 1 and len(output) == 2
    require(rows_alike, "network(z, n)", f"shape (2, …) for z of shape {two_z.shape}", f"shape {output.shape}")
    result = jax.eval_shape(_words, jax.ShapeDtypeStruct((*z.shape[:-1], *output.shape[1:]), z.dtype))
    rows = _Rows(function, tuple(leaf.dtype for leaf in jax.tree.leaves((z, n, given))))
    words = jax.pure_callback(rows, result, *jax.tree.map(_words, (z, n, given)), vmap_method="broadcast_all")
    return jax.lax.bitcast_convert_type(words, z.dtype)


@_on_host.defjvp
def _refuse_derivative(function: Callable[..., Any], primals: Any, tangents: Any) -> NoReturn:
    raise NotImplementedError(NO_DERIVATIVE)


def require_of_jax(network: Any) -> None:
    """Refuse a module of PyTorch that is not adapted."""
    torch = sys.modules.get("torch")
    foreign = torch is not None and isinstance(network, torch.nn.Module)
    require(not foreign, "network", "a network of JAX; one of PyTorch as probdiff.networks.from_torch(module)", type(network).__name__, TypeError)


def from_torch(module: Any, apply: Callable[..., Any] | None = None) -> HostNetwork:
    """A network from a module of PyTorch, for evaluation in bounds, estimators, samplers and exports. It is not trained here.

    The module is called from compiled programs, on all rows at once, without gradients. Its parameters are not copied: each call uses their present values.

    Args:
        module: A ``torch.nn.Module`` in evaluation mode.
        apply: A function ``apply(module, z, n) -> eps_hat``; ``module(z, n)`` if not given. Its arguments are latents z of shape ``(rows, dim)`` and steps n, int64 from
            1 to N of shape ``(rows,)``, and it returns a tensor shaped like z. If it (or else ``module.forward``) accepts ``context`` by name, it is given the context of
            a conditional model. Floating-point tensors have the precision of the module's parameters, and all are on their device. For steps from 0, images, and
            small batches, write for instance
            ``lambda unet, z, n: torch.cat([unet(a.view(-1, 1, 28, 28), b - 1).flatten(1) for a, b in zip(z.split(64), n.split(64))])``.

    Returns:
        The network ``network(z, n)``, whose predictions have the dtype of ``z``, float32 or float64.

    Raises:
        TypeError: If ``module`` is not a ``torch.nn.Module``, or ``apply`` is not callable.
        ValueError: If the module is in training mode, with dropout and batch statistics: use ``module.eval()``.
        NotImplementedError: Where a derivative of the network is asked for.

    Example:
        >>> import jax, numpy as np, probdiff, torch
        >>> network = probdiff.networks.from_torch(torch.nn.Linear(2, 2).eval(), lambda linear, z, n: linear(z) / n[:, None])
        >>> model = probdiff.Diffusion(probdiff.cosine_schedule(10), network, dim=2)
        >>> probdiff.elbo_terms(model, np.ones((3, 2), np.float32), key=jax.random.key(0)).step_kl.shape
        (1, 9, 3)
    """
    torch = sys.modules.get("torch")  # without an import of torch there is no module of it
    own = torch is not None and isinstance(module, torch.nn.Module)
    require(own, "module", "a torch.nn.Module", type(module).__name__, TypeError)
    require(apply is None or callable(apply), "apply", "a callable apply(module, z, n)", type(apply).__name__, TypeError)
    require(not module.training, "module", "one in evaluation mode, module.eval()", "training mode")
    assert torch is not None

    def place() -> dict[str, Any]:
        """The device and the precision of the module's floating-point numbers."""
        numbers = itertools.chain(module.parameters(), module.buffers())
        return next(({"device": each.device, "dtype": each.dtype} for each in numbers if each.is_floating_point()), {})

    def tensor(array: np.ndarray, place: dict[str, Any]) -> Any:
        value = torch.from_numpy(np.array(array))  # a copy, as the module may write to it
        return value.to(**place) if value.is_floating_point() else value.to(place.get("device"), torch.int64)

    call = module if apply is None else functools.partial(apply, module)

    @functools.wraps(module.forward if apply is None else call)
    def function(z: np.ndarray, n: np.ndarray, **context: PyTree) -> np.ndarray:
        with torch.no_grad():
            z, n, context = jax.tree.map(functools.partial(tensor, place=place()), (z, n, context))
            output = call(z, n, **context).cpu()
            return (output.float() if output.dtype == torch.bfloat16 else output).numpy()

    return HostNetwork(function)
