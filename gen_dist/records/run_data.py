"""Data of a run for what reads them later: from another directory, after they have moved, or by another version."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gen_dist.config import TrainConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.errors import CheckpointError, DataError
from gen_dist.parallel.collectives import in_main
from gen_dist.parallel.processes import Processes
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.environment import ENVIRONMENT_SHAPE
from gen_dist.records.reading import read_config, read_object
from gen_dist.records.run_paths import RunPaths


def open_run_data(
    run_path: Path,
    config: TrainConfig,
    announce: Callable[[str], None],
    *,
    digest: str | None,
    data: str | None = None,
    data_root: str | None = None,
) -> Dataset:
    """Open the data that a run was trained on.

    Args:
        run_path: run directory.
        config: of the run.
        announce: takes a line before work that takes long.
        digest: of the data that the run was trained on. None if the run has no checkpoint to tell.
        data: where they are now, such as folder:/new/place, if they have moved since. Test shards of the run move as
            these do: from the directory that both patterns were in to the one that the new pattern is in.
        data_root: directory with torchvision's data sets, if it has moved since.

    Raises:
        DataError: the data are missing or damaged, or not those of the run.
    """
    if config.packing.decoded_on == "cuda" and not torch.cuda.is_available():
        raise DataError(
            f"the images of {run_path} were decoded on a GPU (decoded_on cuda), and have other values elsewhere; use a "
            "host with a GPU and CUDA"
        )
    config = _where_it_trained(run_path, _with_moved_tests(config, data))
    try:
        dataset = open_dataset(data or config.data, data_root or config.data_root, config.packing, announce)
    except DataError as error:
        if data or data_root:
            raise
        raise DataError(f"{error}; if the data have moved, name their place with --data or --data-root") from None
    if digest not in (None, dataset.digest):
        raise DataError(
            f"the data of {data or config.data} are not those that {run_path} was trained on (another digest); put "
            "the old data back, or name their place with --data or --data-root"
        )
    return dataset


def with_packing_of_run(config: TrainConfig, path: Path, fresh: bool, processes: Processes) -> TrainConfig:
    """Config with what an older version did to the files of the run that it resumes, where the config leaves it open.

    Folders had 64 pixels by default in versions that wrote no `fit`, and files were reduced to 8 bits in versions that
    wrote no `dtype`: the command that started such a run resumes it. A collective call.

    Raises:
        CheckpointError: config.json of the run is damaged, or cannot be read just now.
    """
    packing, source = config.packing, config.data.partition(":")[0]
    if fresh or source not in ("folder", "parquet"):
        return config

    def recorded() -> dict[str, Any]:
        if not checkpoint_paths(path):
            return {}
        of_run = read_config(RunPaths(path).config).packing
        return {
            **({"image_size": of_run.image_size} if packing.image_size is None and source == "folder" else {}),
            **({"dtype": of_run.dtype} if packing.dtype == "source" else {}),
        }

    return dataclasses.replace(config, packing=dataclasses.replace(packing, **in_main(recorded, processes)))


def _where_it_trained(run_path: Path, config: TrainConfig) -> TrainConfig:
    """Config with relative paths of the data as they were at the start of the run, if they still exist there."""
    path = RunPaths(run_path if run_path.parent.name != "checkpoints" else run_path.parent.parent).environment
    try:
        directory = read_object(path, ENVIRONMENT_SHAPE, "").get("directory")
    except (FileNotFoundError, CheckpointError):
        return config
    if not directory or os.path.realpath(directory) == os.getcwd():
        return config
    name, colon, place = config.data.partition(":")
    changes: dict[str, Any] = {}
    start = _start_of_shards(directory, place) if name == "shards" else Path(directory) / place
    if colon and "://" not in place and start.exists():
        changes["data"] = f"{name}:{Path(directory) / place}"
    tested = config.packing.test_shards
    if tested and "://" not in tested and _start_of_shards(directory, tested).exists():
        changes["packing"] = dataclasses.replace(config.packing, test_shards=str(Path(directory) / tested))
    if (Path(directory) / config.data_root).is_dir():
        changes["data_root"] = str(Path(directory) / config.data_root)
    return dataclasses.replace(config, **changes)


def _with_moved_tests(config: TrainConfig, data: str | None) -> TrainConfig:
    """Config whose test shards are where the shards to train on, now `data`, have moved to.

    The parts of the two patterns that are equal at their end stay; what stands before them has changed.
    """
    tested = config.packing.test_shards
    if tested is None or data is None or not data.startswith("shards:") or data == config.data:
        return config
    before, after = (name.removeprefix("shards:").split("/") for name in (config.data, data))
    # Names of shards may differ, in the directory that has moved.
    equal = [one == other for one, other in zip(before[::-1], after[::-1], strict=False)]
    same = max(1, [*equal, False].index(False))
    old, new = ("".join(f"{part}/" for part in parts[: len(parts) - same]) for parts in (before, after))
    if not tested.startswith(old) or (not old and tested.startswith(("/", "~"))) or (not old and "://" in tested):
        return config
    moved = dataclasses.replace(config.packing, test_shards=new + tested.removeprefix(old))
    return dataclasses.replace(config, packing=moved)


def _start_of_shards(directory: str, pattern: str) -> Path:
    """Directory of a pattern, which has the start of a name before its first special character."""
    return (Path(directory) / re.split(r"[*?{\[]", pattern)[0]).parent
