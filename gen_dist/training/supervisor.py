"""The owner of a run in other processes: it follows the run, and may restart it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True)
class Supervisor:
    """Owner of the processes of a run, such as Ray, which restarts the run when one of them fails.

    Every process that trains has its own instance.
    """

    name: str
    """Name of this launch, the same at every restart. A restart takes over the run directory from unreachable
    processes of the same launch, which may be alive. `fresh` has an effect at the first start only."""
    stop: threading.Event
    """Event that stops the run in all processes when it is set in any, as SIGTERM does."""
    recorded: Callable[[int, Mapping[str, float | Sequence[float]], Path | None], None]
    """Callback in every process after each evaluation or checkpoint, with step, metrics and checkpoint directory.
    Only the main process has sample checks among the metrics, and a directory. The directory is None if no checkpoint
    was written."""
    directory: Path | None = None
    """Path of the run directory in this process. None takes the config's."""
    screen: TextIO | None = None
    """Stream for the progress of the main process. None is standard error."""
