"""Latent autoencoders: the first stages of latent models (Esser et al. 2021; Rombach et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gen_dist.config import LatentAutoencoderConfig, Roles
from gen_dist.networks import Decoder, build_decoder, build_encoder
from gen_dist.objectives.adversarial import signed_unit
from gen_dist.objectives.base import Objective
from gen_dist.objectives.bottlenecks import Bottleneck, Coded, bottleneck_class
from gen_dist.objectives.losses import absolute_error, squared_error
from gen_dist.objectives.phase import Batch, Phase, TurnResult
from gen_dist.randomness import Stream


class LatentAutoencoder(Objective):
    """Encoder, bottleneck and decoder. Images are float32 -1..1, and decoded ones may exceed that."""

    config: LatentAutoencoderConfig

    def __init__(
        self, config: LatentAutoencoderConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int
    ) -> None:
        super().__init__()
        self.config = config
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
        return {"autoencoder": AutoencoderPhase(self)}

    def start_at(self, mean_image: Tensor) -> None:
        decoder = self.networks["decoder"]
        assert isinstance(decoder, Decoder)
        decoder.start_at(mean_image * 2.0 - 1.0)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return bottleneck_class(self.config).posterior(self.networks["encoder"](signed_unit(images)))

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

    def scaled(self, error: Tensor) -> Tensor:
        """error / exp(s) + s, summed over pixels; `error` is such a sum."""
        scale = self.log_scale()
        inverse = torch.exp(-scale) if isinstance(scale, Tensor) else math.exp(-scale)
        return error * inverse + scale * self.pixels_per_image

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
    """Minimize the scaled error of reconstructions plus the bottleneck's penalty."""

    objective: LatentAutoencoder
    logs_gradient_norm = True

    def __init__(self, objective: LatentAutoencoder) -> None:
        super().__init__(objective)
        self.stops_gradients = objective.bottleneck.stops_gradients

    def forward(self, batch: Batch) -> TurnResult:
        objective = self.objective
        images = signed_unit(batch.images)
        coded = objective.coded(images, batch, Stream.LATENTS)
        error = objective.pixel_error(objective.reconstruct(coded.latents), images).mean()
        loss = objective.scaled(error) + coded.penalty.mean()
        logs = {"loss": loss.detach(), "reconstruction_error": error.detach()}
        return TurnResult(loss, logs | {name: value.detach().mean() for name, value in coded.logs.items()})
