"""The training step, from a batch to updated weights, and the training loop."""
