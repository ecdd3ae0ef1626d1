"""The two Markov chains: noise schedules, the forward chain in closed form, the reverse kernels and their variances, noise and score.

A reverse kernel is given the prediction of a network; only :func:`probdiff.chain.score.score` evaluates one, that of a given Diffusion.
Of the parts of a model the package imports only the likelihoods.
"""

from probdiff.chain import score
from probdiff.chain.conventions import (
    diffusers_schedule,
    edm_schedule,
    improved_diffusion_schedule,
    vdm_schedule,
)
from probdiff.chain.forward import forward_marginal, forward_posterior, forward_step, prior_kl
from probdiff.chain.learned import LearnedSchedule
from probdiff.chain.mixture import MixtureKernel
from probdiff.chain.named_schedules import cosine_schedule, geometric_schedule, linear_schedule, log_snr_schedule
from probdiff.chain.predicted import PredictedVarianceKernel
from probdiff.chain.reverse import AbstractKernel, GaussianKernel
from probdiff.chain.schedules import AbstractSchedule, NoiseSchedule, ScheduleTables
from probdiff.chain.variances import AbstractReverseVariance

__all__ = [
    "AbstractKernel",
    "AbstractReverseVariance",
    "AbstractSchedule",
    "GaussianKernel",
    "LearnedSchedule",
    "MixtureKernel",
    "NoiseSchedule",
    "PredictedVarianceKernel",
    "ScheduleTables",
    "cosine_schedule",
    "diffusers_schedule",
    "edm_schedule",
    "forward_marginal",
    "forward_posterior",
    "forward_step",
    "geometric_schedule",
    "improved_diffusion_schedule",
    "linear_schedule",
    "log_snr_schedule",
    "prior_kl",
    "score",
    "vdm_schedule",
]
