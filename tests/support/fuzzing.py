"""Fuzzing of a reader: damaged versions of its files, each from a seed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS_A_FILE = 20
_TICK_SECONDS = 0.05
_MOST_BETWEEN_TICKS = 0.3
"""Seconds that a busy machine may keep a thread from its tick. The rest of a longer pause is a stop."""
MINUTES = float(os.environ.get("GEN_DIST_FUZZ_MINUTES", "1"))
"""Minutes that the slow test of each reader takes."""


STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e308, 10**400, float("nan"), float("inf"), "", "\u0000", "\ud800", "<b>", "../..", "0" * 500),
    *([], [[]], [None], [1, "a"], {}, {"": {}}, {"kind": "vae"}, {"step": -5}),
)
"""Values of JSON that few writers think of."""


def mutated(content: bytes, others: list[bytes], random_numbers: random.Random) -> bytes:
    """A file with some of the changes that damage and malice make."""
    changed = bytearray(content)
    for _ in range(random_numbers.choice((1, 1, 2, 5, 20))):
        place = random_numbers.randrange(len(changed)) if changed else 0
        match random_numbers.randrange(8):
            case 0 | 1 | 2:
                changed[place : place + 1] = bytes([random_numbers.randrange(256)])
            case 3:  # numbers at the end of their range
                changed[place : place + 4] = random_numbers.choice(
                    (b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\1\0\0\0")
                )
            case 4:
                del changed[place:]
            case 5:
                length = random_numbers.randrange(64)
                changed[place:place] = changed[place : place + length]
            case 6:
                del changed[place : place + random_numbers.randrange(1, 64)]
            case _:
                other = random_numbers.choice(others)
                start = random_numbers.randrange(len(other))
                length = random_numbers.randrange(64)
                changed[place : place + length] = other[start : start + length]
    return bytes(changed)


def strange_json(content: bytes, chance: random.Random) -> bytes:
    """Lines of JSON in which one value is another; the bytes damaged if they are no JSON."""
    try:
        text = content.decode()
        whole = text.startswith("{\n")
        lines = [json.loads(text)] if whole else [json.loads(line) for line in text.splitlines()]
        places = list(_places(lines))
        holder, key = chance.choice(places)
    except (ValueError, IndexError):
        return mutated(content, [content], chance)
    if isinstance(holder, dict) and chance.random() < 0.2:
        del holder[key]
    else:
        holder[key] = chance.choice(STRANGE)
    return "\n".join(json.dumps(line, indent=2 if whole else None) for line in lines).encode() + b"\n"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value within another, as (container, key)."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from _places(inner)


def write_sums(checkpoint: Path) -> None:
    """Record the digests of a checkpoint's files as they are."""
    names = sorted(file.name for file in checkpoint.iterdir() if file.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (checkpoint / "SHA256SUMS").write_text("".join(lines))


def tried(
    files: dict[str, bytes], read: Callable[[str, bytes], None], seeds: Iterator[int], seconds: float = 1e9
) -> int:
    """Read a damaged version of one of the files for each seed; the number of seeds."""
    names, contents = list(files), [content for content in files.values() if content]
    count = 0
    with Stopwatch() as watch:
        for seed in seeds:
            count += 1
            random_numbers = random.Random(seed)
            name = random_numbers.choice(names)
            content = mutated(files[name], contents, random_numbers)
            watch.lap()
            try:
                read(name, content)
            except Exception as error:
                raise AssertionError(
                    f"seed {seed}: a damaged {name} ended in {type(error).__name__}: {error}"
                ) from error
            assert watch.lap() < SECONDS_A_FILE, f"seed {seed}: a damaged {name} took too long"
            if watch.total() > seconds:
                break
    return count


class Stopwatch:
    """Context manager that measures the seconds that this process runs, without those in which it is stopped (SIGSTOP).

    A thread adds up the time between its ticks, of a stop at most `_MOST_BETWEEN_TICKS`. The processor's time, of all
    threads, counts where code that holds Python's lock keeps the thread from its ticks; a wait that holds the lock is
    left to pytest's own limit.
    """

    def __enter__(self) -> Stopwatch:
        self._awake = 0.0
        self._ended = threading.Event()
        self._began = self._last = 0.0, time.process_time()
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def lap(self) -> float:
        """Seconds since the last lap."""
        last, self._last = self._last, (self._awake, time.process_time())
        return self._since(last)

    def total(self) -> float:
        """Seconds since the start."""
        return self._since(self._began)

    def _since(self, moment: tuple[float, float]) -> float:
        awake, processor = moment
        return max(self._awake - awake, time.process_time() - processor)

    def _tick(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(_TICK_SECONDS):
            now = time.monotonic()
            self._awake += min(now - before, _MOST_BETWEEN_TICKS)
            before = now


def peak_mib() -> int:
    """Peak memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


def for_minutes(reader: str, files: dict[str, bytes], read: Callable[[str, bytes], None]) -> None:
    """Fuzz a reader for its minutes, and check its peak memory."""
    start = random.SystemRandom().randrange(2**40)
    count = tried(files, read, iter(range(start, start + 10**9)), 60 * MINUTES)
    print(f"{reader}: {count:,} damaged files, {peak_mib()} MiB at most")
    assert peak_mib() < 1024 + 512  # 512 for torch
