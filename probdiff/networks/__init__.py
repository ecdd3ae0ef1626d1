"""Networks, and heads that convert the prediction of a network to noise.

A network is any callable ``network(z, n)``, or a module of :class:`AbstractNetwork`, ``network(z, log_snr)``, like all networks here:
they do not depend on a schedule. Modules of equinox and Flax NNX are networks without an adapter; :func:`from_apply` adapts modules of Flax linen and Haiku,
and :func:`from_torch` modules of PyTorch, for evaluation. Of the parts of a model the package imports only the likelihoods.
"""

from probdiff.networks.adapters import batched, from_apply
from probdiff.networks.base import AbstractNetwork
from probdiff.networks.context import ContextDropout, Embedding, unconditional
from probdiff.networks.conventions import from_denoiser, from_edm, from_timesteps, from_vdm
from probdiff.networks.convnet import ConvNet
from probdiff.networks.ensemble import Ensemble
from probdiff.networks.heads import AbstractHead, ClipHead, DensityHead, VarianceHead, VHead, X0Head
from probdiff.networks.host import from_torch
from probdiff.networks.level_heads import CategoricalHead, ColumnHead, LevelMixtureHead
from probdiff.networks.mlp import MLP
from probdiff.networks.unet import UNet, has_fast_bfloat16

__all__ = [
    "LevelMixtureHead",
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
    "UNet",
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
    "has_fast_bfloat16",
    "unconditional",
]
