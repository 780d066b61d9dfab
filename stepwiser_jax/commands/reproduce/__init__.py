"""`stepwiser reproduce`: the comparison of judges on the embedded task."""
