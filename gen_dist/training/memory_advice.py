"""Advice for a step that needs more memory than there is: the number of micro-batches with which it fits, by trying."""

from __future__ import annotations

import gc
import resource
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from gen_dist.config import TrainConfig
from gen_dist.errors import MachineError, agreeing, is_out_of_memory, number_of, shortened
from gen_dist.objectives import Objective
from gen_dist.parallel.processes import Processes
from gen_dist.training.rows import rows_together, uncut_accumulations

_GIB = 2**30


@dataclass(frozen=True)
class StepFacts:
    """Facts about a step that ran out of memory."""

    phase: str
    """Name of the phase whose turn it was."""
    rows: int
    """Images of a micro-batch."""
    rows_together: int
    """Number of images in a row that no micro-batch may split."""
    has_batch_statistics: bool
    """True if a network normalizes by the statistics of a micro-batch."""
    keeps_whole_state: bool
    """True if each process keeps more than its own part of state that `--split-state` can split."""


def step_facts(
    phase: str, rows: int, objective: Objective, dtype: torch.dtype, *, keeps_whole_state: bool
) -> StepFacts:
    """Facts about a step of an objective in a precision. In float16 no state is split."""
    mixes = any(isinstance(layer, _BatchNorm) for layer in objective.modules())
    return StepFacts(phase, rows, rows_together(objective), mixes, keeps_whole_state and dtype != torch.float16)


def memory_advice(
    error: RuntimeError, facts: StepFacts, config: TrainConfig, processes: Processes, fits: Callable[[int], bool]
) -> MachineError:
    """Say which phase ran out of memory with how many images, its peak, and what makes it fit.

    Args:
        error: the failure of the step, whose tensors are freed.
        facts: of the step.
        config: config of the run.
        processes: the processes that train together.
        fits: function that tries the step in micro-batches of so many images; True if memory is enough.
    """
    first_line = shortened(str(error).strip().splitlines()[0])
    peak = _peak(processes.device)
    what = (
        f"out of memory in phase {facts.phase} with {number_of(facts.rows, 'image')} at once, at {peak} ({first_line})"
    )
    split = _split_state(facts, config, processes)
    if config.shards:
        ways = [*split, "a smaller network", "more --shards, which is another run in its last digits"]
        return MachineError(f"{what}; use {_either(ways)}")
    free_frames(error)
    number, reason = _accumulation_that_fits(facts, config, processes, fits)
    if number is None:
        return MachineError(f"{what}; {reason}: use {_either([*split, 'a smaller network'])}")
    sure = ", which fits" if processes.world_size == 1 else " or more"
    ways = [f"--accumulation {number}{sure} ({_run_in_parts(facts)})", *split]
    # A trial is of one process, which has the state of all weights.
    if not (config.split_state or config.auto_accumulation):
        ways.append("--auto-accumulation to find it at the start")
    return MachineError(f"{what}; use {_either([*ways, 'a smaller network'])}")


def untried_ways_out(facts: StepFacts, config: TrainConfig, processes: Processes) -> str:
    """Options with which a step needs less memory, in words; whether they suffice is not tried."""
    size, parts = config.global_batch_size, config.shards or processes.world_size * config.accumulation
    ways = []
    numbers = [] if config.shards else uncut_accumulations(config, processes, facts.rows_together)[1:]
    if numbers:
        number = next((one for one in numbers if one >= 2 * config.accumulation), numbers[-1])
        more = " or more" if number < numbers[-1] else ""
        ways.append(f"--accumulation {number}{more} ({_run_in_parts(facts)})")
    if getattr(config.network, "checkpointing", None) is False:
        ways.append("--checkpointing (the same run, a step takes longer)")
    ways += _split_state(facts, config, processes)
    if config.shards and 2 * config.shards <= size:
        ways.append("more --shards, which is another run in its last digits")
    if size > parts:
        ways.append("a smaller --global-batch-size")
    return _either([*ways, "a smaller network"])


def _run_in_parts(facts: StepFacts) -> str:
    """Words for the run with smaller micro-batches."""
    if facts.has_batch_statistics:
        return "another run: batch normalization takes the statistics of a micro-batch"
    return "the same run up to rounding"


def _split_state(facts: StepFacts, config: TrainConfig, processes: Processes) -> list[str]:
    """The option that splits state over the processes, and what it does, if it helps."""
    if config.split_state or processes.world_size == 1 or not facts.keeps_whole_state:
        return []
    state = "optimizer's state" + (" and the moving average" if config.keeps_average else "")
    instead = " in place of --auto-accumulation" if config.auto_accumulation else ""
    return [f"--split-state{instead} (the same run; each process keeps 1/{processes.world_size} of the {state})"]


def _either(ways: Sequence[str]) -> str:
    return ", ".join(ways[:-1]) + f"{',' * (len(ways) > 2)} or {ways[-1]}" if len(ways) > 1 else ways[0]


def _accumulation_that_fits(
    facts: StepFacts, config: TrainConfig, processes: Processes, fits: Callable[[int], bool]
) -> tuple[int | None, str]:
    """Least accumulation that cuts micro-batches in about 2, 4, 8 ... and fits; None and the reason without one.

    An error of another kind in a trial ends the trials and is part of the reason: the lack of memory is the news.
    """
    size, world_size, together = config.global_batch_size, processes.world_size, facts.rows_together
    numbers = uncut_accumulations(config, processes, together)[1:]
    if world_size > 1 and numbers:  # the other processes do not try with this one
        return next((one for one in numbers if one >= 2 * config.accumulation), numbers[-1]), ""
    times = 1
    while numbers:
        times *= 2
        number = next((one for one in numbers if one >= times * config.accumulation), numbers[-1])
        numbers = [one for one in numbers if one > number]
        images = -(-size // (world_size * number))
        try:
            if fits(images):
                return number, ""
        except Exception as error:
            if not lacks_memory(error):
                first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                images_of_it = f"{number_of(images, 'image')} at once {agreeing(images, 'are')}"
                return None, f"{images_of_it} not enough for the step ({shortened(first_line)})"
            free_frames(error)
    least = "one image fits" if together == 1 else f"the {together} images fit that a layer takes together"
    return None, f"not even {least}"


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
