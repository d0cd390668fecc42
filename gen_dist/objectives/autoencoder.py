"""Autoencoder: few latents, trained on the reconstruction error (Hinton & Salakhutdinov 2006)."""

from torch import Tensor

from gen_dist.config import AutoencoderConfig, Roles
from gen_dist.objectives.base import EncoderDecoder
from gen_dist.objectives.losses import bernoulli_nll, squared_error
from gen_dist.objectives.phase import Batch, Phase, TurnResult, unit_interval


class Autoencoder(EncoderDecoder):
    """Deterministic encoder and decoder. It has no prior over its latents, so it cannot generate."""

    config: AutoencoderConfig

    def __init__(
        self, config: AutoencoderConfig, roles: Roles, image_shape: tuple[int, int, int], classes: int
    ) -> None:
        super().__init__(config.likelihood, roles, image_shape, outputs_per_latent=1)
        self.config = config

    def phases(self) -> dict[str, Phase]:
        return {"autoencoder": Reconstruct(self)}

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return self.networks["encoder"](unit_interval(images)).float(), None

    def reconstruction_error(self, images: Tensor) -> Tensor:
        """Reconstruction error per image, float32 [B]: cross-entropy in nats, or squared error."""
        targets = unit_interval(images)
        decoded = self.networks["decoder"](self.networks["encoder"](targets))
        return bernoulli_nll(decoded, targets) if self.likelihood == "bernoulli" else squared_error(decoded, targets)

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        return {"reconstruction_error": self.reconstruction_error(batch.images)}


class Reconstruct(Phase):
    """Minimize the reconstruction error of encoder and decoder together."""

    objective: Autoencoder

    def forward(self, batch: Batch) -> TurnResult:
        loss = self.objective.reconstruction_error(batch.images).mean()
        return TurnResult(loss, {"loss": loss.detach(), "reconstruction_error": loss.detach()})
