"""Denoising diffusion models as pairs of NumPyro programs, with the bound computed two ways."""

from probdiff import datasets, oracles
from probdiff.bounds import iwae, pareto_khat, path_elbo, sandwich
from probdiff.checkpoint import Checkpoint
from probdiff.comparison import compare_estimators
from probdiff.convolutions import ConvNet
from probdiff.elbo import ELBOMoments, ELBOTerms, bits_per_dim, elbo_terms
from probdiff.estimators import ESTIMATORS
from probdiff.export import to_datatree
from probdiff.flow import flow_likelihood, flow_log_prob
from probdiff.gaussians import forward_marginal, forward_posterior, forward_step
from probdiff.heads import CategoricalHead, DensityHead, VHead, X0Head
from probdiff.kernels import GaussianKernel
from probdiff.learned_schedules import LearnedSchedule
from probdiff.ledger import ledger
from probdiff.likelihoods import DiscretizedNormalLikelihood, NormalLikelihood
from probdiff.mixture_kernel import MixtureKernel
from probdiff.networks import MLP, Ensemble
from probdiff.objective import AnalyticELBO
from probdiff.optimal import optimal_variance
from probdiff.parallel import ForwardChain, ParallelPrograms, PosteriorChain, ReverseChain
from probdiff.programs import Diffusion
from probdiff.ranking import compare_models
from probdiff.runs import create_run, open_run
from probdiff.sampling import SAMPLERS, ancestral, annealed_langevin, ddim, probability_flow
from probdiff.schedules import (
    NoiseSchedule,
    cosine_schedule,
    geometric_schedule,
    linear_schedule,
    log_snr_schedule,
)
from probdiff.score import (
    conditional_score,
    eps_from_score,
    eps_from_vp_score,
    noising,
    score,
    score_from_eps,
    ve_from_vp,
    vp_conditional_score,
    vp_from_ve,
    vp_score_from_eps,
)
from probdiff.score_matching import ScoreMatching, likelihood_weights
from probdiff.training import fit
from probdiff.two_ways import TwoWays, compute_both_ways
