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
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

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


class Scenario(NamedTuple):
    """A command, and the state of the files that it starts from."""

    words: Sequence[str]
    """Words after `gen-dist`."""
    state: str


PLUGIN = """
from dataclasses import dataclass, replace
from typing import Literal

from gen_dist.config import MlpConfig, networks
from gen_dist.presets import add_preset, get_preset


@networks.register
@dataclass(frozen=True)
class MineConfig(MlpConfig):
    kind: Literal["mine"] = "mine"


add_preset("mine", replace(get_preset("vae-mnist"), network=MineConfig()), "ours on a network of the plug-in")
"""


class Commands:
    """Commands on the files below `root`, and stored states of these files."""

    def __init__(self, work: Path) -> None:
        self.work = work.resolve()
        self.root = self.work / "root"
        self.states = self.work / "states"
        run, out = self.root / "run", self.root / "out"
        self.run_path = run
        tiny = [
            *("--steps", "12", "--hidden-sizes", "16", "--latent-dim", "2", "--global-batch-size", "64"),
            *("--checkpoint-every", "4", "--sample-every", "6", "--evaluate-every", "6", "--log-every", "3"),
            *("--run-dir", str(run), "--cache-dir", str(self.root / "cache")),
        ]
        train = ["train", "vae-mnist", *tiny, "--ema-decay", "0.9"]
        folder = ["--data", f"folder:{self.root / 'images'}", "--image-size", "16", "--global-batch-size", "4"]
        quick = ["--samples", "500", "--nll-samples", "2", "--nll-images", "5"]
        plugged = ["train", "mine", "--plugin", str(self.root / "mine.py"), *tiny]
        self.scenarios = {
            "train a plug-in": Scenario(plugged, "with a plug-in"),
            "resume a plug-in": Scenario(plugged, "half of a plug-in"),
            "sample a plug-in": Scenario(
                ["sample", str(run), "--count", "8", "--out", str(out / "samples.png")], "plug-in alone"
            ),
            "pack": Scenario(["train", "vae-mnist", *tiny, *folder, "--steps", "2"], "empty"),
            "train": Scenario(train, "packed"),
            "resume": Scenario(train, "half"),
            "finish": Scenario(train, "done"),
            "fresh": Scenario([*train, "--fresh"], "done"),
            "sample": Scenario(["sample", str(run), "--count", "8", "--out", str(out / "samples.png")], "done"),
            "evaluate": Scenario(["evaluate", str(run), *quick], "done"),
            "replay": Scenario(["replay", str(run), "--step", "9"], "done"),
            "report": Scenario(
                ["report", str(run), "--no-step-times", "--no-evaluate", "--out", str(out / "report.html")], "evaluated"
            ),
            "compare": Scenario(["compare", str(run), str(self.root / "run2"), "--out", str(out)], "two"),
            "encode": Scenario(["encode", str(run), "--out", str(out / "latents"), "--shard-size", "900"], "done"),
            "export": Scenario(
                ["export", str(run), "--format", "safetensors", "--out", str(out / "export")], "exported"
            ),
        }

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
        makers: dict[str, tuple[str | None, Callable[[], None]]] = {
            "empty": (None, self._write_images),
            "packed": ("empty", self._only_pack),
            "done": ("packed", lambda: self.must_run("train")),
            "half": ("done", self._lose_the_end),
            "evaluated": ("done", lambda: self.must_run("evaluate")),
            "encoded": ("done", lambda: self.must_run("encode")),
            "exported": ("evaluated", lambda: self.must_run("export")),
            "two": ("evaluated", self._copy_run),
            "with a plug-in": ("packed", self._write_plugin),
            "done with a plug-in": ("with a plug-in", lambda: self.must_run("train a plug-in")),
            "half of a plug-in": ("done with a plug-in", self._lose_the_end),
            "plug-in alone": ("done with a plug-in", (self.root / "mine.py").unlink),
        }
        before, make = makers[state]
        if before is not None:
            self.prepare(before)
            self.restore(before)
        make()
        shutil.copytree(self.root, self.states / state, copy_function=shutil.copy2, symlinks=True)

    def restore(self, state: str) -> None:
        """Put the files back into a state."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.states / state, self.root, copy_function=shutil.copy2, symlinks=True)

    def _write_images(self) -> None:
        (self.root / "out").mkdir(parents=True)
        chance = np.random.default_rng(0)
        for place in range(12):
            path = self.root / "images" / "ab"[place % 2] / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 256, (20, 20), dtype=np.uint8)).save(path)

    def _write_plugin(self) -> None:
        (self.root / "mine.py").write_text(PLUGIN)

    def _only_pack(self) -> None:
        self.must_run("train")
        self.forget_run()

    def forget_run(self) -> None:
        """Remove the run, but not the packed data."""
        shutil.rmtree(self.run_path)

    def _lose_the_end(self) -> None:
        """Remove the newest checkpoint and what the end of a run writes, as if it had been killed before."""
        shutil.rmtree(max((self.run_path / "checkpoints").glob("step_*")))
        (self.run_path / "summary.json").unlink()
        for picture in self.run_path.glob("*.png"):
            picture.unlink()

    def _copy_run(self) -> None:
        shutil.copytree(self.run_path, self.root / "run2", symlinks=True)

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
            elif path.suffix in (".json", ".jsonl"):
                found[name] = _digest(_TIMES.sub("", path.read_text(errors="replace")).encode())
            else:
                found[name] = _digest(path.read_bytes())
        return found

    def whole_checkpoints(self) -> dict[str, bool]:
        """Each checkpoint, and True if all its files have the digests that it lists."""
        return {step.name: _is_whole(step) for step in sorted((self.run_path / "checkpoints").glob("step_*"))}


_WITH_TIMES = frozenset(
    {
        *("environment.json", "SHA256SUMS", "evaluation.json", "card.md", "README.md", "comparison.json"),
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
_TIMES = re.compile(r'"(images_per_second|training_seconds|seconds|id|started|bytes|sha256)": [^,}\n]*,?\s*')


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


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
