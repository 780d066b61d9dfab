"""The run directory, metrics, progress and signals of a run."""
