"""What a fitted model is told about: agreement, comparisons, the gap, DataTrees and figures."""
