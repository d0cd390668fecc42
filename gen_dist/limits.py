"""Shares of the machine that this process may use: CPUs and memory, by affinity and control groups (Linux).

A container with a quota of two CPUs still shows all cores of its host, and as many threads would wait for their turns.
Formats: cgroups(7), proc_pid_mountinfo(5); `cpu.max`, `memory.max` and `memory.swap.max` of version 2,
`cpu.cfs_quota_us`, `memory.limit_in_bytes` and `memory.memsw.limit_in_bytes` (with swap) of version 1. What is absent,
unreadable or not a number is no limit.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PROCESS = Path("/proc/self")
_MEMORY_INFO = Path("/proc/meminfo")
_MOST_LEVELS = 64
_MOST_CHARACTERS = 2**20
_UNLIMITED_BYTES = 2**60
"""Version 1 says a number near 2^63 where there is no limit."""


def usable_cpus(process: Path = _PROCESS) -> int:
    """Number of logical CPUs that this process may use at once: those of its affinity, at most its quota, rounded up.

    Args:
        process: directory of the process below /proc.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(process)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def free_memory_bytes(process: Path = _PROCESS, memory_info: Path = _MEMORY_INFO) -> int | None:
    """Bytes that this process may take yet before the system ends one, by the machine and all control groups.

    Pages that only keep files count as free, and so does swap as far as all groups leave any. None where the system
    does not say.
    """
    machine = _fields(memory_info)
    swap = 1024 * machine.get("SwapFree", 0)
    known = [1024 * machine["MemAvailable"] + swap] if "MemAvailable" in machine else []
    without_swap = []
    for group in _groups("memory", process):
        files, used = _fields(group / "memory.stat"), _number(group / "memory.current", group / "memory.usage_in_bytes")
        cached = files.get("total_inactive_file", files.get("inactive_file", 0))
        cached += files.get("total_active_file", files.get("active_file", 0))
        cached = min(cached, used or 0)
        memory = _left(group, ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        if memory is not None:
            without_swap.append(memory + cached)
        both = _left(group, ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"))
        if both is not None:
            known.append(both + cached)
        more = _left(group, ("memory.swap.max", "memory.swap.current"))
        if more is not None:
            swap = min(swap, max(0, more))
    known += [free + swap for free in without_swap]
    return max(0, min(known)) if known else None


def resident_bytes(process: Path = _PROCESS) -> int | None:
    """Bytes of memory that a process has, files that are mapped included. None where the system does not say."""
    words = _text(process / "statm").split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if len(words) > 1 and words[1].isdecimal() else None


def _left(group: Path, *names: tuple[str, str]) -> int | None:
    """Bytes that a group's limit leaves, by the first pair of files with a limit and its use; None without a limit."""
    for limit_name, used_name in names:
        limit, used = _number(group / limit_name), _number(group / used_name)
        if limit is not None and used is not None and limit < _UNLIMITED_BYTES:
            return limit - used
    return None


def _cpu_quota(process: Path) -> float | None:
    """Least quota of CPUs of a process's control groups; None without one."""
    quotas = []
    for group in _groups("cpu", process):
        words = _text(group / "cpu.max").split()
        if not words:
            words = [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(words) == 2 and all(re.fullmatch("[1-9][0-9]{0,15}", word) for word in words):  # neither `max` nor -1
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _groups(controller: str, process: Path) -> Iterator[Path]:
    """Directories of a process's control groups that may limit a resource, each with those above it."""
    mounts = _mounts(controller, process)
    for line in _text(process / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        is_second = number == "0" and not controllers
        if not is_second and controller not in controllers.split(","):
            continue
        below = [(place, _below(path, root)) for root, place in mounts.get(is_second, [])]
        ours = [(place, inside) for place, inside in below if inside is not None]
        # Without a namespace of its own, a container sees its host's path, and its group is what is mounted.
        for place, inside in ours or [(place, []) for place, _ in below]:
            for depth in range(min(len(inside), _MOST_LEVELS), -1, -1):
                yield Path(place, *inside[:depth])


def _below(path: str, root: str) -> list[str] | None:
    """Names of a group and of those above it, from below `root` on; None if it is not there."""
    names, above = ([part for part in one.split("/") if part] for one in (path, root))
    if not path.startswith("/") or names[: len(above)] != above or ".." in names[len(above) :]:
        return None
    return names[len(above) :]


def _mounts(controller: str, process: Path) -> dict[bool, list[tuple[str, str]]]:
    """Root and place of each mounted tree of control groups, by whether it is of version 2."""
    found: dict[bool, list[tuple[str, str]]] = {}
    for line in _text(process / "mountinfo").splitlines():
        words, _, kind = line.partition(" - ")
        fields, file_system = words.split(" "), kind.split(" ")
        if len(fields) < 5 or len(file_system) < 3 or file_system[0] not in ("cgroup", "cgroup2"):
            continue
        if file_system[0] == "cgroup2" or controller in file_system[2].split(","):
            root, place = (re.sub(r"\\([0-7]{3})", lambda one: chr(int(one[1], 8)), one) for one in fields[3:5])
            found.setdefault(file_system[0] == "cgroup2", []).append((root, place))
    return found


def _number(*paths: Path) -> int | None:
    """Number in the first of some files that has one."""
    texts = (_text(path).strip() for path in paths)
    return next((int(text) for text in texts if re.fullmatch("[0-9]{1,20}", text)), None)


def _fields(path: Path) -> dict[str, int]:
    """Names and numbers of a file's lines, as `MemAvailable:  512 kB` or `inactive_file 4096`."""
    return {found[1]: int(found[2]) for found in re.finditer(r"^(\w+):? +([0-9]{1,20})\b", _text(path), re.MULTILINE)}


def _text(path: Path) -> str:
    """Text of a file of the system; empty if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_MOST_CHARACTERS)
    except (OSError, ValueError):
        return ""
