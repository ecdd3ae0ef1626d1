"""Networks, and heads that turn what a network predicts into noise.

A network is any callable ``network(z, n)``, or a module of :class:`AbstractNetwork`, ``network(z, log_snr)``, as all that are here:
they know no schedule. Imports only the likelihoods and the checks.
"""

from probdiff.networks.adapters import batched
from probdiff.networks.base import AbstractNetwork
from probdiff.networks.context import ContextDropout, Embedding, unconditional
from probdiff.networks.conventions import from_denoiser, from_edm, from_timesteps, from_vdm
from probdiff.networks.convnet import ConvNet
from probdiff.networks.ensemble import Ensemble
from probdiff.networks.heads import (
    AbstractHead,
    CategoricalHead,
    ClipHead,
    ColumnHead,
    DensityHead,
    VarianceHead,
    VHead,
    X0Head,
)
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
    "from_denoiser",
    "from_edm",
    "from_timesteps",
    "from_vdm",
    "unconditional",
]
