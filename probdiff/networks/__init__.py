"""Networks, and heads that turn what a network predicts into noise.

A network is any callable ``network(z, n)``; those here are equinox modules. They look up the log-SNR of a step in a schedule, so the
chain is imported here, and nothing else but the checks.
"""

from probdiff.networks.convnet import ConvNet
from probdiff.networks.ensemble import Ensemble
from probdiff.networks.heads import CategoricalHead, DensityHead, VHead, X0Head
from probdiff.networks.mlp import MLP

__all__ = ["MLP", "CategoricalHead", "ConvNet", "DensityHead", "Ensemble", "VHead", "X0Head"]
