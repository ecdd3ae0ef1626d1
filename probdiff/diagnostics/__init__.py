"""Diagnostics of a fitted model: the bound computed two ways, comparisons, the decomposition of the gap, the audit of a network that was trained
elsewhere, DataTrees for ArviZ, and figures.

Imports the bound and the packages below it. ``compare_estimators`` and ``compare_models`` are modules here; the functions are
``probdiff.compare_estimators`` and ``probdiff.compare_models``.
"""

from probdiff.diagnostics.agreement import TwoWays, compute_both_ways
from probdiff.diagnostics.audit_result import Audit, Finding
from probdiff.diagnostics.classification import Classification
from probdiff.diagnostics.common_paths import CommonPaths, compare_on_common_paths
from probdiff.diagnostics.compare_models import ModelComparison
from probdiff.diagnostics.contexts import ContextDifference, compare_contexts
from probdiff.diagnostics.datatree import arviz_dims, from_datatree, inspect_terms, to_datatree
from probdiff.diagnostics.estimator_comparison import EstimatorComparison
from probdiff.diagnostics.gap import GapDecomposition, gap_decomposition

__all__ = [
    "Audit",
    "Classification",
    "CommonPaths",
    "ContextDifference",
    "EstimatorComparison",
    "Finding",
    "GapDecomposition",
    "ModelComparison",
    "TwoWays",
    "arviz_dims",
    "compare_contexts",
    "compare_on_common_paths",
    "compute_both_ways",
    "from_datatree",
    "gap_decomposition",
    "inspect_terms",
    "to_datatree",
]
