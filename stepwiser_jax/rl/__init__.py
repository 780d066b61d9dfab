"""The method: values, labels, rewards, log-probs and the GRPO loss."""
