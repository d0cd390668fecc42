"""An objective in eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from gen_dist.objectives.base import Objective


@contextlib.contextmanager
def evaluating(objective: Objective) -> Iterator[Objective]:
    """Within it, the objective is in eval mode and draws no graph."""
    was_training = objective.training
    objective.eval()
    try:
        with torch.no_grad():
            yield objective
    finally:
        objective.train(was_training)
