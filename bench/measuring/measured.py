"""How every benchmark of `make bench` is timed, and what is noted beside its times."""

import ctypes
import gc
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measuring.conditions import conditions
from gen_dist.config import Device, TrainConfig
from gen_dist.presets import get_preset


class Measurement:
    """One benchmark: times calls, and notes in `extra_info` what the file of `--benchmark-json` and the table show.

    - `p20_ms`, `p50_ms`, `p80_ms`, `n`: of a call, over the rounds, and their number;
    - `images_per_second`: where calls take images, at the median;
    - `peak_memory_bytes`: see PeakMemory;
    - `device`, and the conditions of bench/measuring/conditions.py.
    """

    def __init__(self, benchmark: BenchmarkFixture, device: torch.device) -> None:
        """To be made before whatever the benchmark needs: its memory counts from here on."""
        self._benchmark = benchmark
        self._device = device
        self._memory = PeakMemory(device)
        self.note(**conditions(), device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")

    def time(
        self,
        call: Callable[..., object],
        *,
        rounds: int,
        iterations: int = 1,
        warmup_rounds: int = 1,
        setup: Callable[[], object] | None = None,
        images: int | None = None,
        of: str = "median",
    ) -> None:
        """Time `rounds` rounds of `iterations` calls each; a GPU is waited for at the end of a round.

        Args:
            call: what is timed.
            rounds: so many times are kept.
            iterations: calls of a round; its time is that of a call. With a setup it is 1.
            warmup_rounds: rounds before them that are not timed.
            setup: called before each call and not timed. It may return the call's arguments (args, kwargs).
            images: what one call takes.
            of: `median` or `mean`, whichever the rate is of.
        """
        self._benchmark.pedantic(
            self._waiting(call, iterations),
            setup=setup,
            rounds=rounds,
            iterations=iterations,
            warmup_rounds=warmup_rounds,
        )
        peak = self._memory.peak_bytes()
        if not self.timed:  # under --benchmark-disable
            return
        assert self._benchmark.stats is not None
        statistics = self._benchmark.stats.stats
        self.note(**milliseconds(statistics.data), n=len(statistics.data), peak_memory_bytes=peak)
        if images is not None:
            self.note(images_per_second=images / getattr(statistics, of))

    @property
    def timed(self) -> bool:
        """Whether there are times: not before `time`, and not where a benchmark only has to run once."""
        return self._benchmark.stats is not None

    def note(self, **facts: Any) -> None:
        """Put facts beside the times."""
        self._benchmark.extra_info.update(facts)

    def _waiting(self, call: Callable[..., object], iterations: int) -> Callable[..., object]:
        """The call; at the last one of a round it waits for a GPU, as waiting at each would end all overlapping."""
        if self._device.type != "cuda":
            return call
        made = itertools.count(1)

        def waiting(*args: Any, **kwargs: Any) -> object:
            result = call(*args, **kwargs)
            if next(made) % iterations == 0:
                torch.cuda.synchronize()
            return result

        return waiting


class PeakMemory:
    """The most memory that is taken from now on, in bytes above what is taken already.

    On CPUs it is what the process has in memory (VmHWM of /proc/self/status, reset by /proc/self/clear_refs); what it
    had freed before goes back to the system first, so that it counts again where it is taken again. What libraries
    keep does not count a second time. On GPUs it is what torch has allocated there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._status = Path("/proc/self/status")
        self._before: int | None = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux":
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):  # glibc
                libc.malloc_trim(0)
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:  # a system that does not allow it: the peak cannot be told
                return
            self._before = self._kibibytes("VmRSS") * 1024

    def peak_bytes(self) -> int | None:
        """The peak so far; None where it cannot be told."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return self._kibibytes("VmHWM") * 1024 - self._before

    def _kibibytes(self, name: str) -> int:
        lines = self._status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def preset_on(name: str, device: torch.device) -> TrainConfig:
    """The config of a preset for a device."""
    return replace(get_preset(name), device=cast(Device, device.type))


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile of some times, in milliseconds."""
    low, middle, high = (np.percentile(seconds, (20, 50, 80)) * 1e3).tolist()
    return {"p20_ms": low, "p50_ms": middle, "p80_ms": high}
