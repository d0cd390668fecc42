"""Commands of gen_dist in forks of one process that has imported torch, where chosen system calls fail.

The process runs under `failing_calls.c` (LD_PRELOAD). A fork arms it, runs a command as a user types it, and ends. All
files that may fail are below one directory, `root`; each scenario starts from a stored state of that directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import traceback
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.faults.scenarios import STATES, scenarios_of
from tests.faults.steady import be_steady, import_also, parse_first
from tests.faults.tree import Tree, figures_of

KINDS = (
    *("write", "fsync", "rename", "open to write", "open to read", "read", "mkdir", "unlink", "mmap", "stat"),
    *("truncate", "opendir", "chmod", "lock", "close"),
)
"""Kinds of system calls, in the order of failing_calls.c."""
LATER = ("", "lasting", "file")
"""Names of which later calls fail, in the order of failing_calls.c."""
_ALL = len(KINDS)
"""Kind that counts the calls of all kinds and fails none."""


class Fault(NamedTuple):
    """The call to fail."""

    kind: str
    nth: int
    """Its number among the calls of this kind below the root, from 1."""
    error: int
    """errno."""
    later: str = ""
    """Later calls of the kind that fail as well: none, all (`lasting`), or those on the same file (`file`)."""
    short: bool = False
    """True if half of the bytes are written, without an error."""


class Ended(NamedTuple):
    """End of a command."""

    code: int | None
    """Exit code; minus the number of the signal that ended it; None if it was still running at the time-out."""
    out: str
    err: str
    calls: dict[str, int]
    """Calls of each kind, if none had to fail; else of the fault's kind alone."""
    failed: str
    """Path of the call that failed; empty if none did."""
    events: bytes
    """Writes, syncs, removals and renames, if no call had to fail; see failing_calls.c."""


class Kept(NamedTuple):
    """Checkpoints and figures of a run, which no command may lose."""

    checkpoints: dict[str, bool]
    """Each checkpoint, and True if all its files have the digests that it lists."""
    measured: set[str]
    """Names of the figures of its evaluation."""


class Commands:
    """Commands on the files below `root`, and stored states of these files."""

    def __init__(self, work: Path) -> None:
        self.work = work.resolve()
        self.root = self.work / "root"
        self.states = self.work / "states"
        self.run_path = self.root / "run"
        self.tree = Tree(self.root)
        self.scenarios = scenarios_of(self.root)

    def run(
        self,
        words: Sequence[str],
        fault: Fault | None = None,
        *,
        seed: int | None = None,
        kill_after: float | None = None,
        timeout: float = 120.0,
    ) -> Ended:
        """Run a command in a fork.

        Args:
            words: what a user types after `gen-dist`.
            fault: the call to fail.
            seed: let equal starts write equal bytes, see `steady.be_steady`.
            kill_after: seconds after which its process group is killed with SIGKILL.
            timeout: seconds after which it is killed as it does not end.
        """
        streams = [self.work / "stdout", self.work / "stderr"]
        parse_first(words)
        library = ctypes.CDLL(None)
        library.calls_seen.restype, library.failed_path.restype = ctypes.c_long, ctypes.c_char_p
        library.events.restype, library.bytes_of_events.restype = ctypes.c_void_p, ctypes.c_long
        _, nth, error, later, short = fault or Fault("", 0, 0)
        kind = KINDS.index(fault.kind) if fault else _ALL
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, 0)
                for number, stream in enumerate(streams, start=1):
                    descriptor = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                    os.dup2(descriptor, number)
                    os.close(descriptor)
                os.chdir(self.work)
                os.environ["TMPDIR"] = tempfile.tempdir = str(self.root / "tmp")
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.work / "compiled")  # torch's files are not judged
                if seed is not None:
                    be_steady(seed)
                below = os.fsencode(self.root)
                library.fail_call(kind, ctypes.c_long(nth), error, LATER.index(later), short, below)
                _become(words, self.work / "modules")
            finally:
                os._exit(1)
        code = _wait(pid, timeout if kill_after is None else kill_after)
        if code is None:
            with contextlib.suppress(ProcessLookupError):  # it may not have made its group yet
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        out, err = (stream.read_text(errors="replace") for stream in streams)
        calls = {name: library.calls_seen(place) for place, name in enumerate(KINDS)}
        events = ctypes.string_at(library.events(), 0 if fault else library.bytes_of_events())
        return Ended(code, out, err, calls, os.fsdecode(library.failed_path()), events)

    def must_run(self, name: str) -> None:
        """Run the command of a scenario, which has to succeed.

        Raises:
            RuntimeError: it did not.
        """
        ended = self.run(self.scenarios[name].words, seed=zlib.crc32(name.encode()))
        if ended.code != 0:
            raise RuntimeError(f"{name} ended with exit code {ended.code}: {ended.err}")
        self.import_what_it_imported()

    def import_what_it_imported(self) -> None:
        """Import what the last command has imported, so that further forks need not."""
        import_also((self.work / "modules").read_text().splitlines())

    def prepare(self, state: str) -> None:
        """Store a state of the files, after those that it is made from."""
        if (self.states / state).exists():
            return
        before, command, change = STATES[state]
        if before is None:
            shutil.rmtree(self.root, ignore_errors=True)
        else:
            self.prepare(before)
            self.restore(before)
        if command is not None:
            self.must_run(command)
        change(self.root)
        self.states.mkdir(exist_ok=True)
        self.tree.store(self.states / state)

    def restore(self, state: str) -> None:
        """Put the files back into a state."""
        self.tree.restore(self.states / state)

    def contents(self) -> dict[str, str]:
        """Digest of every file below the root, without times and identities; see `Tree.contents`."""
        return self.tree.contents()

    def exact(self) -> dict[str, str]:
        """All that a command finds below the root; see `Tree.exact`."""
        return self.tree.exact()

    def printed(self, ended: Ended) -> str:
        """Standard output of a command without what differs between equal ones."""
        return _SECONDS.sub("", ended.out)

    def kept(self) -> Kept:
        """Checkpoints and figures of the run, which no command may lose."""
        steps = sorted((self.run_path / "checkpoints").glob("step_*"))
        measured = set()
        with contextlib.suppress(OSError, ValueError, KeyError):
            measured = set(figures_of(self.run_path / "evaluation.json")["metrics"])
        return Kept({step.name: self.tree.is_whole(step) for step in steps}, measured)


_SECONDS = re.compile(r"[ ]*\b[\d.,]+ (s|seconds?|minutes?)\b[^\n]*")
"""Times that a command prints, to the end of their lines."""


def _wait(pid: int, seconds: float) -> int | None:
    """Exit code of a fork; None if it still runs after so many seconds.

    Time in which this process was itself stopped (SIGSTOP) does not count.
    """
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while seconds > 0:
            part = min(seconds, 1.0)
            if poll.poll(1000 * part):
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            seconds -= part
        return None
    finally:
        os.close(descriptor)


def _become(words: Sequence[str], modules: Path) -> None:
    """Turn this fork into a `gen-dist` command, and end it as Python would. Never returns.

    Names of the modules that it has then imported are written to a file.
    """
    from gen_dist import commands

    sys.argv = ["gen-dist", *words]
    code = 1
    try:
        commands.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            output.flush()
    modules.write_text("\n".join(sys.modules))
    os._exit(code)


def print_json(row: object) -> None:
    """Print one line of JSON."""
    print(json.dumps(row), flush=True)
