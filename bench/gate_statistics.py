"""What the gate makes of times: ratios of blocks in turns, their interval, and what may be said of it.

What is independent of what decides how an interval is made. Blocks of one pair of processes share its luck: where its
memory lies, which core it got, which other program began meanwhile. So a pair of processes gives one figure, the median
of its turns, and intervals are drawn from pairs as wholes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm, t

LOOKS = (4, 6, 8, 12)
"""Pairs of processes after which there is a look at whether it is decided; after the last there is no more to come."""
CONFIDENCE = 0.95
"""That no interval of any look misses the truth; each of the looks gets an equal part of the rest (Bonferroni)."""
LEAST_PAIRS = 3
"""Of two the bootstrap has no tails to widen: its intervals would be narrower than Student's."""
RESAMPLES = 4000

Verdict = Literal["slower", "faster", "no slower", "at the threshold", "too noisy"]


@dataclass(frozen=True)
class Interval:
    """How many times as long as the base the present tree takes."""

    ratio: float
    low: float
    high: float
    pairs: int
    """Pairs of processes that it comes from."""


def turn_log_ratio(order: str, seconds: Sequence[float]) -> float:
    """log of B's seconds to A's from blocks in an order such as ABBA, in which a steady drift cancels."""
    logs = {name: [math.log(s) for s, who in zip(seconds, order, strict=True) if who == name] for name in "AB"}
    return float(np.mean(logs["B"]) - np.mean(logs["A"]))


def order_of_turn(pair: int, turn: int, short: bool) -> str:
    """Who does the blocks of a turn: neither is always first. A short turn has one block of each."""
    first, second = ("AB", "BA") if (pair + turn) % 2 == 0 else ("BA", "AB")
    return first if short else first + second


def interval_of(pairs: Sequence[Sequence[float]], confidence: float) -> Interval:
    """Interval of the ratio from log ratios by pair of processes and turn.

    The figure is the mean over pairs of the median of a pair's turns. Its interval is a bootstrap over whole pairs,
    widened by what it lacks where they are few: sqrt(n / (n - 1)) and Student's t (Hesterberg 2015, section 4.4).
    """
    medians = np.array([np.median(turns) for turns in pairs])
    count, middle = len(medians), float(medians.mean())
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    return _interval(medians[drawn].mean(axis=1), middle, count, count, confidence)


def interval_between(base: Sequence[float], present: Sequence[float], confidence: float) -> Interval:
    """The same where the two were measured apart: log seconds of each one's processes, none paired with another's."""
    ours, theirs = np.asarray(present), np.asarray(base)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1) for values in (ours, theirs)]
    fewest = min(len(ours), len(theirs))
    return _interval(means[0] - means[1], float(ours.mean() - theirs.mean()), fewest, fewest, confidence)


def _interval(means: np.ndarray, middle: float, count: int, pairs: int, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    widening = math.sqrt(count / (count - 1)) * t.ppf(1 - tail, count - 1) / norm.ppf(1 - tail)
    bounds = (middle - (middle - low) * widening, middle + (high - middle) * widening)
    return Interval(math.exp(middle), math.exp(bounds[0]), math.exp(bounds[1]), pairs)


def confidence_of_look(looks: int) -> float:
    """Of each interval, so that all of so many looks together have CONFIDENCE."""
    return 1 - (1 - CONFIDENCE) / looks


def verdict_of(interval: Interval, threshold_percent: float) -> Verdict:
    """What an interval shows of a threshold.

    `slower` and `no slower` have the whole interval on one side of it, however wide. One that reaches over it says
    nothing, unless it is so narrow, half the threshold to either side, that the truth is near the threshold itself.
    """
    limit = 1 + threshold_percent / 100
    if interval.low > limit:
        return "slower"
    if interval.high <= limit:
        return "faster" if interval.high < 1 / limit else "no slower"
    width = math.log(interval.high / interval.low) / 2
    return "at the threshold" if width <= math.log(limit) / 2 else "too noisy"


def decided(verdict: Verdict) -> bool:
    """Whether more pairs are not needed."""
    return verdict != "too noisy"
