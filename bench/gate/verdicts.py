"""What the gate makes of times: ratios of blocks in turns, their interval, and what may be said of it.

What is independent of what decides how an interval is made. Blocks of one pair of processes share its luck: where its
memory lies, which core it got, which other program began meanwhile. So a pair of processes gives one figure, the median
of its turns, and intervals are of those figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t

LOOKS = (4, 6, 8, 12, 24)
"""Pairs of processes after which there is a look at whether it is decided; after the last there is no more to come."""
CONFIDENCE = 0.95
"""That no interval of any look misses the truth; each of the looks gets an equal part of the rest (Bonferroni)."""
LEAST_PAIRS = 3
"""Of two, an interval reaches 51 standard errors to either side, and decides nothing."""

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

    The figure is the mean over pairs of the median of a pair's turns; its interval is Student's (1908). A bootstrap of
    so few pairs is too narrow, also where it is widened for that.
    """
    medians = np.array([np.median(turns) for turns in pairs])
    count = len(medians)
    return _interval(float(medians.mean()), medians.var(ddof=1) / count, count - 1, count, confidence)


def interval_between(base: Sequence[float], present: Sequence[float], confidence: float) -> Interval:
    """The same where the two were measured apart: log seconds of each one's processes, none paired with another's.

    The two may spread differently: Welch 1947.
    """
    ours, theirs = np.asarray(present), np.asarray(base)
    parts = [(values.var(ddof=1) / len(values), len(values) - 1) for values in (ours, theirs)]
    variance = sum(part for part, _ in parts)
    degrees = variance**2 / sum(part**2 / of for part, of in parts) if variance else 1.0
    return _interval(float(ours.mean() - theirs.mean()), variance, degrees, min(len(ours), len(theirs)), confidence)


def _interval(middle: float, variance: float, degrees: float, pairs: int, confidence: float) -> Interval:
    """Around a mean of logs; the variance is the mean's own."""
    half = float(t.ppf((1 + confidence) / 2, degrees)) * math.sqrt(variance)
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), pairs)


def confidence_of_look(looks: int) -> float:
    """Of each interval, so that all of so many looks together have CONFIDENCE."""
    return 1 - (1 - CONFIDENCE) / looks


def verdict_of(interval: Interval, threshold_percent: float, last: bool) -> Verdict:
    """What an interval shows of a threshold.

    `slower` and `no slower` have the whole interval on one side of it, however wide. One that reaches over it says
    nothing, unless it is so narrow, a quarter of the threshold to either side, that the truth is near the threshold
    itself; and that only at the last look, for until then more pairs may put it on one side.
    """
    limit = 1 + threshold_percent / 100
    if interval.low > limit:
        return "slower"
    if interval.high <= limit:
        return "faster" if interval.high < 1 / limit else "no slower"
    half = math.log(interval.high / interval.low) / 2
    return "at the threshold" if last and half <= math.log(limit) / 4 else "too noisy"


def decided(verdict: Verdict) -> bool:
    """Whether more pairs are not needed."""
    return verdict != "too noisy"
