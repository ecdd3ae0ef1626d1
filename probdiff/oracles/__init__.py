"""Cases that are known exactly: distributions, their exact ε-networks, and the bound of a linear-Gaussian chain.

The programs and the estimators are tested against them. The package imports the chain, the likelihoods and the interface of networks, but no program and no
estimator.
"""

from probdiff.oracles.closed_form import exact_log_prob, exact_moments, exact_terms
from probdiff.oracles.distributions import GaussianMixture, GaussianOracle, UniformBoxes
from probdiff.oracles.networks import BoxesNetwork, ConditionalLinearNetwork, LinearNetwork, MixtureNetwork

__all__ = [
    "BoxesNetwork",
    "GaussianMixture",
    "GaussianOracle",
    "ConditionalLinearNetwork",
    "LinearNetwork",
    "MixtureNetwork",
    "UniformBoxes",
    "exact_log_prob",
    "exact_moments",
    "exact_terms",
]
