"""The devices of JAX: options of the compiler, and several devices, of one process or of many, among which the data axis is divided.

The computation on several devices is the program of one, which XLA's partitioner divides along the data; everything else is replicated. An element of random
noise depends only on the key and on its position in the array, so that the noise does not depend on the number of devices, and results differ by rounding only.
Processes are those of JAX (``jax.distributed.initialize``); all of them make the same calls with the same arguments.
"""

import os
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from probdiff._checks import AnyArray, Whole, require

AXIS = "data"

Devices = Whole | Sequence[jax.Device] | None

# XLA on CPU: level 2, not 3, takes about 0.7 of the time to compile a program that is about 4 % slower; vectors of 512 bits, not 256, where the machine has them,
# make up for that (docs/results/benchmark.md). Results are the same up to rounding.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 2, "xla_cpu_prefer_vector_width": 512}


def compiler_options() -> dict[str, int]:
    """Options for ``jax.jit``, or ``compile``, of a large program that is not part of another; those in ``XLA_FLAGS`` are kept."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in COMPILER_OPTIONS.items() if name not in flags}


def set_compiler_options() -> None:
    """Set the options for all programs of this process; XLA reads ``XLA_FLAGS`` when the first array is made."""
    added = [f"--{name}={value}" for name, value in compiler_options().items()]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *added]).strip()


def data_mesh(devices: Devices) -> Mesh | None:
    """A mesh of one axis for the data.

    Args:
        devices: Number of devices, out of those that JAX has; or JAX devices; None for JAX's default device and no mesh.

    Raises:
        ValueError: If JAX has fewer devices; TypeError if the argument is neither a number nor a list of devices.
    """
    if devices is None:
        return None
    if isinstance(devices, int | np.integer) and not isinstance(devices, bool):
        there = jax.devices()
        require(1 <= devices <= len(there), "devices", f"1 to {len(there)}, the devices that JAX has", devices)
        devices = there[: int(devices)]
    good = isinstance(devices, Sequence) and len(devices) > 0 and all(isinstance(each, jax.Device) for each in devices)
    require(good, "devices", "a number of devices, or a list of JAX devices", repr(devices), TypeError)
    assert isinstance(devices, Sequence)
    require(len(set(devices)) == len(devices), "devices", "different devices", devices)
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicate[T](tree: T, mesh: Mesh | None) -> T:
    """The arrays of a tree on every device of the mesh."""
    if mesh is None:
        return tree
    arrays, rest = eqx.partition(tree, eqx.is_array)
    everywhere = NamedSharding(mesh, PartitionSpec())
    if everywhere.is_fully_addressable:
        return eqx.combine(jax.device_put(arrays, everywhere), rest)
    return eqx.combine(jax.tree.map(lambda array: _from_each_process(array, everywhere), arrays), rest)


def _from_each_process(array: Shaped[AnyArray, "*shape"], sharding: NamedSharding) -> Shaped[Array, "*shape"]:
    """An array that every process holds, placed on the devices of all processes."""
    if _is_key(array):
        return jax.random.wrap_key_data(
            _from_each_process(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array)
        )
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _is_key(array: AnyArray) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def to_default_device[T](tree: T, mesh: Mesh | None) -> T:
    """The arrays of a tree that are replicated on the mesh, on JAX's default device of each process."""
    if mesh is None:
        return tree
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.tree.map(_to_default_device, arrays), rest)


def _to_default_device(array: Shaped[AnyArray, "*shape"]) -> Shaped[AnyArray, "*shape"]:
    if not isinstance(array, jax.Array):
        return array
    own = array.addressable_data(0)
    if _is_key(own):
        return jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(own))), impl=jax.random.key_impl(own))
    return jnp.asarray(np.asarray(own))


def shard[T](tree: T, mesh: Mesh | None) -> T:
    """In a compiled function: the arrays of a tree cut along their first axis, a part for each device."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(AXIS)))


def gather[T](tree: T, mesh: Mesh | None) -> T:
    """In a compiled function: the arrays of a tree put together again on every device."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def wait_for_all(name: str) -> None:
    """Wait until every process has reached this call."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)
