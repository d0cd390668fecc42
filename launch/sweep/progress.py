"""Progress of a sweep on the command's standard error."""

from __future__ import annotations

from typing import Any

from gen_dist.launch.sweep.results import Sweep, Trial, readable_metric
from gen_dist.launch.sweep.space import all_as_typed


class SweepProgress:
    """Writes a line for each event of a sweep, and a summary line.

    On a terminal the summary stays in the last line. Elsewhere it is printed when a trial has ended, and evaluations
    have lines of their own.
    """

    def __init__(self, sweep: Sweep, stream: Any) -> None:
        self._sweep = sweep
        self._stream = stream
        self._live = stream.isatty()
        self._width = 0

    def started(self, trial: Trial) -> None:
        """Show that a trial began to train."""
        at = f" at step {trial.step}" if trial.step else ""
        self.line(f"trial {trial.index} {'resumes' if at else 'starts'}{at}: {all_as_typed(trial.values)}")

    def evaluated(self, trial: Trial) -> None:
        """Show an evaluation: on a terminal in the summary, elsewhere in a line."""
        if self._live:
            self._refresh()
        elif trial.value is not None:
            self.line(f"trial {trial.index} at step {trial.step} of {self._sweep.steps}: {self._metric(trial)}")

    def ended(self, trial: Trial) -> None:
        """Show how a trial ended."""
        metric = f": {self._metric(trial)}" if trial.value is not None else ""
        what = {
            "finished": f"finished{metric}",
            "stopped": f"stopped at step {trial.step} of {self._sweep.steps}{metric}",
            "failed": f"failed: {trial.short_reason}",
            "interrupted": f"saved at step {trial.step}",
        }
        self.line(f"trial {trial.index} {what[trial.status]}")
        if not self._live:
            self._write(self.summary() + "\n")

    def line(self, text: str) -> None:
        """Print a line."""
        self._write("\r" + " " * self._width + "\r" if self._width else "")
        self._width = 0
        self._write(text + "\n")
        self._refresh()

    def close(self) -> None:
        """End the summary line."""
        if self._width:
            self._write("\n")
        self._width = 0

    def summary(self) -> str:
        """Summary of the sweep: 5/8 done, 2 running, best 105.37 (trial 3)."""
        trials = self._sweep.trials
        done = sum(trial.status in ("finished", "stopped", "failed") for trial in trials)
        running = [trial for trial in trials if trial.status == "running"]
        shown = [f"{done}/{len(trials)} done"]
        if running:
            only = f" (trial {running[0].index} at step {running[0].step})" if len(running) == 1 else ""
            shown.append(f"{len(running)} running{only}")
        evaluated = [trial for trial in self._sweep.ranked if trial.value is not None and trial.status != "failed"]
        if evaluated:
            shown.append(f"best {readable_metric(evaluated[0].value or 0.0)} (trial {evaluated[0].index})")
        return ", ".join(shown)

    def _metric(self, trial: Trial) -> str:
        return f"{self._sweep.metric.name} {readable_metric(trial.value or 0.0)}"

    def _refresh(self) -> None:
        if self._live:
            text = self.summary()
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a terminal that closed ends the display, not the sweep
            self._live = False
