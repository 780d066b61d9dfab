"""Samples from models: the engine and its scheduler, the reference sampler, a remote server."""
