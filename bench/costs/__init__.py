"""Costs of the parts of a step, a run and an evaluation."""
