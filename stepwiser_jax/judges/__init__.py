"""Judges of chunks, a file for each kind, from the prompt to the verdict."""
