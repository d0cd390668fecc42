"""The moving average of a run's weights. Pictures and test metrics use it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from gen_dist.objectives import Objective


class MovingAverage:
    """A copy of an objective with averaged weights.

    Averaged weights give other activations than the newest ones, so the statistics of batch normalization are averaged
    as well. Other buffers are copied: an average of singular vectors of a spectral norm has no meaning.
    """

    def __init__(self, newest: Objective) -> None:
        """Begin at the newest weights. Their tensors may get new values and memory, but must stay the same objects."""
        self.objective = copy.deepcopy(newest).requires_grad_(False).eval()
        """The averaged objective: float32 weights without gradients, in eval mode."""
        self._moved: list[Tensor] = list(self.objective.networks.parameters())
        self._followed: list[Tensor] = list(newest.networks.parameters())
        self._copied: list[Tensor] = []
        self._copied_from: list[Tensor] = []
        for (name, buffer), new in zip(self.objective.networks.named_buffers(), newest.networks.buffers(), strict=True):
            is_statistic = name.endswith(("running_mean", "running_var"))
            (self._moved if is_statistic else self._copied).append(buffer)
            (self._followed if is_statistic else self._copied_from).append(new)

    def move(self, newest_weight: float | Tensor) -> None:
        """Update the average: average += newest_weight * (newest - average)."""
        with torch.no_grad():
            if self._copied:
                torch._foreach_copy_(self._copied, self._copied_from)
            if isinstance(newest_weight, Tensor):
                differences = list(torch._foreach_sub(self._followed, self._moved))
                torch._foreach_mul_(differences, newest_weight)
                torch._foreach_add_(self._moved, differences)
            else:
                torch._foreach_lerp_(self._moved, self._followed, newest_weight)
