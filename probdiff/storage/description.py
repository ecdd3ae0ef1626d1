"""Descriptions of the parts of a model in JSON, and the parts made from such descriptions."""

from collections.abc import Callable
from typing import Any

import jax

from probdiff._checks import require
from probdiff.chain.learned import LearnedSchedule
from probdiff.chain.mixture import MixtureKernel
from probdiff.diffusion import Diffusion
from probdiff.likelihoods import (
    AbstractLikelihood,
    CategoricalLikelihood,
    ColumnLikelihood,
    DiscretizedNormalLikelihood,
    NormalLikelihood,
)
from probdiff.networks.base import takes
from probdiff.networks.context import ContextDropout, Embedding
from probdiff.networks.convnet import ConvNet
from probdiff.networks.heads import ClipHead, DensityHead, VarianceHead, VHead, X0Head
from probdiff.networks.level_heads import CategoricalHead, ColumnHead, LevelMixtureHead
from probdiff.networks.mlp import MLP
from probdiff.networks.unet import UNet

_HEADS = (X0Head, VHead, DensityHead, ClipHead, VarianceHead, CategoricalHead, LevelMixtureHead, ColumnHead)
_KINDS = (MLP, ConvNet, UNet, *_HEADS, Embedding, ContextDropout)
NETWORKS: dict[str, Callable[..., Any]] = {kind.__name__: kind for kind in _KINDS}
LIKELIHOODS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind for kind in (NormalLikelihood, DiscretizedNormalLikelihood, CategoricalLikelihood, ColumnLikelihood)
}
REMEDY = ": Python code is needed to make it, probdiff.open_run(path, like=…)"


def describe(diffusion: Diffusion) -> dict[str, Any]:
    """The description of a model for JSON; the variances of the schedule and the parameters are stored separately."""
    kernel, schedule = diffusion.kernel, diffusion.schedule
    kept: dict[str, Any] = {"reverse_variance": kernel.name}
    if isinstance(kernel, MixtureKernel):
        kept = {"mixture_levels": kernel.levels}
    if isinstance(schedule, LearnedSchedule):
        kept["schedule"] = schedule.arguments
    return kept | {
        "network": _describe_network(diffusion.network),
        "likelihood": describe_likelihood(diffusion.likelihood),
        "num_steps": diffusion.schedule.num_steps,
        "dim": diffusion.dim,
    }


def _describe_network(network: Any) -> dict[str, Any]:
    """The class of a network and its arguments, of which one may be a network; None for arguments that are not known."""
    name = type(network).__name__
    if NETWORKS.get(name) is not type(network):
        return {"name": name, "arguments": None}
    arguments = {k: v if k != "likelihood" else describe_likelihood(v) for k, v in network.arguments.items()}
    return {"name": name, "arguments": {k: _describe_network(v) if callable(v) else v for k, v in arguments.items()}}


def describe_likelihood(likelihood: AbstractLikelihood) -> dict[str, Any]:
    """The class of a likelihood and its arguments; None for arguments that are not known."""
    name = type(likelihood).__name__
    if LIKELIHOODS.get(name) is not type(likelihood):
        return {"name": name, "arguments": None}
    assert isinstance(likelihood, NormalLikelihood | DiscretizedNormalLikelihood | CategoricalLikelihood | ColumnLikelihood)
    arguments = likelihood.arguments
    if isinstance(likelihood, ColumnLikelihood):
        parts = [[keys, describe_likelihood(part)] for keys, part in arguments["parts"].items()]
        arguments = arguments | {"parts": parts}
    return {"name": name, "arguments": arguments}


def make_likelihood(description: dict[str, Any]) -> AbstractLikelihood:
    """The likelihood of a description.

    Raises:
        ValueError: If it is not one of probdiff's own.
    """
    name, arguments = description["name"], description["arguments"]
    known, got = name in LIKELIHOODS and arguments is not None, f"nothing, for a run with the custom likelihood {name}{REMEDY}"
    require(known, "like", "a Diffusion of the run's structure", got)
    if "parts" in arguments:
        arguments = arguments | {"parts": {tuple(keys): make_likelihood(part) for keys, part in arguments["parts"]}}
    return LIKELIHOODS[name](**arguments)


def make_network(description: dict[str, Any], key: jax.Array) -> Callable[..., Any]:
    """The network of a description, with initial weights.

    Raises:
        ValueError: If it is not one of probdiff's own.
    """
    name, arguments = description["name"], description["arguments"]
    known, got = name in NETWORKS and arguments is not None, f"nothing, for a run with the custom network {name}{REMEDY}"
    require(known, "like", "a network or a Diffusion of the run's structure", got)
    if "likelihood" in arguments:
        arguments = arguments | {"likelihood": make_likelihood(arguments["likelihood"])}
    if "network" in arguments:
        arguments = arguments | {"network": make_network(arguments["network"], key)}
    return NETWORKS[name](**arguments, **({"key": key} if takes(NETWORKS[name], "key") else {}))
