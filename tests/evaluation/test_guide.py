"""The room's guide is complete: its table of metrics is that of the registry."""

import re
from pathlib import Path

import gen_dist.evaluation
from gen_dist.evaluation.guide import base_name, reference_of
from gen_dist.evaluation.metrics import all_metrics


def test_guide_lists_every_metric_with_its_needs() -> None:
    guide = Path(gen_dist.evaluation.__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", guide, re.MULTILINE)
    assert rows == [
        (metric.name, metric.direction or "none", ", ".join(metric.needs) or "nothing")
        for metric in all_metrics().values()
    ]


def test_names_say_reference_and_prior() -> None:
    named = {
        "fid_10k": ("fid", None),
        "fid_50k_train": ("fid", "train"),
        "fid_efficientnet-lite0_1k_ref-1a2b3c4d_fitted": ("fid", "ref-1a2b3c4d"),
        "nll_k5000_1k": ("nll", None),
        "memorization_fitted": ("memorization", None),
        "sharpness_data": ("sharpness_data", None),
    }
    assert {name: (base_name(name), reference_of(name)) for name in named} == named
