"""Scores of judges, and how sure they are."""
