"""Let system calls of commands fail, one after the other, and judge each end: one line of JSON for each on stdout.

    LD_PRELOAD=failing_calls.so python -m tests.faults.inject WORK SCENARIO[,SCENARIO ...] MOST [FAULT ...] \
        [--judged FILE]

A fault is KIND:ERRNO, with `:lasting` if all later calls of the kind fail too, `:file` if those on the same file do, or
`:short` for half-written data. MOST calls of a kind, spread over the command, fail one at a time; 0 lets every one of
them fail. FILE has lines of a run of the same commit that was cut short: what they judge is left out. An end is right
if

- the exit code is 0, or 2 with one line that starts with `error: ` and no traceback, or for `check` 1 and the
  reason,
- every checkpoint is whole, and none newer than those from before is lost,
- what a command prints as its result is that of an undisturbed one, if it ends with exit code 0,
- no figure of an evaluation from before is lost,
- a file of the run or the output has another content than an undisturbed command's only if a line says why,
- the same command, started again, ends with exit code 0 and the files of an undisturbed one, and no others. Only after
  a first start that finished a training, which needs no cache any more, may the cache have fewer.

The undisturbed command comes first, as the fault `none`: it is right if nothing of before is lost, and its files are on
disk before they are renamed into place, see `durable`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.commands import LATER, Commands, Ended, Fault, Kept, print_json
from tests.faults.durable import problems_of_events
from tests.faults.steady import get_ready

FAULTS = (
    *("write:ENOSPC", "write:ENOSPC:lasting", "write:EIO", "write:0:short", "fsync:EIO", "fsync:ENOSPC", "rename:EIO"),
    *("rename:EACCES", "open to write:EACCES", "open to write:EMFILE", "open to write:ENOSPC", "open to read:EMFILE"),
    *("open to read:EACCES", "open to read:EIO", "open to read:ESTALE:lasting", "read:EIO", "read:EIO:lasting"),
    *("read:EIO:file", "open to read:EACCES:file"),
    *("mkdir:ENOSPC", "unlink:EPERM", "unlink:EIO", "mmap:ENOMEM", "stat:EACCES", "stat:EIO", "truncate:ENOSPC"),
    *("opendir:EACCES", "opendir:EMFILE", "chmod:EPERM", "lock:ENOLCK", "lock:ENOLCK:lasting", "close:EIO"),
)

PRINTED = "standard output"
FIRST, SECOND = 1, 2
"""Seeds of a command's first and second start."""

Seconds = dict[tuple[object, ...], list[str]]
"""Problems with second starts of one scenario, by command and files."""


def faults_of(calls: Mapping[str, int], named: str, most: int) -> Iterator[Fault]:
    """Faults at up to `most` calls of a kind, spread evenly over those of the undisturbed command."""
    kind, error, *how = named.split(":")
    number = 0 if error == "0" else getattr(errno, error)
    total = calls[kind]
    count = total if most == 0 else min(most, total)
    for place in range(count):
        later = next((word for word in how if word in LATER), "")
        yield Fault(kind, 1 + place * total // count, number, later, "short" in how)


class Undisturbed(NamedTuple):
    """A command to which nothing happens."""

    ended: Ended
    """End of its first start."""
    losses: list[str]
    """Losses of this end, see `losses`."""
    once: dict[str, str]
    """Result of its first start."""
    twice: dict[str, str]
    """Result of a second start after the first one, as it may add files."""


def undisturbed(commands: Commands, scenario: str) -> Undisturbed:
    """Run a command twice, and then once more, as it imports less and so makes fewer calls than the first time.

    Raises:
        RuntimeError: an exit code is not 0.
    """
    words, state, prints = commands.scenarios[scenario]

    def run(words: Sequence[str], seed: int) -> Ended:
        ended = commands.run(words, seed=seed)
        if ended.code != 0:
            raise RuntimeError(f"{scenario} ended with exit code {ended.code}: {ended.err}")
        commands.import_what_it_imported()
        return ended

    commands.restore(state)
    run(words, FIRST)
    twice = result_of(commands, run(started_again(words), SECOND), prints)
    commands.restore(state)
    before = commands.kept()
    ended = run(words, FIRST)
    return Undisturbed(ended, losses(before, commands.kept(), scenario), result_of(commands, ended, prints), twice)


def started_again(words: Sequence[str]) -> list[str]:
    """Command that goes on with what a command has begun."""
    return [word for word in words if word != "--fresh"]


def result_of(commands: Commands, ended: Ended, prints: bool) -> dict[str, str]:
    """Contents of the files, and the output of a command that prints its result."""
    return commands.contents() | ({PRINTED: commands.printed(ended)} if prints else {})


def problems_of(
    commands: Commands, scenario: str, fault: Fault, usual: Undisturbed, seconds: Seconds
) -> tuple[Ended, list[str]]:
    """Run a command with a fault, and again without; returns its first end and the problems with it."""
    words, state, prints = commands.scenarios[scenario]
    commands.restore(state)
    before = commands.kept()
    ended = commands.run(words, fault, seed=FIRST)
    if not ended.failed:
        return ended, []
    problems = problems_of_end(ended)
    if scenario == "check" and ended.code == 1 and os.strerror(fault.error) in ended.out:
        problems = []  # a check of the plug-in failed, and its row says why
    problems += losses(before, commands.kept(), scenario)
    found = result_of(commands, ended, prints)
    if ended.code == 0 and found.get(PRINTED) != usual.twice.get(PRINTED):
        problems.append(f"it prints {found[PRINTED]}")
    if ended.code == 0 and not _lines_of(ended) - _lines_of(usual.ended):
        changed = {name for name, content in found.items() if content != usual.once.get(name, content)}
        # A cache with less in it makes the second start slower, and not another.
        problems += [f"in silence, {name} is another" for name in sorted(changed) if not name.startswith("cache/")]
    if ended.code == 0 and not problems and found == usual.twice:
        return ended, []  # the fault did not matter, and the second start is that of an undisturbed command
    again = started_again(words) if ended.code == 0 else words
    needs_cache = ended.code != 0 or words[0] != "train"  # a finished training makes nothing again that was not kept
    return ended, problems + problems_of_second(commands, again, prints, usual.twice, seconds, needs_cache=needs_cache)


def losses(before: Kept, after: Kept, scenario: str) -> list[str]:
    """Lines about the checkpoints and figures that a command has lost of a run, or left half-written."""
    problems = []
    found = after.checkpoints
    if not all(found.values()):
        problems.append(f"a checkpoint is not whole: {found}")
    if scenario == "fresh":
        return problems
    steps = before.checkpoints
    if steps and not any(whole and step >= max(steps) for step, whole in found.items()):
        problems.append(f"a checkpoint is lost: {steps} became {found}")
    if lost := before.measured - after.measured:
        problems.append(f"figures of an evaluation are lost: {sorted(lost)}")
    return problems


def problems_of_second(
    commands: Commands,
    words: Sequence[str],
    prints: bool,
    expected: dict[str, str],
    seconds: Seconds,
    *,
    needs_cache: bool,
) -> list[str]:
    """Problems with a second start, which is made once from files that are the same to the byte.

    Args:
        commands: commands on the files.
        words: the command.
        prints: True if its result is what it prints.
        expected: result of a second start of the undisturbed command.
        seconds: takes the problems, and has those of starts from the same files.
        needs_cache: False if the cache may have fewer files than expected.
    """
    start = (needs_cache, *words, *commands.exact().items())
    if start not in seconds:
        again = commands.run(words, seed=SECOND)
        if again.code != 0:
            seconds[start] = [f"started again, it ends with exit code {again.code}: {again.err[-300:]}"]
        else:
            found = result_of(commands, again, prints)
            needed = {
                name: file
                for name, file in expected.items()
                if needs_cache or name in found or not name.startswith("cache/")
            }
            seconds[start] = differences(needed, found)
    return seconds[start]


def problems_of_end(ended: Ended) -> list[str]:
    """Problems with exit code and standard error of a command that met a fault."""
    problems = []
    if ended.code is None:
        problems.append("it did not end")
    elif ended.code not in (0, 2):
        problems.append(f"exit code {ended.code}")
    if "Traceback" in ended.err or "Exception ignored" in ended.err:
        problems.append("a traceback")
    errors = [line for line in ended.err.splitlines() if line.startswith(("error: ", "rank 0: error: "))]
    if ended.code == 2 and len(errors) != 1:
        problems.append(f"{len(errors)} error lines")
    return problems


def _lines_of(ended: Ended) -> set[str]:
    """Lines of a command's output without numbers."""
    return {re.sub(r"\d+", "0", line) for line in (ended.out + ended.err).splitlines()}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Files that differ, as `name: expected digest -> found digest`."""
    return [
        f"{name}: {expected.get(name, 'absent')} -> {found.get(name, 'absent')}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]


def main(arguments: Sequence[str]) -> None:
    """Inject faults into each scenario in turn."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.inject")
    parser.add_argument("work", type=Path)
    parser.add_argument("scenarios", type=lambda words: words.split(","))
    parser.add_argument("most", type=int)
    parser.add_argument("faults", nargs="*", default=FAULTS)
    parser.add_argument("--judged", type=Path)
    given = parser.parse_args(arguments)
    commit = _commit()
    _keep_states_of(commit, given.work)
    judged = judged_of(given.judged, commit) if given.judged else frozenset()
    get_ready()
    commands = Commands(given.work)
    for scenario in given.scenarios:
        commands.prepare(commands.scenarios[scenario].state)
        usual = undisturbed(commands, scenario)
        problems = usual.losses + problems_of_events(usual.ended.events, commands.root)
        print_json(_row(scenario, "none", Fault("", 0, 0), usual.ended, problems, commands) | {"commit": commit})
        seconds: Seconds = {}
        for one in given.faults:
            for fault in faults_of(usual.ended.calls, one, given.most):
                if (scenario, one, fault.nth) not in judged:
                    ended, problems = problems_of(commands, scenario, fault, usual, seconds)
                    print_json(_row(scenario, one, fault, ended, problems, commands) | {"commit": commit})


def _commit() -> str:
    """Commit of this checkout, with `-dirty` if its files are not those of a commit."""
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        env=os.environ | {"LD_PRELOAD": ""},
    )
    return described.stdout.strip() or "unknown-dirty"


def _keep_states_of(commit: str, work: Path) -> None:
    """Remove states of files that another commit has written."""
    writer = work / "commit"
    if not writer.exists() or writer.read_text() != commit:
        shutil.rmtree(work / "states", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        writer.write_text(commit)


def judged_of(rows: Path, commit: str) -> frozenset[tuple[str, str, int]]:
    """Scenario, fault and number of each call that a commit's rows judge. The last row may have been cut."""
    found = set()
    for line in rows.read_text().splitlines() if rows.exists() and not commit.endswith("-dirty") else ():
        with contextlib.suppress(ValueError, KeyError):
            row = json.loads(line)
            if row["commit"] == commit:
                found.add((row["scenario"], row["fault"], row["nth"]))
    return frozenset(found)


def _row(
    scenario: str, named: str, fault: Fault, ended: Ended, problems: Sequence[str], commands: Commands
) -> dict[str, Any]:
    row: dict[str, Any] = {"scenario": scenario, "fault": named, "nth": fault.nth, "problems": list(problems)}
    row |= {"file": ended.failed.replace(str(commands.root), ""), "code": ended.code}
    return row | ({"err": ended.err[-1500:]} if problems else {})


if __name__ == "__main__":
    main(sys.argv[1:])
