"""Likelihoods p(x | z_1): from the last reverse step to the data in the user's units. The package imports no other part of a model."""

from probdiff.likelihoods.base import AbstractLikelihood
from probdiff.likelihoods.categorical import CategoricalLikelihood, Categories
from probdiff.likelihoods.columns import ColumnLikelihood, Columns
from probdiff.likelihoods.discretized import DiscretizedNormal, DiscretizedNormalLikelihood
from probdiff.likelihoods.normal import NormalLikelihood

__all__ = [
    "AbstractLikelihood",
    "Categories",
    "CategoricalLikelihood",
    "ColumnLikelihood",
    "Columns",
    "DiscretizedNormal",
    "DiscretizedNormalLikelihood",
    "NormalLikelihood",
]
