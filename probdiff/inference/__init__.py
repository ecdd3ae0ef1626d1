"""Fitted diffusions in programs of one's own: as the likelihood of a context.

Imports the bound and what it stands on.
"""

from probdiff.inference.likelihood import ConditionalBound, ConditionalEstimate
from probdiff.inference.pseudo_marginal import PseudoMarginal

__all__ = ["ConditionalBound", "ConditionalEstimate", "PseudoMarginal"]
