"""The evidence lower bound and its estimators."""
