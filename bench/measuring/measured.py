"""Timing of every benchmark of `make bench`, and the facts recorded beside its times."""

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
    """One benchmark. It times calls and records in `extra_info` what `--benchmark-json` and the table show.

    - `p20_ms`, `p50_ms`, `p80_ms`, `n`: percentiles of a call over the rounds, and their number;
    - `images_per_second`: at the median, if calls take images;
    - `peak_memory_bytes`: see PeakMemory;
    - `device`, and the conditions of bench/measuring/conditions.py.
    """

    def __init__(self, benchmark: BenchmarkFixture, device: torch.device) -> None:
        """Start to count memory. Create it before anything that the benchmark needs."""
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
        """Time `rounds` rounds of `iterations` calls each, waiting for a GPU at the end of each round.

        Args:
            call: function to time.
            rounds: number of times that are kept.
            iterations: calls per round, whose mean time counts. With a setup it is 1.
            warmup_rounds: untimed rounds before the first.
            setup: called before each call and not timed. It may return the call's arguments (args, kwargs).
            images: number of images per call.
            of: `median` or `mean` time, from which the rate is computed.
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
        """True if there are times: not before `time`, nor under --benchmark-disable."""
        return self._benchmark.stats is not None

    def note(self, **facts: Any) -> None:
        """Record facts beside the times."""
        self._benchmark.extra_info.update(facts)

    def _waiting(self, call: Callable[..., object], iterations: int) -> Callable[..., object]:
        """The call, which waits for a GPU at the end of a round alone: waiting each time would prevent all overlap."""
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
    """Peak memory from now on, in bytes above the present use.

    On CPUs it is the process's resident memory (VmHWM of /proc/self/status, reset by /proc/self/clear_refs). Memory
    freed before goes back to the system first, so that it counts if it is taken again; memory that libraries keep does
    not count again. On GPUs it is torch's allocated memory.
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
            except OSError:  # the system does not allow it, and the peak stays unknown
                return
            self._before = self._kibibytes("VmRSS") * 1024

    def peak_bytes(self) -> int | None:
        """Peak so far, or None if the system does not report it."""
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
