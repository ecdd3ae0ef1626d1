"""Denoising diffusion models as pairs of NumPyro programs, with the bound computed two ways."""

from probdiff import datasets, oracles
from probdiff.chain.forward import forward_marginal, forward_posterior, forward_step
from probdiff.chain.reverse import GaussianKernel, MixtureKernel
from probdiff.chain.schedules import (
    LearnedSchedule,
    NoiseSchedule,
    cosine_schedule,
    geometric_schedule,
    linear_schedule,
    log_snr_schedule,
)
from probdiff.chain.score import (
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
from probdiff.diagnostics.agreement import TwoWays, compute_both_ways
from probdiff.diagnostics.compare_estimators import compare_estimators
from probdiff.diagnostics.compare_models import compare_models
from probdiff.diagnostics.datatree import to_datatree
from probdiff.diagnostics.gap import gap_decomposition
from probdiff.diffusion import Diffusion
from probdiff.elbo.analytic import AnalyticELBO
from probdiff.elbo.estimators import ESTIMATORS
from probdiff.elbo.importance import iwae, pareto_khat, path_elbo, sandwich
from probdiff.elbo.reverse_variance import optimal_variance
from probdiff.elbo.score_matching import ScoreMatching, likelihood_weights
from probdiff.elbo.terms import ELBOMoments, ELBOTerms, bits_per_dim, elbo_terms
from probdiff.flow import flow_likelihood, flow_log_prob
from probdiff.likelihoods import DiscretizedNormalLikelihood, NormalLikelihood
from probdiff.networks.convnet import ConvNet
from probdiff.networks.ensemble import Ensemble
from probdiff.networks.heads import CategoricalHead, DensityHead, VHead, X0Head
from probdiff.networks.mlp import MLP
from probdiff.programs.parallel import ForwardChain, ParallelPrograms, PosteriorChain, ReverseChain
from probdiff.samplers import SAMPLERS, ancestral, annealed_langevin, ddim, probability_flow
from probdiff.storage.checkpoint import Checkpoint
from probdiff.storage.run import create_run, open_run
from probdiff.training import fit
