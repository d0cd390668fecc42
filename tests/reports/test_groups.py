"""Reasons for missing figures are those of the figure that is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gen_dist.reports.groups import Group


def test_a_reason_of_another_reference_is_none() -> None:
    unavailable = {
        "fid_1k_ref-00000000": "the reference has 3 images",
        "path_length_1k_fitted": "great circles",
        "ssim": "it has no encoder",
        "kid_1k": "no features",
    }
    evaluation = SimpleNamespace(unavailable=unavailable)
    config = SimpleNamespace(objective=SimpleNamespace(lacks={}))
    run: Any = SimpleNamespace(evaluation=evaluation, path=Path("run"), config=config)
    reasons = {name: Group("one", [run]).reason(name) for name in ("fid_1k", "fid_1k_train", "path_length_1k")}
    assert all(reason.startswith("not evaluated yet") for reason in reasons.values())
    assert reasons["fid_1k_train"].endswith("--metrics fid --reference train")
    for name, reason in unavailable.items():
        assert Group("one", [run]).reason(name) == reason
    assert Group("one", [run]).reason("kid_1k_train") == "no features"
