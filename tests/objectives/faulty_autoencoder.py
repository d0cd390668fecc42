"""A latent autoencoder with one of the five faults of the best-known public training script."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gen_dist.config import LatentAutoencoderConfig, Roles
from gen_dist.objectives import Batch, Phase, TurnResult
from gen_dist.objectives.adversarial import signed_unit
from gen_dist.objectives.bottlenecks import Coded
from gen_dist.objectives.latent_autoencoder import RECONSTRUCTIONS, AutoencoderPhase, LatentAutoencoder
from gen_dist.randomness import Stream

ScriptFault = Literal[
    "none",
    "perceptual loss under no_grad",
    "encoder past the wrapper",
    "discriminator on the generator's graph",
    "bf16 weights",
    "state that no resume loads",
]


@dataclass(frozen=True)
class FaultyAutoencoderConfig(LatentAutoencoderConfig):
    """A latent autoencoder with a fault."""

    implementation: ClassVar[str] = "tests.objectives.faulty_autoencoder:FaultyAutoencoder"
    kind: Literal["faulty-latent-autoencoder"] = "faulty-latent-autoencoder"  # type: ignore[assignment]
    fault: ScriptFault = "none"


class FaultyAutoencoder(LatentAutoencoder):
    config: FaultyAutoencoderConfig

    def __init__(
        self, config: FaultyAutoencoderConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int
    ) -> None:
        super().__init__(config, roles, image_shape, classes)
        self.unwrapped = [copy.deepcopy(self.networks["encoder"])]
        if config.fault == "bf16 weights":
            self.networks["decoder"].to(torch.bfloat16)
        if config.fault == "state that no resume loads":
            self.bottleneck.register_buffer("usage", self.bottleneck.get_buffer("usage"), persistent=False)

    def coded(self, images: Tensor, batch: Batch, stream: Stream, deterministic: bool = False) -> Coded:
        if self.config.fault != "encoder past the wrapper":
            return super().coded(images, batch, stream, deterministic)
        coded: Coded = self.bottleneck(self.unwrapped[0](images), batch.key(stream), deterministic)
        return coded

    def reconstruct(self, latents: Tensor) -> Tensor:
        decoder = self.networks["decoder"]
        decoded: Tensor = decoder(latents.to(next(decoder.parameters()).dtype))
        return decoded.float()

    def phases(self) -> dict[str, Phase]:
        return super().phases() | {"autoencoder": FaultyPhase(self)}


class FaultyPhase(AutoencoderPhase):
    objective: FaultyAutoencoder

    def forward(self, batch: Batch) -> TurnResult:
        result = super().forward(batch)
        if self.objective.config.fault == "discriminator on the generator's graph":
            coded = self.objective.coded(signed_unit(batch.images), batch, Stream.LATENTS)
            result.carried[RECONSTRUCTIONS] = self.objective.reconstruct(coded.latents)  # type: ignore[index]
        return result

    def _error(self, reconstructions: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.objective.config.fault != "perceptual loss under no_grad":
            return super()._error(reconstructions, images)
        assert self.perceptual is not None
        with torch.no_grad():
            distance = self.perceptual.distance(reconstructions, images)
        return self.objective.pixel_error(reconstructions, images) + distance, {"perceptual_distance": distance}
