"""Weights of another program that a run starts from: `--from diffusers:DIR`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.inference import diffusers_format
from gen_dist.objectives import Objective
from gen_dist.parallel.collectives import errors_shared, from_main
from gen_dist.parallel.processes import Processes
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.reading import read_config
from gen_dist.records.run_paths import RunPaths


def with_start_digest(config: TrainConfig, path: Path, fresh: bool, processes: Processes) -> TrainConfig:
    """Config with the digest of its starting weights: as recorded, in it or by a resumed run, else of the directory.

    A collective call.

    Raises:
        ConfigError: the directory is needed and cannot be read.
    """
    if config.start_from is None or config.start_digest is not None:
        return config
    digest = None
    with errors_shared(processes):
        if processes.is_main:
            digest = (
                diffusers_format.digest_of(_directory(config))
                if fresh or not checkpoints.checkpoint_paths(path)
                else read_config(RunPaths(path).config).start_digest
            )
    return dataclasses.replace(config, start_digest=from_main(digest, processes))


def take_starting_weights(objectives: Iterable[Objective], config: TrainConfig) -> None:
    """Give objectives of one config the weights that it starts from, if it names any.

    Raises:
        ConfigError: they cannot be read, are of other networks, or are not those that the run started from.
    """
    if config.start_from is None:
        return
    published = diffusers_format.read_published(_directory(config))
    if config.start_digest not in (None, published.digest):
        raise ConfigError(
            f"the weights in {published.place} are not those that the run started from (SHA-256 "
            f"{str(config.start_digest)[:12]} -> {published.digest[:12]}); put the old ones back, or start a "
            "new run from a preset with --from"
        )
    for objective in objectives:
        diffusers_format.start_from(objective, config, published)


def _directory(config: TrainConfig) -> Path:
    assert config.start_from is not None
    return Path(config.start_from.removeprefix("diffusers:")).expanduser()
