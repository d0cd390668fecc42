"""Use of a trained model: load a run or checkpoint, then sample, encode, decode, reconstruct."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from gen_dist.config import TrainConfig
from gen_dist.config.labels import LabelScheme, classes_named
from gen_dist.data.forms import as_held, as_own, own_shape
from gen_dist.data.values import PLAIN, ValueScale
from gen_dist.errors import UserError
from gen_dist.inference.fitted_prior import FittedPrior
from gen_dist.inference.truncation import truncated
from gen_dist.kernels import Key, normal
from gen_dist.objectives import Objective
from gen_dist.objectives.evaluating import SMALL_PASS, rows_per_pass
from gen_dist.plugins.surroundings import watched_if_loaded
from gen_dist.randomness import Stream

Result = TypeVar("Result")
PriorName = Literal["normal", "fitted"]

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
        self.find_fitted_prior: Callable[[], FittedPrior] | None = None
        """Reads the prior that `gen-dist fit-prior` fitted to these weights; None for models that are not loaded."""
        self._fitted_prior: FittedPrior | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes 0, 1, ... of the training images; one name if they had none."""
        return self.labels.class_names

    @property
    def classes(self) -> int:
        """Number of classes of the training images, 1 if they had no labels."""
        return self.labels.classes

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of one row of the data as their user has it: (C, H, W), (C, L) of signals, or (D,) of vectors."""
        return own_shape(self.scale.form, self.image_shape)

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
        _check_seed(seed)
        # Drawn on the CPU, because other devices draw other numbers. Cloned, so that the caller may write to it.
        shape = self.objective.latent_shape
        latents = normal(Key(torch.tensor([seed, 0]), Stream.PRIOR, first_row), count, math.prod(shape)).clone()
        return latents.view(count, *shape).to(self.device)

    def latents(self, count: int, seed: int = 0, first_row: int = 0, prior: PriorName = "normal") -> Tensor:
        """Draw latents float32 [count, *latent_shape] from the standard normal prior or a fitted one; see
        `prior_latents`.

        Raises:
            UserError: no prior was fitted to these weights, or the seed is out of range.
        """
        if prior not in get_args(PriorName):
            raise UserError(f"prior {prior!r} is not one of {', '.join(get_args(PriorName))}")
        if prior == "normal":
            return self.prior_latents(count, seed, first_row)
        _check_seed(seed)
        drawn = self.fitted_prior.sample(count, seed, first_row)
        return drawn.view(count, *self.objective.latent_shape).to(self.device)

    @property
    def fitted_prior(self) -> FittedPrior:
        """The prior that was fitted to these weights.

        Raises:
            UserError: there is none, or it is damaged or of other weights.
        """
        if self._fitted_prior is None:
            if self.find_fitted_prior is None:
                raise UserError("no prior is fitted to this model; load a run after gen-dist fit-prior RUN")
            self._fitted_prior = self.find_fitted_prior()
        if len(self._fitted_prior.centre) != math.prod(self.objective.latent_shape):
            raise UserError(
                f"the fitted prior is of {len(self._fitted_prior.centre)} latents, and the model has "
                f"{math.prod(self.objective.latent_shape)}; fit it again with gen-dist fit-prior"
            )
        return self._fitted_prior

    @property
    def conditional(self) -> bool:
        """True if images are decoded from latents and labels."""
        return self.objective.conditional

    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        seed: int = 0,
        *,
        truncation: float = 1.0,
        prior: PriorName = "normal",
    ) -> Tensor:
        """Draw new images [count, C, H, W] from the prior, of the data's dtype. The same seed gives the same images.

        A model of signals draws [count, C, L], one of vectors [count, D]; so do `decode`, `images` and `reconstruct`.

        Args:
            count: number of images.
            labels: labels of the images of a conditional model: int64 [count] of classes, int64 [count, A] of
                attributes or float32 [count, A] of numbers, see `labels` of the model. None takes all classes in turn,
                or labels as training images have them.
            seed: key of the latents.
            truncation: distance of styles from their mean, as a fraction: less gives images of higher quality that are
                more alike. Only generators with styles have it.
            prior: distribution of the latents: standard normal, or the mixture that `gen-dist fit-prior` fitted, which
                models without a prior can have, too.

        Raises:
            UserError: the model has no prior, count is not positive, the seed is out of range, the labels are not the
                model's, the model is not conditional and labels are given, the truncation is not in 0..1, the model
                has no styles, or no prior is fitted to its weights.
        """
        if prior == "normal" and not self.objective.generates:
            raise UserError(
                f"a model of preset {self.config.preset} reconstructs but cannot generate: it has no prior over its "
                "latents; use a VAE preset such as vae-mnist, or fit a prior with gen-dist fit-prior and use --prior "
                "fitted"
            )
        if count < 1:
            raise UserError(f"count {count} is less than 1")
        with truncated(self.objective, truncation, self.labels_in_turn):
            return self.images(self.latents(count, seed, prior=prior), labels)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Posterior of images [N, C, H, W], signals [N, C, L] or vectors [N, D] of the data's dtype and units: mean
        float32 [N, *latent_shape] and log-variance of that shape, or None if it has none.

        Raises:
            UserError: shape or dtype of the images is not the model's, or the model has no encoder.
        """
        given, images = images, as_held(self.scale.form, images)
        if images.dtype != self.scale.torch_dtype or tuple(images.shape[1:]) != self.image_shape:
            raise UserError(
                f"{self.scale.form} are {str(given.dtype).removeprefix('torch.')} {list(given.shape)}; "
                f"the model takes {self.scale.dtype} [N, {', '.join(map(str, self.own_shape))}]"
            )
        means, logvars = zip(*self._chunked(self._encode, images), strict=True)
        return torch.cat(means), None if logvars[0] is None else torch.cat(logvars)

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode latents float32 [N, *latent_shape] to float32 [N, C, H, W].

        A VAE gives logits (Bernoulli) or means (Gaussian), a GAN images in -1..1. `labels` are as in `sample`.

        Raises:
            UserError: the shape of the latents is not the model's, or the labels do not match them.
        """
        return as_own(self.scale.form, torch.cat(self._decoded(latents, labels, self.objective.decode)))

    def images(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode latents float32 [N, *latent_shape] to images [N, C, H, W] of the data's dtype and units.

        `labels` are as in `sample`.
        """
        return as_own(self.scale.form, torch.cat(self._decoded(latents, labels, self._images)))

    def scaled_images(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """The same [N, C, H, W] in the model's range: uint8, or float32 in 0..255 for values other than 8-bit ones."""
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
        checked = self.checked_labels(labels, len(latents))
        return self._chunked(decode, *([latents] if checked is None else [latents, checked]))

    def checked_labels(self, labels: Tensor | None, count: int) -> Tensor | None:
        """Labels of `count` latents in the model's dtype, in turn unless given; None if the model is not conditional.

        Raises:
            UserError: they are not for such a model, or not so many.
        """
        if not self.conditional:
            if labels is not None:
                raise UserError(
                    f"a model of preset {self.config.preset} is not conditional on classes; leave out the labels"
                )
            return None
        return self._checked(self.labels_in_turn(count) if labels is None else labels, count)

    def _checked(self, labels: Tensor, count: int) -> Tensor:
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


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} is not in 0 .. 2^63 - 1")
