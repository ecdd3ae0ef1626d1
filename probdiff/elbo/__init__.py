"""The evidence lower bound: its terms, its estimators as objectives for ``SVI``, and importance-weighted bounds.

The package imports the diffusion and its parts; diagnostics, training and samplers import this package.
"""

from probdiff.elbo.analytic import AnalyticELBO
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.estimators import ESTIMATORS
from probdiff.elbo.importance import Sandwich, iwae, pareto_khat, path_elbo, sandwich
from probdiff.elbo.random_steps import DataSetELBO, data_set_elbo
from probdiff.elbo.reverse_variance import optimal_variance
from probdiff.elbo.sampled_terms import AbstractTerm
from probdiff.elbo.score_matching import ScoreMatching, likelihood_weights
from probdiff.elbo.steps import AbstractSteps
from probdiff.elbo.terms import ELBOMoments, ELBOTerms, Moments, bits_per_dim, elbo_terms
from probdiff.elbo.variance_reduction import AbstractControl, AbstractNoise

__all__ = [
    "ESTIMATORS",
    "AbstractControl",
    "AbstractNoise",
    "AbstractSteps",
    "AbstractTerm",
    "AnalyticELBO",
    "DataSetELBO",
    "ELBOMoments",
    "ELBOTerms",
    "Estimate",
    "Moments",
    "Sandwich",
    "ScoreMatching",
    "bits_per_dim",
    "data_set_elbo",
    "elbo_terms",
    "iwae",
    "likelihood_weights",
    "optimal_variance",
    "pareto_khat",
    "path_elbo",
    "sandwich",
]
