"""Where workers and Ray's controller leave word for the command that started them, and it for them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train import UserCallback


class Desk:
    """Where workers and Ray's controller leave word for the command that started them, and it for them."""

    def __init__(self) -> None:
        self._text = ""
        self._refusal: str | None = None
        self._failures = 0
        self._wants_stop = False
        self._running = False

    def started(self) -> None:
        """Workers are at work."""
        self._running = True

    def show(self, text: str) -> None:
        """Text for the command's standard error."""
        self._text += text

    def refuse(self, reason: str) -> None:
        """An error that another try would not mend."""
        self._refusal = self._refusal or reason

    def failed(self, text: str) -> None:
        """Workers failed."""
        self._running = False
        self._failures += 1
        self.show(text)

    def got_on(self) -> None:
        """The run got on since workers last failed."""
        self._failures = 0

    def news(self) -> tuple[str, str | None, int, bool]:
        """Text since the last call, why the run is refused, failures since it got on, and whether workers run."""
        text, self._text = self._text, ""
        return text, self._refusal, self._failures, self._running

    def ask_to_stop(self) -> None:
        """Have the run save and stop."""
        self._wants_stop = True

    def wants_stop(self) -> bool:
        """Whether the run is to save and stop."""
        return self._wants_stop


class DeskScreen(io.StringIO):
    """The command's terminal, as a stream in the main worker."""

    def __init__(self, desk: Any, terminal: bool, as_told: Callable[[str], str]) -> None:
        """`as_told` makes of a text what the user is to read."""
        super().__init__()
        self._as_told = as_told
        self._desk = desk
        self._terminal = terminal
        self._text = ""

    def isatty(self) -> bool:
        """Whether the command shows on a terminal."""
        return self._terminal

    def write(self, text: str) -> int:
        """Keep the text until it is flushed."""
        self._text += text
        return len(text)

    def flush(self) -> None:
        """Send the text on its way, without waiting for it."""
        if self._text:
            self._desk.show.remote(self._as_told(self._text))
            self._text = ""


class Watch(UserCallback):
    """Runs in Ray's controller: tells the desk of failures."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """One line; when a process dies, that the others lost it is no news."""
        reasons = {rank: brief(error) for rank, error in sorted(worker_exceptions.items())}
        own = {rank: reason for rank, reason in reasons.items() if reason != _LOST} or reasons
        what = "; ".join(f"rank {rank}: {reason}" for rank, reason in own.items())
        self._desk.failed.remote(f"{what}; starting again from the newest checkpoint\n")


_LOST = "lost the others"


def brief(error: Exception) -> str:
    """The sentence that matters of an error from a worker."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process or host is gone"
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    if any(word in line for line in lines for word in ("gloo", "NCCL", "PeerDiedError")):
        return _LOST
    return lines[-1] if lines else type(error).__name__
