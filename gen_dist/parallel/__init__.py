"""Processes that train together. Only this package uses torch.distributed and Accelerate."""
