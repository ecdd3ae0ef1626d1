"""The NumPyro programs of a diffusion: model, guide and posterior guide, by a scan along the chain or in parallel over the steps.

The programs need only the interface :class:`~probdiff.programs.sites.AbstractDiffusion` of a model.
"""

from probdiff.programs.parallel import ForwardChain, ParallelPrograms, PosteriorChain, ReverseChain
from probdiff.programs.sites import PARAMS

__all__ = ["PARAMS", "ForwardChain", "ParallelPrograms", "PosteriorChain", "ReverseChain"]
