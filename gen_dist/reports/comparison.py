"""Comparison of runs: the better one by each metric, in figures and in words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen_dist.errors import ConfigError
from gen_dist.evaluation.guide import in_order, metric_of
from gen_dist.evaluation.record import Evaluation
from gen_dist.inference.markdown import text as markdown_text
from gen_dist.reports.groups import (
    Group,
    are_apart,
    are_comparable,
    labels_of,
    machine_of,
    ranked_by,
    readable_values,
    scalars,
)
from gen_dist.reports.run_record import RunRecord, group_by_config, read_run, with_evaluation
from gen_dist.reports.statements import Statement, statements_of
from gen_dist.startup import tell


@dataclass(frozen=True)
class Comparison:
    """Groups of runs on the same data, with statements and notes."""

    groups: Sequence[Group]
    metrics: Sequence[str]
    """Names of the scalar metrics that any group has, in the order of the guide."""
    statements: Sequence[Statement]
    notes: Sequence[str]
    """Conditions of the figures, a sentence each."""

    @property
    def warnings(self) -> list[str]:
        """Warnings that come before all figures, a sentence each: short trainings and collapsed ones."""
        short = [
            f"{group.label} is {caveat}: these figures are not what it can do."
            for group in self.groups
            if (caveat := group.caveat)
        ]
        collapsed = [
            f"{group.label}, seed {run.config.seed}: {collapse.text}."
            for group in self.groups
            for run in group.runs
            for collapse in run.collapses
        ]
        return short + collapsed

    def best(self, metric: str) -> Group | None:
        """The group that is best by a metric; None if undecided."""
        ranked = ranked_by(self.groups, metric)
        if len(ranked) < 2 or not are_comparable(ranked, metric) or not are_apart(ranked[0], ranked[1], metric):
            return None
        return ranked[0]

    def as_json(self) -> dict[str, Any]:
        """Content of compare.json."""
        return {
            "format": 1,
            "data": self.groups[0].runs[0].config.data,
            "data_digest": self.groups[0].runs[0].state["data_digest"],
            "groups": [
                {
                    "label": group.label,
                    "family": group.family,
                    "runs": [str(run.path) for run in group.runs],
                    "seeds": [run.config.seed for run in group.runs],
                    "step": group.runs[0].step,
                    "metrics": {
                        name: {"values": values, "mean": statistics.fmean(values)}
                        for name in self.metrics
                        if (values := group.values(name))
                    },
                    "unavailable": {name: group.reason(name) for name in self.metrics if not group.values(name)},
                }
                for group in self.groups
            ],
            "best": {name: group.label for name in self.metrics if (group := self.best(name))},
            "statements": [
                {
                    "topic": one.topic,
                    "text": one.text,
                    "metrics": list(one.metrics),
                    "textbook": one.textbook,
                    "holds": one.holds,
                    "undecided": one.undecided,
                }
                for one in self.statements
            ],
            "warnings": self.warnings,
            "notes": list(self.notes),
        }


def read_runs(paths: Sequence[Path], evaluate: Callable[[Path], Evaluation | None] | None = None) -> list[RunRecord]:
    """Read runs that are to be compared.

    Args:
        paths: run directories.
        evaluate: writes and returns the evaluation of a run whose newest checkpoint has none. What it returns is used
            if it could not be written, or if the run trains on meanwhile. None skips this.

    Raises:
        CheckpointError: there is no run, or none with a checkpoint.
        ConfigError: a run is named twice, or runs are of different data or were evaluated in different features.
    """
    names = [path.resolve() for path in paths]
    if twice := next((path for path in paths if names.count(path.resolve()) > 1), None):
        raise ConfigError(f"{twice} is named twice; name each run once")
    runs = [read_run(path, tell) for path in paths]  # all of them before any is evaluated, which takes long
    _refuse_other_data(runs)
    if evaluate is not None:
        for index, run in enumerate(runs):
            if run.evaluation is None:
                runs[index] = with_evaluation(run, evaluate(run.path))
    _refuse_other_features(runs)
    for run in runs:
        if run.damage:
            tell(f"warning: {run.damage}")
    return runs


def comparison_of(runs: Sequence[RunRecord]) -> Comparison:
    """Compare runs, those of one config with different seeds together."""
    grouped = group_by_config(runs)
    groups = [Group(label, group) for label, group in zip(labels_of(grouped), grouped, strict=True)]
    names = dict.fromkeys(name for run in runs for name in scalars(run))
    metrics = in_order([name for name in names if not name.endswith("_data")])
    return Comparison(groups, metrics, statements_of(groups, metrics), _notes(groups))


def table_lines(comparison: Comparison) -> list[str]:
    """The comparison as lines for a terminal: a table, reasons of what is missing, statements, notes."""
    reasons: dict[str, int] = {}
    rows = [["", *(group.label for group in comparison.groups), ""]]
    for name in comparison.metrics:
        best = comparison.best(name)
        cells = []
        for group in comparison.groups:
            if values := group.values(name):
                cells.append(readable_values(values, name) + (" *" if group is best else ""))
            else:
                cells.append(f"none [{reasons.setdefault(group.reason(name), len(reasons) + 1)}]")
        metric = metric_of(name)
        rows.append([metric.label, *cells, metric.direction])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "* best, unless undecided", *(f"[{number}] {text}" for text, number in reasons.items())]
    said = [_statement_line(one) for one in comparison.statements]
    return [*comparison.warnings, *lines, "", *said, *comparison.notes]


def markdown(comparison: Comparison, picture: str | None = None) -> str:
    """The comparison as a Markdown document; `picture` is a relative path of the picture to show."""
    labels = [markdown_text(group.label) for group in comparison.groups]
    lines = [f"# {' and '.join(labels) if len(labels) < 4 else f'{len(labels)} models'} compared", ""]
    lines += [f"**{markdown_text(warning)}**\n" for warning in comparison.warnings]
    lines += [f"- {markdown_text(_statement_line(one))}" for one in comparison.statements]
    lines += ["", f"| metric | {' | '.join(labels)} | |", "|---" * (len(labels) + 2) + "|"]
    for name in comparison.metrics:
        best = comparison.best(name)
        cells = []
        for group in comparison.groups:
            values = group.values(name)
            text = readable_values(values, name) if values else markdown_text(group.reason(name))
            cells.append(f"**{text}**" if group is best else text)
        metric = metric_of(name)
        lines.append(f"| {metric.label} | {' | '.join(cells)} | {metric.direction} |")
    lines += ["", *map(markdown_text, comparison.notes)]
    if picture:
        lines += ["", f"![samples, reconstructions, interpolations and metrics side by side]({picture})"]
    return "\n".join(lines).rstrip() + "\n"


def _statement_line(statement: Statement) -> str:
    line = f"{statement.topic}: {statement.text}"
    if statement.textbook:
        line += f" Textbooks say: {statement.textbook}; {statement.verdict}."
    return line


def _refuse_other_data(runs: Sequence[RunRecord]) -> None:
    first, *others = runs
    for run in others:
        if run.state["data_digest"] != first.state["data_digest"]:
            raise ConfigError(
                f"{first.path} and {run.path} do not compare: one is of {first.config.data} (digest "
                f"{first.state['data_digest'][:8]}), the other of {run.config.data} "
                f"({run.state['data_digest'][:8]}); compare runs on the same data"
            )


def _refuse_other_features(runs: Sequence[RunRecord]) -> None:
    evaluated = [(run, run.evaluation.features) for run in runs if run.evaluation and run.evaluation.features]
    for run, features in evaluated[1:]:
        if features.get("digest") != evaluated[0][1].get("digest"):
            raise ConfigError(
                f"{evaluated[0][0].path} and {run.path} were evaluated in other features, so that FID and the like do "
                f"not compare; evaluate one of them again in those of the other: gen-dist evaluate {run.path}"
            )


def _notes(groups: Sequence[Group]) -> list[str]:
    notes = []
    single = [group.label for group in groups if len(group.runs) == 1]
    if single:
        notes.append(f"One run each of {' and '.join(single)}: other seeds give slightly different figures.")
    machines = {machine_of(run) for group in groups for run in group.runs}
    if len(machines) > 1:
        notes.append(f"Trained on different machines ({'; '.join(sorted(machines))}): times do not compare.")
    return notes
