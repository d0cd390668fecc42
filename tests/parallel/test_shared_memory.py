"""Shared memory of a host has no name, so that no kill leaves any of it behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest
import torch

from gen_dist.parallel.shared_weights import _anonymous_memory

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memfd_create of Linux")


def test_memory_that_another_process_writes_has_no_file() -> None:
    files_before = named_memory()
    own = _anonymous_memory(4096)
    assert own is not None
    descriptor, name = own
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    assert os.readlink(path).startswith(f"/memfd:{name}")
    memory = torch.from_file(path, shared=True, size=1024)
    assert not memory.any()
    assert named_memory() == files_before
    os.close(descriptor)  # the memory stays for those who have it
    memory[1] = 5.0


def named_memory() -> set[str]:
    """Files in /dev/shm that this process has open or mapped: others have files of their own there."""
    mapped = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    descriptors = []
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            descriptors.append(os.readlink(one))
    return {path for path in [*mapped, *descriptors] if path.startswith("/dev/shm/")}


def test_a_file_of_shared_memory_would_be_found() -> None:
    before = named_memory()
    named = shared_memory.SharedMemory(create=True, size=4096)
    try:
        assert named_memory() - before == {f"/dev/shm/{named.name}"}
    finally:
        named.close()
        named.unlink()


def test_another_process_opens_it_by_its_number() -> None:
    own = _anonymous_memory(4096)
    assert own is not None
    path = f"/proc/{os.getpid()}/fd/{own[0]}"
    memory = torch.from_file(path, shared=True, size=1024)
    code = "import mmap, os, sys; m = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096); m[4:8] = bytes([0, 0, 128, 63])"
    subprocess.run([sys.executable, "-ISc", code, path], check=True)
    os.close(own[0])
    assert memory[1] == 1.0


def test_memory_that_the_system_lacks_is_none() -> None:
    available = psutil.virtual_memory().available
    assert _anonymous_memory(2 * available) is None  # to try it would have the system kill processes
