"""Interface of trackers, their registry, and the guard that keeps their failures away from the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, UserError
from gen_dist.plugins.tables import Table
from gen_dist.records.score_bins import SCORE_EDGES

Values = Mapping[str, float | Sequence[float]]
"""Figures by name: scalars, such as `train/loss`, and heights of histograms, such as `samples/class_shares`."""


@dataclass(frozen=True)
class RunToTrack:
    """A start of a run, as a tracker sees it."""

    path: Path
    """The run directory, whose name is the run's name."""
    config: TrainConfig
    run_id: str
    """Identity of the run: the same at every start, another after `--fresh`."""
    start_step: int
    """Steps done before. What was sent of later steps is sent again: a run that was killed had got further than its
    last checkpoint."""
    note: Callable[[str], None]
    """Shows a line to the user."""


class RunTracker:
    """Base of trackers. Every method may raise any exception, after which the tracker is not called again."""

    def log(self, step: int, values: Values) -> None:
        """Send scalars and histograms by name."""

    def pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Send image files by name."""

    def finish(self, exit_code: int) -> None:
        """Send what is left, and close. An `exit_code` other than 0 marks the run as failed."""


OpenTracker = Callable[[RunToTrack], RunTracker]
"""Starts a tracker. It raises ConfigError for what a user has to change, and any other exception for a failure."""

_KINDS: Table[OpenTracker] = Table("tracker")


def register(name: str, open_tracker: OpenTracker) -> None:
    """Register a tracker under its name for `--track NAME`.

    Raises:
        ConfigError: the name is taken.
    """
    _KINDS.add(name, open_tracker)


def registered() -> dict[str, OpenTracker]:
    """The registered trackers by name."""
    return dict(_KINDS.parts)


class Guarded:
    """A tracker that cannot stop the run: at its first failure it costs one warning, and is not called again."""

    def __init__(self, name: str, open_tracker: OpenTracker, run: RunToTrack) -> None:
        """Start the tracker.

        Raises:
            ConfigError: it cannot start as configured.
        """
        self._name = name
        self._note = run.note
        self._tracker: RunTracker | None = None
        try:
            self._tracker = open_tracker(run)
        except UserError:
            raise
        except Exception as error:  # a failing service of a third party must not stop the training
            self._give_up("did not start", error)

    def log(self, step: int, values: Values) -> None:
        """See RunTracker."""
        self._call(lambda tracker: tracker.log(step, values))

    def pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """See RunTracker."""
        self._call(lambda tracker: tracker.pictures(step, pictures))

    def finish(self, exit_code: int) -> None:
        """See RunTracker. A second call does nothing."""
        self._call(lambda tracker: tracker.finish(exit_code))
        self._tracker = None

    def _call(self, function: Callable[[RunTracker], Any]) -> None:
        if self._tracker is None:
            return
        try:
            function(self._tracker)
        except Exception as error:  # see above
            self._give_up("failed", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._tracker = None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        self._note(f"warning: {self._name} {what}, the run goes on without it: {reason}")


def histogram(name: str, heights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Heights of a histogram's bins, and the edges of these, one more: of scores, or one bin a class.

    Heights that are not finite count as 0. metrics.jsonl shows which were not.
    """
    finite = [height if math.isfinite(height) else 0.0 for height in heights]
    of_scores = name.startswith("scores/") and len(finite) == len(SCORE_EDGES) - 1
    return finite, list(SCORE_EDGES) if of_scores else [place - 0.5 for place in range(len(finite) + 1)]


def missing_package(tracker: str, package: str) -> ConfigError:
    """The error of a tracker whose package is not installed."""
    return ConfigError(
        f"--track {tracker} needs the package {package}; run `pip install {package}`, or leave {tracker} out"
    )
