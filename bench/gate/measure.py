"""Measuring of the gate: processes in pairs, blocks in turns, and a comparison of the outputs."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.gate.processes import REPOSITORY, BenchmarkError, DiedError, LackError, Worker, workers
from bench.gate.verdicts import (
    Interval,
    Verdict,
    confidence_of_look,
    decided,
    interval_of,
    order_of_turn,
    turn_log_ratio,
    verdict_of,
)
from bench.gate.worker import BENCHMARKS, Outputs
from gen_dist.errors import ConfigError

RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-5, 1e-7
"""Tolerances of numbers that both trees computed. Rounding in another order takes a tenth of them."""


@dataclass
class Measured:
    """One benchmark in two trees, `A` and `B`."""

    name: str
    count: int = 0
    """Operations of a block."""
    images: dict[str, int | None] = field(default_factory=dict)
    """Images of an operation, by tree."""
    outputs: dict[str, Outputs] = field(default_factory=dict)
    seconds: dict[str, list[list[float]]] = field(default_factory=lambda: {"A": [], "B": []})
    """Seconds of one operation by tree, process and block."""
    log_ratios: list[list[float]] = field(default_factory=list)
    """Log ratios by pair of processes and turn."""
    interval: Interval | None = None
    verdict: Verdict | None = None
    incomparable: str | None = None
    """Reason why it cannot be compared: the base lacks something."""
    broken: str | None = None
    """Reason why it fails in the present tree."""
    broken_in_base: str | None = None
    """Reason why it fails in the base, which lacks nothing."""
    differences: list[str] = field(default_factory=list)
    """Differences of the outputs, in words."""

    @property
    def given_up(self) -> str | None:
        """Reason to stop measuring it, if there is one."""
        return self.broken or self.broken_in_base or self.incomparable

    @property
    def is_open(self) -> bool:
        """True while more pairs of processes may give a verdict."""
        return not self.given_up and (self.verdict is None or not decided(self.verdict))


@dataclass(frozen=True)
class Effort:
    """Amount of measuring."""

    turns: int
    block_seconds: float
    looks: Sequence[int]
    """Numbers of pairs of processes after which the interval is looked at."""


def measure(
    trees: Mapping[str, Path],
    names: Sequence[str],
    threshold: float,
    effort: Effort,
    directory: Path,
    environments: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[dict[str, Any], list[Measured]]:
    """Measure the benchmarks in two trees until each has a verdict. Returns facts of the processes as well."""
    measured = [Measured(name) for name in names]
    done, facts = 0, {}
    confidence = confidence_of_look(len(effort.looks))
    for look in effort.looks:
        still = [one for one in measured if one.is_open]
        if not still:
            break
        with progress(len(still) * (look - done), f"pairs {done + 1} to {look}") as advance:
            for pair in range(done, look):
                facts = measure_pair(
                    trees, still, pair, effort, directory / f"pair-{pair}", environments or {}, advance
                )
        done = look
        for one in still:
            if one.is_open:
                one.interval = interval_of(one.log_ratios, confidence)
                one.verdict = verdict_of(one.interval, threshold, last=look == effort.looks[-1])
    return facts, measured


def measure_pair(
    trees: Mapping[str, Path],
    measured: Sequence[Measured],
    pair: int,
    effort: Effort,
    directory: Path,
    environments: Mapping[str, Mapping[str, str]],
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Add the turns of one pair of fresh processes to the benchmarks."""
    try:
        with workers(trees, directory, environments) as (both, facts):
            for one in measured:
                if one.is_open:
                    prepare(one, both)
                if one.is_open:
                    turns_of(one, both, pair, effort)
                advance()
            return facts["B"]
    except BenchmarkError as error:
        raise ConfigError(f"a tree cannot be measured: {error}") from None


def prepare(one: Measured, both: Mapping[str, Worker]) -> None:
    """Set a benchmark up in both trees and compare what they computed, or note what failed."""
    found = {}
    for tree, worker in both.items():
        try:
            found[tree] = worker.call("prepare", one.name, bool(one.outputs))
        except BenchmarkError as error:
            note_failure(one, tree, error)
    if len(found) == len(both):
        one.images = {tree: facts["images"] for tree, facts in found.items()}
        if not one.outputs:  # those of later processes would be the same
            one.outputs = {tree: facts["outputs"] for tree, facts in found.items()}
            one.differences = differences_of(one.outputs["A"], one.outputs["B"])


def note_failure(one: Measured, tree: str, error: BenchmarkError) -> None:
    """Record the failure of one tree. Earlier pairs do not count either.

    Raises:
        DiedError: the process has died, and the benchmarks that come next need it.
    """
    if isinstance(error, DiedError):
        raise DiedError(f"{one.name} in {tree}: {error}") from None
    one.interval = one.verdict = None
    if tree == "B":
        one.broken = str(error)
    elif isinstance(error, LackError):
        one.incomparable = str(error)
    else:
        one.broken_in_base = str(error)


def turns_of(one: Measured, both: Mapping[str, Worker], pair: int, effort: Effort) -> None:
    """Warm both up, then time their blocks in turns. Both do the same operations, and only one works at a time."""
    benchmark = BENCHMARKS[one.name]
    turns = 1
    next_number = dict.fromkeys(both, 0)
    seconds: dict[str, list[float]] = {tree: [] for tree in both}

    working = "A"

    def block(tree: str, count: int) -> float:
        nonlocal working
        working = tree
        first, next_number[tree] = next_number[tree], next_number[tree] + count
        return float(both[tree].call("block", one.name, first, count))

    try:
        if benchmark.starts:  # preparing has started it once
            one.count = 1
        else:
            warm_up = {tree: [block(tree, benchmark.at_once) for _ in range(2)] for tree in both}
            one.count = one.count or operations_of_block(min(warm_up["A"]), benchmark.at_once, effort.block_seconds)
            turns = turns_of_process(effort, min(warm_up["A"]) * one.count)
            for tree in both:
                block(tree, one.count)
        log_ratios = []
        for turn in range(turns):
            order = order_of_turn(pair, turn, short=benchmark.starts)
            times_of_turn = [block(tree, one.count) for tree in order]
            for tree, value in zip(order, times_of_turn, strict=True):
                seconds[tree].append(value)
            log_ratios.append(turn_log_ratio(order, times_of_turn) + log_images(one))
    except BenchmarkError as error:
        note_failure(one, working, error)
        return
    one.log_ratios.append(log_ratios)
    for tree, values in seconds.items():
        one.seconds[tree].append(values)


def operations_of_block(seconds: float, at_once: int, block_seconds: float) -> int:
    """Number of operations that take about `block_seconds`, a multiple of `at_once`."""
    return at_once * max(1, round(block_seconds / (seconds * at_once)))


def turns_of_process(effort: Effort, block_seconds: float) -> int:
    """Number of turns: fewer, but at least two, if even the shortest block is too long."""
    return min(effort.turns, max(2, round(effort.turns * effort.block_seconds / block_seconds)))


def log_images(one: Measured) -> float:
    """Correction of a log ratio of seconds per operation to seconds per image."""
    base, present = one.images["A"], one.images["B"]
    return math.log(base / present) if base and present else 0.0


def measure_alone(
    names: Sequence[str], effort: Effort, directory: Path, stored: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Measured]]:
    """Measure the benchmarks in the present tree, beside the stored figures."""
    measured = [Measured(name) for name in names]
    facts: dict[str, Any] = {}
    processes = effort.looks[-1]
    for one in measured:
        if stored and one.name not in stored:
            one.incomparable = "no figures of it are stored"
        elif stored:
            kept = stored[one.name]
            one.count, one.seconds["A"] = kept["count"], kept["seconds"]
            one.images["A"], one.outputs["A"] = kept["images"], kept["outputs"]
    with progress(processes * len(measured), f"processes 1 to {processes}") as advance:
        for number in range(processes):
            try:
                with workers({"B": REPOSITORY}, directory / f"process-{number}", {}) as (alone, found):
                    facts = found["B"]
                    for one in measured:
                        if one.is_open:
                            blocks_alone(one, alone["B"], effort)
                        advance()
            except BenchmarkError as error:
                raise ConfigError(f"the present tree cannot be measured: {error}") from None
    return facts, measured


def blocks_alone(one: Measured, worker: Worker, effort: Effort) -> None:
    """Add the blocks of one process that takes no turns with another."""
    benchmark = BENCHMARKS[one.name]
    number = 0

    def block(count: int) -> float:
        nonlocal number
        first, number = number, number + count
        return float(worker.call("block", one.name, first, count))

    turns = 1
    try:
        found = worker.call("prepare", one.name, "B" in one.outputs)
        one.images["B"] = found["images"]
        one.outputs.setdefault("B", found["outputs"])
        if "A" in one.outputs:
            one.differences = differences_of(one.outputs["A"], one.outputs["B"])
        if benchmark.starts:
            one.count = 1
        else:
            warm_up = min(block(benchmark.at_once) for _ in range(2))
            one.count = one.count or operations_of_block(warm_up, benchmark.at_once, effort.block_seconds)
            block(one.count)
            turns = 2 * turns_of_process(effort, warm_up * one.count)
        one.seconds["B"].append([block(one.count) for _ in range(turns)])
    except BenchmarkError as error:
        note_failure(one, "B", error)


def logs_of_processes(one: Measured, tree: str) -> list[float]:
    """log of each process's median seconds an operation, or an image."""
    return [math.log(float(np.median(blocks)) / (one.images[tree] or 1)) for blocks in one.seconds[tree]]


def threads_here(directory: Path) -> int:
    """Threads that a trainer of the present tree uses."""
    with workers({"B": REPOSITORY}, directory, {}) as (_, facts):
        return int(facts["B"]["threads"])


def differences_of(base: Outputs, present: Outputs) -> list[str]:
    """Differences of two trees' outputs beyond the tolerance, a sentence each."""
    found = [f"{name} is only in A" for name in base if name not in present]
    found += [f"{name} is only in B" for name in present if name not in base]
    for name in base:
        if name in present and not alike(base[name], present[name]):
            found.append(f"{name} was {base[name]}, is {present[name]}")
    return found


def alike(base: float | str, present: float | str) -> bool:
    """True if two outputs are equal: digests exactly, numbers to the tolerance, and NaN to NaN."""
    if isinstance(base, str) or isinstance(present, str):
        return base == present
    if math.isnan(base) or math.isnan(present):
        return math.isnan(base) and math.isnan(present)
    return math.isclose(base, present, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[], None]]:
    """Progress bar on a terminal; its value is a function that advances it by one."""
    with tqdm(total=total, desc=what, unit="benchmark", leave=False, disable=None) as bar:
        yield lambda: bar.update() and None
