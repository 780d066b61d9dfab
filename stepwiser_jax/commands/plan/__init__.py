"""`stepwiser plan`: what a run needs on a TPU slice."""
