"""Use of a trained model: load a run or checkpoint, then sample, encode, decode, reconstruct."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from gen_dist.config import TrainConfig
from gen_dist.config.labels import LabelScheme, classes_named, scheme_of_json
from gen_dist.data.values import PLAIN, ValueScale, scale_of_json
from gen_dist.errors import CheckpointError, DamagedError, UserError
from gen_dist.inference.exported import is_export, read_export, refuse_export
from gen_dist.inference.truncation import truncated
from gen_dist.kernels import Key, normal
from gen_dist.objectives import Objective, build_objective
from gen_dist.objectives.evaluating import SMALL_PASS, rows_per_pass
from gen_dist.parallel.collectives import from_main
from gen_dist.parallel.processes import Processes
from gen_dist.plugins.surroundings import watched_if_loaded
from gen_dist.randomness import Stream
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.best import best_checkpoint
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.records.run_mark import refuse_lost_checkpoints
from gen_dist.records.run_paths import RunPaths

Result = TypeVar("Result")
WhichCheckpoint = Literal["newest", "best"]

IMAGES_PER_CHUNK = 1000
"""Maximum number of images in one forward pass; large ones are fewer, see `rows_per_pass`."""


def label_tensor(labels: LabelScheme, rows: Sequence[Sequence[float]]) -> Tensor:
    """Labels as `GenerativeModel.sample` takes them from rows, each with one number or A of them."""
    return torch.tensor(rows, dtype=getattr(torch, labels.dtype)).view(len(rows), *labels.shape)


class GenerativeModel:
    """A trained objective in eval mode, with images of the data's dtype and units in and out.

    Results depend on the arguments only.
    """

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        image_shape: tuple[int, int, int],
        labels: Sequence[str] | LabelScheme,
        scale: ValueScale = PLAIN,
    ) -> None:
        """`labels` are the names of classes, or the meaning of other labels."""
        self.objective = objective
        self.config = config
        self.image_shape = image_shape
        self.labels = labels if isinstance(labels, LabelScheme) else classes_named(labels)
        """Meaning of the labels of the training images."""
        self.scale = scale
        """Values of the training images, and the range of them that networks see as 0..1."""
        self._rows_per_pass: dict[str, int] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes 0, 1, ... of the training images; one name if they had none."""
        return self.labels.class_names

    @property
    def classes(self) -> int:
        """Number of classes of the training images, 1 if they had no labels."""
        return self.labels.classes

    @property
    def device(self) -> torch.device:
        """Device of the weights. Inputs are moved there."""
        return next(self.objective.parameters()).device

    def prior_latents(self, count: int, seed: int = 0, first_row: int = 0) -> Tensor:
        """Draw normal latents float32 [count, *latent_shape]. A row does not depend on the count or the device.

        Args:
            count: number of latents.
            seed: key of the latents.
            first_row: index of the first row among all latents of this seed.

        Raises:
            UserError: the seed is not in 0 .. 2^63 - 1.
        """
        if not 0 <= seed < 2**63:
            raise UserError(f"seed {seed} is not in 0 .. 2^63 - 1")
        # Drawn on the CPU, because other devices draw other numbers. Cloned, so that the caller may write to it.
        shape = self.objective.latent_shape
        latents = normal(Key(torch.tensor([seed, 0]), Stream.PRIOR, first_row), count, math.prod(shape)).clone()
        return latents.view(count, *shape).to(self.device)

    @property
    def conditional(self) -> bool:
        """True if images are decoded from latents and labels."""
        return self.objective.conditional

    def sample(self, count: int, labels: Tensor | None = None, seed: int = 0, *, truncation: float = 1.0) -> Tensor:
        """Draw new images [count, C, H, W] from the prior, of the data's dtype. The same seed gives the same images.

        Args:
            count: number of images.
            labels: labels of the images of a conditional model: int64 [count] of classes, int64 [count, A] of
                attributes or float32 [count, A] of numbers, see `labels` of the model. None takes all classes in turn,
                or labels as training images have them.
            seed: key of the latents.
            truncation: distance of styles from their mean, as a fraction: less gives images of higher quality that are
                more alike. Only generators with styles have it.

        Raises:
            UserError: the model has no prior, count is not positive, the seed is out of range, the labels are not the
                model's, the model is not conditional and labels are given, the truncation is not in 0..1, or the model
                has no styles.
        """
        if not self.objective.generates:
            raise UserError(
                f"a model of preset {self.config.preset} reconstructs but cannot generate: it has no prior over its "
                "latents; use a VAE preset such as vae-mnist"
            )
        if count < 1:
            raise UserError(f"count {count} is less than 1")
        with truncated(self.objective, truncation, self.labels_in_turn):
            return self.images(self.prior_latents(count, seed), labels)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Posterior of images [N, C, H, W] of the data's dtype and units: mean float32 [N, *latent_shape] and
        log-variance of that shape, or None if it has none.

        Raises:
            UserError: shape or dtype of the images is not the model's, or the model has no encoder.
        """
        if images.dtype != self.scale.torch_dtype or tuple(images.shape[1:]) != self.image_shape:
            raise UserError(
                f"images are {str(images.dtype).removeprefix('torch.')} {list(images.shape)}; "
                f"the model takes {self.scale.dtype} [N, {', '.join(map(str, self.image_shape))}]"
            )
        means, logvars = zip(*self._chunked(self._encode, images), strict=True)
        return torch.cat(means), None if logvars[0] is None else torch.cat(logvars)

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode latents float32 [N, *latent_shape] to float32 [N, C, H, W].

        A VAE gives logits (Bernoulli) or means (Gaussian), a GAN images in -1..1. `labels` are as in `sample`.

        Raises:
            UserError: the shape of the latents is not the model's, or the labels do not match them.
        """
        return torch.cat(self._decoded(latents, labels, self.objective.decode))

    def images(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode latents float32 [N, *latent_shape] to images [N, C, H, W] of the data's dtype and units.

        `labels` are as in `sample`.
        """
        return torch.cat(self._decoded(latents, labels, self._images))

    def scaled_images(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """The same in the model's range: uint8, or float32 in 0..255 for values other than 8-bit ones."""
        return torch.cat(self._decoded(latents, labels, self._scaled_images))

    def reconstruct(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode the posterior means of images [N, C, H, W] to images of the same shape, dtype and units.

        Raises:
            UserError: as `encode`; or the model is conditional and `labels`, as in `sample`, are not given.
        """
        if self.conditional and labels is None:
            raise UserError(
                f"a model of preset {self.config.preset} decodes latents and labels: give the labels of these images, "
                "reconstruct(images, labels)"
            )
        return self.images(self.encode(images)[0], labels)

    def labels_in_turn(self, count: int) -> Tensor:
        """Labels of `count` images: all classes in turn, or labels as training images have them."""
        return label_tensor(self.labels, self.labels.in_turn(count))

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.objective.encode(self.scale.for_model(images))

    def _scaled_images(self, *inputs: Tensor) -> Tensor:
        return self.scale.for_model(self._images(*inputs))

    def _images(self, *inputs: Tensor) -> Tensor:
        return self.scale.values(self.objective.pixels(self.objective.decode(*inputs)))

    def _decoded(self, latents: Tensor, labels: Tensor | None, decode: Callable[..., Tensor]) -> list[Tensor]:
        """Results of a function of latents and labels, those of one pass after those of another."""
        if latents.shape[1:] != self.objective.latent_shape:
            taken = ", ".join(map(str, self.objective.latent_shape))
            raise UserError(f"latents are {list(latents.shape)}; the model takes [N, {taken}]")
        if not self.conditional:
            if labels is not None:
                raise UserError(
                    f"a model of preset {self.config.preset} is not conditional on classes; leave out the labels"
                )
            return self._chunked(decode, latents)
        if labels is None:
            labels = self.labels_in_turn(len(latents))
        return self._chunked(decode, latents, self._checked(labels, len(latents)))

    def _checked(self, labels: Tensor, count: int) -> Tensor:
        """Labels of `count` latents in the model's dtype."""
        numbers = self.labels.kind == "numbers"
        wanted = (count, *self.labels.shape)
        if labels.shape != wanted or labels.is_complex() or (labels.is_floating_point() and not numbers):
            raise UserError(
                f"labels are {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}; {count} latents "
                f"take {self.labels.dtype} {list(wanted)}"
            )
        if self.labels.kind == "classes":
            if count and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
                raise UserError(f"labels are {labels.min()} to {labels.max()}; the model's are 0 to {self.classes - 1}")
            return labels.long()
        for row in labels.tolist():
            self.labels.refuse(row)
        return labels.to(getattr(torch, self.labels.dtype))

    def _chunked(self, function: Callable[..., Result], *inputs: Tensor) -> list[Result]:
        was_training = self.objective.training
        self.objective.eval()
        try:
            with watched_if_loaded(), torch.no_grad():
                rows = self._rows_of(function, inputs)
                chunks = zip(*(tensor.split(rows) for tensor in inputs), strict=True)
                return [function(*(tensor.to(self.device) for tensor in chunk)) for chunk in chunks]
        finally:
            self.objective.train(was_training)

    def _rows_of(self, function: Callable[..., object], inputs: Sequence[Tensor]) -> int:
        """Rows of one pass of a method of the objective; the method's first use on large images measures one row."""
        numbers, name = math.prod(self.image_shape), function.__name__
        if min(len(inputs[0]), IMAGES_PER_CHUNK) * numbers <= SMALL_PASS:
            return IMAGES_PER_CHUNK
        if name not in self._rows_per_pass:
            first = [tensor[:1].to(self.device) for tensor in inputs]
            self._rows_per_pass[name] = rows_per_pass(IMAGES_PER_CHUNK, numbers, lambda: function(*first))
        return self._rows_per_pass[name]


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
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU here; use cpu")
    if is_export(Path(path)):
        _refuse_best(Path(path), checkpoint)
        return _model_of_export(Path(path), device)
    return model_of(*read_checkpoint(Path(path), announce, checkpoint), device)


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
    """The model of a checkpoint. Its weights are their moving average if the run kept one."""
    channels, height, width = checkpoint.facts["image_shape"]
    labels = scheme_of_json(checkpoint.facts.get("labels"), checkpoint.facts["class_names"])
    scale = scale_of_json(checkpoint.facts.get("values"))
    try:
        weights = checkpoint.tensors.get("averaged") or checkpoint.tensors["networks"]
        with _at_most(2 * sum(tensor.numel() for tensor in weights.values())):  # layers may replace a few
            objective = build_objective(config, (channels, height, width), labels, scale)
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
            objective.networks[name].load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"the weights in {path} are of other networks than its config: {reason}") from None
    objective = objective.to(device).eval()
    return GenerativeModel(objective, found.config, found.image_shape, found.labels, found.scale)


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
