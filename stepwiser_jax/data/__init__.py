"""Data sets: problems, labelled steps, benchmarks, and what is held out."""
