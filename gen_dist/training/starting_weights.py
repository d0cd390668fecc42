"""Weights that a run starts from: those of another run, or of another program (`--from diffusers:DIR`)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gen_dist.config import LatentAutoencoderConfig, TrainConfig
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.inference import diffusers_format
from gen_dist.inference.loading import read_checkpoint
from gen_dist.objectives import Objective
from gen_dist.parallel.collectives import errors_shared, from_main
from gen_dist.parallel.processes import Processes
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import Checkpoint, first_difference
from gen_dist.records.reading import read_config
from gen_dist.records.run_paths import RunPaths
from gen_dist.startup import tell


def with_start_digest(config: TrainConfig, path: Path, fresh: bool, processes: Processes) -> TrainConfig:
    """Config with the digest of its starting weights: as recorded, in it or by a resumed run, else of their files.

    A collective call.

    Raises:
        ConfigError: the files are needed and cannot be read.
    """
    if config.start_from is None or config.start_digest is not None:
        return config
    digest = None
    with errors_shared(processes):
        if processes.is_main:
            digest = (
                _digest(config, path)
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
    if _is_run(config):
        checkpoint = _checkpoint(config)
        _refuse_other(config, str(_directory(config)), _digest_of(checkpoint))
        newest = checkpoint.tensors["networks"]
        for objective, weights in zip(objectives, (newest, checkpoint.tensors.get("averaged", newest)), strict=False):
            _load(objective, weights, config)
        return
    published = diffusers_format.read_published(_directory(config))
    _refuse_other(config, str(published.place), published.digest)
    for objective in objectives:
        diffusers_format.start_from(objective, config, published)


def _refuse_other(config: TrainConfig, place: str, digest: str) -> None:
    """Raise ConfigError if weights have another digest than those that the run started from."""
    if config.start_digest not in (None, digest):
        raise ConfigError(
            f"the weights in {place} are not those that the run started from (SHA-256 "
            f"{str(config.start_digest)[:12]} -> {digest[:12]}); put the old ones back, or start a "
            "new run from a preset with --from"
        )


def _load(objective: Objective, weights: Mapping[str, Tensor], config: TrainConfig) -> None:
    """Give all networks of an objective the weights of a run.

    Raises:
        ConfigError: they are of other networks; the line names the first tensor that differs.
    """
    ours, weights = (_taken(one, objective) for one in (objective.networks.state_dict(), weights))
    if different := first_difference(weights, ours):
        _refuse_other_parts(weights, ours, config)
        raise ConfigError(
            f"{config.start_from} is a run of other networks: {different}; use its preset, its options of networks, "
            "and images of its size and channels, or if those are equal, train it anew: another version made it"
        )
    objective.networks.load_state_dict(weights, strict=False)  # names are equal but for those that start anew


def _refuse_other_parts(there: Iterable[str], here: Iterable[str], config: TrainConfig) -> None:
    """Raise ConfigError if one of two runs, by the names of its weights, has a network that the other one lacks."""
    parts = [{name.split(".")[0] for name in one} for one in (there, here)]
    unlike = sorted(parts[0] ^ parts[1])
    if not unlike:
        return
    name, is_ours = unlike[0], unlike[0] in parts[1]
    has, trains = ("no", "trains one") if is_ours else ("an" if name[0] in "aeiou" else "a", "has none")
    way_out = "use the preset and the objective of that run"
    if name == "discriminator" and isinstance(config.objective, LatentAutoencoderConfig):
        way_out = (
            "leave the adversarial term out with --adversarial-weight 0, or start from a run that was trained with one"
            if is_ours
            else "give this run an adversarial term too, with --adversarial-weight"
        )
    raise ConfigError(f"{config.start_from} is a run with {has} {name}, and this run {trains}; {way_out}")


def _taken(weights: Mapping[str, Tensor], objective: Objective) -> dict[str, Tensor]:
    """Weights by name without those of networks that start anew."""
    return {name: one for name, one in weights.items() if name.split(".")[0] not in objective.starts_anew}


def _digest(config: TrainConfig, run_path: Path) -> str:
    place = _directory(config)
    if not _is_run(config):
        return diffusers_format.digest_of(place)
    if run_path.resolve() in (place.resolve(), *place.resolve().parents):
        raise ConfigError(f"from {config.start_from} is the run directory itself; choose another --run-dir")
    return _digest_of(_checkpoint(config))


def _digest_of(checkpoint: Checkpoint) -> str:
    """SHA-256 of the weights of a checkpoint, newest and averaged ones."""
    digest = hashlib.sha256()
    for group in ("networks", "averaged"):
        for name, tensor in sorted(checkpoint.tensors.get(group, {}).items()):
            digest.update(f"{group} {name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checkpoint(config: TrainConfig) -> Checkpoint:
    place = _directory(config)
    try:
        return read_checkpoint(place, tell)[0]
    except CheckpointError as error:
        hint = (
            "; a directory of diffusers is named diffusers:DIR" if (place / diffusers_format.WEIGHTS).exists() else ""
        )
        raise ConfigError(f"from {config.start_from}: {error}{hint}") from None


def _is_run(config: TrainConfig) -> bool:
    return not str(config.start_from).startswith("diffusers:")


def _directory(config: TrainConfig) -> Path:
    assert config.start_from is not None
    return Path(config.start_from.removeprefix("diffusers:")).expanduser()
