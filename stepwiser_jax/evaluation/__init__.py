"""Scores of judges on benchmarks, with confidence intervals."""
