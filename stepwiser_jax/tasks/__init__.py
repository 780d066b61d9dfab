"""The embedded task, whose problems are generated on the spot, and checks of answers."""
