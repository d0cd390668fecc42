"""Figures of an evaluation are added to those before only where they belong together."""

from __future__ import annotations

from typing import Any

from gen_dist.evaluation.record import Evaluation


def _evaluation(**changes: Any) -> Evaluation:
    fields: dict[str, Any] = dict.fromkeys(("preset", "data", "data_digest", "split"), "same")
    fields |= {name: {} for name in ("pixels", "metrics", "unavailable", "seconds", "environment")}
    return Evaluation(**{"checkpoint_step": 4, "features": None, **fields, **changes})


def test_figures_of_another_fitted_prior_are_dropped() -> None:
    figures = {"fid_1k_fitted": 2.0, "fid_1k": 3.0}
    intervals = {"fid_1k_fitted": [1.0, 3.0]}
    before = _evaluation(metrics=figures, intervals=intervals, fitted_prior="first")
    for prior, kept in (("first", True), (None, True), ("second", False)):
        found = _evaluation(metrics={"kid_1k_fitted": 0.1}, fitted_prior=prior).added_to(before)
        assert found.metrics == {"kid_1k_fitted": 0.1, "fid_1k": 3.0} | (figures if kept else {})
        assert found.intervals == (intervals if kept else {})
        assert found.fitted_prior == (prior or "first")


def test_figures_of_the_data_go_with_those_of_their_features() -> None:
    figures = {"memorization": 0.02, "memorization_data": 0.01, "sharpness_1k": 1.0, "sharpness_data": 2.0}
    before = _evaluation(metrics=figures, features={"name": "digits", "digest": "one"})
    found = _evaluation(metrics={"fid_1k": 1.0}, features={"name": "inception", "digest": "two"}).added_to(before)
    assert found.metrics == {"fid_1k": 1.0, "sharpness_1k": 1.0, "sharpness_data": 2.0}
