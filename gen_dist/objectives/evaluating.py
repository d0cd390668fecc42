"""Eval mode of an objective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from gen_dist.objectives.base import Objective


@contextlib.contextmanager
def evaluating(objective: Objective) -> Iterator[Objective]:
    """Context manager that puts an objective into eval mode, without autograd."""
    was_training = objective.training
    objective.eval()
    try:
        with torch.no_grad():
            yield objective
    finally:
        objective.train(was_training)
