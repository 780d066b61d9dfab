"""Sampling from a model: the engine, its reference, the draw of a token, a remote server."""
