"""Advice for a step that needs more memory than there is: the number of micro-batches with which it fits, by trying."""

from __future__ import annotations

import gc
import resource
import sys
import traceback
from collections.abc import Callable

import psutil
import torch

from gen_dist.config import TrainConfig
from gen_dist.errors import MachineError, is_out_of_memory, shortened
from gen_dist.parallel.processes import Processes

_GIB = 2**30


def memory_advice(
    error: RuntimeError,
    phase: str,
    rows: int,
    config: TrainConfig,
    processes: Processes,
    fits: Callable[[int], bool],
    *,
    has_batch_statistics: bool,
) -> MachineError:
    """Say which phase ran out of memory with how many images, its peak, and the accumulation that fits.

    Args:
        error: the failure of the step, whose tensors are freed.
        phase: name of the phase.
        rows: images of a micro-batch.
        config: config of the run.
        processes: the processes that train together.
        fits: function that tries the step in micro-batches of so many images; True if memory is enough.
        has_batch_statistics: True if a network normalizes by the statistics of a micro-batch.
    """
    first_line = shortened(str(error).strip().splitlines()[0])
    peak = _peak(processes.device)
    what = f"out of memory in phase {phase} with {rows} images at once, at {peak} ({first_line})"
    if config.shards:
        return MachineError(f"{what}; use a smaller network, or more --shards, which is another run in its last digits")
    free_frames(error)
    times, reason = _times_that_fit(rows, processes, fits)
    if times is None:
        return MachineError(f"{what}; {reason}: use a smaller network")
    most = config.global_batch_size // processes.world_size  # then a micro-batch is one image
    sure = ", which fits" if processes.world_size == 1 else " or more"
    run = "the same run up to rounding"
    if has_batch_statistics:
        run = "another run: batch normalization takes the statistics of a micro-batch"
    advised = f"--accumulation {min(config.accumulation * times, most)}{sure} ({run})"
    return MachineError(f"{what}; use {advised}, --auto-accumulation to find it at the start, or a smaller network")


def _times_that_fit(rows: int, processes: Processes, fits: Callable[[int], bool]) -> tuple[int | None, str]:
    """Least number out of 2, 4, 8 ... `rows` into which a micro-batch has to be cut; None and the reason without one.

    An error of another kind in a trial ends the trials and is part of the reason: the lack of memory is the news.
    """
    if processes.world_size > 1 and rows > 1:  # the other processes do not try with this one
        return 2, ""
    times = 1
    while times < rows:
        times = min(2 * times, rows)
        images = -(-rows // times)
        try:
            if fits(images):
                return times, ""
        except Exception as error:
            if not lacks_memory(error):
                first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                return None, f"{images} images at once are not enough for the step ({shortened(first_line)})"
            free_frames(error)
    return None, "not even one image fits"


def lacks_memory(error: Exception) -> bool:
    """True if memory is short, on a GPU or on the host."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error))


def free_frames(error: BaseException) -> None:
    """Free the tensors of the frames that an error has passed."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _peak(device: torch.device) -> str:
    """Greatest use of memory so far, and how much there is."""
    on_gpu = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    return f"{peak_memory_bytes(device) / _GIB:.2f} of {there / _GIB:.2f} GiB"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that tensors of this process had on a GPU, else most memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
