"""Curves as inline SVG: drawn here, so that they are there without a script, which adds values under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen_dist.config import ObjectiveConfig
from gen_dist.pictures.curves import (
    ANY_OBJECTIVE,
    axis_limits,
    colour_of,
    curves_of,
    is_single,
    readable_value,
    single_value,
    spelled,
    unit_of,
)
from gen_dist.records.readable import readable_tick

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 8, 22
MOST_POINTS = 300
"""Most points of one line. Longer lines are thinned evenly and keep their ends."""


@dataclass(frozen=True)
class Line:
    """One line of a panel."""

    name: str
    colour: str
    """Name of one of the style sheet's colours."""
    dashed: bool
    last: str
    """Last finite value, as text."""
    path: str
    """SVG path. A value that is not finite leaves a gap."""

    is_dot: bool
    """True if the line is a single point, which a line of no length would hide."""


@dataclass(frozen=True)
class Panel:
    """One figure of metrics.jsonl over the steps."""

    title: str
    unit: str
    lines: Sequence[Line]
    x_ticks: Sequence[tuple[float, str]]
    """Places in the drawing, and labels."""
    y_ticks: Sequence[tuple[float, str]]
    description: str
    """Text alternative of the figure."""
    points: str
    """JSON for the script: by line a list of [x, y, step, readable value]."""


@dataclass(frozen=True)
class Single:
    """One figure of metrics.jsonl that was logged at one step."""

    title: str
    value: str
    """Value with its unit."""
    step: int


def panels_of(
    records: Sequence[Mapping[str, Any]], objective: ObjectiveConfig = ANY_OBJECTIVE
) -> tuple[list[Panel], list[Single]]:
    """A panel for each figure of the objects of metrics.jsonl, as curves.png has them, and the figures of one step."""
    curves = curves_of(records, objective)
    singles = [_single(name, lines, objective) for name, lines in curves.items() if is_single(lines)]
    return [_panel(name, lines, objective) for name, lines in curves.items() if not is_single(lines)], singles


def _single(name: str, lines: Mapping[str, NDArray[np.float64]], objective: ObjectiveConfig) -> Single:
    value, step = single_value(name, lines)
    return Single(spelled(name, objective), f"{value} {unit_of(name, objective) or ''}".strip(), step)


def _drawable(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values with NaN for those whose differences or powers a float could not hold."""
    return np.where(np.abs(values) < 1e100, values, np.nan)


def _panel(name: str, lines: Mapping[str, NDArray[np.float64]], objective: ObjectiveConfig) -> Panel:
    everything = np.concatenate(list(lines.values()))
    everything[:, 1] = _drawable(everything[:, 1])
    low, high, logarithmic = axis_limits(name, everything)
    last_step = float(everything[:, 0].max())

    def place(points: NDArray[np.float64]) -> NDArray[np.float64]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * points[:, 0] / max(last_step, 1.0)
        values, bottom, top = _drawable(points[:, 1]), low, high
        if logarithmic:
            values = np.log10(np.where(values > 0, values, np.nan))
            bottom, top = math.log10(low), math.log10(high)
        y = TOP + (HEIGHT - TOP - BOTTOM) * ((top - values) / (top - bottom))
        return np.column_stack([x, y.clip(TOP - 2 * HEIGHT, 3 * HEIGHT)])  # far outside is outside, and short

    drawn, points, told = [], {}, []
    for line, curve in lines.items():
        thin = curve[np.unique(np.linspace(0, len(curve) - 1, MOST_POINTS).round().astype(int))]
        finite = curve[np.isfinite(curve[:, 1])]
        last = readable_value(finite[-1, 1], name) if len(finite) else "never finite"
        places = place(thin)
        dashed = line.startswith("test ")
        drawn.append(Line(line, colour_of(line, objective, lines), dashed, last, _path(places), len(finite) == 1))
        points[line] = [
            [round(x, 1), round(y, 1), int(step), readable_value(value, name)]
            for (x, y), (step, value) in zip(places.tolist(), thin.tolist(), strict=True)
            if math.isfinite(y)
        ]
        if len(finite):
            told.append(f"{line} from {readable_value(finite[0, 1], name)} to {last}".strip())
    return Panel(
        title=spelled(name, objective),
        unit=unit_of(name, objective) or "",
        lines=drawn,
        x_ticks=[(place(np.array([[tick, low]]))[0, 0], f"{tick:,.0f}") for tick in _ticks(0.0, last_step)],
        y_ticks=[
            (place(np.array([[0.0, tick]]))[0, 1], _tick_label(tick))
            for tick in (_log_ticks(low, high) if logarithmic else _ticks(low, high))
        ],
        description=f"{spelled(name, objective)} over {last_step:,.0f} steps: {'; '.join(told) or 'never finite'}",
        points=json.dumps(points),
    )


def _path(places: NDArray[np.float64]) -> str:
    words, down = [], False
    for x, y in places.tolist():
        if math.isfinite(y):
            words.append(f"{'L' if down else 'M'}{x:.1f} {y:.1f}")
        down = math.isfinite(y)
    if len(words) == 1:
        words.append(words[0].replace("M", "L"))  # a line of no length: its round cap is a dot
    return "".join(words)


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(nbins=4).tick_values(low, high) if low <= tick <= high]


def _tick_label(tick: float) -> str:
    label = readable_tick(tick)
    return label if len(label) <= 7 else f"{tick:.2e}"


def _log_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import LogLocator

    ticks = LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]
