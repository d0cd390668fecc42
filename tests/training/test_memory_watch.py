"""Memory that is nearly used up is told before the system ends the process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from gen_dist.parallel.processes import Processes
from gen_dist.presets import get_preset
from gen_dist.training import memory_watch
from gen_dist.training.memory_watch import memory_line, memory_watched
from gen_dist.training.run import train
from tests.support.runs import small_config

GIB = 2**30
ALONE = Processes(0, 0, 1, torch.device("cpu"))


def until(is_so: Callable[[], bool]) -> bool:
    """Wait for something to become true, at most as long as a loaded machine may take."""
    end = time.monotonic() + 30
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give this process a limit of memory, so many bytes above what it has."""

    def set_it(above: int) -> None:
        process = psutil.Process()
        limit = process.memory_info().rss + above
        monkeypatch.setattr(memory_watch, "free_memory_bytes", lambda: max(0, limit - process.memory_info().rss))
        monkeypatch.setattr(memory_watch, "_SECONDS", 0.01)

    return set_it


def test_a_process_that_grows_to_its_limit_says_so_once(limit: Callable[[int], None]) -> None:
    told: list[str] = []
    limit(psutil.Process().memory_info().rss // 10 + 2**26)
    with memory_watched(get_preset("kl-f8"), ALONE, told.append):
        time.sleep(0.1)
        assert not told
        grown = [torch.ones(2**27, dtype=torch.uint8)]
        assert until(lambda: bool(told))
        grown.append(torch.ones(2**26, dtype=torch.uint8))
        time.sleep(0.1)
    assert len(told) == 1


def test_a_run_beside_its_limit_says_so_and_trains(limit: Callable[[int], None], tmp_path: Path) -> None:
    limit(0)
    told: list[str] = []
    config = small_config("vae", run_dir=str(tmp_path / "run"))
    assert train(config, say=told.append).finished
    assert sum("if it needs more, the system ends it without a word (signal 9): use" in line for line in told) == 1


def test_the_line_names_the_options_that_need_less() -> None:
    line = memory_line(get_preset("kl-f8"), 20 * GIB, GIB)
    assert line == (
        "warning: this process has 20.0 GiB of memory and 1.0 GiB are left; if it needs more, the system ends it "
        "without a word (signal 9): use --accumulation 2 or more (the same batch in parts), --checkpointing (the same "
        "run with less memory), a smaller --global-batch-size"
    )
    assert "--checkpointing" not in memory_line(small_config("vae", accumulation=3), GIB, 0)
    assert "--accumulation 6 or more" in memory_line(small_config("vae", accumulation=3), GIB, 0)
    assert "--accumulation" not in memory_line(small_config("vae", shards=2), GIB, 0)


def test_without_numbers_of_the_system_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[None] = []
    monkeypatch.setattr(memory_watch, "_SECONDS", 0.01)
    monkeypatch.setattr(memory_watch, "free_memory_bytes", lambda: looks.append(None))
    told: list[str] = []
    with memory_watched(small_config("vae"), ALONE, told.append):
        assert until(lambda: bool(looks))
    assert not told and len(looks) == 1
