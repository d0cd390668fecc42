"""Verdicts of the performance regression gate on times with a known ratio."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.gate.verdicts import (
    LEAST_PAIRS,
    LOOKS,
    Interval,
    Verdict,
    confidence_of_look,
    interval_between,
    interval_of,
    order_of_turn,
    turn_log_ratio,
    verdict_of,
)

THRESHOLD = 5.0
TURNS = 8
TRIES = 200


def simulated_pair(rng: np.random.Generator, pair: int, ratio: float, noise: float) -> list[float]:
    """Log ratios of the turns of a pair of processes whose B takes `ratio` times as long.

    Each process has luck of its own; blocks are log-normal, a machine drifts meanwhile, and some blocks are outliers.
    """
    luck = {"A": rng.normal(0, 0.5 * noise), "B": rng.normal(0, 0.5 * noise) + math.log(ratio)}
    drift, blocks = rng.normal(0, 3 * noise), 4 * TURNS
    outliers = rng.uniform(0.1, 0.6, blocks) * (rng.random(blocks) < 0.05)
    slow = rng.normal(0, noise, blocks) + outliers + drift * np.arange(blocks) / blocks
    found = []
    for turn, shared in enumerate(slow.reshape(TURNS, 4).tolist()):
        order = order_of_turn(pair, turn, short=False)
        seconds = [8e-3 * math.exp(luck[tree] + one) for tree, one in zip(order, shared, strict=True)]
        found.append(turn_log_ratio(order, seconds))
    return found


def simulated_verdict(rng: np.random.Generator, ratio: float, noise: float) -> Verdict:
    """The gate's final verdict, with all its looks."""
    pairs: list[list[float]] = []
    for look in LOOKS:
        pairs += [simulated_pair(rng, pair, ratio, noise) for pair in range(len(pairs), look)]
        found = interval_of(pairs, confidence_of_look(len(LOOKS)))
        verdict = verdict_of(found, THRESHOLD, last=look == LOOKS[-1])
        if verdict != "too noisy":
            break
    return verdict


def shares(ratio: float, noise: float) -> dict[str, float]:
    rng = np.random.default_rng(7)
    verdicts = [simulated_verdict(rng, ratio, noise) for _ in range(TRIES)]
    return {verdict: verdicts.count(verdict) / TRIES for verdict in set(verdicts)}


@pytest.mark.parametrize("noise", [0.01, 0.02, 0.03])
def test_a_tenth_slower_is_caught_and_no_change_is_passed(noise: float) -> None:
    assert shares(1.10, noise)["slower"] >= 0.9
    unchanged = shares(1.0, noise)
    assert unchanged.get("slower", 0.0) == 0.0
    assert unchanged.get("too noisy", 0.0) <= 0.05


def test_what_is_just_at_the_threshold_is_seldom_called_slower() -> None:
    # The looks share the 2.5 % by which an interval may lie above the truth.
    assert shares(1 + THRESHOLD / 100, 0.02).get("slower", 0.0) <= 0.05


@pytest.mark.parametrize("ratio", [1.0, 1.10])
def test_a_machine_too_noisy_to_tell_is_said_to_be_so(ratio: float) -> None:
    found = shares(ratio, 0.25)
    assert found["too noisy"] >= 0.8
    # A verdict that it gives all the same is seldom wrong.
    assert found.get("slower" if ratio == 1.0 else "no slower", 0.0) <= 0.05


def test_a_regression_beyond_the_threshold_seldom_passes() -> None:
    found = shares(1.06, 0.01)
    assert found["slower"] >= 0.7
    assert found.get("no slower", 0.0) == 0.0
    assert shares(1.07, 0.01).keys() <= {"slower", "too noisy"}


def assert_misses(missed: int, tries: int, nominal: float) -> None:
    """True if a share is within three standard deviations of the nominal one."""
    assert abs(missed / tries - nominal) <= 3 * math.sqrt(nominal * (1 - nominal) / tries)


@pytest.mark.parametrize("pairs", [LEAST_PAIRS, *LOOKS])
def test_intervals_miss_the_truth_as_often_as_they_say(pairs: int) -> None:
    rng, confidence, tries = np.random.default_rng(3), confidence_of_look(len(LOOKS)), 4000
    drawn = rng.normal(math.log(1.03), 0.02, (tries, pairs, 1))
    found = [interval_of(list(one), confidence) for one in drawn]
    missed = sum(not one.low <= 1.03 <= one.high for one in found)
    assert_misses(missed, tries, 1 - confidence)


@pytest.mark.parametrize("pairs", LOOKS)
def test_outliers_and_drift_do_not_make_intervals_miss_more(pairs: int) -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(400):
        found = interval_of([simulated_pair(rng, pair, 1.03, 0.02) for pair in range(pairs)], 0.95)
        missed += not found.low <= 1.03 <= found.high
    assert missed / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("spread", [0.02, 0.05])
def test_unpaired_intervals_miss_as_often_as_they_say(spread: float) -> None:
    rng, confidence, tries = np.random.default_rng(5), confidence_of_look(1), 4000
    base, present = rng.normal(0, 0.02, (tries, 6)), rng.normal(math.log(1.03), spread, (tries, 6))
    found = [interval_between(*one, confidence) for one in zip(base, present, strict=True)]
    assert_misses(sum(not one.low <= 1.03 <= one.high for one in found), tries, 1 - confidence)


def test_equal_figures_have_an_interval_of_no_width() -> None:
    assert interval_between([0.0] * 3, [0.0] * 3, 0.95) == interval_of([[0.0]] * 3, 0.95) == Interval(1, 1, 1, 3)


def test_a_steady_drift_cancels_within_a_turn() -> None:
    seconds = [math.exp(0.1 * place) for place in range(4)]
    assert turn_log_ratio("ABBA", seconds) == pytest.approx(0)
    assert turn_log_ratio("BAAB", seconds) == pytest.approx(0)
    assert turn_log_ratio("ABBA", [1, 2, 2, 1]) == pytest.approx(math.log(2))


def test_neither_is_always_first() -> None:
    assert [order_of_turn(pair, turn, short=False) for pair in (0, 1) for turn in (0, 1)] == [
        *("ABBA", "BAAB"),
        *("BAAB", "ABBA"),
    ]
    assert [order_of_turn(pair, 0, short=True) for pair in (0, 1)] == ["AB", "BA"]


def test_figures_measured_apart_are_compared_unpaired() -> None:
    rng = np.random.default_rng(0)
    base, present = rng.normal(0, 0.01, 6), rng.normal(math.log(1.2), 0.01, 6)
    found = interval_between(list(base), list(present), 0.95)
    assert found.low < 1.2 < found.high
    assert verdict_of(found, THRESHOLD, last=True) == "slower"


def test_a_verdict_needs_the_whole_interval() -> None:
    def of(low: float, high: float, last: bool = True) -> Verdict:
        return verdict_of(Interval(math.sqrt(low * high), low, high, 4), 5.0, last)

    assert of(1.051, 1.9) == "slower"
    assert of(0.6, 1.049) == "no slower"
    assert of(0.6, 0.9) == "faster"
    assert of(1.04, 1.06) == "at the threshold"
    assert of(1.04, 1.06, last=False) == of(1.035, 1.062) == "too noisy"
    assert of(1.0, 1.12) == of(0.9, 1.5) == "too noisy"
