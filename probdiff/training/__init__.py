"""Fitting a diffusion by SVI, and the default optimiser.

Imports the bound and the packages below it; reads and writes no files.
"""

from probdiff.training.fitting import CheckpointLike, Fit, fit
from probdiff.training.loop import FitState
from probdiff.training.optimiser import EMAState, orthogonalised_convolutions, parameter_ema

__all__ = ["CheckpointLike", "EMAState", "Fit", "FitState", "fit", "orthogonalised_convolutions", "parameter_ema"]
