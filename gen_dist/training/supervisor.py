"""The owner of a run in processes elsewhere: it follows the run, and may start it again."""

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
    """Name of this launch, the same at every restart. A restart takes the run directory over from processes of the
    same launch that are unreachable but may be alive, and `fresh` has an effect at the first start only."""
    stop: threading.Event
    """Set in any process, it stops the run in all of them, as SIGTERM does."""
    recorded: Callable[[int, Mapping[str, float | Sequence[float]], Path | None], None]
    """Called in every process after each evaluation or checkpoint with step, metrics and checkpoint directory.
    Sample checks are among the metrics in the main process only; the directory is None in all others, and None if no
    checkpoint was written."""
    directory: Path | None = None
    """Run directory as this process sees it. None takes the config's."""
    screen: TextIO | None = None
    """Stream on which the main process shows progress. None is standard error."""
