"""The evidence lower bound: its terms, its estimators as objectives for ``SVI``, and importance-weighted bounds.

Imports the diffusion and what it is made of; diagnostics, training and samplers stand on this.
"""

from probdiff.elbo.analytic import AnalyticELBO
from probdiff.elbo.estimate import Estimate
from probdiff.elbo.estimators import ESTIMATORS
from probdiff.elbo.importance import Sandwich, iwae, pareto_khat, path_elbo, sandwich
from probdiff.elbo.reverse_variance import optimal_variance
from probdiff.elbo.score_matching import ScoreMatching, likelihood_weights
from probdiff.elbo.terms import ELBOMoments, ELBOTerms, Moments, bits_per_dim, elbo_terms

__all__ = [
    "ESTIMATORS",
    "AnalyticELBO",
    "ELBOMoments",
    "ELBOTerms",
    "Estimate",
    "Moments",
    "Sandwich",
    "ScoreMatching",
    "bits_per_dim",
    "elbo_terms",
    "iwae",
    "likelihood_weights",
    "optimal_variance",
    "pareto_khat",
    "path_elbo",
    "sandwich",
]
