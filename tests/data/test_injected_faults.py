"""Packing and opening under faults of the system, and killed: the right data or one line, and nothing is left."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import open_dataset
from gen_dist.errors import DataError

CALLS: list[tuple[ModuleType, str]] = [
    *((os, name) for name in ("open", "stat", "lstat", "fstat", "scandir", "listdir", "fsync", "rename", "replace")),
    *((os, "mkdir"), (os, "unlink"), (os, "rmdir"), (os, "chmod"), (fcntl, "flock"), (builtins, "open"), (io, "open")),
]
CODES = (errno.EIO, errno.EACCES, errno.ENOSPC, errno.ENOMEM, errno.ENOLCK)
FILES_OF_A_CACHE = 8


@pytest.fixture
def source(tmp_path: Path) -> str:
    for number in range(4):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((12, 12), 90).save(path)
    return f"folder:{tmp_path / 'images'}"


def digest_of(source: str, cache: Path, lines: list[str] | None = None) -> str:
    packing = DataConfig(cache_dir=str(cache), image_size=8)
    return open_dataset(source, ".", packing, (lines if lines is not None else []).append).digest


def failing_once(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, number: int, code: int) -> list[int]:
    """Make the call of a number fail. The list that is returned grows with each call."""
    function, calls = getattr(module, name), []

    def called(*words: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise OSError(code, os.strerror(code), str(words[0]) if words else None)
        return function(*words, **named)

    monkeypatch.setattr(module, name, called)
    return calls


def assert_whole(source: str, cache: Path, right: str) -> None:
    """The next opening is right, without a word of damage, and nothing else is in the cache."""
    lines: list[str] = []
    assert digest_of(source, cache, lines) == right
    assert not any("damaged" in line for line in lines), lines
    for entry in cache.iterdir():
        assert not entry.name.startswith("."), entry
        assert not entry.is_dir() or len(list(entry.iterdir())) == FILES_OF_A_CACHE


def attempt(source: str, cache: Path, right: str, fault: tuple[ModuleType, str], number: int, code: int) -> bool:
    """Pack or open with one fault. False if there are not so many calls of the kind."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "sleep", lambda seconds: None)
        calls = failing_once(patched, *fault, number, code)
        try:
            assert digest_of(source, cache) == right
        except DataError as error:
            assert "\n" not in str(error)
    assert_whole(source, cache, right)
    return len(calls) >= number


@pytest.mark.parametrize("fault", CALLS, ids=lambda fault: f"{fault[0].__name__}.{fault[1]}")
def test_one_fault_ends_right(tmp_path: Path, source: str, fault: tuple[ModuleType, str]) -> None:
    right = digest_of(source, tmp_path / "right")
    for number in (1, 3):
        attempt(source, tmp_path / f"cache{number}", right, fault, number, errno.EIO)


@pytest.mark.slow
@pytest.mark.parametrize("packed_before", [False, True], ids=["packing", "opening"])
@pytest.mark.parametrize("fault", CALLS, ids=lambda fault: f"{fault[0].__name__}.{fault[1]}")
def test_every_fault_ends_right(
    tmp_path: Path, source: str, fault: tuple[ModuleType, str], packed_before: bool
) -> None:
    right = digest_of(source, tmp_path / "right")
    cache = tmp_path / "cache"
    for code in CODES:
        for number in range(1, 200):
            shutil.rmtree(cache, ignore_errors=True)
            if packed_before:
                digest_of(source, cache)
            if not attempt(source, cache, right, fault, number, code):
                break


KILLED = """
import faulthandler, os, random, signal, sys, time
faulthandler.dump_traceback_later(270, exit=True)  # tells where it waits
from gen_dist.config import DataConfig
from gen_dist.data import open_dataset
source, cache, seed, kills = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
draws = random.Random(seed)
def opened(cache):
    return open_dataset(source, ".", DataConfig(cache_dir=cache, image_size=8), lambda line: None).digest
right = opened(cache + "-right")
for number in range(kills):
    here = f"{cache}/{number}"
    child = os.fork()
    if child == 0:
        opened(here)
        os._exit(0)
    time.sleep(draws.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert opened(here) == right, number
    left = [entry.name for entry in os.scandir(here) if entry.name.startswith(".")]
    assert not left, left
print("right")
"""


@pytest.mark.slow
def test_packing_killed_at_random_moments_ends_right(tmp_path: Path, source: str) -> None:
    seed = random.SystemRandom().randrange(2**31)
    command = [sys.executable, "-c", KILLED, source, str(tmp_path / "cache"), str(seed), "50"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert found.stdout == "right\n", (seed, found.stderr[-800:])
