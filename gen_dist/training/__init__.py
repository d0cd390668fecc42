"""From a batch to moved weights, and the loop over steps."""
