"""Walks through the latents of a trained model that end where they begin, frame by frame."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gen_dist.config.labels import Row
from gen_dist.errors import ConfigError, UserError
from gen_dist.inference.latent_walks import great_circles
from gen_dist.inference.model import GenerativeModel, PriorName, label_tensor
from gen_dist.inference.truncation import truncated
from gen_dist.networks.label_inputs import LabelVectors


class Walk(NamedTuple):
    """A walk of several images at once."""

    images: int = 16
    """Images of a frame, each on a walk of its own."""
    stops: int = 6
    """Latents that each walk passes."""
    frames_per_stop: int = 20
    """Frames from a latent to the next one."""
    seed: int = 0
    truncation: float = 1.0
    prior: PriorName = "normal"

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.stops * self.frames_per_stop

    def check(self) -> None:
        """Raise ConfigError if there would be nothing to see."""
        for name, least in (("images", 1), ("stops", 2), ("frames_per_stop", 1)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"{name} {value} is less than {least}")


def walk_latents(model: GenerativeModel, walk: Walk) -> Tensor:
    """Latents of the frames, float32 [frames, images, *latent_shape]. After the last frame comes the first again.

    Latents are keyed draws from the prior. Walks between normal ones are great circles (White 2016), those between
    latents of a fitted prior straight.
    """
    walk.check()
    drawn = model.latents(walk.stops * walk.images, walk.seed, prior=walk.prior).cpu().numpy()
    stops = drawn.reshape(walk.stops, walk.images, *model.objective.latent_shape)
    columns = walk.frames_per_stop + 1
    legs = []
    for start, end in zip(stops, np.roll(stops, -1, axis=0), strict=True):
        if walk.prior == "normal":
            points = great_circles(start, end, columns).reshape(walk.images, columns, *start.shape[1:])
        else:
            parts = np.linspace(0.0, 1.0, columns, dtype=np.float32).reshape(1, -1, *[1] * (start.ndim - 1))
            points = start[:, None] * (1 - parts) + end[:, None] * parts
        legs.append(np.moveaxis(points[:, :-1], 1, 0))  # the end is the next leg's start
    return torch.from_numpy(np.concatenate(legs).astype(np.float32))


def frames_of(
    model: GenerativeModel, walk: Walk, rows: Sequence[Row] = (), *, walk_labels: bool = False
) -> Iterator[Tensor]:
    """Decode the frames of a walk, one after another: images [walk.images, C, H, W] of the data's dtype each.

    Args:
        model: the model.
        walk: the walk.
        rows: labels of a conditional model. Images hold them, in turn; none given takes all classes in turn.
        walk_labels: instead, all images pass from one label to the next with the latents, and back to the first.

    Raises:
        UserError: the model cannot generate, is not conditional and labels are given, or does not mix labels.
    """
    if walk.prior == "normal" and not model.objective.generates:
        model.sample(1)  # raises the error
    if (rows or walk_labels) and not model.conditional:
        what = "the labels" if rows else "walk_labels"
        raise UserError(f"a model of preset {model.config.preset} is not conditional on classes; leave out {what}")
    latents = walk_latents(model, walk)
    rows = list(rows) or (model.labels.in_turn(walk.stops if walk_labels else walk.images) if model.conditional else [])
    with truncated(model.objective, walk.truncation, model.labels_in_turn):
        for place, some in enumerate(latents):
            if walk_labels:
                yield _between_labels(model, some, rows, place / walk.frames * len(rows))
            else:
                held = [rows[one % len(rows)] for one in range(walk.images)] if rows else None
                yield model.images(some, label_tensor(model.labels, held) if held else None)


def _between_labels(model: GenerativeModel, latents: Tensor, rows: Sequence[Row], place: float) -> Tensor:
    """Images of latents with a label between those of two rows, all with the same."""
    first = int(place)
    labels = [label_tensor(model.labels, [rows[one % len(rows)]]) for one in (first, first + 1)]
    with _mixed(model.objective, labels[1].to(model.device), place - first):
        return model.images(latents, labels[0].repeat(len(latents), *[1] * (labels[0].ndim - 1)))


@contextlib.contextmanager
def _mixed(objective: nn.Module, other: Tensor, share: float) -> Iterator[None]:
    """Context manager in which vectors of labels are mixed with those of another label [1] or [1, A].

    Raises:
        UserError: the model has no such vectors.
    """
    found = [module for module in objective.modules() if isinstance(module, LabelVectors)]
    if not found:
        raise UserError("this model has no vectors of labels to walk between; leave out --walk-labels")

    def mix(module: nn.Module, _inputs: tuple[Tensor, ...], vectors: Tensor) -> Tensor:
        assert isinstance(module, LabelVectors)
        return torch.lerp(vectors, module.forward(other).expand_as(vectors), share)

    handles = [module.register_forward_hook(mix) for module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
