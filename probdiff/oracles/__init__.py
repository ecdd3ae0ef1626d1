"""Cases in which everything is known: distributions, their exact ε-networks, and the bound of a linear-Gaussian chain.

What the programs and the estimators are held against. Imports the chain and the likelihoods, and nothing that it is to judge.
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
