"""Loading of a trained model: from a run, one of its checkpoints, or an export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from gen_dist.config import TrainConfig
from gen_dist.config.labels import scheme_of_json
from gen_dist.data.values import scale_of_json
from gen_dist.errors import CheckpointError, DamagedError, UserError
from gen_dist.inference.exported import PRIOR, is_export, read_export, refuse_export
from gen_dist.inference.fitted_prior import FittedPrior, networks_digest, read_fitted_prior
from gen_dist.inference.model import GenerativeModel
from gen_dist.objectives import build_objective
from gen_dist.parallel.collectives import from_main
from gen_dist.parallel.processes import Processes
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.best import best_checkpoint
from gen_dist.records.checkpoint import Checkpoint, first_difference
from gen_dist.records.run_mark import refuse_lost_checkpoints
from gen_dist.records.run_paths import RunPaths, WhichCheckpoint


def load(
    path: str | Path,
    device: str = "cpu",
    announce: Callable[[str], None] = print,
    *,
    checkpoint: WhichCheckpoint = "newest",
) -> GenerativeModel:
    """Load the model of a run directory, of one checkpoint directory, or of an export.

    `checkpoint` is that of a run directory: the newest whole one, or the best that the run keeps (`keep_best`).

    The weights are their moving average if the run kept one. An export in safetensors gives the model with the parts
    that were exported; using another one raises UserError.

    Raises:
        CheckpointError: there is no run, checkpoint or such an export at the path, or it is damaged, or the best one is
            asked for where there is one alone.
        UserError: `device` is cuda and there is no GPU.
    """
    _refuse_missing_gpu(device)
    if is_export(Path(path)):
        _refuse_best(Path(path), checkpoint)
        return _model_of_export(Path(path), device)
    model = model_of(*read_checkpoint(Path(path), announce, checkpoint), device)
    model.find_fitted_prior = partial(fitted_prior_of, model, Path(path), checkpoint)
    return model


def _refuse_missing_gpu(device: str | torch.device) -> None:
    if str(device) == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU here; use cpu")


def home_of(path: Path) -> Path:
    """Run directory of a run directory or of a checkpoint in it."""
    return path.resolve().parent.parent if checkpoints.is_checkpoint(path) else path


def fitted_prior_of(model: GenerativeModel, path: Path, which: WhichCheckpoint = "newest") -> FittedPrior:
    """Prior that was fitted to the weights of a run's model.

    Raises:
        CheckpointError: there is none, or it is damaged or of other weights.
    """
    again = f"gen-dist fit-prior {path}{'' if which == 'newest' else f' --checkpoint {which}'}"
    return read_fitted_prior(RunPaths(home_of(path)).fitted_prior, networks_digest(model.objective.networks), again)


def read_checkpoint(
    path: Path, announce: Callable[[str], None], which: WhichCheckpoint = "newest"
) -> tuple[Checkpoint, TrainConfig]:
    """Read one checkpoint directory, or the newest whole or the best one of a run directory, and the config of its run.

    Raises:
        CheckpointError: there is no run or checkpoint at the path, or it is damaged.
        UserError: `which` is another word.
    """
    if which not in get_args(WhichCheckpoint):
        raise UserError(f"checkpoint {which!r} is not one of {', '.join(get_args(WhichCheckpoint))}")
    if checkpoints.is_checkpoint(path):
        _refuse_best(path, which)
        return checkpoints.load(path)
    if which == "best":
        return checkpoints.load(best_checkpoint(path, announce))
    found = checkpoints.load_newest(path, announce)
    if found is None:
        refuse_lost_checkpoints(path)
        refuse_export(path)
        what = "has no checkpoint yet" if RunPaths(path).config.exists() else "is not a run or checkpoint directory"
        raise CheckpointError(f"{path} {what}; train one with gen-dist train PRESET --run-dir {path}")
    return found


def _refuse_best(path: Path, which: WhichCheckpoint) -> None:
    """Raise CheckpointError if the best checkpoint is asked for where there is a single one."""
    if which == "best":
        raise CheckpointError(f"{path} holds one checkpoint: leave out --checkpoint best, or name the run's directory")


def read_same_checkpoint(
    path: Path, announce: Callable[[str], None], processes: Processes, which: WhichCheckpoint = "newest"
) -> tuple[Checkpoint, TrainConfig]:
    """Read the main process's checkpoint in every process. A run that trains meanwhile may have written a newer one.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    found = read_checkpoint(path, announce, which)
    step = from_main(found[0].step, processes)
    return found if found[0].step == step else checkpoints.load(RunPaths(path).checkpoint(step))


def model_of(checkpoint: Checkpoint, config: TrainConfig, device: str | torch.device = "cpu") -> GenerativeModel:
    """The model of a checkpoint. Its weights are their moving average if the run kept one.

    Raises:
        DamagedError: the weights have other shapes than this version's networks of the config.
        UserError: `device` is cuda and there is no GPU.
    """
    _refuse_missing_gpu(device)
    channels, height, width = checkpoint.facts["image_shape"]
    labels = scheme_of_json(checkpoint.facts.get("labels"), checkpoint.facts["class_names"])
    scale = scale_of_json(checkpoint.facts.get("values"))
    try:
        weights = checkpoint.tensors.get("averaged") or checkpoint.tensors["networks"]
        with _at_most(2 * sum(tensor.numel() for tensor in weights.values())):  # layers may replace a few
            objective = build_objective(config, (channels, height, width), labels, scale)
        if different := first_difference(weights, objective.networks.state_dict()):
            raise DamagedError(
                f"the checkpoint of step {checkpoint.step} is of other networks than its config: {different}; put back "
                "its config.json if that was changed, else use the version that environment.json names"
            )
        objective.networks.load_state_dict(dict(weights))
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(
            f"the checkpoint of step {checkpoint.step} is of other networks than its config: {reason}"
        ) from None
    shape = channels, height, width
    return GenerativeModel(objective.to(device).eval(), config, shape, labels, scale)


class _NotExported(nn.Module):
    """Stands for a network that an export does not hold."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__()
        self._message = f"the export {path} does not hold the {name} of the model; load the run, or export all parts"

    def forward(self, *_inputs: Tensor) -> Tensor:
        """Raise UserError."""
        raise UserError(self._message)


def _model_of_export(path: Path, device: str | torch.device) -> GenerativeModel:
    found = read_export(path)
    try:
        with _at_most(2 * found.parameters):  # as above
            objective = build_objective(found.config, found.image_shape, found.labels, found.scale)
        for name in set(objective.networks) - set(found.weights):
            objective.networks[name] = _NotExported(name, path)
        for name, weights in found.weights.items():
            if different := first_difference(weights, objective.networks[name].state_dict()):
                raise DamagedError(
                    f"the {name} in {path} is of other networks than its config: {different}; put back its config.json "
                    "if that was changed, else use the version that exported it"
                )
            objective.networks[name].load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"the weights in {path} are of other networks than its config: {reason}") from None
    objective = objective.to(device).eval()
    model = GenerativeModel(objective, found.config, found.image_shape, found.labels, found.scale)
    model.find_fitted_prior = lambda: read_fitted_prior(path / PRIOR, None, "gen-dist fit-prior RUN, and export again")
    return model


@contextlib.contextmanager
def _at_most(elements: int) -> Iterator[None]:
    """Context manager in which new networks may have this many parameters together; RuntimeError beyond, before the
    memory of the one too many is touched."""
    total = 0

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        total += 0 if parameter is None else parameter.numel()
        if total > elements:
            raise RuntimeError(f"that has more than {elements:,} parameters")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
