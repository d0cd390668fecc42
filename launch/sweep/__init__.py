"""A search over configs: the space, the plan, its trials, early stopping, results and their picture."""
