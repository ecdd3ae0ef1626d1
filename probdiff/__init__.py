"""Denoising diffusion models as pairs of NumPyro programs, with the bound computed two ways."""

from probdiff import datasets, oracles
from probdiff.comparison import TwoWays, compute_both_ways
from probdiff.elbo import AnalyticELBO, ELBOMoments, ELBOTerms, bits_per_dim, elbo_terms
from probdiff.export import to_datatree
from probdiff.gaussians import forward_marginal, forward_posterior, forward_step
from probdiff.kernels import GaussianKernel
from probdiff.likelihoods import DiscretizedNormalLikelihood, NormalLikelihood
from probdiff.networks import MLP
from probdiff.programs import Diffusion
from probdiff.runs import Checkpoint, create_run, open_run
from probdiff.schedules import NoiseSchedule, cosine_schedule, linear_schedule, log_snr_schedule
from probdiff.training import fit
