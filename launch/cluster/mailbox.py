"""Messages between a command and the Ray workers that train for it: the mailbox, and what writes to it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train import UserCallback

from gen_dist.config import TrainConfig
from gen_dist.config.training import read_sent
from gen_dist.errors import PluginError


@dataclass(frozen=True)
class News:
    """Events since the command last read its mailbox."""

    text: str
    """Text for the command's standard error."""
    refusal: str | None
    """An error that another try would not fix; None if there is none."""
    failures: int
    """Failures of the workers since the run last made progress."""
    running: bool
    """True while workers train."""


class Mailbox:
    """Actor on the command's host. Workers and Ray's controller write to it, and the command reads it.

    In the other direction the command asks the run to stop, and the workers read that.
    """

    def __init__(self) -> None:
        self._settings: dict[str, str] = {}
        self._text = ""
        self._refusal: str | None = None
        self._failures = 0
        self._wants_stop = False
        self._running = False

    def started(self) -> None:
        """Note that workers train."""
        self._running = True

    def show(self, text: str) -> None:
        """Add text for the command's standard error."""
        self._text += text

    def refuse(self, reason: str) -> None:
        """Note an error that another try would not fix; the first one counts."""
        self._refusal = self._refusal or reason

    def failed(self, text: str) -> None:
        """Note that the workers failed."""
        self._running = False
        self._failures += 1
        self.show(text)

    def made_progress(self) -> None:
        """Forget earlier failures: the run saved or recorded something since."""
        self._failures = 0

    def news(self) -> News:
        """Take what happened since the last call."""
        text, self._text = self._text, ""
        return News(text, self._refusal, self._failures, self._running)

    def why_unread(self, config: str, plugins: dict[str, bytes]) -> str | None:
        """Return why a process of Ray cannot read a config as it is sent; None if it can."""
        try:
            read_sent(config, plugins)
        except PluginError as error:
            return str(error)
        return None

    def keep_settings(self, settings: dict[str, str]) -> None:
        """Keep the command's settings of file systems for the workers; see `settings_of_file_systems`."""
        self._settings = settings

    def settings(self) -> dict[str, str]:
        """Settings of file systems that the command has."""
        return self._settings

    def ask_to_stop(self) -> None:
        """Ask the run to save and stop."""
        self._wants_stop = True

    def wants_stop(self) -> bool:
        """Return True if the run should save and stop."""
        return self._wants_stop


def mailbox_here(kind: type[Mailbox], config: TrainConfig) -> Any:
    """Start a mailbox on this host, because another host may be cut off, and return its handle.

    Raises:
        PluginError: processes of Ray have not the plug-ins of the config, which their own errors would not name.
    """
    node = ray.get_runtime_context().get_node_id()
    mailbox: Any = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node})(kind).remote()
    if config.plugins and (reason := ray.get(mailbox.why_unread.remote(*config.to_send()))):
        raise PluginError(f"{reason} (said by a process of Ray: install the module on all hosts of the cluster)")
    if settings := settings_of_file_systems():
        ray.get(mailbox.keep_settings.remote(settings))
    return mailbox


def settings_of_file_systems() -> dict[str, str]:
    """Variables of fsspec in this process's environment, such as FSSPEC_HTTPS, which may hold credentials.

    Ray records a process's environment in logs and shows it on its dashboard. A message to an actor is in neither.
    """
    return {name: value for name, value in os.environ.items() if name.startswith("FSSPEC_")}


def take_settings(settings: Mapping[str, str]) -> None:
    """Give this process those of the command's settings of file systems that it lacks."""
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    if missing:
        import fsspec.config

        os.environ |= missing
        fsspec.config.set_conf_env(fsspec.config.conf)  # it has read the environment when it was imported


class RemoteScreen(io.StringIO):
    """The command's standard error, as a stream in the main worker."""

    def __init__(self, mailbox: Any, terminal: bool, for_user: Callable[[str], str]) -> None:
        """Write to a mailbox.

        Args:
            mailbox: handle of the Mailbox.
            terminal: True if the command shows its output on a terminal.
            for_user: replaces names in a text that mean nothing on the command's host.
        """
        super().__init__()
        self._mailbox = mailbox
        self._terminal = terminal
        self._for_user = for_user
        self._text = ""

    def isatty(self) -> bool:
        """Return True if the command shows its output on a terminal."""
        return self._terminal

    def write(self, text: str) -> int:
        """Keep the text until it is flushed."""
        self._text += text
        return len(text)

    def flush(self) -> None:
        """Send the text, without waiting for its arrival."""
        if self._text:
            self._mailbox.show.remote(self._for_user(self._text))
            self._text = ""


class FailureReporter(UserCallback):
    """Reports failures of workers to the mailbox. It runs in Ray's controller."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Report one line. When a process dies, the others fail too; only its own reason is shown."""
        reasons = {rank: summary_of(error) for rank, error in sorted(worker_exceptions.items())}
        causes = {rank: reason for rank, reason in reasons.items() if reason != _LOST} or reasons
        shown = "; ".join(f"rank {rank}: {reason}" for rank, reason in causes.items())
        self._mailbox.failed.remote(f"{shown}; starting again from the newest checkpoint\n")


_LOST = "lost the others"


def summary_of(error: Exception) -> str:
    """Return the one line of a worker's error that names its cause."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process or host is gone"
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    if any(word in line for line in lines for word in ("gloo", "NCCL", "PeerDiedError")):
        return _LOST
    return lines[-1] if lines else type(error).__name__
