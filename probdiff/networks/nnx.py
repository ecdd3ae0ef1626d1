"""Modules of Flax NNX, which are networks without an adapter, if a call does not change their state. Flax is not imported here."""

import sys
from typing import Any

import jax

from probdiff._checks import require
from probdiff.networks.base import Network

SPLIT = (
    "graphdef, params, rest = nnx.split(module, nnx.Param, ...) and probdiff.networks.from_apply("
    "lambda params, z, n: nnx.merge(graphdef, params, rest, copy=True)(z, n), params)"
)
WITH_DROPOUT = (
    "give from_apply a function apply(params, z, n, *, key=None) that calls module = nnx.merge(graphdef, params, rest, copy=True), "
    "after nnx.reseed(module, default=key), or module.eval() if key is None"
)


def require_pure(network: Network) -> None:
    """Refuse a network with a module of Flax NNX whose state changes in a call or must not be trained.

    Raises:
        ValueError: If there is dropout that is not switched off, or a variable that is neither an ``nnx.Param`` nor the state of a random generator,
            such as the statistics of a batch normalisation.
    """
    nnx = sys.modules.get("flax.nnx")  # without an import of Flax NNX there is no module of it
    if nnx is None:
        return

    def drops(node: Any) -> bool:
        rate = getattr(node, "rate", getattr(node, "dropout_rate", 0.0))
        return isinstance(node, nnx.Module) and getattr(node, "deterministic", True) is False and rate > 0

    def found(is_leaf: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(network, is_leaf=is_leaf)
        return {f"{type(leaf).__name__} at network{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves if is_leaf(leaf)}

    for name in found(drops):
        require(False, "network", "a module of Flax NNX without dropout", f"{name}: module.eval() switches it off; to train with it, {WITH_DROPOUT}")
    for name, variable in found(lambda node: isinstance(node, nnx.Variable)).items():
        known = isinstance(variable, nnx.Param | nnx.RngState)
        require(known, "network", "a module of Flax NNX that has nnx.Param alone", f"{name}: {SPLIT} keeps it constant")
