"""Fitted diffusions inside other programs: as the likelihood of a context, and as a prior.

Imports the bound and the packages below it.
"""

from probdiff.inference.likelihood import ConditionalBound, ConditionalEstimate
from probdiff.inference.missing import ObservedLogProb, observed_log_prob
from probdiff.inference.observations import AbstractObservation, Inpainting, LinearGaussian, Program
from probdiff.inference.particles import log_evidence, smc
from probdiff.inference.posterior import Posterior
from probdiff.inference.priors import ChainPrior, FlowPrior
from probdiff.inference.pseudo_marginal import PseudoMarginal
from probdiff.inference.twists import AbstractTwist, DiagonalTwist, NoTwist, PointTwist, TweedieTwist
from probdiff.inference.two_sided import EvidenceBounds, evidence_bounds

__all__ = [
    "AbstractObservation",
    "AbstractTwist",
    "ChainPrior",
    "ConditionalBound",
    "ConditionalEstimate",
    "DiagonalTwist",
    "EvidenceBounds",
    "FlowPrior",
    "Inpainting",
    "LinearGaussian",
    "NoTwist",
    "ObservedLogProb",
    "PointTwist",
    "Posterior",
    "Program",
    "PseudoMarginal",
    "TweedieTwist",
    "evidence_bounds",
    "log_evidence",
    "observed_log_prob",
    "smc",
]
