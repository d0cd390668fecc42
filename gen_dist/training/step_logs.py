"""Logs of training steps, from tensors on the device to means over the steps between two lines of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from gen_dist.training.trainer import Trainer

Row = dict[str, float | list[float]]
"""Logs of one step: scalars, and histograms of discriminator scores."""


class StepLogs:
    """Logs of the steps since the last line of metrics.jsonl.

    They stay on the device until they are needed: reading one makes the host wait for the step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._on_device: list[dict[str, Tensor]] = []
        self.unlogged: list[Row] = []
        """Rows on the host that no line of metrics.jsonl contains yet. Checkpoints keep them."""

    def add(self, logs: dict[str, Tensor]) -> None:
        """Take the logs of the next step, as `Trainer.run_step` returns them."""
        self._on_device.append(logs)

    def resume(self, rows: Sequence[Mapping[str, float | list[float]]]) -> None:
        """Take the unlogged rows of a checkpoint."""
        self.unlogged = [dict(row) for row in rows]

    def collect(self, step: int) -> str | None:
        """Bring the logs to the host, averaged over all processes. Waits for the device.

        Args:
            step: number of the last step that was added.

        Returns:
            Name, value and step of the first scalar that is NaN or infinite; None if all are finite.
        """
        rows = self._trainer.average_logs(self._on_device)
        self._on_device.clear()
        for number, row in enumerate(rows, start=step - len(rows) + 1):
            for name, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    return f"{name} is {value} at step {number}"
        self.unlogged += rows
        return None

    def means(self) -> Row:
        """Take the means of all unlogged rows: `train/NAME` for scalars, `scores/KIND` for histograms."""
        means: Row = {}
        for name in dict.fromkeys(name for row in self.unlogged for name in row):
            values = [row[name] for row in self.unlogged if name in row]
            numbers = [value for value in values if isinstance(value, float)]
            histograms = [value for value in values if isinstance(value, list)]
            if numbers:
                means[f"train/{name}"] = math.fsum(numbers) / len(numbers)
            if histograms:
                kind = name.rpartition("scores_")[2]
                means[f"scores/{kind}"] = [math.fsum(bin) / len(histograms) for bin in zip(*histograms, strict=True)]
        self.unlogged.clear()
        return means
