"""Embedded tasks: problems with exactly known step truth, generated on the spot."""
