"""Curves and pictures of a run on wandb. No failure of wandb stops the run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gen_dist.config import TrainConfig, WandbMode
from gen_dist.errors import ConfigError
from gen_dist.files import is_utf8
from gen_dist.records.run_paths import RunPaths
from gen_dist.records.trackers.base import RunToTrack, RunTracker, histogram, register

# A run does not wait longer for wandb: whatever was not sent stays on disk for `wandb sync`.
WANDB_INIT_SECONDS = 30.0
WANDB_FINISH_SECONDS = 60.0


def wandb_mode(configured: WandbMode | None) -> WandbMode:
    """The configured mode, else $WANDB_MODE, else disabled.

    Raises:
        ConfigError: $WANDB_MODE is not a mode.
    """
    wanted = configured or os.environ.get("WANDB_MODE") or "disabled"
    modes: tuple[WandbMode, ...] = get_args(WandbMode)
    for mode in modes:
        if mode == wanted:
            return mode
    raise ConfigError(f"WANDB_MODE {wanted!r} is not one of {', '.join(modes)}")


def id_of_agent() -> str | None:
    """Id that `wandb agent` gave to the run that it waits for."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None


class WandbRun(RunTracker):
    """A wandb run. After any failure of wandb it warns once and sends nothing more."""

    def __init__(
        self, mode: WandbMode, run_path: Path, config: TrainConfig, wandb_id: str, note: Callable[[str], None]
    ) -> None:
        """Start the run on wandb.

        Args:
            mode: offline or online.
            run_path: the run directory. Its name is the name on wandb, and wandb writes to `wandb` in it.
            config: stored on wandb beside the curves.
            wandb_id: id of the run on wandb. A resumed run with the same id continues the same curves.
            note: shows a line to the user.

        Raises:
            ConfigError: wandb is not installed, mode online has no valid API key, or the path is not UTF-8.
        """
        # Its service waits for minutes where it meets such a path.
        if not is_utf8(run_path):
            raise ConfigError(f"wandb {mode} needs a run directory in UTF-8, unlike {run_path}; use --wandb disabled")
        self._note = note
        self._run: Any = None
        self._directory = RunPaths(run_path).wandb
        try:
            import wandb
        except ImportError:
            raise ConfigError(f"wandb {mode} needs the wandb package; install it, or use --wandb disabled") from None
        quiet: dict[str, Any] = {"silent": True, "console": "off"}
        try:
            with _without_other_ids(wandb_id):
                wandb.setup(wandb.Settings(**quiet))  # from here on, wandb neither prints nor asks for a key
                limits: dict[str, Any] = {"init_timeout": WANDB_INIT_SECONDS, "finish_timeout": WANDB_FINISH_SECONDS}
                self._run = wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "gen_dist"),
                    name=run_path.name,
                    dir=str(run_path),
                    id=wandb_id,
                    resume="allow",
                    reinit="create_new",
                    config=dataclasses.asdict(config),
                    mode=mode,
                    settings=wandb.Settings(**quiet, **limits),
                )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"wandb {mode}: {_one_line(error)} Run `wandb login`, set WANDB_API_KEY, or use --wandb offline"
            ) from None
        except Exception as error:  # a failing service of a third party must not stop the training
            self._give_up("did not start", error)
            return
        if mode == "online":
            note(f"wandb: {self._run.url}")

    def log(self, step: int, values: Mapping[str, float | Sequence[float]]) -> None:
        """Send scalars and histograms by name. wandb draws the steps of a histogram side by side, in shades."""
        if self._run is None:
            return
        try:
            self._run.log({name: _shown(name, value) for name, value in values.items()}, step=step)
        except Exception as error:  # see above
            self._give_up("failed", error)

    def pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Send image files by name."""
        if self._run is None:
            return
        import wandb

        try:
            self._run.log({name: wandb.Image(str(path)) for name, path in pictures.items()}, step=step)
        except Exception as error:  # see above
            self._give_up("failed", error)

    def summarize(self, values: Mapping[str, float | Sequence[float]]) -> None:
        """Add values to the summary of the run, which the table of runs on wandb shows."""
        if self._run is None:
            return
        try:
            self._run.summary.update(values)
        except Exception as error:  # see above
            self._give_up("failed", error)

    def finish(self, exit_code: int) -> None:
        """End the run on wandb. An `exit_code` other than 0 marks it as failed."""
        if self._run is None:
            return
        offline = self._run.settings.mode == "offline"
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:  # see above
            self._give_up("did not finish", error)
            return
        self._run = None
        if offline:
            self._note(f"wandb: offline run kept in {self._directory}; `wandb sync` uploads it")

    def _give_up(self, what: str, error: Exception) -> None:
        import wandb

        self._run = None
        self._note(f"warning: wandb {what}, the run goes on without it: {_one_line(error)}")
        # Without this, wandb prints a traceback at exit if its service is dead.
        with contextlib.suppress(Exception):
            wandb.teardown()


@contextlib.contextmanager
def _without_other_ids(wandb_id: str) -> Iterator[None]:
    """Hide an agent's variables from wandb if they are of another run: they go before the id that wandb is given."""
    names = [] if id_of_agent() in (None, wandb_id) else ["WANDB_RUN_ID", "WANDB_SWEEP_ID"]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _shown(name: str, value: float | Sequence[float]) -> Any:
    """Value in the form that wandb draws: a list becomes a histogram, of scores or with one bin a class."""
    if not isinstance(value, Sequence):
        return value
    import wandb

    heights, edges = histogram(name, value)  # wandb refuses NaN in one
    return wandb.Histogram(np_histogram=(np.array(heights), np.array(edges)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _open(run: RunToTrack) -> WandbRun:
    """By `--track wandb` alone, online; the option or $WANDB_MODE says otherwise."""
    mode = wandb_mode(run.config.wandb)
    return WandbRun("online" if mode == "disabled" else mode, run.path, run.config, run.run_id, run.note)


register("wandb", _open)
