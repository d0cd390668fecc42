"""Each sign of a collapse is told once, when it begins, and never of a healthy training."""

from __future__ import annotations

import io
from typing import Any

import pytest

from gen_dist.config import GanConfig
from gen_dist.records.collapse import LEAST_STEPS, CollapseWatch
from tests.support.trackers import make_tracker

Record = dict[str, Any]
LOW, HIGH = [1.0] + [0.0] * 19, [0.0] * 19 + [1.0]
EVEN = [0.05] * 20
D = "train/discriminator/accuracy_"

SIGNS: dict[str, list[Record]] = {
    "posterior collapse": [
        {"train/kl": 0.005},
        {"train/encoder/kl": 0.0},
        {"train/vae/kl": 0.0999, "train/loss": 206.0},
    ],
    "dead discriminator": [
        {D + "real": 0.0, D + "fake": 1.0},
        {D + "real": 1.0, D + "fake": 0.001},
        {"train/critic/accuracy": 0.0},
    ],
    "saturated scores": [
        {D + "real": 1.0, D + "fake": 1.0, "scores/real": EVEN, "scores/fake": LOW},
        {D + "real": 0.8, D + "fake": 0.7, "scores/real": HIGH, "scores/fake": EVEN},
        {D + "real": 0.9, D + "fake": 0.9, "scores/real": [0.1] * 5 + [0.0] * 14 + [0.5], "scores/fake": LOW},
    ],
    "collapsed generator": [
        {"samples/diversity_ratio": 0.0},
        {"samples/diversity_ratio": 0.03, "samples/classes_found": 1.0},
        {"samples/diversity_ratio": 0.0499},
    ],
}
CASES = [(name, record) for name, records in SIGNS.items() for record in records]
HEALTHY: list[Record] = [
    {"train/kl": 0.34},  # vae-mnist at 20 times the KL term: one latent is left
    {"train/kl": None},
    {"train/kl": float("nan")},
    {"train/learning_rate": 1e-3},
    {D + "real": 0.96, D + "fake": 0.97, "scores/real": EVEN, "scores/fake": [0.9] + [0.0] * 18 + [0.1]},
    {D + "real": 0.9, D + "fake": 0.9, "scores/real": [None] * 20, "scores/fake": [None] * 20},
    {"train/critic/accuracy": 0.9, "scores/real": HIGH, "scores/fake": LOW},  # a critic's scores have no scale
    {D + "real": 1.0, D + "fake": 1.0, "scores/real": EVEN, "scores/fake": EVEN},  # sure, within the scale
    {D + "real": 1.0, D + "fake": 1.0},
    {D + "real": 0.5, D + "fake": 0.5},
    {"train/critic/accuracy": 1.0},
    {"samples/diversity_ratio": 0.6},
    {"samples/diversity_ratio": None},
    # Figures of a wrong shape, as a damaged file may have them.
    {"samples/diversity_ratio": [0.0], "train/kl": [0.0]},
    {D + "real": [0.0], D + "fake": 1.0},
    {D + "real": 0.9, D + "fake": 0.9, "scores/real": 1.0, "scores/fake": []},
]


def _told(records: list[Record], last_step: int = 10_000) -> list[str]:
    watch = CollapseWatch(last_step)
    return [line.partition(" since step ")[0] for record in records for line in watch.see(record)]


def _over_steps(record: Record, count: int = 8) -> list[Record]:
    return [{"step": LEAST_STEPS + 50 * place, **record} for place in range(count)]


@pytest.mark.parametrize(("name", "record"), CASES)
def test_a_sign_is_told_once_when_it_begins(name: str, record: Record) -> None:
    assert _told(_over_steps(record)) == [name]


@pytest.mark.parametrize(("name", "record"), CASES)
def test_a_sign_near_the_initial_weights_is_none(name: str, record: Record) -> None:
    assert _told([{"step": step, **record} for step in range(1, LEAST_STEPS, 5)], last_step=LEAST_STEPS - 1) == []


@pytest.mark.parametrize("record", HEALTHY)
def test_a_healthy_training_gives_no_sign(record: Record) -> None:
    assert _told(_over_steps(record)) == []


def test_a_sign_that_ends_and_returns_is_told_again() -> None:
    low, well = ({"train/kl": value} for value in (0.01, 9.0))
    records = [{"step": 100 + 50 * place, **one} for place, one in enumerate([low] * 4 + [well] + [low] * 4)]
    assert _told(records) == ["posterior collapse", "posterior collapse ended at step 300", "posterior collapse"]
    watch = CollapseWatch(10_000, records)
    assert [(one.name, one.since) for one in watch.present] == [("posterior collapse", 350)]


def test_a_short_sign_is_told_at_the_last_step_alone() -> None:
    records = [{"step": step, "train/kl": 0.01} for step in (450, 500)]
    assert _told(records, last_step=1000) == []
    assert _told(records, last_step=500) == ["posterior collapse"]


def test_lines_without_the_figure_do_not_end_a_sign() -> None:
    records = [{"step": 100 + 10 * place, **({"train/kl": 0.0} if place % 2 else {})} for place in range(8)]
    assert _told(records) == ["posterior collapse"]


def test_a_resumed_run_does_not_tell_a_sign_again(tmp_path) -> None:
    screens = [io.StringIO(), io.StringIO()]
    dead = {D + "real": 0.0, D + "fake": 1.0, "train/discriminator/loss": 1.39}
    for screen, start in zip(screens, (0, 600), strict=True):
        with make_tracker(tmp_path, start_step=start, stream=screen, objective=GanConfig()) as run:
            for step in range(start + 100, start + 601, 100):
                run.log(step, dead)
    first, second = (screen.getvalue() for screen in screens)
    assert first.count("dead discriminator since step 100: it gives real and generated images the same answer") == 1
    assert "dead discriminator" not in second
