"""Networks, and heads that turn what a network predicts into noise.

A network is any callable ``network(z, n)``, or a module of :class:`AbstractNetwork`, ``network(z, log_snr)``, as all that are here:
they know no schedule. Those of other libraries: modules of equinox and Flax NNX are networks as they are, :func:`from_apply` takes those of Flax linen and Haiku,
:func:`from_torch` those of PyTorch, for evaluation. Imports only the likelihoods and the checks.
"""

from probdiff.networks.adapters import batched, from_apply
from probdiff.networks.base import AbstractNetwork
from probdiff.networks.context import ContextDropout, Embedding, unconditional
from probdiff.networks.conventions import from_denoiser, from_edm, from_timesteps, from_vdm
from probdiff.networks.convnet import ConvNet
from probdiff.networks.ensemble import Ensemble
from probdiff.networks.heads import AbstractHead, ClipHead, DensityHead, VarianceHead, VHead, X0Head
from probdiff.networks.host import from_torch
from probdiff.networks.level_heads import CategoricalHead, ColumnHead
from probdiff.networks.mlp import MLP

__all__ = [
    "MLP",
    "AbstractHead",
    "AbstractNetwork",
    "CategoricalHead",
    "ClipHead",
    "ColumnHead",
    "ContextDropout",
    "ConvNet",
    "DensityHead",
    "Embedding",
    "Ensemble",
    "VHead",
    "VarianceHead",
    "X0Head",
    "batched",
    "from_apply",
    "from_denoiser",
    "from_edm",
    "from_timesteps",
    "from_torch",
    "from_vdm",
    "unconditional",
]
