"""Curves of a run over its steps as a PNG file, with one panel for each figure of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.config import ObjectiveConfig
from gen_dist.pictures.figures import FAKE_COLOUR, REAL_COLOUR, figure_of, percent, save_figure
from gen_dist.records.readable import readable_number, readable_share, readable_tick

# Okabe and Ito. One panel has the lines of training and test, or of all phases, or of real and fake images.
_COLOURS = {"train": "blue", "test": "orange", "real": "blue", "fake": "orange"}
_PHASE_COLOURS = ("blue", "orange", "green")
_HEX = {"blue": REAL_COLOUR, "orange": FAKE_COLOUR, "green": "#009e73", "ink": "#4d4d4d"}

ANY_OBJECTIVE = ObjectiveConfig()
"""Stands for an objective that has no names for its figures."""
_ACRONYMS = frozenset({"nll", "kl", "elbo", "iwae", "fid", "kid"})
_TITLES = {"sure_ratio": "samples of a sure class"}
_UNITS = {
    "images_per_second": "images / s",
    "accuracy": "of the images classified correctly",
    "diversity_ratio": "times that of test images",
    "classes_found": "classes of the samples",
    "sure_ratio": "times that of test images",
    "class_variation": "total variation from test images",
    "label_accuracy": "of the samples in their class",
}
_FIRST_PANELS = ("loss", "accuracy", "negative_elbo", "nll", "kl")
_CHECK_PANELS = ("diversity_ratio", "classes_found", "sure_ratio", "class_variation", "label_accuracy")
_LAST_PANELS = (*_CHECK_PANELS, "learning_rate", "images_per_second")
_OF_MACHINE = ("tflops_per_second", "fraction_of_peak", "peak_memory_mib")
"""Figures without panels: they follow the throughput, or stay as they are."""
_CHART_WIDTH, _CHART_HEIGHT, _NUMBER_HEIGHT = 4.3, 3.1, 1.3
"""Sizes of panels, in inches."""
_PERCENT_PANELS = frozenset({"accuracy", "label_accuracy"})
_LOG_PANELS = frozenset({"gradient_norm"})


def has_curves(records: Sequence[Mapping[str, Any]]) -> bool:
    """True if any record has a scalar."""
    return bool(curves_of(records))


def save_curves(path: Path, records: Sequence[Mapping[str, Any]], objective: ObjectiveConfig = ANY_OBJECTIVE) -> None:
    """Draw one panel for each name, with `train/NAME` and `test/NAME` together.

    Axis limits ignore the first tenth of the steps: a steep start would flatten the rest. Figures of a single step are
    written as numbers below the charts.

    Args:
        path: the PNG file.
        records: the objects of metrics.jsonl. A null leaves a gap.
        objective: has the names of figures and phases.

    Raises:
        ValueError: no record has a scalar.
    """
    curves = curves_of(records, objective)
    if not curves:
        raise ValueError("no record has a scalar to draw")
    charts = {name: lines for name, lines in curves.items() if not is_single(lines)}
    numbers = {name: lines for name, lines in curves.items() if is_single(lines)}
    columns = min(3, max(len(charts), len(numbers)))
    chart_rows, number_rows = -(-len(charts) // columns), -(-len(numbers) // columns)
    width, height = _CHART_WIDTH * columns, _CHART_HEIGHT * chart_rows + _NUMBER_HEIGHT * number_rows
    last_step = max(record["step"] for record in records)
    with figure_of(width, height) as figure:
        for place, (name, lines) in enumerate(charts.items()):
            row, column = divmod(place, columns)
            top = height - _CHART_HEIGHT * row - 0.35
            axes = _add_axes(figure, _CHART_WIDTH * column + 0.8, top, _CHART_WIDTH - 1.0, _CHART_HEIGHT - 0.85)
            _draw_panel(axes, name, lines, objective)
            axes.set_xlim(0, 1.02 * last_step or 1)
        for place, (name, lines) in enumerate(numbers.items()):
            row, column = divmod(place, columns)
            top = height - _CHART_HEIGHT * chart_rows - _NUMBER_HEIGHT * row - 0.35
            axes = _add_axes(figure, _CHART_WIDTH * column, top, _CHART_WIDTH, _NUMBER_HEIGHT - 0.45)
            _write_panel(axes, name, lines, objective)
        save_figure(path, figure)


def _add_axes(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes at a place in inches: the layout engines of matplotlib would double the drawing time."""
    wide, high = figure.get_size_inches()
    return figure.add_axes((left / wide, (top - height) / high, width / wide, height / high))


def is_single(lines: Mapping[str, NDArray[np.float64]]) -> bool:
    """True if all finite points of a panel are of one step: a chart of them would be dots."""
    return len({step for points in lines.values() for step, value in points if np.isfinite(value)}) == 1


def single_value(name: str, lines: Mapping[str, NDArray[np.float64]]) -> tuple[str, int]:
    """Text and step of a panel whose points are of one step: `107.93`, or `train 107.93, test 110.21`."""
    last = {line: points[np.isfinite(points[:, 1])][-1:] for line, points in lines.items()}
    several = len(last) > 1
    texts = [
        f"{f'{line} ' if several else ''}{readable_value(point[0, 1], name)}"
        for line, point in last.items()
        if len(point)
    ]
    return ", ".join(texts), int(max(point[0, 0] for point in last.values() if len(point)))


def curves_of(
    records: Sequence[Mapping[str, Any]], objective: ObjectiveConfig = ANY_OBJECTIVE
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Panels by name, each with lines [points, (step, value)] by name. Lists are left to other charts."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    keys = {key for record in records for key in record}
    passed_over = {"step", "images_seen", *_OF_MACHINE}
    if "samples/diversity_ratio" in keys:
        passed_over.add("samples/diversity")  # the same curve at another scale
    for record in records:
        for key, value in record.items():
            if key in passed_over or isinstance(value, list):
                continue
            panel, line = _place(key)
            number = float("nan") if value is None else float(value)
            points.setdefault(panel, {}).setdefault(line, []).append((record["step"], number))
    order = [*_FIRST_PANELS, *sorted(points.keys() - {*_FIRST_PANELS, *_LAST_PANELS}), *_LAST_PANELS]
    return {
        name: {
            line: np.array(points[name][line])
            for line in sorted(points[name], key=lambda line: _line_order(line, objective))
        }
        for name in order
        if name in points
    }


def _place(key: str) -> tuple[str, str]:
    """Panel and line of a name in metrics.jsonl: `train/nll` is line `train`, `train/generator/loss` is `generator`."""
    *scopes, name = key.split("/")
    split = scopes.pop(0) if scopes and scopes[0] in ("train", "test") else ""
    line = "" if scopes in (["samples"], ["evaluation"]) else " ".join(scopes)
    if name in ("accuracy_real", "accuracy_fake"):  # only a discriminator has them
        name, _, line = name.partition("_")
    if not line:
        return name, split
    return name, f"test {line}" if split == "test" else line


def _line_order(line: str, objective: ObjectiveConfig) -> tuple[bool, int, str]:
    """Sort key of lines: training before test, then real before fake, then the order of the objective's phases."""
    names = [*_COLOURS, *objective.phase_names]
    last = line.split(" ")[-1]
    return line.startswith("test"), names.index(last) if last in names else len(names), line


def colour_of(line: str, objective: ObjectiveConfig, beside: Iterable[str] = ()) -> str:
    """Colour of a line: `blue`, `orange`, `green` or `ink`.

    Args:
        line: name of the line.
        objective: config whose phases have colours by their order.
        beside: names of all lines of its panel. Several phases that the config does not name get colours that are free.
    """
    last = line.split(" ")[-1]
    known = dict(zip(objective.phase_names, _PHASE_COLOURS, strict=False))
    free = [colour for colour in _PHASE_COLOURS if colour not in known.values()]
    known |= _COLOURS
    unnamed = sorted({one.split(" ")[-1] for one in beside} - known.keys())
    if len(unnamed) > 1:
        known |= dict(zip(unnamed, free, strict=False))
    return known.get(last, "ink")


def unit_of(name: str, objective: ObjectiveConfig) -> str | None:
    """Unit of a panel; None if it has none or the objective does not state it."""
    known = objective.figure_names.get(name)
    return known.unit if known else _UNITS.get(name)


def spelled(name: str, objective: ObjectiveConfig) -> str:
    """Name of a panel as a title: `negative ELBO`."""
    if known := objective.figure_names.get(name):
        return known.title
    if name in _TITLES:
        return _TITLES[name]
    return " ".join(word.upper() if word in _ACRONYMS else word for word in name.split("_"))


def _write_panel(axes: Any, name: str, lines: Mapping[str, NDArray[np.float64]], objective: ObjectiveConfig) -> None:
    """Write the value of a panel of one step, with its unit below."""
    value, step = single_value(name, lines)
    axes.set_axis_off()
    axes.set_title(spelled(name, objective))
    unit = unit_of(name, objective)
    axes.text(0.5, 0.68, value, ha="center", va="center", fontsize=20 if len(value) < 15 else 13)
    axes.text(0.5, 0.18, f"{f'{unit}, ' if unit else ''}at step {step:,}", ha="center", va="center", fontsize=9)


def _draw_panel(
    axes: Any, name: str, lines: Mapping[str, NDArray[np.float64]], objective: ObjectiveConfig = ANY_OBJECTIVE
) -> None:
    everything = np.concatenate(list(lines.values()))
    in_percent = name in _PERCENT_PANELS
    for line, points in lines.items():
        finite = points[np.isfinite(points[:, 1])]
        last = readable_value(finite[-1, 1], name) if len(finite) else "never finite"
        is_test = line.startswith("test")
        axes.plot(
            *points.T,
            color=_HEX[colour_of(line, objective, lines)],
            marker="o" if is_test or len(points) < 15 else None,
            markersize=3.5,
            linewidth=1.4,
            linestyle="--" if is_test and line != "test" else "-",
            label=f"{line} {last}".strip(),
            zorder=3 if is_test else 2,
        )
    axes.set_title(spelled(name, objective))
    axes.set_xlabel("step")
    axes.set_ylabel(unit_of(name, objective) or "")
    axes.grid(True)
    axes.yaxis.set_major_formatter(percent if in_percent else lambda value, _: readable_tick(value))
    low, high, logarithmic = axis_limits(name, everything)
    # A small panel needs few ticks, which take a third of the drawing time.
    axes.locator_params(nbins=5)
    if logarithmic:
        _log_axis(axes, (low, high))
    else:
        axes.set_ylim(low, high)
    if _has_phases(lines) and not in_percent:
        # The lines leave no corner free: make room for the legend above them.
        rows = 1 + (len(lines) + 1) // 2
        _stretch_upwards(axes, 0.13 * rows)
        axes.legend(
            title="last value",
            loc="upper center",
            ncols=2,
            columnspacing=1.0,
            handlelength=1.5,
            frameon=True,
            edgecolor="none",
        )
    else:
        axes.legend(title="last value", frameon=True, framealpha=0.8, edgecolor="none")


def _has_phases(lines: Collection[str]) -> bool:
    return not {"train", "test", ""} & set(lines)


def _stretch_upwards(axes: Any, share: float) -> None:
    """Extend the vertical axis upwards by a share of its length on paper."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(low, high * (high / low) ** share)
    else:
        axes.set_ylim(low, high + share * (high - low))


def readable_value(value: float, name: str) -> str:
    """Value of a panel as text: a percentage, a whole number or a loss."""
    if name in _PERCENT_PANELS:
        return readable_share(value)
    return f"{value:.0f}" if name == "classes_found" else readable_number(value)


def _log_axis(axes: Any, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    formatter = axes.yaxis.get_major_formatter()
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if limits[1] / limits[0] < 1e3 else (1.0,)))
    axes.yaxis.set_major_formatter(formatter)
    axes.yaxis.set_minor_formatter(NullFormatter())


def axis_limits(name: str, points: NDArray[np.float64]) -> tuple[float, float, bool]:
    """Limits of the vertical axis of a panel with these points [N, (step, value)], and True if it is logarithmic."""
    if name in _LOG_PANELS and (limits := _log_limits(points)):
        return *limits, True
    if name in _PERCENT_PANELS:
        return -0.02, 1.02, False
    if name in _LAST_PANELS:
        return 0.0, 1.08 * np.max(points[:, 1], initial=0, where=np.isfinite(points[:, 1])) or 1.0, False
    return *limits_of(points), False


def _log_limits(points: NDArray[np.float64]) -> tuple[float, float] | None:
    """Limits of a logarithmic axis; None if the values differ too little for one."""
    positive = points[np.isfinite(points[:, 1]) & (points[:, 1] > 0)]
    if not len(positive):
        return None
    low, high = limits_of(np.column_stack([positive[:, 0], np.log10(positive[:, 1])]))
    return (10.0**low, 10.0**high) if high - low > np.log10(8) else None


def limits_of(points: NDArray[np.float64]) -> tuple[float, float]:
    """Limits of an axis, from the values after the first tenth of the steps and without single spikes."""
    points = points[np.isfinite(points[:, 1])]
    settled = points[points[:, 0] > 0.1 * points[:, 0].max(initial=0), 1]
    values = settled if len(settled) >= 4 else points[:, 1]
    if not len(values):
        return 0, 1
    low, high = np.percentile(values, [1, 99]) if len(values) >= 200 else (values.min(), values.max())
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
