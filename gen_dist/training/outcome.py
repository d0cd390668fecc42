"""Outcome of a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen_dist.config import ObjectiveConfig
from gen_dist.errors import UserError
from gen_dist.records.display import brief_checks, brief_measured, short_name


class DivergenceError(UserError):
    """The loss or a weight became NaN or infinite."""

    shared = True


@dataclass(frozen=True)
class Outcome:
    """Result of `train`."""

    run_path: Path
    step: int
    finished: bool
    """True if all steps are done, False after SIGTERM, SIGINT or SIGHUP."""
    metrics: dict[str, Any]
    """Last value of each metric: a number, None if it was not finite, or a list of them."""
    pictures: dict[str, Path]
    collapses: list[str]
    """A line for each sign of a collapsed training that holds at the end."""
    is_main: bool
    """True in the one process that prints for the user."""
    objective: ObjectiveConfig
    """Has the names of the metrics."""

    def report(self, command: str) -> list[str]:
        """Format the outcome as lines for the user; `command` is the command that resumes the run."""
        if not self.finished:
            return [f"stopped at step {self.step}, everything is saved in {self.run_path}; to go on: {command}"]
        values = [
            f"{short_name(name, self.objective)} {'not finite' if value is None else f'{value:.2f}'}"
            for split, _, name in (key.partition("/") for key in self.metrics)
            if split == "test"
            for value in [self.metrics[f"test/{name}"]]
        ]
        if values:
            values = ["test", *values]
        if checks := brief_checks(self.metrics):
            values += ["samples", *checks]
        values += brief_measured({name: value for name, value in self.metrics.items() if value is not None})
        width = max(map(len, self.pictures), default=0)
        return [
            f"finished at step {self.step}: {'  '.join(values)}",
            *(f"warning: {collapse}" for collapse in self.collapses),
            *(f"  {name.replace('_', ' '):{width}}  {path}" for name, path in self.pictures.items()),
        ]
