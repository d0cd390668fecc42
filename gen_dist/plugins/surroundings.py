"""Settings that runs depend on are put back after code of a plug-in has changed them, and a line names the changes.

Its import is enclosed by `surroundings_kept`, and its code that runs later by a `Watch`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from gen_dist.plugins import interpreter, settings
from gen_dist.plugins.settings import Setting
from gen_dist.startup import forgiving, tell

_VARIABLES = (
    *("ACCELERATE_", "CUDA_VISIBLE_DEVICES", "GEN_DIST_", "LOCAL_", "MASTER_", "MPLBACKEND"),
    *("OMPI_COMM_WORLD_", "PMI_", "RANK", "TQDM_", "WORLD_SIZE"),
)
"""Environment variables, or their first letters, that decide how a run goes."""
_LOADED_FILES = "GEN_DIST_PLUGIN_FILES"
"""The one of ours that a plug-in may change: it loads another one."""
SETTINGS = (*interpreter.SETTINGS, *settings.SETTINGS)
_imported: list[str] = []
"""Plug-ins whose code may run in this process."""
_spoiled: list[str] = []
"""Settings that they changed after their import. They are told once."""


@contextlib.contextmanager
def surroundings_kept(plugin: str) -> Iterator[None]:
    """Context manager for the import of a plug-in. At its end all settings are as before, and a warning names changes.

    Within it, standard output is standard error: programs read the results of commands from standard output.
    """
    _imported[:] = [*(one for one in _imported if one != plugin), plugin]
    streams = sys.stdin, sys.stdout, sys.stderr
    sys.stdout = sys.stderr
    variables, before = _variables(), [one.now() for one in SETTINGS]
    try:
        yield
    finally:
        found = _put_back(SETTINGS, before)
        changed = [*_streams_put_back(streams), *_variables_put_back(variables), *found]
        if changed:
            tell(
                f"warning: plug-in {plugin} changed {', '.join(changed)} while it was imported; put back, since runs "
                "depend on that: make such a change in the function that needs it"
            )


class Watch:
    """Settings as they were when it was made, to which they return."""

    def __init__(self, watched: Sequence[Setting] = SETTINGS) -> None:
        """`watched` are settings that only a plug-in changes meanwhile."""
        self._watched = watched
        self._before = [one.now() for one in watched]

    def settle(self) -> None:
        """Put back what the code of plug-ins has changed. A warning names each setting, once a process."""
        if not _imported:
            return
        new = [name for name in _put_back(self._watched, self._before) if name not in _spoiled]
        _spoiled.extend(new)
        if new:
            tell(
                f"warning: code of {_plugins()} changed {', '.join(new)} and left it so; put back, since runs depend "
                "on that: give it back in the function that needs the change"
            )


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Context manager around calls of a plug-in's code. At its end all settings are as before."""
    watch = Watch()
    try:
        yield
    finally:
        watch.settle()


def watched_if_loaded() -> contextlib.AbstractContextManager[None]:
    """Context manager as `watched`, for calls that are made often: without plug-ins it does nothing."""
    return watched() if _imported else contextlib.nullcontext()


def spoiled_by() -> str | None:
    """Plug-ins and the settings that they changed after their import. None if they changed none."""
    return f"{_plugins()} changed {', '.join(_spoiled)}" if _spoiled else None


def _plugins() -> str:
    return f"plug-in {' or '.join(_imported)}"


def _put_back(watched: Sequence[Setting], before: Sequence[Any]) -> list[str]:
    """Put settings back, and name those that were changed."""
    return [one.name for one, value in zip(watched, before, strict=True) if one.put_back(value)]


def _streams_put_back(streams: tuple[Any, Any, Any]) -> list[str]:
    """Put the standard streams back, and open those again that were closed. Name them if they were changed."""
    changed = (sys.stdin, sys.stdout, sys.stderr) != (streams[0], streams[2], streams[2])
    sys.stdin, sys.stdout, sys.stderr = streams
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(getattr(sys, name), "closed", False):
            setattr(sys, name, forgiving(getattr(sys, name), number, "backslashreplace"))
            changed = True
    return ["the standard streams"] if changed else []


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES) and name != _LOADED_FILES}


def _variables_put_back(before: dict[str, str]) -> list[str]:
    """Give environment variables their values of before, and return the names of those that had others."""
    after = _variables()
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    return changed
