"""Training a model: the step, the loop, batches, checkpoints."""
