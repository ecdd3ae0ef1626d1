"""Distributions whose every quantity is known."""

from probdiff.oracles.distributions import GaussianMixture, GaussianOracle, UniformBoxes, exact_log_prob, exact_terms
