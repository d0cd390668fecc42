"""The summary's best step is that of the metric which the objective names first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gen_dist.config import AutoencoderConfig, GanConfig, ObjectiveConfig, TrainConfig, VaeConfig, VaeGanConfig
from gen_dist.records.summary import summary_of
from gen_dist.training.outcome import Outcome

# In an order that no objective names them in: `kl` first.
RECORDS = [
    {"step": 1, "test/kl": 1.0, "test/nll": 9.0, "test/negative_elbo": 10.0, "test/reconstruction_error": 5.0},
    {"step": 2, "test/kl": 2.0, "test/nll": 6.0, "test/negative_elbo": 8.0, "test/reconstruction_error": 4.0},
    {"step": 3, "test/kl": 4.0, "test/nll": 5.0, "test/negative_elbo": 9.0, "test/reconstruction_error": 3.0},
]


def _summary(objective: ObjectiveConfig, records: list[dict[str, Any]]) -> dict[str, Any]:
    return summary_of(
        TrainConfig(objective=objective), records, step=3, train_images=384, training_seconds=1.0, pictures={}
    )


@pytest.mark.parametrize(
    ("objective", "best"),
    [
        (VaeConfig(), {"step": 2, "test/negative_elbo": 8.0}),
        (AutoencoderConfig(), {"step": 3, "test/reconstruction_error": 3.0}),
        (VaeGanConfig(), {"step": 3, "test/reconstruction_error": 3.0}),
        (GanConfig(), None),
    ],
    ids=["vae", "autoencoder", "vae-gan", "gan"],
)
def test_the_best_step_is_by_the_objectives_headline(objective: ObjectiveConfig, best: dict[str, Any] | None) -> None:
    assert _summary(objective, RECORDS)["best"] == best


def test_a_collapse_that_holds_at_the_end_is_in_the_summary() -> None:
    records = [{"step": step, "train/kl": 0.005} for step in (100, 200, 300)]
    (collapse,) = summary_of(
        TrainConfig(steps=300), records, step=300, train_images=9, training_seconds=1.0, pictures={}
    )["collapses"]
    assert collapse.startswith("posterior collapse since step 100: ")
    assert _summary(VaeConfig(), RECORDS)["collapses"] == []
    lines = Outcome(Path("run"), 300, True, {"test/kl": 0.005}, {}, [collapse], True, VaeConfig()).report("again")
    assert lines == ["finished at step 300: test  KL 0.01", f"warning: {collapse}"]


def test_a_headline_that_was_never_finite_has_no_best_step() -> None:
    assert _summary(VaeConfig(), [{"step": 1, "test/negative_elbo": None, "test/kl": 1.0}])["best"] is None
