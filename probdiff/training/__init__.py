"""Fitting a diffusion by SVI, and the optimiser that it takes by default.

Imports the bound and what it stands on; it knows no files.
"""

from probdiff.training.fitting import CheckpointLike, Fit, fit
from probdiff.training.loop import FitState
from probdiff.training.optimiser import EMAState, orthogonalised_convolutions, parameter_ema

__all__ = ["CheckpointLike", "EMAState", "Fit", "FitState", "fit", "orthogonalised_convolutions", "parameter_ema"]
