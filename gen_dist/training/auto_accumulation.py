"""The least accumulation with which a step fits in memory, found by trying before the run starts."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from gen_dist.config import TrainConfig
from gen_dist.data import Dataset
from gen_dist.errors import MachineError, number_of
from gen_dist.objectives import Objective, build_objective
from gen_dist.parallel.collectives import in_main, rows_of_all
from gen_dist.parallel.processes import Processes
from gen_dist.plugins.surroundings import watched
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.environment import ENVIRONMENT_SHAPE
from gen_dist.records.reading import read_config, read_object
from gen_dist.records.run_paths import RunPaths
from gen_dist.training.cuda_graphs import WARM_UP_STEPS
from gen_dist.training.memory_advice import free_frames, lacks_memory
from gen_dist.training.rows import refuse_batch, rows_of_rank, rows_together, uncut_accumulations
from gen_dist.training.trainer import Trainer

Announce = Callable[[str], None]


def with_accumulation_that_fits(
    config: TrainConfig, path: Path, fresh: bool, dataset: Dataset, processes: Processes, announce: Announce
) -> TrainConfig:
    """Config with the accumulation of the run that it resumes, else with the least one that fits in all processes.

    A config without `auto_accumulation` stays as it is. A collective call.

    Raises:
        ConfigError: the batch cannot be cut as the config says.
        MachineError: not even the smallest micro-batches fit.
    """
    if not config.auto_accumulation:
        return config
    numbers = _possible(config, dataset, processes)
    recorded = in_main(lambda: None if fresh else _recorded(path, processes), processes)
    if recorded is not None:
        at_least = max(recorded, config.accumulation)
        return dataclasses.replace(config, accumulation=next((n for n in numbers if n >= at_least), numbers[-1]))
    own = least_that_fits(numbers, lambda number: _fits(number, config, dataset, processes))
    found = rows_of_all(torch.tensor([own or 0], device=processes.device), processes)
    if not found.all():
        ranks = ", ".join(str(rank) for rank, one in enumerate(found.tolist()) if not one)
        split = "--split-state in place of --auto-accumulation, or " if processes.world_size > 1 else ""
        raise MachineError(
            f"auto_accumulation: no accumulation up to {numbers[-1]} fits in the memory of rank {ranks}; use {split}a "
            "smaller network"
        )
    number = int(found.max())
    rows = -(-config.global_batch_size // (processes.world_size * number))
    announce(
        f"accumulation {number} is the least that fits: at most {number_of(rows, 'image')} at once in each process"
    )
    return dataclasses.replace(config, accumulation=number)


def _possible(config: TrainConfig, dataset: Dataset, processes: Processes) -> Sequence[int]:
    """Numbers of micro-batches, from the config's on, that leave together the images that a layer takes together.

    Raises:
        ConfigError: that of the config does not, or the batch is too small for it.
    """
    rows_of_rank(config, processes)
    with torch.random.fork_rng(devices=[]), watched():
        objective = build_objective(config, dataset.image_shape, dataset.labels, dataset.scale)
    refuse_batch(objective, config, processes)
    return uncut_accumulations(config, processes, rows_together(objective))


def least_that_fits(numbers: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Least of ascending numbers for which `fits` is true, which stays true above it; None if there is none."""
    too_few, enough, last = -1, 0, len(numbers) - 1
    while enough < last and not fits(numbers[enough]):
        too_few, enough = enough, bisect.bisect_left(numbers, 2 * numbers[enough], hi=last)
    if enough == last and not fits(numbers[last]):
        return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if fits(numbers[middle]):
            enough = middle
        else:
            too_few = middle
    return numbers[enough]


def _recorded(path: Path, processes: Processes) -> int | None:
    """Accumulation that a run has found, with as few images at once on another number of processes.

    None if it has no checkpoint, or did not try.
    """
    if not checkpoint_paths(path):
        return None
    paths = RunPaths(path)
    config, before = read_config(paths.config), processes.world_size
    if not config.auto_accumulation:
        return None
    with contextlib.suppress(FileNotFoundError):
        before = read_object(paths.environment, ENVIRONMENT_SHAPE, "remove it").get("processes") or before
    return -(-config.accumulation * before // processes.world_size)


def _fits(number: int, config: TrainConfig, dataset: Dataset, processes: Processes) -> bool:
    """True if this process has memory for steps of every kind with so many micro-batches.

    It tries by itself, since another process may lack memory in the middle of a collective.
    """
    rows = -(-config.global_batch_size // processes.world_size)
    trial = dataclasses.replace(config, global_batch_size=rows, accumulation=number)
    alone = Processes(0, processes.local_rank, 1, processes.device)
    with _as_before(processes.device, compiled=config.compile):
        try:
            with watched():
                _try_steps(trial, dataset, alone, reduces=processes.world_size > 1)
        except Exception as error:
            # Smaller micro-batches may be refused for another reason, such as batch normalization of one image.
            if not lacks_memory(error) and number == config.accumulation:
                raise
            free_frames(error)
            return False
    return True


def _try_steps(config: TrainConfig, dataset: Dataset, alone: Processes, *, reduces: bool) -> None:
    """Take steps of every kind, so often that they are recorded, and that state of optimizers is there.

    `reduces` says that the run will have a buffer for gradients on their way to other processes.
    """
    with contextlib.closing(_Trial(config, dataset, alone)) as trainer:
        weights = sum(one.nbytes for one in trainer.objective.parameters()) if reduces else 0
        buffer = torch.empty(weights, dtype=torch.uint8, device=alone.device)
        for step in trainer.kinds_of_steps():
            for _ in range(WARM_UP_STEPS + 2):
                trainer.try_step(step)
        if alone.device.type == "cuda":
            torch.cuda.synchronize(alone.device)
        del buffer


class _Trial(Trainer):
    """Trainer of one process's images, whose batch counts as part of the whole one."""

    def _refuse_batch(self, objective: Objective) -> None:
        """See Trainer. `_possible` has done this for the whole batch."""


@contextlib.contextmanager
def _as_before(device: torch.device, *, compiled: bool) -> Iterator[None]:
    """Context manager that gives back memory, peak and random state at its end, and forgets compiled code.

    The compiler remembers shapes: the run would get code for any number of images, which a resumed run, that does not
    try, has not.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        yield
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
