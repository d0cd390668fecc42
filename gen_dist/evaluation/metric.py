"""A metric: its names, direction, requirements and measurement.

A metric is one file in `gen_dist/evaluation/metrics`, found by its place there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gen_dist.errors import ConfigError
from gen_dist.plugins.tables import Table

Better = Literal["less", "more", "data"]
Group = Literal["features", "pixels", "classes", "walks", "likelihood", "reconstruction", "latents", "run"]
GROUPS: tuple[Group, ...] = ("features", "pixels", "classes", "walks", "likelihood", "reconstruction", "latents", "run")
"""Groups in the order of tables. Within a group, metrics have the order of their files, plug-ins last."""
Value = float | int | list[float]


class UnavailableError(Exception):
    """Raised while measuring a metric that is not available; its text is the reason as a clause."""


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    """Name in options and, with counts behind it, in evaluation.json."""
    label: str
    """Name for people."""
    group: Group
    better: Better | None
    """Smaller values are better, larger ones, or those near that of the data; None if no direction is."""
    meaning: str
    """One sentence."""
    unit: str = ""
    needs: tuple[str, ...] = ()
    """Requirements of the model and the data, by the names of `gen_dist.evaluation.plan.REQUIREMENTS`."""
    counts: Literal["samples", "importance samples", "test images", "chosen test images"] | None = None
    """Numbers that are part of the figure, and so of its full name: `fid_10k`, `nll_k5000_1k`, `rfid_digits_1k`. The
    chosen test images are those that `nll` is measured on."""
    named_after: Literal["features", "other features", "perceptual features"] | None = None
    """Network whose name is part of the figure's full name; of `other features`, if it is not the digit network."""
    of_reference: bool = False
    """True if samples are compared with the images of `--reference`. Those are part of the full name, as in
    `fid_50k_train`, unless they are the test split."""
    measure: Callable[[Any], Mapping[str, Value]] | None = None
    """Function of a `gen_dist.evaluation.context.Context` to values by name: that of the metric, and perhaps, as
    `NAME_data`, that of the data. None for figures of the run, which are not measured."""
    stage: str = ""
    """Name of its time in evaluation.json; its own name if it has none."""
    rests_on_features: bool = False
    """True if figures of different feature networks do not compare."""
    of_pixels: bool = False
    """True if figures compare only between equal pixel models: real-valued or binarized."""
    estimate: Callable[[Any], tuple[str, float] | None] | None = None
    """Function of the same context to what will be measured and about how many seconds it takes, for slow metrics. It
    returns None where the metric is quick."""
    takes_minutes: bool = False
    """True for slow metrics: they are measured last, after the others have been written."""

    @property
    def direction(self) -> str:
        """The better direction in words."""
        match self.better:
            case "less":
                return "less is better"
            case "more":
                return "more is better"
            case "data":
                return "near the data's is better"
            case None:
                return ""


_METRICS: Table[Metric] = Table("metric")


def register(metric: Metric) -> Metric:
    """Add a metric to the table.

    Raises:
        ConfigError: its name is taken, or its group does not exist.
    """
    if metric.group not in GROUPS:
        raise ConfigError(f"metric {metric.name!r} has group {metric.group!r}; the groups are {', '.join(GROUPS)}")
    _METRICS.add(metric.name, metric)
    return metric


def registered() -> dict[str, Metric]:
    """The registered metrics by name, in the order of tables."""
    return dict(sorted(_METRICS.parts.items(), key=lambda entry: _place(entry[1])))


def _place(metric: Metric) -> tuple[int, bool, str]:
    """Key of a metric's place in tables, which does not depend on which file was imported first."""
    file = "" if metric.measure is None else metric.measure.__module__
    return GROUPS.index(metric.group), bool(file) and not file.startswith("gen_dist."), file
