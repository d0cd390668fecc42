"""The textbook's loop for a DCGAN, as in PyTorch's examples, to which dcgan_speed.py compares.

64 x 64 pixels, a hundred latents, 64 feature maps, batch normalization, a sigmoid at the end of the discriminator and
the cross-entropy of its probabilities. A step goes backward through the discriminator three times, for real images, for
generated ones and for the generator, gathers its gradients each time, and reads its losses. Everything else is at
torch's defaults.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

REAL, FAKE = 1.0, 0.0


class PlainLoop:
    """Two networks, two optimizers, and their step."""

    def __init__(self, channels: int = 3, latent_dim: int = 100, feature_maps: int = 64) -> None:
        self.latent_dim = latent_dim
        self.generator = _generator(latent_dim, feature_maps, channels)
        self.discriminator = _discriminator(channels, feature_maps)
        for network in (self.generator, self.discriminator):
            network.apply(_draw_weights)
        self.criterion = nn.BCELoss()
        self.generator_adam, self.discriminator_adam = (
            torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
            for network in (self.generator, self.discriminator)
        )

    def step(self, images: Tensor, latents: Tensor) -> dict[str, float]:
        """Images [B, C, 64, 64] in -1..1 and latents [B, D]: one step of the discriminator, then of the generator."""
        fake = self.generate(latents)
        return self.discriminator_turn(images, fake) | self.generator_turn(fake)

    def generate(self, latents: Tensor) -> Tensor:
        """Latents [B, D] -> images [B, C, 64, 64] in -1..1."""
        images: Tensor = self.generator(latents[:, :, None, None])
        return images

    def discriminator_turn(self, images: Tensor, fake: Tensor) -> dict[str, float]:
        """One step of the discriminator on as many images of both kinds."""
        self.discriminator.zero_grad()
        targets = torch.full((len(images),), REAL)
        probabilities_real = self._probabilities(images)
        loss_real = self.criterion(probabilities_real, targets)
        loss_real.backward()
        targets.fill_(FAKE)
        probabilities_fake = self._probabilities(fake.detach())
        loss_fake = self.criterion(probabilities_fake, targets)
        loss_fake.backward()
        self.discriminator_adam.step()
        return {
            "discriminator_loss": (loss_real + loss_fake).item(),
            "probability_real": probabilities_real.mean().item(),
            "probability_fake": probabilities_fake.mean().item(),
        }

    def generator_turn(self, fake: Tensor) -> dict[str, float]:
        """One step of the generator by images of its own."""
        self.generator.zero_grad()
        probabilities = self._probabilities(fake)
        loss = self.criterion(probabilities, torch.full((len(fake),), REAL))
        loss.backward()
        self.generator_adam.step()
        return {"generator_loss": loss.item(), "probability_fake_after": probabilities.mean().item()}

    def load(self, generator: Sequence[Tensor], discriminator: Sequence[Tensor]) -> None:
        """Take the weights of our networks of the same kind, each in the order of its `parameters()`."""
        # Theirs begins with a transposed convolution of a map of one pixel, ours with the linear layer which that is;
        # the other network ends in the same way, with a convolution of the whole map.
        first, last = (
            generator[0].unflatten(0, (4, 4, -1)).permute(3, 2, 0, 1),
            discriminator[-1].unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2),
        )
        _fill(self.generator, [first, *generator[1:]])
        _fill(self.discriminator, [*discriminator[:-1], last])

    def _probabilities(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.discriminator(images)
        return probabilities.view(-1)


def _generator(latent_dim: int, feature_maps: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs, stride, padding = latent_dim, 1, 0
    for outputs in (8 * feature_maps, 4 * feature_maps, 2 * feature_maps, feature_maps):
        layers += [
            nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
        inputs, stride, padding = outputs, 2, 1
    return nn.Sequential(*layers, nn.ConvTranspose2d(inputs, channels, 4, 2, 1, bias=False), nn.Tanh())


def _discriminator(channels: int, feature_maps: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(channels, feature_maps, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    inputs = feature_maps
    for outputs in (2 * feature_maps, 4 * feature_maps, 8 * feature_maps):
        layers += [
            nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        inputs = outputs
    return nn.Sequential(*layers, nn.Conv2d(inputs, 1, 4, 1, 0, bias=False), nn.Sigmoid())


def _draw_weights(layer: nn.Module) -> None:
    """As Radford et al. 2016, section 4."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)


def _fill(network: nn.Module, values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), values, strict=True):
            assert parameter.shape == value.shape
            parameter.copy_(value)
