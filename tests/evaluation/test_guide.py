"""The room's guide is complete: its table of metrics is that of the registry."""

import re
from pathlib import Path

import gen_dist.evaluation
from gen_dist.evaluation.metrics import all_metrics


def test_guide_lists_every_metric_with_its_needs() -> None:
    guide = Path(gen_dist.evaluation.__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", guide, re.MULTILINE)
    assert rows == [
        (metric.name, metric.direction or "none", ", ".join(metric.needs) or "nothing")
        for metric in all_metrics().values()
    ]
