"""The run directory and what a run says of itself."""
