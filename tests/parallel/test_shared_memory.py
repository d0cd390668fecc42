"""Shared memory of a host has no name, so that no kill leaves any of it behind."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
import torch

from gen_dist.parallel.shared_weights import _anonymous_memory

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memfd_create of Linux")


def test_memory_that_another_process_writes_has_no_file() -> None:
    own = _anonymous_memory(4096)
    assert own is not None
    descriptor, name = own
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    assert os.readlink(path).startswith(f"/memfd:{name}")
    memory = torch.from_file(path, shared=True, size=1024)
    assert not memory.any()
    os.close(descriptor)  # the memory stays for those who have it
    memory[1] = 5.0
    assert not [one for one in os.listdir("/dev/shm") if name in one]  # other processes have files of their own there


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
