"""Performance regression gate: `make bench-compare BASE=main`, or `python bench/gate/gate.py --help`.

`compare` measures the present tree, with its uncommitted changes, against a commit. A fresh process in each tree does
blocks of the same operations in turns (ABBA), one at a time. More pairs of processes follow until the interval of the
ratio decides. It fails (exit code 1) only if the whole interval lies beyond the threshold or the outputs differ, and
exits with code 3 if the machine is too noisy for a verdict.

`store` and `against` do the same with stored figures of the same machine, which cannot be measured in turns. `prove`
slows a step down by a tenth and shows how often the gate notices, and how often it reports a change without one.
"""

import contextlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.gate.measure import (
    RELATIVE_TOLERANCE,
    Effort,
    Measured,
    logs_of_processes,
    measure,
    measure_alone,
    threads_here,
)
from bench.gate.processes import REPOSITORY, checked_out, commit_of, temporary_directory
from bench.gate.verdicts import (
    LEAST_PAIRS,
    LOOKS,
    Interval,
    Verdict,
    confidence_of_look,
    interval_between,
    verdict_of,
)
from bench.gate.worker import BENCHMARKS, CONTROL, SLOWDOWN
from bench.measuring.conditions import conditions, fingerprint
from bench.measuring.out_file import check_out
from gen_dist.cli import run_command, run_subcommand
from gen_dist.errors import ConfigError
from gen_dist.files import write_atomically

DIFFERENCES_SHOWN = 6
STORED_PROCESSES = 6
"""Processes of each side of a comparison with stored figures: there is one look, at its end."""
FAILED, NOISY = 1, 3
BARS = {"slowed": 0.9, "unchanged": 0.95}
"""Shares of tries in which the verdict must be right."""


def compare(
    base: str,
    only: tuple[str, ...] = (),
    threshold: float = 5.0,
    turns: int = 8,
    block_seconds: float = 0.15,
    most_pairs: int = LOOKS[-1],
    outputs_may_differ: bool = False,
    allow_noisy: bool = False,
    out: Path | None = None,
) -> None:
    """Compare the present tree, with what is not committed, to a commit. Exit code 0: no regression; 1: one; 3: noise.

    Args:
        base: Commit, branch or tag to compare to.
        only: Benchmarks to compare. All of them if none is named.
        threshold: Per cent of more time that is a regression.
        turns: Turns of a pair of processes; in one each does two blocks.
        block_seconds: Length of a block, of those benchmarks that are not a start of a process.
        most_pairs: Pairs of processes at most, of benchmarks that fewer do not decide.
        outputs_may_differ: Accept different outputs, for a change that is meant to alter them.
        allow_noisy: Exit code 0 also where the machine is too noisy to tell.
        out: File for everything that was measured, JSON.
    """
    names = chosen(only)
    effort = effort_of(turns, block_seconds, most_pairs)
    check_threshold(threshold)
    check_out(out)
    commit = commit_of(base)
    before = conditions()
    with temporary_directory() as directory, checked_out(commit, directory / "base") as tree:
        print(f"A: {base} ({commit[:12]}); B: the present tree ({short(before['git_commit'])})", flush=True)
        facts, measured = measure({"A": tree, "B": REPOSITORY}, names, threshold, effort, directory)
    before |= {"threads": facts["threads"], "base_commit": commit}
    report(measured, threshold, outputs_may_differ)
    finish(measured, before, threshold, outputs_may_differ, allow_noisy, out)


def store(
    file: tyro.conf.Positional[Path],
    /,
    only: tuple[str, ...] = (),
    turns: int = 8,
    block_seconds: float = 0.15,
    processes: int = STORED_PROCESSES,
) -> None:
    """Measure the present tree alone and keep its figures, for `against` on the same machine.

    Args:
        file: JSON file to write.
        only: Benchmarks to measure. All of them if none is named.
        turns: Twice as many blocks are measured in each process.
        block_seconds: Length of a block, of those benchmarks that are not a start of a process.
        processes: Fresh processes, at least 3.
    """
    names, effort = [*chosen(only), CONTROL], effort_of(turns, block_seconds, processes)
    check_out(file)
    before = conditions()
    with temporary_directory() as directory:
        facts, measured = measure_alone(names, effort, directory, {})
    for one in measured:
        print(f"{one.name:22}{one.broken or times(one, 'B')}")
    before |= {"threads": facts["threads"]}
    kept = {
        one.name: {
            "count": one.count,
            "images": one.images["B"],
            "outputs": one.outputs["B"],
            "seconds": one.seconds["B"],
        }
        for one in measured
        if not one.broken
    }
    write(file, {"conditions": before, "benchmarks": kept})
    if any(one.broken for one in measured):
        sys.exit(FAILED)


def against(
    file: tyro.conf.Positional[Path],
    /,
    only: tuple[str, ...] = (),
    threshold: float = 5.0,
    turns: int = 8,
    block_seconds: float = 0.15,
    processes: int = STORED_PROCESSES,
    outputs_may_differ: bool = False,
    allow_noisy: bool = False,
    out: Path | None = None,
) -> None:
    """Compare the present tree to stored figures of this machine, not in turns: a slower hour counts as slower code.

    A reference task unrelated to the project is measured as well. If its speed has changed, there is no verdict.

    Args:
        file: JSON file that `store` wrote.
        only: Benchmarks to compare. All that are stored if none is named.
        threshold: Per cent of more time that is a regression.
        turns: Twice as many blocks are measured in each process.
        block_seconds: Length of a block, of those benchmarks that are not a start of a process.
        processes: Fresh processes, at least 3.
        outputs_may_differ: Accept different outputs, for a change that is meant to alter them.
        allow_noisy: Exit code 0 also where the machine is too noisy to tell.
        out: File for everything that was measured, JSON.
    """
    stored = read_stored(file)
    kept = tuple(name for name in stored["benchmarks"] if name in BENCHMARKS and name != CONTROL)
    names, effort = [*chosen(only or kept), CONTROL], effort_of(turns, block_seconds, processes)
    check_threshold(threshold)
    check_out(out)
    before = conditions()
    with temporary_directory() as directory:
        before |= {"threads": threads_here(directory / "facts")}
        here, there = fingerprint(before), fingerprint(stored["conditions"])
        if here != there:
            raise ConfigError(f"{file} was measured on another machine or with other versions: {there}; here: {here}")
        commit = short(stored["conditions"]["git_commit"])
        print(f"A: stored figures of {commit}; B: the present tree ({short(before['git_commit'])})")
        print("Not measured in turns: what has changed on the machine since then counts as a change of the code.")
        _, measured = measure_alone(names, effort, directory, stored["benchmarks"])
    for one in measured:
        if one.given_up:
            continue
        base, present = (logs_of_processes(one, tree) for tree in "AB")
        found = interval_between(base, present, confidence_of_look(1))
        one.interval, one.verdict = found, verdict_of(found, threshold, last=True)
    doubt_if_machine_changed(measured, threshold)
    report(measured, threshold, outputs_may_differ)
    before |= {"base_commit": stored["conditions"]["git_commit"], "base": stored["conditions"], "in_turns": False}
    finish(measured, before, threshold, outputs_may_differ, allow_noisy, out)


def prove(
    slowed: int = 10,
    unchanged: int = 20,
    slowdown: float = 10.0,
    benchmark: str = "step-vae-mnist",
    threshold: float = 5.0,
    turns: int = 8,
    block_seconds: float = 0.15,
    out: Path | None = None,
) -> None:
    """Try the gate: the last commit against itself, in some tries with B slowed down. Exit code 1: it fails.

    Each operation is followed by idle time in proportion to its own; the measured code is not changed.

    Args:
        slowed: Tries with the slowdown; 9 of 10 have to fail.
        unchanged: Tries without; 19 of 20 have to pass. No verdict counts as wrong in both.
        slowdown: Per cent of its time by which each operation of B becomes longer.
        benchmark: Benchmark to measure.
        threshold: Per cent of more time that is a regression.
        turns: Turns of a pair of processes; in one each does two blocks.
        block_seconds: Length of a block.
        out: File for everything that was measured, JSON.
    """
    names, effort = chosen((benchmark,)), effort_of(turns, block_seconds, LOOKS[-1])
    check_threshold(threshold)
    if min(slowed, unchanged) < 0 or slowed + unchanged < 1:
        raise ConfigError(f"{slowed} tries with a slowdown and {unchanged} without prove nothing; name some")
    if not 0 < slowdown < math.inf:
        raise ConfigError(f"slowdown {slowdown} is not above 0 per cent")
    check_out(out)
    before, commit = conditions(), commit_of("HEAD")
    wrong_outputs = 0
    right: dict[str, list[bool]] = {"slowed": [], "unchanged": []}
    tries: list[dict[str, Any]] = []
    # Both kinds are spread over the whole time: the machine may have quiet and loud hours.
    plan = sorted(
        [("slowed", (n + 0.5) / slowed) for n in range(slowed)]
        + [("unchanged", (n + 0.5) / unchanged) for n in range(unchanged)],
        key=lambda planned: planned[1],
    )
    with temporary_directory() as directory, contextlib.ExitStack() as stack:
        trees = {name: stack.enter_context(checked_out(commit, directory / name)) for name in "AB"}
        for number, (kind, _) in enumerate(plan):
            here = directory / f"try-{number}"
            slow = {"B": {SLOWDOWN: str(slowdown / 100)}} if kind == "slowed" else {}
            facts, (one,) = measure(trees, names, threshold, effort, here, slow)
            if one.interval is None or one.verdict is None:
                raise ConfigError(f"{benchmark} cannot be measured: {one.given_up}")
            right[kind].append(one.verdict == "slower" if kind == "slowed" else one.verdict in PASSING)
            wrong_outputs += bool(one.differences)
            tries.append({"kind": kind, **asdict(one)})
            print(f"{number + 1:3} {kind:10} {interval_words(one.interval)}  {one.verdict}", flush=True)
    before |= {"threads": facts["threads"]}
    for kind, word in (("slowed", f"slowed by {slowdown:g} %: caught"), ("unchanged", "unchanged: passed")):
        print(f"{word} in {sum(right[kind])} of {len(right[kind])} tries")
    print(json.dumps({"right": {kind: sum(tell) for kind, tell in right.items()}, "conditions": before}), flush=True)
    if out is not None:
        write(out, {"conditions": before, "tries": tries})
    enough = all(sum(tell) >= BARS[kind] * len(tell) for kind, tell in right.items())
    if wrong_outputs or not enough:
        sys.exit(FAILED)


PASSING: tuple[Verdict, ...] = ("faster", "no slower", "at the threshold")


def doubt_if_machine_changed(measured: Sequence[Measured], threshold: float) -> None:
    """Mark every benchmark as too noisy if the reference task's speed changed, or may have changed."""
    control = next(one for one in measured if one.name == CONTROL)
    limit, found = 1 + threshold / 100, control.interval
    if found is not None and 1 / limit <= found.low and found.high <= limit:
        return
    for one in measured:
        if one.verdict is not None:
            one.verdict = "too noisy"
    told = "cannot be compared" if found is None else f"takes {interval_words(found).strip()} times as long"
    print(f"What has nothing to do with the project ({CONTROL}) {told} now: the stored figures are of no use here.")


def chosen(only: Sequence[str]) -> list[str]:
    """The benchmarks of these names, or all."""
    known = [name for name in BENCHMARKS if name != CONTROL]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ConfigError(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if not only or name in only]


def effort_of(turns: int, block_seconds: float, most_pairs: int) -> Effort:
    """Check how much to measure."""
    if turns < 1 or not block_seconds > 0 or not math.isfinite(block_seconds):
        raise ConfigError(
            f"turns {turns} of blocks of {block_seconds} s measure nothing; they are at least 1 and above 0"
        )
    if most_pairs < LEAST_PAIRS:
        raise ConfigError(f"{most_pairs} fresh processes show no spread to rely on; it takes at least {LEAST_PAIRS}")
    return Effort(turns, block_seconds, [*(look for look in LOOKS if look < most_pairs), most_pairs])


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that is not above 0."""
    if not 0 < threshold < math.inf:
        raise ConfigError(f"threshold {threshold} is not above 0 per cent")


def report(measured: Sequence[Measured], threshold: float, outputs_may_differ: bool) -> None:
    """Print a line for each benchmark, and the differences of its outputs."""
    print(f"\n{'':20}{'A: ms (p20 to p80)':>29}{'B: ms (p20 to p80)':>29}   B to A, time [interval]     pairs")
    for one in measured:
        if one.broken:
            print(f"{one.name:20} fails in the present tree: {one.broken}")
        elif one.broken_in_base:
            print(f"{one.name:20} fails in the base: {one.broken_in_base}")
        elif one.incomparable:
            print(f"{one.name:20} cannot be compared: {one.incomparable}")
        elif one.interval is not None:
            spread = "".join(f"{times(one, tree):>29}" for tree in "AB")
            verdict = verdict_words(one, threshold)
            print(f"{one.name:20}{spread}   {interval_words(one.interval)}{one.interval.pairs:6}  {verdict}")
        shown = one.differences[:DIFFERENCES_SHOWN]
        more = len(one.differences) - len(shown)
        if shown:
            allowed = "allowed to differ" if outputs_may_differ else "outputs differ"
            print(f"{'':20} {allowed}: {'; '.join(shown)}{f'; and {more} more' if more else ''}")
    print(
        f"A regression is more than {threshold:g} % of time; intervals are of {100 * confidence_of_look(1):g} % "
        f"over all looks; numbers may differ by {RELATIVE_TOLERANCE:g} of their value."
    )


def verdict_words(one: Measured, threshold: float) -> str:
    """The verdict in words."""
    words = {
        "slower": "SLOWER",
        "faster": "faster",
        "no slower": f"less than {threshold:g} % slower",
        "at the threshold": "at the threshold: passes",
        "too noisy": "too noisy to tell",
    }
    return words[one.verdict] if one.verdict else ""


def interval_words(interval: Interval) -> str:
    """A ratio and its interval."""
    return f"{interval.ratio:6.3f} [{interval.low:.3f} to {interval.high:.3f}]"


def times(one: Measured, tree: str) -> str:
    """Milliseconds of an operation: median and spread over all blocks."""
    low, middle, high = np.percentile(np.concatenate([*one.seconds[tree]]), (20, 50, 80)) * 1e3
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def finish(
    measured: Sequence[Measured],
    found: Mapping[str, Any],
    threshold: float,
    outputs_may_differ: bool,
    allow_noisy: bool,
    out: Path | None,
) -> None:
    """Print the outcome, and all figures as JSON in the last line; exit with the code of the outcome."""
    failed = [
        one.name
        for one in measured
        if one.broken or one.broken_in_base or one.verdict == "slower" or (one.differences and not outputs_may_differ)
    ]
    noisy = [one.name for one in measured if one.verdict == "too noisy" and one.name not in failed]
    passed = [one.name for one in measured if one.verdict in PASSING and one.name not in failed]
    incomparable = [one.name for one in measured if one.incomparable and one.name not in failed]
    groups = {"failed": failed, "too noisy to tell": noisy, "passed": passed, "not comparable": incomparable}
    print("; ".join(f"{word}: {', '.join(names)}" for word, names in groups.items() if names))
    whole = {"conditions": dict(found), "threshold_percent": threshold, "benchmarks": [asdict(one) for one in measured]}
    brief = {one.name: one.interval and asdict(one.interval) | {"verdict": one.verdict} for one in measured}
    print(json.dumps({"ratios": brief, "conditions": dict(found)}), flush=True)
    if out is not None:
        write(out, whole)
    if failed:
        sys.exit(FAILED)
    if {*passed, *noisy} <= {CONTROL}:
        raise ConfigError("nothing could be compared, so nothing is known; name another commit")
    if noisy and not allow_noisy:
        sys.exit(NOISY)


def short(commit: str | None) -> str:
    """Short name of a commit, with a `+` for uncommitted changes."""
    return "of no commit" if commit is None else commit[:12] + "+" * commit.endswith("+")


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    try:
        write_atomically(file, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None


def read_stored(file: Path) -> dict[str, Any]:
    """Read and check a file of `store`."""
    try:
        stored: dict[str, Any] = json.loads(file.read_text())
        assert {"cpu", "git_commit"} <= set(stored["conditions"])
        assert all({"count", "images", "outputs", "seconds"} <= set(one) for one in stored["benchmarks"].values())
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}; make it by `bench/gate/gate.py store {file}`"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, AssertionError):
        raise ConfigError(f"{file} is not what `bench/gate/gate.py store` writes") from None
    return stored


def main() -> None:
    """Run the command that the command line names."""
    run_command(lambda: run_subcommand([compare, store, against, prove], sys.argv[1:], "bench/gate/gate.py"))


if __name__ == "__main__":
    main()
