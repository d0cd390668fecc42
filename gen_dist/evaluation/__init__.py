"""Evaluation of trained models: one set of metrics for VAEs and GANs."""
