"""The least accumulation with which a step fits in memory, found by trying before the run starts."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gen_dist.config import TrainConfig
from gen_dist.data import Dataset
from gen_dist.errors import MachineError
from gen_dist.parallel.collectives import in_main, rows_of_all
from gen_dist.parallel.processes import Processes
from gen_dist.plugins.surroundings import watched
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.environment import ENVIRONMENT_SHAPE
from gen_dist.records.reading import read_config, read_object
from gen_dist.records.run_paths import RunPaths
from gen_dist.training.cuda_graphs import WARM_UP_STEPS
from gen_dist.training.memory_advice import free_frames, lacks_memory
from gen_dist.training.trainer import Trainer

Announce = Callable[[str], None]


def with_accumulation_that_fits(
    config: TrainConfig, path: Path, fresh: bool, dataset: Dataset, processes: Processes, announce: Announce
) -> TrainConfig:
    """Config with the accumulation of the run that it resumes, else with the least one that fits in all processes.

    A config without `auto_accumulation` stays as it is. A collective call.

    Raises:
        MachineError: not even one image at a time fits.
    """
    if not config.auto_accumulation:
        return config
    most = config.global_batch_size // processes.world_size  # then a micro-batch is one image
    recorded = in_main(lambda: None if fresh else _recorded(path, processes), processes)
    if recorded is not None:
        return dataclasses.replace(config, accumulation=min(max(recorded, config.accumulation), most))
    own = least_that_fits(config.accumulation, most, lambda number: _fits(number, config, dataset, processes))
    found = rows_of_all(torch.tensor([own or 0], device=processes.device), processes)
    if not found.all():
        ranks = ", ".join(str(rank) for rank, one in enumerate(found.tolist()) if not one)
        raise MachineError(
            f"auto_accumulation: no accumulation up to {most} fits in the memory of rank {ranks}; use a smaller network"
        )
    number = int(found.max())
    rows = -(-config.global_batch_size // (processes.world_size * number))
    announce(f"accumulation {number} is the least that fits: at most {rows} images at once in each process")
    return dataclasses.replace(config, accumulation=number)


def least_that_fits(first: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """Least number in `first` .. `most` for which `fits` is true, which stays true above it; None if there is none."""
    too_few, enough = first - 1, first
    while enough < most and not fits(enough):
        too_few, enough = enough, min(2 * enough, most)
    if enough >= most and not fits(most):
        return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if fits(middle):
            enough = middle
        else:
            too_few = middle
    return enough


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
    with contextlib.closing(Trainer(config, dataset, alone)) as trainer:
        weights = sum(one.nbytes for one in trainer.objective.parameters()) if reduces else 0
        buffer = torch.empty(weights, dtype=torch.uint8, device=alone.device)
        for step in trainer.kinds_of_steps():
            for _ in range(WARM_UP_STEPS + 2):
                trainer.try_step(step)
        if alone.device.type == "cuda":
            torch.cuda.synchronize(alone.device)
        del buffer


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
