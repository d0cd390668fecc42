"""The page of the history: benchmarks over commits as inline SVG; script.js shows values at the pointer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from bench.history.record import Record
from gen_dist.records.readable import readable_number, readable_tick

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 22
LEAST_RANGE = 0.1
"""Least distance of the axis's ends from the middle value, as a share of it, so that noise does not fill a drawing."""
_COLOURS = ("blue", "orange", "green", "ink")
_MARKS = ("M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0Z", "M-3-3H3V3H-3Z", "M0-4L3.8 3H-3.8Z", "M0-4L4 0L0 4L-4 0Z")
"""Marks of machines, beside their colours: a circle, a square, a triangle, a diamond around 0, 0."""


@dataclass(frozen=True)
class Machine:
    """Hardware and versions, and how its figures are drawn."""

    label: str
    """`machine 1` and so on, in the order of their first figures."""
    fingerprint: str
    colour: str
    mark: str


@dataclass(frozen=True)
class Point:
    """One figure in a drawing."""

    x: float
    y: float
    record: Record
    machine: Machine
    text: str
    """Full description of the figure."""


@dataclass(frozen=True)
class Series:
    """The figures of one machine in one drawing."""

    machine: Machine
    points: Sequence[Point]
    line: str
    """Path through the medians."""
    band: str
    """Path around 20th and 80th percentiles; a bar for one that has no neighbour."""


@dataclass(frozen=True)
class Panel:
    """One benchmark."""

    title: str
    series: Sequence[Series]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    latest: str
    description: str
    data: str
    """JSON for the script: a list of [x, y, text], from left to right."""

    @property
    def points(self) -> list[Point]:
        """All points, the newest commit first."""
        return sorted((point for one in self.series for point in one.points), key=lambda point: -point.x)


def history_html(records: Sequence[Record]) -> str:
    """The whole page. It loads nothing from elsewhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).resolve().parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    machines = machines_of(records)
    commits = commits_of(records)
    names = list(dict.fromkeys(record.benchmark for record in records))
    groups: dict[str, list[Panel]] = {}
    for name in names:
        own = [record for record in records if record.benchmark == name]
        groups.setdefault(name.partition("::")[0], []).append(panel_of(name, own, commits, machines))
    return environment.get_template("page.html").render(
        groups=groups,
        machines=list(machines.values()),
        commits=len(commits),
        figures=len(records),
        conditions=conditions_of,
        style=Markup((files("gen_dist.reports") / "style.css").read_text(encoding="utf-8")),
        script=Markup((here / "script.js").read_text(encoding="utf-8")),
    )


def machines_of(records: Sequence[Record]) -> dict[str, Machine]:
    """Every machine by its fingerprint."""
    found = dict.fromkeys(record.machine for record in records)
    return {
        told: Machine(
            f"machine {place + 1}",
            told or "nothing known",
            _COLOURS[place % len(_COLOURS)],
            _MARKS[place % len(_MARKS)],
        )
        for place, told in enumerate(found)
    }


def commits_of(records: Sequence[Record]) -> list[str]:
    """All commits by date. Uncommitted changes come right after their commit."""
    dates = {record.commit: record.commit_date for record in records}
    return sorted(dates, key=lambda commit: (moment_of(dates[commit]), commit.endswith("+")))


def moment_of(date: str) -> datetime:
    """Date from git, in the committer's time zone. An invalid date sorts first."""
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def panel_of(name: str, records: Sequence[Record], commits: Sequence[str], machines: Mapping[str, Machine]) -> Panel:
    """The drawing of one benchmark. All drawings have the same commits at the same places."""
    low, high = limits_of(records)

    def y_of(milliseconds: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - milliseconds) / (high - low)

    def x_of(commit: str, nth: int, of: int) -> float:
        """Figures of a commit that was measured several times stand side by side."""
        slot = (WIDTH - LEFT - RIGHT) / len(commits)
        aside = 0.0 if of == 1 else 0.6 * (nth / (of - 1) - 0.5)
        return LEFT + slot * (commits.index(commit) + 0.5 + aside)

    series = []
    for told, machine in machines.items():
        own = sorted(
            (record for record in records if record.machine == told),
            key=lambda record: (commits.index(record.commit), record.measured),
        )
        points, ends = [], []
        for record in own:
            same = [other for other in own if other.commit == record.commit]
            x = x_of(record.commit, same.index(record), len(same))
            points.append(Point(x, y_of(record.p50_ms), record, machine, told_of(record, machine)))
            if record.p20_ms is None or record.p80_ms is None:
                ends.append((x, y_of(record.p50_ms), y_of(record.p50_ms)))
            else:
                ends.append((x, y_of(record.p20_ms), y_of(record.p80_ms)))
        if points:
            line = "".join(f"{'L' if place else 'M'}{p.x:.1f} {p.y:.1f}" for place, p in enumerate(points))
            series.append(Series(machine, points, line if len(points) > 1 else "", band_of(ends)))
    ordered = sorted((point for one in series for point in one.points), key=lambda point: point.x)
    newest = max(ordered, key=lambda point: (commits.index(point.record.commit), point.record.measured))
    return Panel(
        title=title_of(name),
        series=series,
        x_ticks=x_ticks_of(commits),
        y_ticks=[(y_of(tick), readable_tick(tick)) for tick in ticks(low, high)],
        latest=newest.text,
        description=f"{title_of(name)}: milliseconds over {len(commits)} commits, last {newest.text}",
        data=json.dumps([[round(point.x, 1), round(point.y, 1), point.text] for point in ordered]),
    )


def limits_of(records: Sequence[Record]) -> tuple[float, float]:
    """Least and most milliseconds that a drawing shows."""
    values = [
        value for record in records for value in (record.p20_ms, record.p50_ms, record.p80_ms) if value is not None
    ]
    medians = sorted(record.p50_ms for record in records)
    middle = medians[len(medians) // 2]
    low, high = min(*values, middle * (1 - LEAST_RANGE)), max(*values, middle * (1 + LEAST_RANGE))
    margin = 0.05 * (high - low)
    return max(0.0, low - margin), high + margin


def band_of(ends: Sequence[tuple[float, float, float]]) -> str:
    """A closed path around [x, y of p20, y of p80]."""
    if len(ends) == 1:
        (x, bottom, top), half = ends[0], 3.0
        return f"M{x - half:.1f} {top:.1f}H{x + half:.1f}V{bottom:.1f}H{x - half:.1f}Z"
    there = [f"{x:.1f} {top:.1f}" for x, _, top in ends]
    back = [f"{x:.1f} {bottom:.1f}" for x, bottom, _ in reversed(ends)]
    return f"M{'L'.join([*there, *back])}Z"


def x_ticks_of(commits: Sequence[str]) -> list[tuple[float, str]]:
    """The first, the middle and the last commit, or fewer."""
    last = len(commits) - 1
    slot = (WIDTH - LEFT - RIGHT) / len(commits)
    places = sorted({0, last // 2, last}) if last >= 4 else sorted({0, last})
    return [(LEFT + slot * (place + 0.5), short(commits[place])) for place in places]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two."""
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(nbins=4).tick_values(low, high) if low <= tick <= high]


def told_of(record: Record, machine: Machine) -> str:
    """A figure, its commit and its machine in one line."""
    subject = f" {record.subject}" if record.subject else ""
    return f"{spread_of(record)}; {short(record.commit)}{subject}; {record.commit_date[:10]}; {machine.label}"


def spread_of(record: Record) -> str:
    """Median and percentiles in words: `1.05 ms (0.75 to 1.97)`."""
    spread = ""
    if record.p20_ms is not None and record.p80_ms is not None:
        spread = f" ({readable_number(record.p20_ms)} to {readable_number(record.p80_ms)})"
    return f"{readable_number(record.p50_ms)} ms{spread}"


def conditions_of(record: Record) -> str:
    """Conditions of a figure besides its machine, and its date."""
    load: Any = record.conditions.get("load_average")
    words = [f"measured {record.measured[:16].replace('T', ' ')}" if record.measured else ""]
    words += [f"n {record.n}" if record.n else "", f"load {load}" if load is not None else ""]
    return ", ".join(filter(None, words))


def title_of(name: str) -> str:
    """A benchmark's readable name: `test_step.py::test_whole_step[vae-mnist]` is `Whole step [vae-mnist]`."""
    words = name.rpartition("::")[2].removeprefix("test_")
    function, bracket, case = words.partition("[")
    title = function.replace("_", " ")
    return title[:1].upper() + title[1:] + (f" {bracket}{case}" if bracket else "")


def short(commit: str) -> str:
    """Short name of a commit."""
    return commit[:7] + "+" * commit.endswith("+")
