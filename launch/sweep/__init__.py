"""Searches over configs: space, plan, trials, early stopping, results and their picture."""
