"""The metrics, a file each: a function of images, features or log-weights, and the entry that registers it.

Sums over pairs and rows are computed in parts, for the rows of one process, so many processes add theirs up exactly.
"""

from __future__ import annotations

from gen_dist.evaluation.metric import Metric, registered
from gen_dist.plugins.loading import find_parts


def all_metrics() -> dict[str, Metric]:
    """All metrics by name, in the order of tables: those that the modules of this folder and plug-ins register."""
    find_parts(__name__)
    return registered()


def measured_metrics() -> dict[str, Metric]:
    """The metrics that an evaluation measures, by name."""
    return {name: metric for name, metric in all_metrics().items() if metric.measure is not None}
