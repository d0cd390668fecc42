"""A function of the user's as a tracker: `gen_dist.train(config, on_log=function)`."""

from __future__ import annotations

from collections.abc import Callable

from gen_dist.records.trackers.base import RunTracker, Values


class Callback(RunTracker):
    """Calls a function with each step and a copy of its figures."""

    def __init__(self, function: Callable[[int, Values], object]) -> None:
        self._function = function

    def log(self, step: int, values: Values) -> None:
        """See RunTracker."""
        self._function(step, dict(values))
