"""The report as one HTML file: runs and their comparison, filled into page.html."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from gen_dist.config import Capability
from gen_dist.errors import ConfigError
from gen_dist.evaluation.guide import metric_of
from gen_dist.files import reason_of, write_atomically
from gen_dist.reports.comparison import Comparison, comparison_of
from gen_dist.reports.groups import Group
from gen_dist.reports.run_page import SERIES, Frame, RunPage, pictures_of, run_page, value_text
from gen_dist.reports.run_record import RunRecord
from gen_dist.reports.thumbnails import thumbnails
from gen_dist.training.step_times import StepTimes


def write_report(path: Path, runs: Sequence[RunRecord], step_times: Sequence[StepTimes | None]) -> None:
    """Write the report of one run, or of several with their comparison first.

    Args:
        path: the HTML file.
        runs: as `read_run` gives them; several are of the same data.
        step_times: times of each run; None if not measured.

    Raises:
        ConfigError: the file cannot be written.
    """
    comparison = comparison_of(runs) if len(runs) > 1 else None
    try:
        write_atomically(path, report_html(runs, step_times, comparison))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {reason_of(error)}") from None


def report_html(
    runs: Sequence[RunRecord], step_times: Sequence[StepTimes | None], comparison: Comparison | None
) -> str:
    """The whole page. It loads nothing: pictures are data URIs, style and script are inline."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    texts = files("gen_dist.reports")
    environment = Environment(
        loader=PackageLoader("gen_dist.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = sum(map(pictures_of, runs)) + (3 * len(runs) if comparison else 0)
    pages = [
        run_page(run, times, place, pictures) for place, (run, times) in enumerate(zip(runs, step_times, strict=True))
    ]
    command = shlex.join(["gen-dist", "report", *(str(run.path) for run in runs)])
    return environment.get_template("page.html").render(
        title=pages[0].title if comparison is None else " and ".join(group.label for group in comparison.groups),
        pages=pages,
        command=command,
        comparison=None if comparison is None else _comparison(comparison, pages, pictures),
        style=Markup((texts / "style.css").read_text(encoding="utf-8")),
        script=Markup((texts / "script.js").read_text(encoding="utf-8")),
    )


def _comparison(comparison: Comparison, pages: Sequence[RunPage], page_pictures: int) -> dict[str, Any]:
    by_run = {id(page.run): page for page in pages}
    rows = []
    for name in comparison.metrics:
        best, metric = comparison.best(name), metric_of(name)
        cells = []
        for group in comparison.groups:
            values = group.values(name)
            text = value_text(name, values, group) if values else group.reason(name)
            cells.append({"text": text, "has": bool(values), "best": group is best})
        rows.append({"label": metric.label, "direction": metric.direction, "meaning": metric.meaning, "cells": cells})
    pictures: dict[str, list[Frame | None]] = {
        kind: [next(reversed(by_run[id(group.runs[0])].series.get(kind, [])), None) for group in comparison.groups]
        for kind in SERIES
    }
    pictures["interpolations"] = [
        Frame("", *thumbnails([file], page_pictures)) if (file := group.runs[0].picture("interpolations")) else None
        for group in comparison.groups
    ]
    return {
        "labels": [group.label for group in comparison.groups],
        "rows": rows,
        "warnings": comparison.warnings,
        "statements": comparison.statements,
        "notes": comparison.notes,
        "pictures": {kind: frames for kind, frames in pictures.items() if any(frames)},
        "why_none": {
            "samples": [_why_none(group, "samples", "none has been drawn yet") for group in comparison.groups],
            "reconstructions": [_why_none(group, "encoder", "none has been drawn yet") for group in comparison.groups],
            "interpolations": [
                _why_none(group, "samples", "they are made when the run finishes") for group in comparison.groups
            ],
        },
    }


def _why_none(group: Group, capability: Capability, not_yet: str) -> str:
    """Reason why a group has no picture that needs a capability."""
    return group.runs[0].config.objective.lacks.get(capability, not_yet)
