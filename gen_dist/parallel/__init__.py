"""Processes that train together. The only room that knows torch.distributed and Accelerate."""
