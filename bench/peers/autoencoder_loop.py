"""A plain loop that trains diffusers' AutoencoderKL, to which autoencoder_speed.py compares.

It is in the manner of train_autoencoderkl.py of diffusers' research projects, at torch's defaults: AdamW, losses read
at each step, a discriminator of plain modules, EMAModel. What is wrong in that script is right here, so that both learn
the same: each optimizer takes its own gradients alone, the discriminator sees reconstructions without their graph. A
step takes the turns of both networks on one batch; the script's steps alternate.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.config import AutoencoderKlConfig, LatentAutoencoderConfig, PatchganConfig, TrainConfig
from gen_dist.networks.diffusers_layout import diffusers_config

FLOOR, LIMIT = 1e-4, 1e4
"""Numbers of the adaptive weight: the script has no options for them."""


class AutoencoderLoop:
    """Two networks, two optimizers, the average, and their step."""

    def __init__(
        self,
        config: TrainConfig,
        image_shape: tuple[int, int, int],
        *,
        checkpointing: bool = False,
        wasteful: bool = False,
    ) -> None:
        """Build networks of the sizes in our config, with weights of their own.

        Args:
            config: of a latent autoencoder with bottleneck kl and a discriminator of patches.
            image_shape: (C, H, W).
            checkpointing: with diffusers' gradient checkpointing.
            wasteful: also compute what the script computes in vain. Before the adversary's first step that is its term
                and the adaptive weight, times zero; from then on it is the autoencoder a second time, with its graph,
                for the discriminator's turn.
        """
        from diffusers import AutoencoderKL  # only where it is measured
        from diffusers.training_utils import EMAModel

        network, patches, objective = config.network, config.discriminator, config.objective
        assert isinstance(network, AutoencoderKlConfig) and isinstance(patches, PatchganConfig)
        assert isinstance(objective, LatentAutoencoderConfig)
        self.objective = objective
        self.wasteful = wasteful
        self.vae: Any = AutoencoderKL.from_config(diffusers_config(network, image_shape, scaling_factor=1.0)).train()
        if checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.discriminator = _patchgan(image_shape[0], patches.feature_maps, patches.layers)
        scale = config.global_batch_size if config.optimization.rate_per_image else 1
        options: dict[str, Any] = {
            "lr": config.learning_rate * scale,
            "betas": config.optimization.betas,
            "weight_decay": 0.0,
        }
        self.vae_adam = torch.optim.AdamW(self.vae.parameters(), **options)
        options["lr"] *= config.optimization.discriminator_rate_factor
        self.discriminator_adam = torch.optim.AdamW(self.discriminator.parameters(), **options)
        decay = config.optimization.ema_decay
        assert decay is not None
        self.average = EMAModel(self.vae.parameters(), decay=decay)

    def load(self, autoencoder: dict[str, Tensor], discriminator: list[Tensor]) -> None:
        """Take weights by diffusers' names, and those of the discriminator in the order of its parameters."""
        self.vae.load_state_dict(autoencoder)
        with torch.no_grad():
            for parameter, value in zip(self.discriminator.parameters(), discriminator, strict=True):
                assert parameter.shape == value.shape
                parameter.copy_(value)

    def step(self, images: Tensor, noise: Tensor, *, adversarial: bool) -> dict[str, float]:
        """Train on images [B, C, H, W] in -1..1 with noise [B, D, h, w] for their latents. Returns losses."""
        posterior, reconstructions = self._reconstruct(images, noise)
        logs = self._autoencoder_turn(images, posterior, reconstructions, adversarial=adversarial)
        if adversarial:
            if self.wasteful:
                reconstructions = self._reconstruct(images, noise)[1]
            logs |= self._discriminator_turn(images, reconstructions.detach())
        self.average.step(self.vae.parameters())
        return logs

    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructions of the posterior's means, by the averaged weights."""
        parameters = list(self.vae.parameters())
        self.average.store(parameters)
        self.average.copy_to(parameters)
        with torch.no_grad():
            decoded: Tensor = self.vae.decode(self.vae.encode(images).latent_dist.mode()).sample
        self.average.restore(parameters)
        return decoded

    def _reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Any, Tensor]:
        """Posterior and reconstructions."""
        posterior = self.vae.encode(images).latent_dist
        reconstructions: Tensor = self.vae.decode(posterior.mean + posterior.std * noise).sample
        return posterior, reconstructions

    def _autoencoder_turn(
        self, images: Tensor, posterior: Any, reconstructions: Tensor, *, adversarial: bool
    ) -> dict[str, float]:
        count = len(images)
        error = F.l1_loss if self.objective.reconstruction == "l1" else F.mse_loss
        nll = error(reconstructions, images, reduction="none").sum() / count
        kl = posterior.kl().sum() / count
        loss = nll + self.objective.kl_weight * kl
        logs = {"autoencoder/reconstruction_error": nll.item(), "autoencoder/kl": kl.item()}
        if adversarial or self.wasteful:
            deceit = -self.discriminator(reconstructions).mean()
            weight = self._adaptive_weight(nll, deceit) * float(adversarial)
            loss = loss + weight * deceit
            logs |= {"autoencoder/adversarial": deceit.item(), "autoencoder/adaptive_weight": weight.item()}
        loss.backward()
        self.vae_adam.step()
        self.vae_adam.zero_grad()
        return {"autoencoder/loss": loss.item(), **logs}

    def _adaptive_weight(self, nll: Tensor, deceit: Tensor) -> Tensor:
        """Weight of the adversary's term (Esser et al. 2021, eq. 7)."""
        last = self.vae.decoder.conv_out.weight
        first, second = (torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, deceit))
        return (first / (second + FLOOR)).clamp(0.0, LIMIT).detach() * self.objective.adversarial_weight

    def _discriminator_turn(self, images: Tensor, reconstructions: Tensor) -> dict[str, float]:
        self.discriminator_adam.zero_grad()  # the other turn left gradients here
        real, fake = self.discriminator(images), self.discriminator(reconstructions)
        loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        loss.backward()
        self.discriminator_adam.step()
        return {"discriminator/loss": loss.item()}


def _patchgan(channels: int, feature_maps: int, halvings: int) -> nn.Sequential:
    """The discriminator of Isola et al. 2017, as the script takes it from another project."""
    layers: list[nn.Module] = [nn.Conv2d(channels, feature_maps, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    inputs = feature_maps
    for level in range(1, halvings + 1):
        outputs = feature_maps * min(2**level, 8)
        stride = 2 if level < halvings else 1
        layers += [
            nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.2, True),
        ]
        inputs = outputs
    return nn.Sequential(*layers, nn.Conv2d(inputs, 1, 4, 1, 1))
