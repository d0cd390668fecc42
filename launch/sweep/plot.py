"""Picture of a sweep: the metric of each trial over the steps, and against each searched field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gen_dist.launch.sweep.results import NOT_FINITE, Metric, Sweep, Trial, readable_metric
from gen_dist.launch.sweep.space import Searched, Value, as_typed
from gen_dist.pictures.figures import INK_HEX, figure_of, save_figure

# Colours of Okabe and Ito, and grey for trials that did not finish.
_BEST, _FINISHED, _OTHER = "#d55e00", "#0072b2", "#9a9a9a"
_LONGEST_LABEL = 14
_MOST_NAMED = 3


def save_plot(path: Path, sweep: Sweep) -> None:
    """Draw the evaluated trials, the best ones in front.

    Raises:
        ValueError: no trial has been evaluated.
        OSError: the file cannot be written.
    """
    trials = [trial for trial in sweep.ranked[::-1] if trial.value is not None and trial.status != "failed"]
    if not trials:
        raise ValueError("no trial has been evaluated")
    rows = min(2, len(sweep.space))
    columns = -(-len(sweep.space) // rows)
    panel_width, height = (3.1, 3.4 * rows + 0.45) if rows > 1 else (3.9, 4.2)
    curves_width = 5.6
    width = curves_width + columns * panel_width
    with figure_of(width, height) as figure:
        bottom, top = 0.55 / height, 1 - 0.45 / height
        under = 0.95 / height  # the legend stands below: among the lines it would cover some
        curves = figure.add_axes((0.85 / width, under, (curves_width - 1.05) / width, top - under))
        panels = figure.subplots(
            rows,
            columns,
            squeeze=False,
            gridspec_kw={
                "left": (curves_width + 0.75) / width,
                "right": 1 - 0.15 / width,
                "bottom": bottom,
                "top": top,
                "wspace": 0.75 / (panel_width - 0.75),
                "hspace": 0.75 / (height / rows - 0.75),
            },
        ).ravel(order="F")
        _draw_curves(curves, sweep, trials, limits_over_steps(sweep.metric, trials, sweep.best))
        limits = limits_at_end(sweep.metric, trials)
        for axes, searched in zip(panels, sweep.space, strict=False):
            _draw_field(axes, sweep, trials, searched, limits)
        for axes in panels[len(sweep.space) :]:
            axes.set_visible(False)
        save_figure(path, figure)


def limits_over_steps(metric: Metric, trials: Sequence[Trial], best: Trial | None) -> tuple[float, float]:
    """Ends of the metric's axis over the steps: they show the whole best trial and the ends of the others.

    Left out is an end twice as far from the best value as that trial and four in five others reach, or further.
    """
    values = [metric.order(value) for trial in trials for _, value in trial.history]
    whole_way = [metric.order(value) for _, value in best.history if abs(value) < NOT_FINITE] if best else []
    ended = [metric.order(trial.value or 0.0) for trial in trials]
    finite = [one for one in ended if one < NOT_FINITE] or ended
    most = max(float(np.percentile(finite, 80, method="lower")), *whole_way, -math.inf)
    near = [one for one in ended if one - min(values) < 2 * (most - min(values))]
    return _ends(metric, values, max(most, *near, -math.inf))


def limits_at_end(metric: Metric, trials: Sequence[Trial]) -> tuple[float, float]:
    """Ends of the metric's axis for last values; trials far worse than the better half do not stretch it."""
    ends = sorted(metric.order(trial.value or 0.0) for trial in trials)
    finite = [end for end in ends if end < NOT_FINITE] or ends
    finished = [metric.order(trial.value or 0.0) for trial in trials if trial.status == "finished"]
    finished = [end for end in finished if end < NOT_FINITE]
    room = 2.5 * (finite[(len(finite) - 1) // 2] - ends[0])
    if finished:
        room = max(room, float(np.percentile(finished, 75)) - ends[0])
    return _ends(metric, ends, ends[0] + room)


def _ends(metric: Metric, values: Sequence[float], worst: float) -> tuple[float, float]:
    """Ends of an axis from the best of `values` to `worst`; both are keys of Metric.order, so that less is better."""
    least, worst = min(values), min(worst, max(values))
    margin = 0.06 * (worst - least) or 0.05 * abs(least) or 1.0
    first, last = metric.order(least - margin), metric.order(worst + margin)
    return min(first, last), max(first, last)


def _colour(sweep: Sweep, trial: Trial) -> str:
    if trial is sweep.best:
        return _BEST
    return _FINISHED if trial.status == "finished" else _OTHER


def _draw_curves(axes: Any, sweep: Sweep, trials: Sequence[Trial], limits: tuple[float, float]) -> None:
    from matplotlib.patheffects import withStroke

    for trial in trials:
        steps, values = zip(*trial.history, strict=True)
        is_best, was_ended = trial is sweep.best, trial.status != "finished"
        axes.plot(
            steps,
            values,
            color=_colour(sweep, trial),
            linewidth=2.4 if is_best else 1.2,
            marker="o" if len(steps) < 25 else None,
            markersize=4 if is_best else 3,
            zorder=4 if is_best else 2 if was_ended else 3,
        )
        if was_ended:
            axes.plot(steps[-1], values[-1], color=_OTHER, marker="x", markersize=7, markeredgewidth=1.6, zorder=3)
    if best := sweep.best:
        # The label stands at the end, where the lines have separated, on the side away from worse trials.
        step, value = best.history[-1]
        below = sweep.metric.mode == "min"
        axes.annotate(
            f"trial {best.index}  {readable_metric(value)}",
            (step, value),
            (0, -14 if below else 8),
            textcoords="offset points",
            ha="right",
            color=_BEST,
            fontsize=9,
            fontweight="bold",
            zorder=5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
        reach = 0.09 * (limits[1] - limits[0])  # room for the label
        limits = (limits[0] - reach, limits[1]) if below else (limits[0], limits[1] + reach)
    _mark_outliers(axes, sweep, trials, limits)
    axes.set_ylim(*limits)
    axes.set_xlim(0, 1.03 * sweep.steps)
    axes.set_xlabel("step")
    axes.set_ylabel(sweep.metric.name)
    axes.set_title(_title(sweep, trials))
    axes.grid(True)
    handles = [
        axes.plot([], [], color=colour, linewidth=line, marker=marker, markersize=size, label=label)[0]
        for colour, line, marker, size, label, shown in (
            (_BEST, 2.4, "o", 4, "best", sweep.best is not None),
            (_FINISHED, 1.2, "o", 3, "finished", any(_colour(sweep, one) == _FINISHED for one in trials)),
            (_OTHER, 1.2, "x", 7, "stopped early", any(one.status == "stopped" for one in trials)),
        )
        if shown
    ]
    inches = axes.get_position().height * axes.figure.get_size_inches()[1]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.45 / inches), ncols=3)


def _mark_outliers(axes: Any, sweep: Sweep, trials: Sequence[Trial], limits: tuple[float, float]) -> None:
    """Mark trials that end beyond the axis by a triangle at its end that points outwards, and name them in a line."""
    from matplotlib.patheffects import withStroke

    if not (names := outliers(sweep.metric, trials, limits)):
        return
    low, high = limits
    upwards = sweep.metric.mode == "min"
    for trial in trials:
        value = trial.value or 0.0
        if low <= value <= high:
            continue
        edge = high - 0.02 * (high - low) if upwards else low + 0.02 * (high - low)
        marker, colour = "^" if upwards else "v", _colour(sweep, trial)
        axes.plot(trial.history[-1][0], edge, marker=marker, markersize=7, color=colour, linestyle="", zorder=5)
    shown = ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" if names[_MOST_NAMED:] else "")
    axes.annotate(
        f"beyond the axis: {shown}",
        (0.98, 1 if upwards else 0),
        (0, -14 if upwards else 14),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="top" if upwards else "bottom",
        fontsize=9,
        zorder=6,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def outliers(metric: Metric, trials: Sequence[Trial], limits: tuple[float, float]) -> list[str]:
    """Trials whose last value is beyond the ends of an axis, worst first, with these values."""
    low, high = limits
    found = [(trial.value, trial.index) for trial in trials if trial.value is not None]
    beyond = sorted((one for one in found if not low <= one[0] <= high), key=lambda one: -metric.order(one[0]))
    return [f"trial {index} ({readable_metric(value)})" for value, index in beyond]


def _title(sweep: Sweep, trials: Sequence[Trial]) -> str:
    better = "less is better" if sweep.metric.mode == "min" else "more is better"
    failed = sum(trial.status == "failed" for trial in sweep.trials)
    missing = f", {failed} failed" if failed else ""
    return f"{len(trials)} trials{missing}; {better}"


def _draw_field(
    axes: Any, sweep: Sweep, trials: Sequence[Trial], searched: Searched, limits: tuple[float, float]
) -> None:
    places = _places(searched, [trial.values[searched.name] for trial in trials])
    low, high = limits
    reach = 0.03 * (high - low)
    for trial, place in zip(trials, places, strict=True):
        value, colour, is_best = trial.value or 0.0, _colour(sweep, trial), trial is sweep.best
        # A value beyond the scale is a triangle at its end that points outwards.
        beyond = int(value > high) - int(value < low)
        marker = {0: "*" if is_best else "o", 1: "^", -1: "v"}[beyond]
        axes.plot(
            place,
            min(max(value, low + reach), high - reach) if beyond else value,
            marker=marker,
            markersize=15 if is_best else 7,
            color=colour if trial.status == "finished" else "white",
            markeredgecolor="white" if trial.status == "finished" else colour,
            markeredgewidth=0.8 if trial.status == "finished" else 1.6,
            linestyle="",
            zorder=4 if is_best else 3,
        )
    axes.set_ylim(low, high)
    axes.set_title(searched.short_name.replace("_", " "))
    axes.grid(True)
    if searched.scale == "choice":
        _label_choices(axes, searched)
    else:
        _scale_numbers(axes, searched)


def _places(searched: Searched, values: Sequence[Value]) -> list[float]:
    """Positions of trials on a field's axis: the number, or the choice's position with some jitter."""
    if searched.scale != "choice":
        return [float(value) for value in values]
    jitter = np.random.default_rng(0).uniform(-0.16, 0.16, len(values))
    return [searched.choices.index(value) + float(aside) for value, aside in zip(values, jitter, strict=True)]


def _label_choices(axes: Any, searched: Searched) -> None:
    labels = [as_typed(choice) for choice in searched.choices]
    labels = [label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…" for label in labels]
    axes.set_xticks(range(len(labels)))
    crowded = sum(map(len, labels)) > 30 or len(labels) > 6
    axes.set_xticklabels(labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.set_xlim(-0.5, len(labels) - 0.5)


def _scale_numbers(axes: Any, searched: Searched) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = searched.low, searched.high
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    if searched.scale != "log":
        margin = 0.04 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=searched.whole))
        return
    decades = math.log10(high / low)
    margin = 10 ** (0.04 * decades)
    axes.set_xscale("log", base=10)
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1.0,) if decades > 2.2 else (1.0, 3.0) if decades > 1.7 else (1.0, 2.0, 5.0))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", color=INK_HEX, length=2)
