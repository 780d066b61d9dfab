"""The network: array code, and weights in and out. Knows logical axis names, not meshes."""
