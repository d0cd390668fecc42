"""Objectives with one planted fault each, for the checks to find. Without a fault they are a small VAE and a GAN."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_dist.config import Capability, ObjectiveConfig, Roles
from gen_dist.kernels import normal, reparameterize_kl
from gen_dist.networks import build_decoder, build_encoder
from gen_dist.objectives import Batch, Objective, Phase, TurnResult
from gen_dist.objectives.losses import bernoulli_nll
from gen_dist.objectives.phase import unit_interval
from gen_dist.randomness import Stream

Fault = Literal[
    "none",
    "term under no_grad",
    "detached reparameterization",
    "graph of the generator",
    "forward past the wrapper",
    "torch's generator",
    "changing number",
    "mean over the local batch",
    "bf16 weights",
    "unsaved buffer",
    "wrong sign on one rank",
    "state on the module",
    "branch on data",
    "branch on the compiler",
]
LATENTS = 4


@dataclass(frozen=True)
class FaultyConfig(ObjectiveConfig):
    """A small model with a fault."""

    family: ClassVar[str] = "vae"
    family_name: ClassVar[str] = "faulty model"
    lacks: ClassVar[Mapping[Capability, str]] = {}
    implementation: ClassVar[str] = "tests.testing.faults:FaultyVae"
    kind: Literal["faulty"] = "faulty"
    fault: Fault = "none"


@dataclass(frozen=True)
class FaultyGanConfig(FaultyConfig):
    """A small GAN with a fault."""

    lacks: ClassVar[Mapping[Capability, str]] = {"encoder": "a GAN has no encoder"}
    implementation: ClassVar[str] = "tests.testing.faults:FaultyGan"


class FaultyVae(Objective):
    config: FaultyConfig
    running: Tensor

    def __init__(self, config: FaultyConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.config, self.latent_shape = config, (LATENTS,)
        encoder, decoder = (
            build_encoder(roles.encoder, image_shape, 2 * LATENTS),
            build_decoder(roles.decoder, image_shape, LATENTS),
        )
        self.networks = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        self.beside = [nn.Linear(LATENTS, LATENTS)]
        if config.fault == "bf16 weights":
            self.networks["decoder"].to(torch.bfloat16)
        self.register_buffer("running", torch.zeros(()), persistent=False)

    def phases(self) -> dict[str, Phase]:
        return {"elbo": FaultyPhase(self)}

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.networks["encoder"](unit_interval(images)).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        decoder = self.networks["decoder"]
        return decoder(latents.to(next(decoder.parameters()).dtype)).float()

    def pixels(self, decoded: Tensor) -> Tensor:
        return decoded.sigmoid()


_STEPS = itertools.count(1)


class FaultyPhase(Phase):
    objective: FaultyVae

    def __init__(self, objective: FaultyVae) -> None:
        super().__init__(objective)
        self.last: Tensor | None = None

    def forward(self, batch: Batch) -> TurnResult:
        fault, images = self.objective.config.fault, unit_interval(batch.images)
        latents, kl = reparameterize_kl(self.objective.networks["encoder"](images), batch.key(Stream.LATENTS))
        if fault == "term under no_grad":
            with torch.no_grad():
                kl = kl * 2.0  # FAULT: term under no_grad
        if fault == "detached reparameterization":
            latents = latents.detach()  # FAULT: detached reparameterization
        if fault == "forward past the wrapper":
            latents = latents + self.objective.beside[0](latents)  # FAULT: forward past the wrapper
        if fault == "torch's generator":
            latents = latents + 0.1 * torch.randn_like(latents)  # FAULT: torch's generator
        nll = bernoulli_nll(self.objective.decode(latents), images)
        if fault == "changing number":
            kl = kl * (1.0 / next(_STEPS))  # FAULT: changing number
        if fault == "branch on data":
            kl = kl if nll.mean() > 0 else 2 * kl  # FAULT: branch on data
        loss = (nll + kl).mean()
        if fault == "branch on the compiler" and torch.compiler.is_compiling():
            loss = loss + kl.mean()
        if fault == "mean over the local batch":
            loss = loss + 100 * latents.mean(dim=0).square().sum()
        if fault == "wrong sign on one rank" and dist.is_initialized() and dist.get_rank() == 1:
            loss = -loss
        if fault == "state on the module":
            loss = loss if self.last is None else loss + (latents.mean() - self.last).square()
            self.last = latents.detach().mean()
        if fault == "unsaved buffer":
            self.objective.running.lerp_(images.mean(), 0.1)
            loss = loss + (latents.mean() - self.objective.running).square()
        return TurnResult(loss, {"loss": loss.detach()})


class FaultyGan(Objective):
    config: FaultyGanConfig

    def __init__(self, config: FaultyGanConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.config, self.latent_shape = config, (LATENTS,)
        generator = build_decoder(roles.generator, image_shape, LATENTS)
        discriminator = build_encoder(roles.discriminator, image_shape, 1)
        self.networks = nn.ModuleDict({"generator": generator, "discriminator": discriminator})

    def phases(self) -> dict[str, Phase]:
        return {"generator": GeneratorPhase(self), "discriminator": DiscriminatorPhase(self)}

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.networks["generator"](latents)

    def pixels(self, decoded: Tensor) -> Tensor:
        return decoded.sigmoid()


class GeneratorPhase(Phase):
    objective: FaultyGan

    def __init__(self, objective: FaultyGan) -> None:
        super().__init__(objective)
        self.trains = ("generator",)

    def forward(self, batch: Batch) -> TurnResult:
        fake = self.objective.decode(normal(batch.key(Stream.PRIOR), len(batch.images), LATENTS)).sigmoid()
        loss = nn.functional.softplus(-self.objective.networks["discriminator"](fake)).mean()
        carried = fake if self.objective.config.fault == "graph of the generator" else fake.detach()
        return TurnResult(loss, {"loss": loss.detach()}, {"fake": carried})


class DiscriminatorPhase(Phase):
    objective: FaultyGan

    def __init__(self, objective: FaultyGan) -> None:
        super().__init__(objective)
        self.trains = ("discriminator",)

    def forward(self, batch: Batch) -> TurnResult:
        discriminator, softplus = self.objective.networks["discriminator"], nn.functional.softplus
        real = discriminator(unit_interval(batch.images))
        loss = softplus(-real).mean() + softplus(discriminator(batch.carried["fake"])).mean()
        return TurnResult(loss, {"loss": loss.detach()})
