"""Searches for solutions with a judge."""
