"""Results of a sweep: the metric that ranks its trials, their state on disk, and the table."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from gen_dist.config import ObjectiveConfig, TrainConfig
from gen_dist.config.recorded import MEASURED, MORE_IS_BETTER, SAMPLE_CHECKS
from gen_dist.errors import CheckpointError, ConfigError, DamagedError
from gen_dist.files import write_atomically
from gen_dist.launch.sweep.space import Searched, Value, as_typed, short_names
from gen_dist.records.metrics_file import metrics_of_run
from gen_dist.records.readable import readable_number
from gen_dist.records.reading import COUNT, FLAG, NUMBER, TEXT, Kind, either, list_of, object_with, read_object
from gen_dist.records.run_paths import RunPaths

Mode = Literal["min", "max"]
Status = Literal["waiting", "running", "interrupted", "finished", "stopped", "failed"]

NOT_FINITE = 1e30
"""Worst value of a metric, in place of NaN and infinity."""
_STATE_FILE = "sweep.json"


@dataclass(frozen=True)
class Metric:
    """Metric that ranks the trials."""

    name: str
    mode: Mode
    """Direction in which it is better."""

    def value_in(self, record: Mapping[str, Any]) -> float | None:
        """Value in a record of a run, or None if the record is not an evaluation. NaN and infinity rank last.

        Raises:
            ConfigError: the record is an evaluation without this metric, or its value is no number.
        """
        if not any(name.startswith(("test/", "samples/")) for name in record):
            return None
        key = self.key_in(record)
        if key is None:
            measured = ", ".join(name for name in record if name.startswith(MEASURED))
            why = f"they have {measured}" if measured else "these images do not allow it"
            raise ConfigError(f"evaluations have no {self.name}: {why}; choose another --metric")
        value = record[key]
        if value is not None and not NUMBER.fits(value):
            raise ConfigError(f"evaluations have a {self.name} that is no number; choose another --metric")
        if value is not None and math.isfinite(value):
            return float(value)
        return NOT_FINITE if self.mode == "min" else -NOT_FINITE

    def key_in(self, record: Mapping[str, Any]) -> str | None:
        """Name of this metric in a record: `evaluation/fid_5k` of `evaluation/fid`; None if it has none."""
        if self.name in record or not self.name.startswith(MEASURED):
            return self.name if self.name in record else None
        from gen_dist.evaluation.guide import base_name

        measured = (one for one in record if one.startswith(MEASURED))
        return next((one for one in measured if MEASURED + base_name(one.removeprefix(MEASURED)) == self.name), None)

    def order(self, value: float) -> float:
        """Key that sorts better values first."""
        return value if self.mode == "min" else -value


def choose_metric(config: TrainConfig, name: str | None, mode: Mode | None) -> Metric:
    """The metric of a name; None stands for the objective's first test metric.

    Raises:
        ConfigError: evaluations of this config have no such metric, or none is named where there is no default.
    """
    objective = config.objective
    tested = [f"test/{one}" for one in objective.test_metrics]
    checks = [] if "samples" in objective.lacks else [f"samples/{one}" for one in SAMPLE_CHECKS]
    if name is None:
        if not tested:
            raise ConfigError(
                f"{objective.kind} has no test metric; name one with --metric, as in --metric samples/class_variation; "
                f"there are {', '.join(checks)}"
            )
        name = tested[0]
    known = [*tested, *checks, *(MEASURED + one for one in config.evaluate_metrics)]
    name = next((one for one in known if name == one.rpartition("/")[2]), name)
    if name not in (*tested, *checks):
        measurable = _measurable(objective)
        if found := _measured_metric(config, name, mode, measurable):
            return found
        prefix = MEASURED if name.startswith(MEASURED) else ""
        possible = [MEASURED + one for one in measurable] if prefix else [*tested, *checks]
        # Without the prefix, which would make any two of these names alike.
        alike = difflib.get_close_matches(
            name.removeprefix(prefix), [one.removeprefix(prefix) for one in possible], n=2
        )
        near = [prefix + one for one in alike]
        perhaps = f"perhaps you meant {' or '.join(near)}" if near else f"there are {', '.join(possible)}"
        raise ConfigError(f"--metric {name} is none that an evaluation of {objective.kind} gives; {perhaps}")
    usual: Mode = "max" if name.rpartition("/")[2] in MORE_IS_BETTER else "min"
    return Metric(name, mode or usual)


def _measurable(objective: ObjectiveConfig) -> list[str]:
    """Names that `evaluate_metrics` takes, without counts, for models of this objective."""
    from gen_dist.evaluation.metrics import measured_metrics

    lacks: Collection[str] = objective.lacks
    return [
        name
        for name, metric in measured_metrics().items()
        if metric.counts != "importance samples" and not any(need in lacks for need in metric.needs)
    ]


def _measured_metric(config: TrainConfig, name: str, mode: Mode | None, measurable: Sequence[str]) -> Metric | None:
    """One of the `evaluate_metrics` of a config: `fid`, or as in metrics.jsonl, `evaluation/fid_1k`.

    Args:
        config: config of the trials.
        name: the metric, with its prefix and counts or without.
        mode: direction in which it is better; None is the metric's own.
        measurable: names that `evaluate_metrics` takes.

    Returns:
        None if there is no such metric.

    Raises:
        ConfigError: the config does not ask for it, or for another number of samples.
    """
    from gen_dist.evaluation.guide import base_name, metric_of
    from gen_dist.evaluation.plan import short_count

    asked = config.evaluate_metrics
    if counted := [one for one in asked if one not in measurable and base_name(one) in measurable]:
        raise ConfigError(
            f"--evaluate-metrics {counted[0]} has a number or a network in its name; name {base_name(counted[0])}, and "
            "set --evaluate-samples and --evaluate-features"
        )
    full = name.removeprefix(MEASURED)
    base = base_name(full)
    if base not in measurable:
        return None
    if base not in asked:
        if asked:
            raise ConfigError(
                f"--metric {name} is none of --evaluate-metrics {' '.join(asked)}; name {base} there, too"
            )
        raise ConfigError(f"--metric {name} is measured only where that is asked for; add --evaluate-metrics {base}")
    metric = metric_of(full)
    count = short_count(config.evaluate_samples)
    if full != base and metric.counts == "samples" and not full.endswith(f"_{count}"):
        raise ConfigError(
            f"--metric {name} is not what trials measure with --evaluate-samples {config.evaluate_samples}; name "
            f"{base}, or set --evaluate-samples"
        )
    return Metric(MEASURED + full, mode or ("max" if metric.better == "more" else "min"))


@dataclass
class Trial:
    """One trial: a run in its own directory."""

    index: int
    values: dict[str, Value]
    """Values of the searched fields, by dotted name."""
    config: TrainConfig
    status: Status = "waiting"
    reason: str | None = None
    """Error of a failed trial."""
    diverged: bool = False
    """True if its loss diverged: the trial would fail again."""
    step: int = 0
    """Last recorded step."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """Steps and values of the metric."""
    others: dict[str, float] = field(default_factory=dict)
    """Other `evaluate_metrics` of the last evaluation, by name."""

    @property
    def path(self) -> Path:
        """Run directory of the trial."""
        return self.config.run_path

    @property
    def value(self) -> float | None:
        """Value of the metric at the last evaluation."""
        return self.history[-1][1] if self.history else None

    @property
    def short_reason(self) -> str:
        """Error of a failed trial, without the advice after it, which is meant for a single run."""
        return (self.reason or "").partition("; ")[0]

    @property
    def is_settled(self) -> bool:
        """True if nothing is left to train."""
        return self.status in ("finished", "stopped") or self.diverged

    def has_finished(self) -> bool:
        """Return True if the run has done all steps."""
        try:
            summary = read_object(RunPaths(self.path).summary, {"steps": COUNT}, "it counts as unfinished")
        except (FileNotFoundError, DamagedError):
            return False
        return bool(summary["steps"] == self.config.steps)

    def read(self, metric: Metric) -> None:
        """Read step and history from the files of the run.

        Raises:
            UserError: metrics.jsonl is damaged, or evaluations do not have this metric.
        """
        records = metrics_of_run(self.path)
        self.step = records[-1]["step"] if records else 0
        values = [(record["step"], metric.value_in(record)) for record in records]
        self.history = [(step, value) for step, value in values if value is not None]
        last: Mapping[str, Any] = next(
            (record for record in reversed(records) if metric.value_in(record) is not None), {}
        )
        ranking = metric.key_in(last)
        self.others = {
            name: float(value)
            for name, value in last.items()
            if name.startswith(MEASURED) and name != ranking and NUMBER.fits(value)
        }


@dataclass
class Sweep:
    """All trials of a sweep, and its directory."""

    path: Path
    space: tuple[Searched, ...]
    metric: Metric
    steps: int
    grace_period: int
    """Steps before a trial may be stopped early."""
    trials: list[Trial]

    def read(self) -> None:
        """Read the results of earlier starts of the sweep from disk.

        Raises:
            CheckpointError: a file is damaged.
        """
        known = _read_state(self.path / _STATE_FILE)
        for trial in self.trials:
            before = known.get(trial.index, {})
            if not RunPaths(trial.path).config.exists():
                continue
            trial.read(self.metric)
            if trial.has_finished():
                trial.status = "finished"
            elif before.get("status") == "stopped" or before.get("diverged"):
                trial.status, trial.reason = before["status"], before["reason"]
                trial.diverged = bool(before["diverged"])
            else:
                trial.status = "interrupted"

    def save(self) -> None:
        """Write sweep.json, which the next start of the sweep reads.

        Raises:
            CheckpointError: the file cannot be written.
        """
        state = {
            "metric": self.metric.name,
            "mode": self.metric.mode,
            "steps": self.steps,
            "space": {one.name: one.text for one in self.space},
            "best": self.best.index if self.best else None,
            "trials": [self._row(trial) for trial in self.trials],
        }
        try:
            write_atomically(self.path / _STATE_FILE, json.dumps(state, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self.path}: {error.strerror}; remove the cause, then run the same command to resume"
            ) from None

    def save_table(self) -> None:
        """Write sweep.csv, the table with all columns.

        Raises:
            OSError: the file cannot be written.
        """
        names = [one.name for one in self.space]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        others = self._other_metrics()
        heads = ["rank", "trial", *names, self.metric.name, *others, "steps", "status", "reason", "directory"]
        writer.writerow(heads)
        for rank, trial in enumerate(self.ranked, start=1):
            values = [as_typed(trial.values[name]) for name in names]
            metrics = [trial.value, *(trial.others.get(name) for name in others)]
            row = [trial.index, *values, *metrics, trial.step, trial.status, trial.reason, trial.path]
            writer.writerow([rank, *row])
        write_atomically(self.path / "sweep.csv", text.getvalue())

    def _row(self, trial: Trial) -> dict[str, Any]:
        return {
            "trial": trial.index,
            "values": trial.values,
            "status": trial.status,
            "reason": trial.reason,
            "diverged": trial.diverged,
            "step": trial.step,
            "value": trial.value,
            "others": {name: value if math.isfinite(value) else None for name, value in trial.others.items()},
            "history": trial.history,
            "directory": str(trial.path),
        }

    @property
    def ranked(self) -> list[Trial]:
        """Trials from the best metric to the worst; trials without a value come last, after them failed ones."""

        def key(trial: Trial) -> tuple[bool, bool, float]:
            value = trial.value
            return trial.status == "failed", value is None, 0.0 if value is None else self.metric.order(value)

        return sorted(self.trials, key=key)

    @property
    def best(self) -> Trial | None:
        """Best finished trial. Values of other trials do not compare, because they are of earlier steps."""
        return next((trial for trial in self.ranked if trial.status == "finished" and trial.value is not None), None)

    def _other_metrics(self) -> list[str]:
        """Names of the metrics that trials have beside the one that ranks them."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.others))

    def saved_steps(self) -> int:
        """Steps that early stopping left out."""
        return sum(self.steps - trial.step for trial in self.trials if trial.status == "stopped")

    def table(self) -> list[str]:
        """Table of the trials as lines of text, best first."""
        heads = short_names([one.name for one in self.space]).values()
        others = self._other_metrics()
        shown = [name.removeprefix(MEASURED) for name in others]
        rows = [["rank", "trial", *heads, self.metric.name, *shown, "steps", "status"]]
        for rank, trial in enumerate(self.ranked, start=1):
            value = "" if trial.value is None else readable_metric(trial.value)
            values = [as_typed(trial.values[one.name]) for one in self.space]
            more = [readable_metric(trial.others[name]) if name in trial.others else "" for name in others]
            rows.append([str(rank), str(trial.index), *values, value, *more, str(trial.step), trial.status])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths[:-1])) + f"  {row[-1]}" for row in rows]
        reasons = ["", *(f": {trial.short_reason}" if trial.reason else "" for trial in self.ranked)]
        return [line + reason for line, reason in zip(lines, reasons, strict=True)]


_TRIAL = {
    "trial": COUNT,
    "status": Kind("a status", lambda value: value in get_args(Status)),
    "reason": either(TEXT, None),
    "diverged": either(FLAG, None),
}
"""Fields of sweep.json that the next start reads, of each trial."""


def _read_state(file: Path) -> Mapping[int, Mapping[str, Any]]:
    """Rows of sweep.json by the index of their trial.

    Raises:
        CheckpointError: the file is damaged, or cannot be read just now.
    """
    shape = {"trials": list_of(object_with(**_TRIAL))}
    way_out = "remove it, and sweep.csv and sweep.png where they are, to rank the trials again"
    try:
        return {row["trial"]: row for row in read_object(file, shape, way_out)["trials"]}
    except FileNotFoundError:
        return {}


def readable_metric(value: float) -> str:
    """Format a value of the metric for display."""
    return "not finite" if abs(value) >= NOT_FINITE else readable_number(value)


def make_trials(path: Path, draws: Sequence[dict[str, Value]], configs: Sequence[TrainConfig]) -> list[Trial]:
    """Trials with run directories inside the sweep's directory."""
    return [
        Trial(index, values, dataclasses.replace(config, run_dir=str(path / f"trial_{index:03}")))
        for index, (values, config) in enumerate(zip(draws, configs, strict=True))
    ]
