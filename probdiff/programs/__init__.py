"""The NumPyro programs of a diffusion: model, guide and posterior guide, by a scan along the chain or parallel in its steps.

They are written for the interface :class:`~probdiff.programs.sites.AbstractDiffusion`, and import the chain.
"""

from probdiff.programs.parallel import ForwardChain, ParallelPrograms, PosteriorChain, ReverseChain
from probdiff.programs.sites import PARAMS

__all__ = ["PARAMS", "ForwardChain", "ParallelPrograms", "PosteriorChain", "ReverseChain"]
