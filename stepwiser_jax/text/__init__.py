"""Tokenizers, chat templates, prompts, chunks. Worker processes import this, so it has no jax."""
