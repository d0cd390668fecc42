"""Trackers of runs, a file each: where the figures and pictures of a run are sent beside its directory.

A file registers its name here and imports its package only when a run asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.plugins.loading import find_parts
from gen_dist.records.trackers.base import Guarded, OpenTracker, RunToTrack, Values, registered
from gen_dist.records.trackers.callback import Callback
from gen_dist.records.trackers.wandb_run import wandb_mode


def tracker_kinds() -> Mapping[str, OpenTracker]:
    """All trackers by name: those that the modules of this folder and plug-ins register."""
    find_parts(__name__)
    return registered()


def wanted_trackers(config: TrainConfig) -> Sequence[str]:
    """Names of the trackers that a config asks for; `wandb` also by its own option.

    Raises:
        ConfigError: a name is unknown, or $WANDB_MODE is not a mode.
    """
    by_option = [] if wandb_mode(config.wandb) == "disabled" else ["wandb"]
    names = list(dict.fromkeys([*by_option, *config.track]))
    if unknown := [name for name in names if name not in tracker_kinds()]:
        raise ConfigError(f"unknown tracker {unknown[0]!r}; there are {', '.join(tracker_kinds())}")
    return names


def open_trackers(run: RunToTrack, on_log: Callable[[int, Values], object] | None = None) -> list[Guarded]:
    """Open the trackers of a run. All or none are open afterwards.

    Args:
        run: the run.
        on_log: a callback, which is called with each step and its figures.

    Raises:
        ConfigError: a name is unknown, or a tracker cannot start as configured.
    """
    opened: list[Guarded] = []
    try:
        for name in wanted_trackers(run.config):
            opened.append(Guarded(name, tracker_kinds()[name], run))
        if on_log:
            opened.append(Guarded("on_log", lambda _run: Callback(on_log), run))
    except BaseException:
        for one in opened:
            one.finish(1)
        raise
    return opened
