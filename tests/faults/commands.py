"""Commands of gen_dist in forks of one process that has imported torch, where chosen system calls fail.

The process runs under `failing_calls.c` (LD_PRELOAD). A fork arms it, runs a command as a user types it, and ends. All
files that may fail are below one directory, `root`; each scenario starts from a stored state of that directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.scenarios import STATES, scenarios_of

KINDS = (
    *("write", "fsync", "rename", "open to write", "open to read", "read", "mkdir", "unlink", "mmap", "stat"),
    *("truncate", "opendir", "chmod", "lock", "close"),
)
"""Kinds of system calls, in the order of failing_calls.c."""


class Fault(NamedTuple):
    """The call to fail."""

    kind: str
    nth: int
    """Its number among the calls of this kind below the root, from 1. 0 counts the calls and fails none."""
    error: int
    """errno."""
    lasting: bool = False
    """True if all later calls of the kind fail as well."""
    short: bool = False
    """True if half of the bytes are written, without an error."""


class Ended(NamedTuple):
    """End of a command."""

    code: int | None
    """Exit code; minus the number of the signal that ended it; None if it was still running at the time-out."""
    out: str
    err: str
    calls: int
    """Calls of the fault's kind."""
    failed: str
    """Path of the call that failed; empty if none did."""


class Commands:
    """Commands on the files below `root`, and stored states of these files."""

    def __init__(self, work: Path) -> None:
        self.work = work.resolve()
        self.root = self.work / "root"
        self.states = self.work / "states"
        self.run_path = self.root / "run"
        self.scenarios = scenarios_of(self.root)

    def run(
        self,
        words: Sequence[str],
        fault: Fault | None = None,
        *,
        kill_after: float | None = None,
        timeout: float = 120.0,
    ) -> Ended:
        """Run a command in a fork. With `kill_after`, kill its process group with SIGKILL after as many seconds."""
        streams = [self.work / "stdout", self.work / "stderr"]
        library = ctypes.CDLL(None)
        library.calls_seen.restype, library.failed_path.restype = ctypes.c_long, ctypes.c_char_p
        kind, nth, error, lasting, short = fault or Fault("close", 0, 0)
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
                below = os.fsencode(self.root)
                library.fail_call(KINDS.index(kind), ctypes.c_long(nth), error, lasting, short, below)
                _become(words)
            finally:
                os._exit(1)
        code, until = None, time.monotonic() + (timeout if kill_after is None else kill_after)
        while code is None and time.monotonic() < until:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.005)
        if code is None:
            with contextlib.suppress(ProcessLookupError):  # it may not have made its group yet
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        out, err = (stream.read_text(errors="replace") for stream in streams)
        return Ended(code, out, err, library.calls_seen(), os.fsdecode(library.failed_path()))

    def must_run(self, name: str) -> None:
        """Run the command of a scenario, which has to succeed.

        Raises:
            RuntimeError: it did not.
        """
        ended = self.run(self.scenarios[name].words)
        if ended.code != 0:
            raise RuntimeError(f"{name} ended with exit code {ended.code}: {ended.err}")

    def prepare(self, state: str) -> None:
        """Store a state of the files, after those that it is made from."""
        if (self.states / state).exists():
            return
        before, command, change = STATES[state]
        if before is not None:
            self.prepare(before)
            self.restore(before)
        if command is not None:
            self.must_run(command)
        change(self.root)
        shutil.copytree(self.root, self.states / state, copy_function=shutil.copy2, symlinks=True)

    def restore(self, state: str) -> None:
        """Put the files back into a state."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.states / state, self.root, copy_function=shutil.copy2, symlinks=True)

    def contents(self) -> dict[str, str]:
        """Digest of every file below the root, without what differs between equal runs: times, and identities."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = _KEY_OF_FOLDER.sub("KEY", path.relative_to(self.root).as_posix())
            if path.is_dir():
                if not any(path.iterdir()):
                    found[name] = "empty directory"
            elif path.name in _WITH_TIMES or path.suffix == ".html":
                found[name] = "present"
            elif path.name == "evaluation.json":
                found[name] = _digest(json.dumps(figures_of(path), sort_keys=True).encode())
            elif path.suffix in (".json", ".jsonl"):
                found[name] = _digest(_TIMES.sub("", path.read_text(errors="replace")).encode())
            else:
                found[name] = _digest(path.read_bytes())
        return found

    def exact(self) -> dict[str, str]:
        """Mode of every directory, and mode and digest of every file: all that a command finds below the root."""
        return {path.relative_to(self.root).as_posix(): _exact_digest(path) for path in sorted(self.root.rglob("*"))}

    def printed(self, ended: Ended) -> str:
        """Standard output of a command without what differs between equal ones."""
        return _SECONDS.sub("", ended.out)

    def whole_checkpoints(self) -> dict[str, bool]:
        """Each checkpoint, and True if all its files have the digests that it lists."""
        return {step.name: _is_whole(step) for step in sorted((self.run_path / "checkpoints").glob("step_*"))}


_WITH_TIMES = frozenset(
    {
        *("environment.json", "SHA256SUMS", "card.md", "README.md", "comparison.json"),
        *(
            "comparison.md",
            "comparison.png",
            "curves.png",
            "run.json",
            "seen.json",
            ".holder",
            ".lock",
            ".encoding.lock",
            "wandb-id",
        ),
    }
)
"""Files with times or identities in them."""
_KEY_OF_FOLDER = re.compile(r"(?<=cache/folder-images-)[0-9a-f]+")
"""Key of a folder's packed data: it holds the folder's inode, which each copy of the files has anew."""
_OF_TIME = "images_per_second|tflops_per_second|fraction_of_peak|peak_memory_mib|training_seconds|seconds"
_TIMES = re.compile(rf'"({_OF_TIME}|id|started|bytes|sha256)": [^,}}\n]*,?\s*')

_SECONDS = re.compile(r"[ ]*\b[\d.,]+ (s|seconds?|minutes?)\b[^\n]*")
"""Times that a command prints, to the end of their lines."""


def figures_of(evaluation: Path) -> dict[str, Any]:
    """Content of evaluation.json without times and versions."""
    found = json.loads(evaluation.read_text())
    return {name: value for name, value in found.items() if name not in ("seconds", "environment", "sha256")}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _exact_digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    mode = f"{path.stat().st_mode:o}"
    return mode if path.is_dir() else f"{mode} {_digest(path.read_bytes())}"


def _is_whole(step: Path) -> bool:
    try:
        lines = [line.split("  ", 1) for line in (step / "SHA256SUMS").read_text().splitlines()]
        return bool(lines) and all(
            hashlib.sha256((step / name).read_bytes()).hexdigest() == digest for digest, name in lines
        )
    except (OSError, ValueError):
        return False


def _become(words: Sequence[str]) -> None:
    """Turn this fork into a `gen-dist` command, and end it as Python would. Never returns."""
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
    os._exit(code)


def import_first() -> None:
    """Import what commands import, so that forks need not, and leave charts blank.

    Drawing is two thirds of the time of a small run, and calls no system call on the run's files.
    """
    import matplotlib.figure
    import pyarrow.parquet  # noqa: F401

    matplotlib.figure.Figure.draw = lambda *_: None  # type: ignore[method-assign]

    import gen_dist.commands
    import gen_dist.evaluation.evaluator
    import gen_dist.inference.encoding
    import gen_dist.inference.export
    import gen_dist.reports.comparison
    import gen_dist.reports.page
    import gen_dist.training.replay
    import gen_dist.training.run  # noqa: F401

    gc.freeze()  # a fork's collections then copy no pages of what is imported


def print_json(row: object) -> None:
    """Print one line of JSON."""
    print(json.dumps(row), flush=True)
