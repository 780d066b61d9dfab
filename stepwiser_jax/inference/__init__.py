"""Samples from models: the engine and its scheduler, the chunk sampler, a remote server."""
