"""Start of a process: standard streams, environment variables and launcher, which it did not choose, and imports.

None of them may end a run or change it in silence. `settle` comes before everything that takes time, and before torch.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import gc
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")
"""Words in the command line of a launcher that waits for the processes it started."""
_REAPERS = ("systemd", "init", "tini", "dumb-init", "docker-init", "catatonit", "conmon", "containerd-shim")
"""Programs that adopt a process whose parent has died, besides process 1."""

_FOREIGN = ("MPLBACKEND", "TQDM_")
"""Variables, or their first letters, that change or break libraries which we use in one way only. Jupyter exports
MPLBACKEND to every command of its shell; `import tqdm`, and so torch, fails at a TQDM_MININTERVAL that is no number."""
_RANKS = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPI = ("OMPI_COMM_WORLD_", "PMI_", "MPI_LOCAL", "MV2_COMM_WORLD_")
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def settle() -> None:
    """Make this process independent of what it did not choose; end it if its launcher has already died."""
    end_with_launcher()
    forget_foreign_variables()
    take_ranks()
    open_standard_streams()


# Standard streams.


class _Forgiving(io.FileIO):
    """A standard stream whose writes never fail: nobody reads it any more, or its disk is full."""

    lost: OSError | None = None
    """First error of a write."""

    def write(self, data: Any) -> int:
        """Write some of the data. Data that cannot be written is dropped."""
        try:
            while (written := super().write(data)) is None:  # full, and another program has made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


def open_standard_streams() -> None:
    """Have standard output and standard error take any text, and fail in no write.

    A descriptor that is closed gets /dev/null: else the next file that is opened gets its number, and what C libraries
    print goes into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if os.name != "posix":
        return
    if sys.stdout is sys.__stdout__:  # else the caller has its own
        sys.stdout = forgiving(sys.stdout, 1, _PATHS_AS_THEY_ARE)
    if sys.stderr is sys.__stderr__:
        sys.stderr = forgiving(sys.stderr, 2, "backslashreplace")


def forgiving(stream: TextIO | None, descriptor: int, errors: str) -> TextIO:
    """A stream to a descriptor that takes any text and fails in no write, with encoding and buffering of another.

    Args:
        stream: the stream to replace. None is one whose descriptor was closed.
        descriptor: where to write.
        errors: Python's name of what to do with letters that the encoding lacks.
    """
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(descriptor, "w", closefd=False)),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors=errors,
        line_buffering=bool(getattr(stream, "line_buffering", True)),
    )


def lost_output(stream: TextIO) -> OSError | None:
    """Flush a stream, and return the first error since the last call for which text was lost.

    A reader that left, or a terminal that hung up, is not an error.
    """
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    if not isinstance(raw, _Forgiving):
        return None
    lost, raw.lost = raw.lost, None
    return None if lost is None or lost.errno in (errno.EPIPE, errno.EIO) else lost


def tell(line: str, stream: TextIO | None = None) -> None:
    """Print a line on a stream, else on standard error. It does not matter if nobody can read it."""
    with contextlib.suppress(OSError, ValueError):
        if stream := stream or sys.stderr:
            print(line, file=stream, flush=True)


def _paths_as_they_are(error: UnicodeError) -> tuple[bytes, int]:
    """Write the bytes of a path that is not UTF-8 as they are, and escape other letters that the encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    written = [
        bytes([ord(letter) - 0xDC00]) if "\udc80" <= letter <= "\udcff" else letter.encode("ascii", "backslashreplace")
        for letter in letters
    ]
    return b"".join(written), error.end


_PATHS_AS_THEY_ARE = "gen_dist.paths_as_they_are"
codecs.register_error(_PATHS_AS_THEY_ARE, _paths_as_they_are)


# Environment variables.


def forget_foreign_variables() -> None:
    """Remove variables that other programs left for libraries that we use."""
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        del os.environ[name]


def take_ranks() -> None:
    """Take ranks that mpirun gave, and forget those that another launcher left behind.

    WORLD_SIZE says that this process is one of several. Without it, a rank is left over from another launch.
    """
    if "WORLD_SIZE" in os.environ:
        return
    for names in (_OPEN_MPI, _MPICH):
        rank, size, local_rank, local_size = (os.environ.get(name, "") for name in names)
        if rank.isdecimal() and size.isdecimal() and int(size) > 1:
            here = local_size or size
            ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank or rank, "LOCAL_WORLD_SIZE": here}
            os.environ.update(ranks)
            if here == size:  # all on this host, where they find each other without being told
                os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
                os.environ.setdefault("MASTER_PORT", "29500")
            return
    for name in [name for name in os.environ if name in _RANKS or name.startswith(_MPI)]:
        del os.environ[name]


# The launcher.


def end_with_launcher() -> None:
    """End this process when its launcher dies, or now if it is dead already (Linux).

    A launcher that is killed sends no signal: its processes would train on unseen, or wait for each other.
    """
    if is_launched():
        end_with_parent()


def is_launched() -> bool:
    """True if `accelerate launch` or `torchrun` started this process."""
    # Users export single variables of Accelerate, too; this pair is its launcher's.
    by_accelerate = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"} <= os.environ.keys()
    return by_accelerate or "TORCHELASTIC_RUN_ID" in os.environ


def end_with_parent() -> None:
    """Have the system send SIGTERM to this process when its parent dies, and end it if that is dead already (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if is_adopted(os.getppid()):  # looked at last: a parent that dies from now on sends the signal
        os.kill(os.getpid(), signal.SIGTERM)


def is_adopted(parent: int, processes: Path = Path("/proc")) -> bool:
    """True if a parent has adopted this process, which a launcher started and left behind."""
    try:
        name = (processes / str(parent) / "comm").read_text(errors="replace").strip()
        words = (processes / str(parent) / "cmdline").read_text(errors="replace")
    except OSError:
        return parent <= 1
    if any(launcher in words for launcher in _LAUNCHERS):  # in a container the launcher itself may be process 1
        return False
    return parent <= 1 or name.startswith(_REAPERS)


# Imports.


@contextlib.contextmanager
def quick_import() -> Iterator[None]:
    """Context manager without Python's garbage collector, for imports of large packages.

    The collector takes a seventh of the time to import torch, and finds nothing to free: modules stay alive.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
