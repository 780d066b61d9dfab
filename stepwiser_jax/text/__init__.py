"""Text in and out of the models. Pure Python and numpy: worker processes import it without jax."""
