"""Verdicts from times: ratios of blocks in turns, their interval, and the conclusion that it allows.

Blocks of one pair of processes are not independent: they share where memory lies, which core they got and which other
program was running. So each pair of processes gives one figure, the median of its turns, and the interval is that of
these figures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

import numpy as np
from scipy.special import stdtrit

LOOKS = (4, 6, 8, 12, 24)
"""Numbers of pairs of processes after which the interval is looked at. After the last there are no more pairs."""
CONFIDENCE = 0.95
"""Probability that no look's interval misses the true ratio. Looks share the rest equally (Bonferroni)."""
LEAST_PAIRS = 3
"""With two pairs an interval would reach 51 standard errors to either side."""

Verdict = Literal["slower", "faster", "no slower", "at the threshold", "too noisy"]


@dataclass(frozen=True)
class Interval:
    """Ratio of the present tree's time to the base's, with its interval."""

    ratio: float
    low: float
    high: float
    pairs: int
    """Pairs of processes that it comes from."""


def turn_log_ratio(order: str, seconds: Sequence[float]) -> float:
    """log of B's seconds to A's from blocks in an order such as ABBA, in which a steady drift cancels."""
    logs = {name: [math.log(s) for s, who in zip(seconds, order, strict=True) if who == name] for name in "AB"}
    return fmean(logs["B"]) - fmean(logs["A"])


def order_of_turn(pair: int, turn: int, short: bool) -> str:
    """Trees in the order of a turn's blocks; neither is always first. A short turn has one block of each."""
    first, second = ("AB", "BA") if (pair + turn) % 2 == 0 else ("BA", "AB")
    return first if short else first + second


def interval_of(pairs: Sequence[Sequence[float]], confidence: float) -> Interval:
    """Interval of the ratio from log ratios by pair of processes and turn.

    The figure is the mean over pairs of the median of a pair's turns; its interval is Student's (1908). A bootstrap of
    so few pairs is too narrow, even with a correction.
    """
    medians = np.array([median(turns) for turns in pairs])
    count = len(medians)
    return _interval(float(medians.mean()), medians.var(ddof=1) / count, count - 1, count, confidence)


def interval_between(base: Sequence[float], present: Sequence[float], confidence: float) -> Interval:
    """Interval of the ratio from unpaired log seconds of each tree's processes.

    The spreads may differ: Welch 1947.
    """
    ours, theirs = np.asarray(present), np.asarray(base)
    parts = [(values.var(ddof=1) / len(values), len(values) - 1) for values in (ours, theirs)]
    variance = sum(part for part, _ in parts)
    degrees = variance**2 / sum(part**2 / of for part, of in parts) if variance else 1.0
    return _interval(float(ours.mean() - theirs.mean()), variance, degrees, min(len(ours), len(theirs)), confidence)


def _interval(middle: float, variance: float, degrees: float, pairs: int, confidence: float) -> Interval:
    """Interval around a mean of logs; `variance` is that of the mean."""
    half = float(stdtrit(degrees, (1 + confidence) / 2)) * math.sqrt(variance)
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), pairs)


def confidence_of_look(looks: int) -> float:
    """Confidence of each interval, so that this number of looks together has CONFIDENCE."""
    return 1 - (1 - CONFIDENCE) / looks


def verdict_of(interval: Interval, threshold_percent: float, last: bool) -> Verdict:
    """Verdict of an interval about a threshold.

    `slower` and `no slower` have the whole interval on one side of the threshold, however wide. An interval across the
    threshold gives no verdict, unless it is narrow (a quarter of the threshold to either side): then the truth is near
    the threshold itself. That verdict needs the last look, since until then more pairs may decide.
    """
    limit = 1 + threshold_percent / 100
    if interval.low > limit:
        return "slower"
    if interval.high <= limit:
        return "faster" if interval.high < 1 / limit else "no slower"
    half = math.log(interval.high / interval.low) / 2
    return "at the threshold" if last and half <= math.log(limit) / 4 else "too noisy"


def decided(verdict: Verdict) -> bool:
    """True if no more pairs are needed."""
    return verdict != "too noisy"
