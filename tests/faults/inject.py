"""Let system calls of commands fail, one after the other, and judge each end: one line of JSON for each on stdout.

    LD_PRELOAD=failing_calls.so python -m tests.faults.inject WORK SCENARIO[,SCENARIO ...] MOST [FAULT ...]

A fault is KIND:ERRNO, with `:lasting` if all later calls of the kind fail too, or `:short` for half-written data. MOST
calls of a kind, spread over the command, fail one at a time; 0 lets every one of them fail. An end is right if

- the exit code is 0, or 2 with one line that starts with `error: ` and no traceback, or for `check` 1 and the
  reason,
- every checkpoint is whole, and none newer than those from before is lost,
- what a command prints as its result is that of an undisturbed one, if it ends with exit code 0,
- the same command, started again, ends with exit code 0 and the files of an undisturbed one, and no others.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.faults.commands import Commands, Ended, Fault, import_first, print_json

FAULTS = (
    *("write:ENOSPC", "write:ENOSPC:lasting", "write:EIO", "write:0:short", "fsync:EIO", "fsync:ENOSPC", "rename:EIO"),
    *("rename:EACCES", "open to write:EACCES", "open to write:EMFILE", "open to write:ENOSPC", "open to read:EMFILE"),
    *("open to read:EACCES", "open to read:EIO", "open to read:ESTALE:lasting", "read:EIO", "read:EIO:lasting"),
    *("mkdir:ENOSPC", "unlink:EPERM", "unlink:EIO", "mmap:ENOMEM", "stat:EACCES", "stat:EIO", "truncate:ENOSPC"),
    *("opendir:EACCES", "opendir:EMFILE", "chmod:EPERM", "lock:ENOLCK", "lock:ENOLCK:lasting", "close:EIO"),
)

PRINTED = "standard output"

Seconds = dict[tuple[object, ...], list[str]]
"""Problems with second starts of one scenario, by command and files."""


def faults_of(commands: Commands, scenario: str, named: str, most: int) -> Iterator[Fault]:
    """Faults at up to `most` calls of a kind, spread evenly over those of the undisturbed command."""
    kind, error, *how = named.split(":")
    number = 0 if error == "0" else getattr(errno, error)
    commands.restore(commands.scenarios[scenario].state)
    total = commands.run(commands.scenarios[scenario].words, Fault(kind, 0, 0)).calls
    count = total if most == 0 else min(most, total)
    for place in range(count):
        yield Fault(kind, 1 + place * total // count, number, "lasting" in how, "short" in how)


def undisturbed(commands: Commands, scenario: str) -> dict[str, str]:
    """Result after the command has ended twice, as the second start may add files."""
    words, state, prints = commands.scenarios[scenario]
    commands.restore(state)
    for attempt in (words, [word for word in words if word != "--fresh"]):
        ended = commands.run(attempt)
        if ended.code != 0:
            raise RuntimeError(f"{scenario} ended with exit code {ended.code}: {ended.err}")
    return result_of(commands, ended, prints)


def result_of(commands: Commands, ended: Ended, prints: bool) -> dict[str, str]:
    """Contents of the files, and the output of a command that prints its result."""
    return commands.contents() | ({PRINTED: commands.printed(ended)} if prints else {})


def problems_of(
    commands: Commands, scenario: str, fault: Fault, expected: dict[str, str], seconds: Seconds
) -> tuple[Ended, list[str]]:
    """Run a command with a fault, and again without; returns its first end and the problems with it."""
    words, state, prints = commands.scenarios[scenario]
    commands.restore(state)
    before = commands.whole_checkpoints()
    ended = commands.run(words, fault)
    if not ended.failed:
        return ended, []
    problems = problems_of_end(ended)
    if scenario == "check" and ended.code == 1 and os.strerror(fault.error) in ended.out:
        problems = []  # a check of the plug-in failed, and its row says why
    after = commands.whole_checkpoints()
    if before and scenario != "fresh" and not any(whole and step >= max(before) for step, whole in after.items()):
        problems.append(f"a checkpoint is lost: {before} became {after}")
    if not all(after.values()):
        problems.append(f"a checkpoint is not whole: {after}")
    found = result_of(commands, ended, prints)
    if ended.code == 0 and found.get(PRINTED) != expected.get(PRINTED):
        problems.append(f"it prints {found[PRINTED]}")
    if ended.code == 0 and not problems and found == expected:
        return ended, []  # the fault did not matter, and the second start is that of an undisturbed command
    again = [word for word in words if word != "--fresh"] if ended.code == 0 else words
    return ended, problems + problems_of_second(commands, again, prints, expected, seconds)


def problems_of_second(
    commands: Commands, words: Sequence[str], prints: bool, expected: dict[str, str], seconds: Seconds
) -> list[str]:
    """Problems with a second start, which is made once from files that are the same to the byte."""
    start = (*words, *commands.exact().items())
    if start not in seconds:
        again = commands.run(words)
        if again.code != 0:
            seconds[start] = [f"started again, it ends with exit code {again.code}: {again.err[-300:]}"]
        else:
            seconds[start] = differences(expected, result_of(commands, again, prints))
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


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Files that differ, as `name: expected digest -> found digest`."""
    return [
        f"{name}: {expected.get(name, 'absent')} -> {found.get(name, 'absent')}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]


def main(work: str, scenarios: str, most: str, *named: str) -> None:
    """Inject faults into each scenario in turn."""
    import_first()
    commands = Commands(Path(work))
    for scenario in scenarios.split(","):
        commands.prepare(commands.scenarios[scenario].state)
        expected = undisturbed(commands, scenario)
        seconds: Seconds = {}
        for one in named or FAULTS:
            for fault in faults_of(commands, scenario, one, int(most)):
                ended, problems = problems_of(commands, scenario, fault, expected, seconds)
                print_json(_row(scenario, one, fault, ended, problems, commands))


def _row(
    scenario: str, named: str, fault: Fault, ended: Ended, problems: Sequence[str], commands: Commands
) -> dict[str, Any]:
    row: dict[str, Any] = {"scenario": scenario, "fault": named, "nth": fault.nth, "problems": list(problems)}
    row |= {"file": ended.failed.replace(str(commands.root), ""), "code": ended.code}
    return row | ({"err": ended.err[-1500:]} if problems else {})


if __name__ == "__main__":
    main(*sys.argv[1:])
