"""The moving average of a run's weights. Pictures and test metrics use it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from gen_dist.config import TrainConfig
from gen_dist.objectives import Objective
from gen_dist.parallel.gradients import in_buckets
from gen_dist.parallel.own_part import Chunks, make_dense
from gen_dist.parallel.processes import Processes


def choose_average(newest: Objective, config: TrainConfig, processes: Processes) -> MovingAverage | None:
    """Begin the average that a config asks for; None if it asks for none."""
    if not config.keeps_average:
        return None
    splits = config.split_state and processes.world_size > 1
    return SplitAverage(newest, processes) if splits else MovingAverage(newest)


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
            if not self._moved:  # a process may have no part of a small network
                return
            if isinstance(newest_weight, Tensor):
                differences = list(torch._foreach_sub(self._followed, self._moved))
                torch._foreach_mul_(differences, newest_weight)
                torch._foreach_add_(self._moved, differences)
            else:
                torch._foreach_lerp_(self._moved, self._followed, newest_weight)

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which the averaged objective has all its weights. A collective call."""
        return contextlib.nullcontext()


class SplitAverage(MovingAverage):
    """An average of which each process keeps, and moves, its part of the weights alone, with the bits of a whole one.

    Outside of `whole` the averaged objective has empty weights. Statistics of batch normalization are small, and whole
    in every process.
    """

    def __init__(self, newest: Objective, processes: Processes) -> None:
        super().__init__(newest)
        weights = list(self.objective.networks.parameters())
        make_dense([*weights, *newest.networks.parameters()])  # both alike: a copy keeps strides
        place = {parameter: index for index, parameter in enumerate(weights)}
        self._groups = in_buckets(weights, None)
        self._chunks = [Chunks(group, processes.rank, processes.world_size) for group in self._groups]
        self._newest = [[self._followed[place[parameter]] for parameter in group] for group in self._groups]
        self._pieces = [
            [piece.clone() for piece in chunks.of(group)]
            for chunks, group in zip(self._chunks, self._groups, strict=True)
        ]
        self._statistics = self._followed[len(weights) :]
        self._moved = [piece for pieces in self._pieces for piece in pieces] + self._moved[len(weights) :]
        self._whole = 0
        """Number of contexts of `whole` that are open."""
        self._release()

    def move(self, newest_weight: float | Tensor) -> None:
        """See MovingAverage. The newest weights may have moved to other memory, so their pieces are taken anew."""
        newest = [chunks.of(group) for chunks, group in zip(self._chunks, self._newest, strict=True)]
        self._followed = [piece for pieces in newest for piece in pieces] + self._statistics
        super().move(newest_weight)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """See MovingAverage. Values that the weights get within it are kept."""
        if not self._whole:
            self._gather()  # not within `try`: there is nothing to keep if a process is lost meanwhile
        self._whole += 1
        try:
            yield
        finally:
            self._whole -= 1
            if not self._whole:
                for group, chunks, pieces in zip(self._groups, self._chunks, self._pieces, strict=True):
                    for piece, value in zip(pieces, chunks.of(group), strict=True):
                        piece.copy_(value)
                self._release()

    def _gather(self) -> None:
        for group, chunks, pieces in zip(self._groups, self._chunks, self._pieces, strict=True):
            for parameter, view in zip(group, chunks.gathered(pieces), strict=True):
                parameter.data = view

    def _release(self) -> None:
        for parameter in self.objective.networks.parameters():
            parameter.data = parameter.data.new_empty(0)
