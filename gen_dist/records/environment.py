"""Environment of a run: versions, hardware, git commit and command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from gen_dist.errors import CheckpointError
from gen_dist.records.reading import (
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    TEXT,
    either,
    list_of,
    object_with,
    read_object,
    values_of,
)

ENVIRONMENT_SHAPE = {
    "versions": either(values_of(either(TEXT, None)), None),
    "cpu": either(OBJECT, None),
    "gpus": either(list_of(object_with(name=TEXT, memory_gib=NUMBER)), None),
    "git": either(object_with(commit=TEXT, dirty=FLAG), None),
    "command": either(list_of(TEXT), None),
    "directory": either(TEXT, None),
    "processes": either(COUNT, None),
    "earlier": either(list_of(OBJECT), None),
}
"""Fields of environment.json on which readers rely. Those of other versions may be missing."""
_PACKAGES = ("torch", "torchvision", "accelerate", "triton", "numpy")


def environment() -> dict[str, Any]:
    """The content of environment.json: versions, hardware, git commit and command line.

    Memory is in GiB. None stands for a package that is not installed, for the commit of code outside a checkout, and
    for a count that the operating system does not give. No environment variable and no host name is recorded.
    """
    import psutil
    import torch

    from gen_dist import __version__

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"gen_dist": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "memory_gib": _gib(psutil.virtual_memory().total),
        },
        "gpus": [{"name": gpu.name, "memory_gib": _gib(gpu.total_memory)} for gpu in gpus],
        "torch_threads": torch.get_num_threads(),
        "git": _git_state(),
        "command": list(sys.argv),
        "directory": _directory(),
    }


def threads_that_reached(step: int, file: Path) -> int | None:
    """Number of CPU threads of the start that took a run to a step; None if its environment.json does not say."""
    try:
        last = read_object(file, ENVIRONMENT_SHAPE, "remove it")
    except (FileNotFoundError, CheckpointError):
        return None
    for start in [last, *(last.get("earlier") or [])]:  # the newest first; one that ended before a checkpoint left none
        begun, threads = start.get("from_step"), start.get("torch_threads")
        if isinstance(begun, int) and begun < step:
            return threads if isinstance(threads, int) else None
    return None


def _directory() -> str | None:
    """Current directory, from which relative paths of the config count; None if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def _cpu_model() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text(errors="replace").splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        if "model name" in facts:
            # Virtual machines have one name for processors of several generations, which differ in family and model.
            return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"
    elif sys.platform == "darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or None


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that tracks this file. An installed copy inside another repository has none."""
    directory = str(Path(__file__).resolve().parent)
    if _output_of("git", "-C", directory, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _output_of("git", "-C", directory, "rev-parse", "HEAD")
    changes = _output_of("git", "-C", directory, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _output_of(*command: str) -> str | None:
    """Output of a command; None if it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
