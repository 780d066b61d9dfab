"""Searching for a solution with a judge."""
