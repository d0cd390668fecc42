"""Latent autoencoders: the first stages of latent models (Esser et al. 2021; Rombach et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gen_dist.config import LatentAutoencoderConfig, Roles
from gen_dist.errors import ConfigError
from gen_dist.networks import Decoder, build_decoder, build_encoder
from gen_dist.networks.perceptual import PerceptualDistance, perceptual_distance, refuse_channels
from gen_dist.networks.players import Discriminator
from gen_dist.objectives.adaptive_weight import (
    Slopes,
    balance,
    features_and_images,
    last_convolution,
    slopes_of,
    weight_gradients,
)
from gen_dist.objectives.adversarial import accuracy_logs, signed_unit
from gen_dist.objectives.base import Objective
from gen_dist.objectives.bottlenecks import Bottleneck, Coded, bottleneck_class
from gen_dist.objectives.losses import absolute_error, fake_loss, generator_loss, real_loss, squared_error
from gen_dist.objectives.phase import Batch, Phase, TurnResult
from gen_dist.randomness import Stream

RECONSTRUCTIONS = "reconstructions"
"""Name of the carried decoded images of the autoencoder's turn: float32 [B, C, H, W]."""
ADAPTIVE_WEIGHT = "adaptive_weight"
"""Name of the weight [] that was computed from several micro-batches."""


class LatentAutoencoder(Objective):
    """Encoder, bottleneck and decoder. Images are float32 -1..1, and decoded ones may exceed that."""

    config: LatentAutoencoderConfig

    def __init__(
        self, config: LatentAutoencoderConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int
    ) -> None:
        super().__init__()
        self.config = config
        if config.perceptual_weight:
            refuse_channels(image_shape[0])
        self.latent_shape = roles.shared_latent_shape("decoder", image_shape)
        self.pixels_per_image = math.prod(image_shape)
        made = bottleneck_class(config)
        outputs = made.outputs_per_latent * self.latent_shape[0]
        self.networks = nn.ModuleDict(
            {
                "encoder": build_encoder(roles.encoder, image_shape, outputs),
                "decoder": build_decoder(roles.decoder, image_shape),
            }
        )
        self.networks["decoder"].bottleneck = made(config, self.latent_shape)
        self.codebook_size = self.bottleneck.codebook_size
        self.latents_are_fixed = False
        if config.adversarial_weight:
            self.networks["discriminator"] = Discriminator(roles.discriminator, image_shape, "none", 0)
        if config.log_scale is None:
            self.networks["scale"] = LearnedScale()

    @property
    def bottleneck(self) -> Bottleneck:
        """The bottleneck, a part of the decoder."""
        bottleneck = self.networks["decoder"].bottleneck
        assert isinstance(bottleneck, Bottleneck)
        return bottleneck

    @property
    def gives_logvar(self) -> bool:
        return bottleneck_class(self.config).outputs_per_latent == 2

    def phases(self) -> dict[str, Phase]:
        phases: dict[str, Phase] = {"autoencoder": AutoencoderPhase(self)}
        if "discriminator" in self.networks:
            phases["discriminator"] = DiscriminatorPhase(self)
        return phases

    def fix_latents(self) -> None:
        super().fix_latents()
        self.bottleneck.requires_grad_(False)
        self.latents_are_fixed = True

    def start_at(self, mean_image: Tensor) -> None:
        decoder = self.networks["decoder"]
        assert isinstance(decoder, Decoder)
        decoder.start_at(mean_image * 2.0 - 1.0)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return bottleneck_class(self.config).posterior(self.networks["encoder"](signed_unit(images)))

    def codes(self, images: Tensor) -> Tensor:
        return self.bottleneck.codes(self.encode(images)[0])

    def refuse_batch(self, global_batch_size: int) -> None:
        places = global_batch_size * math.prod(self.latent_shape[1:])
        if self.config.bottleneck == "vq" and self.codebook_size > places:
            raise ConfigError(
                f"codebook_size {self.codebook_size} is more than the {places} places of latents in a batch of "
                f"{global_batch_size} images; use at most {places} codes, or a larger --global-batch-size"
            )

    def coded(self, images: Tensor, batch: Batch, stream: Stream, deterministic: bool = False) -> Coded:
        """Latents of images float32 -1..1, and their terms in the loss."""
        coded = self.bottleneck(self.networks["encoder"](images), batch.key(stream), deterministic)
        assert isinstance(coded, Coded)
        return coded

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Decode latents [B, *latent_shape] to images float32 [B, C, H, W]; pictures show the range -1..1."""
        return self.reconstruct(self.bottleneck.decodable(latents))

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Decode latents that have passed the bottleneck, [B, *latent_shape], to images float32 [B, C, H, W]."""
        decoded: Tensor = self.networks["decoder"](latents)
        return decoded.float()

    def pixels(self, decoded: Tensor) -> Tensor:
        return (decoded * 0.5 + 0.5).clamp(0.0, 1.0)

    def pixel_error(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Absolute or squared error of images -1..1, summed over pixels: float32 [B]."""
        error = absolute_error if self.config.reconstruction == "l1" else squared_error
        return error(reconstructions, images)

    def log_scale(self) -> Tensor | float:
        """Logarithm s of the scale of a pixel's error: a number, or float32 [] if it is learned."""
        if self.config.log_scale is not None:
            return self.config.log_scale
        learned: Tensor = self.networks["scale"]()
        return learned

    def inverse_scale(self) -> Tensor | float:
        """exp(-s), without gradient."""
        scale = self.log_scale()
        return torch.exp(-scale.detach()) if isinstance(scale, Tensor) else math.exp(-scale)

    def scaled(self, error: Tensor) -> Tensor:
        """error / exp(s) + s, summed over pixels; `error` is such a sum."""
        scale = self.log_scale()
        inverse = torch.exp(-scale) if isinstance(scale, Tensor) else math.exp(-scale)
        return error * inverse + scale * self.pixels_per_image

    def deceit(self, images: Tensor) -> Tensor:
        """Loss of decoded images' scores, a mean over their patches, [B]; it is low if they pass for real ones."""
        loss = generator_loss(self.config.adversarial_loss, self._scores(images))
        return loss.flatten(1).mean(1) if loss.ndim > 1 else loss

    def scores_of_both(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of real and decoded images: in one pass, unless batch normalization would mix the two."""
        discriminator = self.networks["discriminator"]
        assert isinstance(discriminator, Discriminator)
        if discriminator.mixes_images:
            return self._scores(real), self._scores(fake)
        real_scores, fake_scores = self._scores(torch.cat([real, fake])).chunk(2)
        return real_scores, fake_scores

    def _scores(self, images: Tensor) -> Tensor:
        """Discriminator scores, float32 [B], or of patches."""
        scores: Tensor = self.networks["discriminator"](images, None)
        return scores

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        images = signed_unit(batch.images)
        coded = self.coded(images, batch, Stream.TEST_LATENTS, deterministic=True)
        return {"reconstruction_error": self.pixel_error(self.reconstruct(coded.latents), images), **coded.logs}


class LearnedScale(nn.Module):
    """Logarithm of one scale for the errors of all pixels, at first 0."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.log_scale


class AutoencoderPhase(Phase):
    """Minimize the scaled error of reconstructions, the bottleneck's penalty, and the adversary's term once it begins.

    The term is -mean D(x') for hinge, -mean log sigmoid(D(x')) for non_saturating, with D on patches or whole images.
    """

    objective: LatentAutoencoder
    logs_gradient_norm = True

    def __init__(self, objective: LatentAutoencoder) -> None:
        super().__init__(objective)
        config = objective.config
        self.trains = tuple(name for name in objective.networks if name != "discriminator")
        self.stops_gradients = objective.bottleneck.stops_gradients
        self.perceptual: PerceptualDistance | None = None
        if config.perceptual_weight:  # only to train: a trained model is loaded without it
            self.perceptual = perceptual_distance(config.perceptual_features, config.vgg_weights)
            self.perceptual.copy_to(next(objective.parameters()).device)
        self.adversarial, self.adaptive = config.adversarial_weight > 0, False
        if self.adversarial:
            self.first_penalized_step = config.adversarial_start
            self.adaptive = config.adaptive_weight
        if self.adaptive:
            last_convolution(objective.networks["decoder"])  # refused here, not in the first step
            self.stops_gradients = "the adaptive weight is a constant, and decoded images have their gradient already"

    def forward(self, batch: Batch) -> TurnResult:
        images = signed_unit(batch.images)
        coded = self.objective.coded(images, batch, Stream.LATENTS)
        adversarial = self.adversarial and batch.penalized
        if adversarial and self.adaptive:
            terms = self._balanced(coded, images, batch)
        else:
            terms = self._weighted(coded, images, adversarial=adversarial)
        loss = terms.loss + coded.penalty.mean()
        logs = {"loss": loss, **terms.logs, **coded.logs}
        carried = dict(coded.carried)
        if adversarial:
            carried[RECONSTRUCTIONS] = terms.reconstructions.detach()
        return TurnResult(loss, {name: value.detach().mean() for name, value in logs.items()}, carried)

    def prepare(self, micro_batches: Sequence[Batch]) -> Mapping[str, Tensor]:
        """See Phase. Several micro-batches have one adaptive weight, that of the whole batch: a forward pass more."""
        if not self.adaptive or not micro_batches[0].penalized or len(micro_batches) == 1:
            return {}
        summed: list[Tensor] = []
        for batch in micro_batches:
            images = signed_unit(batch.images)
            summed.append(self._slopes(self.objective.coded(images, batch, Stream.LATENTS), images).summed)
        return {ADAPTIVE_WEIGHT: self._adaptive_weight(torch.stack(summed).sum(0))}

    def finish(self, micro_batches: Sequence[Batch], carried: Sequence[Mapping[str, Tensor]]) -> None:
        """See Phase."""
        if self.objective.latents_are_fixed:
            return
        self.objective.bottleneck.update(micro_batches, carried, self.objective.sum_over_batch)

    def _error(self, reconstructions: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Error of each image, [B], with the perceptual distance for each of its pixels, and the parts of it."""
        error = self.objective.pixel_error(reconstructions, images)
        if self.perceptual is None:
            return error, {"reconstruction_error": error}
        distance = self.perceptual.distance(reconstructions, images)
        weight = self.objective.config.perceptual_weight * self.objective.pixels_per_image
        return error + weight * distance, {"reconstruction_error": error, "perceptual_distance": distance}

    def _deceit(self, reconstructions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        deceit = self.objective.deceit(reconstructions)
        return deceit, {"adversarial": deceit}

    def _weighted(self, coded: Coded, images: Tensor, *, adversarial: bool) -> Terms:
        """Loss with a fixed weight of the adversary's term, or without the term."""
        objective = self.objective
        reconstructions = objective.reconstruct(coded.latents)
        error, logs = self._error(reconstructions, images)
        loss = objective.scaled(error.mean())
        if adversarial:
            deceit, more = self._deceit(reconstructions)
            loss, logs = loss + objective.config.adversarial_weight * deceit.mean(), logs | more
        return Terms(loss, logs, reconstructions)

    def _balanced(self, coded: Coded, images: Tensor, batch: Batch) -> Terms:
        """Loss with the adaptive weight."""
        found, count = self._slopes(coded, images), len(images)
        weight = batch.carried.get(ADAPTIVE_WEIGHT)
        if weight is None:
            weight = self._adaptive_weight(found.summed)
        slopes = (found.error.slopes * self.objective.inverse_scale() + weight * found.deceit.slopes) / count
        # Zero, with the gradient of both terms in the weights of encoder and decoder.
        zero = ((found.reconstructions - found.reconstructions.detach()) * slopes).sum()
        loss = self.objective.scaled(found.error.total / count) + weight * found.deceit.total / count + zero
        logs = found.error.logs | found.deceit.logs | {ADAPTIVE_WEIGHT: weight}
        return Terms(loss, logs, found.reconstructions)

    def _slopes(self, coded: Coded, images: Tensor) -> BothSlopes:
        """Both terms of a micro-batch with their gradients in its reconstructions and in the last convolution."""
        decoder = self.objective.networks["decoder"]
        features, reconstructions = features_and_images(decoder, coded.latents)
        error = slopes_of(lambda x: self._error(x, images), reconstructions)
        deceit = slopes_of(self._deceit, reconstructions)
        scaled = error.slopes * self.objective.inverse_scale()
        gradients = weight_gradients(features, last_convolution(decoder), (scaled, deceit.slopes))
        summed = torch.cat([gradients.flatten(), gradients.new_full((1,), len(images))])
        return BothSlopes(reconstructions, error, deceit, summed)

    def _adaptive_weight(self, summed: Tensor) -> Tensor:
        """Weight [] of the adversary's term from `BothSlopes.summed` of all this process's images."""
        total = self.objective.sum_over_processes(summed)
        config = self.objective.config
        return config.adversarial_weight * balance((total[:-1] / total[-1]).view(2, -1), config.adaptive_limit)


class Terms(NamedTuple):
    """Loss of a micro-batch without the bottleneck's penalty."""

    loss: Tensor
    logs: Mapping[str, Tensor]
    """[B] or [] each."""
    reconstructions: Tensor
    """float32 [B, C, H, W]."""


class BothSlopes(NamedTuple):
    """The error and the adversary's term of a micro-batch, with their gradients."""

    reconstructions: Tensor
    """float32 [B, C, H, W], with their graph."""
    error: Slopes
    """Not divided by its scale."""
    deceit: Slopes
    summed: Tensor
    """Gradients of the scaled error and of the other term in the last convolution's weight, and the number of images:
    float32 [2 * weights + 1]."""


class DiscriminatorPhase(Phase):
    """Minimize half the loss of real images' scores and of reconstructions' scores."""

    objective: LatentAutoencoder
    logs_gradient_norm = True

    def __init__(self, objective: LatentAutoencoder) -> None:
        super().__init__(objective)
        self.trains = ("discriminator",)
        self.first_step = objective.config.adversarial_start

    def forward(self, batch: Batch) -> TurnResult:
        name = self.objective.config.adversarial_loss
        real, fake = self.objective.scores_of_both(signed_unit(batch.images), batch.carried[RECONSTRUCTIONS])
        loss = 0.5 * (real_loss(name, real) + fake_loss(name, fake)).mean()
        return TurnResult(loss, {"loss": loss.detach(), **accuracy_logs(real, fake, threshold=0.0)})
