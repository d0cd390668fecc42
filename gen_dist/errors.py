"""Errors that a user can cause or fix. Every command prints such an error as one line and exits with code 2."""

from __future__ import annotations

import errno
import os
import re


class UserError(ValueError):
    """Base of all errors that a user caused and can fix: the message has the values and the way out."""

    shared = False
    """True if all processes of a host raise the error at once, so that one of them is enough to print it."""


class ConfigError(UserError):
    """Invalid config: an unknown preset, a value out of range, or values that contradict each other."""

    shared = True


class PluginError(ConfigError):
    """A plug-in that cannot be loaded: missing, failing, or of another version than a run recorded."""


class UnknownNameError(ConfigError):
    """A config has an option or kind that this version does not have: mistyped, or of another version."""


class DataError(UserError):
    """Invalid data source: missing, empty, damaged or of the wrong shape."""


class CheckpointError(UserError):
    """Unusable run directory or checkpoint: missing, damaged, or of another config."""


class DamagedError(CheckpointError):
    """A file of a run has other content than was written there."""


class UnreadableError(CheckpointError):
    """A file of a run cannot be read just now, e.g. for a permission or a failing disk. It need not be damaged."""


class OtherVersionError(CheckpointError):
    """A run or checkpoint that another version of gen_dist wrote, in a format that this one does not know."""


class TakenOverError(CheckpointError):
    """A later start of the same launch has claimed the run directory, since this process was presumed dead."""


class MachineError(UserError):
    """Refusal of the machine: a file that cannot be used, memory that is not there, a process that has gone."""


_WAYS_OUT = {
    errno.EACCES: "use one that this user may read and write",
    errno.EPERM: "use one that this user may read and write",
    errno.EROFS: "use one that can be written",
    errno.ENAMETOOLONG: "use a shorter one",
    errno.ELOOP: "fix the link, which leads to itself",
    errno.ENOSPC: "free some space, then run the same command",
    errno.EDQUOT: "free some space, then run the same command",
    errno.EMFILE: "raise the limit of open files (ulimit -n), then run the same command",
    errno.ENFILE: "close other programs, then run the same command",
}
_MEMORY = ("allocate memory", "out of memory", "bad_alloc", "not enough memory", "storage size calculation overflowed")
"""Words of libraries for memory that is not there."""
_LOST_PEERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
_KINDS_OF_LOST_PEERS = ("PeerDiedError", "DistBackendError", "DistNetworkError", "DistStoreError")


def is_out_of_memory(error: RuntimeError) -> bool:
    """True if a library of arrays lacked memory, on a GPU or on the host."""
    return any(words in str(error).lower() for words in _MEMORY)


def as_user_error(error: BaseException) -> UserError | None:
    """Return an error as one that is told in a line. None stands for a fault of this program, whose traceback helps.

    The kinds of torch's errors are known by name, so that no command waits for torch.
    """
    if isinstance(error, UserError):
        return error
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    is_runtime = isinstance(error, RuntimeError)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return _out_of_memory(first_line)
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return _out_of_memory(first_line)
    if isinstance(error, OSError):
        return MachineError(_refused(error))
    if is_runtime and first_line.startswith("Symlink loop"):  # pathlib's, before Python 3.13
        return MachineError(f"{first_line}; fix the link, which leads to itself")
    if is_runtime and "start new thread" in first_line:
        return MachineError(f"{first_line}; raise the limit of processes (ulimit -u), then run the same command")
    if type(error).__name__ in _KINDS_OF_LOST_PEERS or (is_runtime and any(one in str(error) for one in _LOST_PEERS)):
        reason = re.sub(r"^\[[^\]]*\] ", "", first_line).split(". ")[0]  # without the place in a library's source
        return MachineError(
            f"another process of this run has ended or cannot be reached ({shortened(reason)}); see its output, then "
            "run the same command"
        )
    return None


def _out_of_memory(reason: str) -> MachineError:
    return MachineError(
        f"out of memory ({shortened(reason)}); use a smaller batch, --accumulation 2 or more for the same batch in "
        "parts, or a smaller network"
    )


def _refused(error: OSError) -> str:
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes) and path]
    where = f"{' to '.join(map(shortened, paths))}: " if paths else ""
    way_out = _WAYS_OUT.get(error.errno or 0, "fix that, then run the same command")
    return f"{where}{shortened(reason)}; {way_out}"


def number_of(count: int, noun: str) -> str:
    """Number of things in words: `1 image`, `2,000 images`, `2 processes`.

    Args:
        count: how many there are.
        noun: one of them, with or without words before it. Its plural is regular: `batches`, `boxes`, `directories`.
    """
    if count == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{count:,} {noun}es"
    stem = re.sub(r"(?<![aeiou])y$", "ie", noun)
    return f"{count:,} {stem}s"


def agreeing(count: int, predicate: str) -> str:
    """Predicate of `count` things, which is given in the plural: `are resized` is `is resized` for 1.

    What follows a comma or a semicolon is about something else.
    """
    if count != 1:
        return predicate
    clause, rest = re.fullmatch(r"([^,;]*)(.*)", predicate, re.DOTALL).groups()  # type: ignore[union-attr]
    return re.sub(r"\b(are|have|lose|get|their)\b", lambda found: _OF_ONE[found[0]], clause) + rest


_OF_ONE = {"are": "is", "have": "has", "lose": "loses", "get": "gets", "their": "its"}


def shortened(text: str) -> str:
    """Start and end of a text on one line: together with the way out it fits a line that can be read."""
    text = r"\n".join(text.splitlines())
    return text if len(text) <= 200 else f"{text[:110]} ... {text[-80:]}"
