"""Generator and discriminator, with or without classes, on any decoder and encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gen_dist.config import Conditioning, NetworkConfig
from gen_dist.networks import build_decoder, build_encoder
from gen_dist.networks.spectral_norm import spectrally_normalized


class Generator(nn.Module):
    """Latents [B, D] or [B, C, h, w], and labels int64 [B] if conditional, to images [B, C, H, W]."""

    def __init__(self, network: NetworkConfig, image_shape: tuple[int, int, int], classes: int) -> None:
        """Build the decoder; with `classes` above 0, its latents include one-hot labels (Mirza & Osindero 2014)."""
        super().__init__()
        self.classes = classes
        self.decoder = build_decoder(network, image_shape, network.latent_shape(image_shape)[0] + classes)

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        if self.classes:
            assert labels is not None
            one_hot = labels[:, None] == torch.arange(self.classes, device=labels.device)
            places = latents.shape[2:]
            one_hot = one_hot.view(*one_hot.shape, *[1] * len(places)).expand(-1, -1, *places)
            latents = torch.cat([latents, one_hot.to(latents.dtype)], dim=1)
        return self.decoder(latents)


class Discriminator(nn.Module):
    """Images [B, C, H, W], and labels int64 [B] if conditional, to scores [B], or [B, h, w] of overlapping patches."""

    def __init__(
        self, network: NetworkConfig, image_shape: tuple[int, int, int], conditioning: Conditioning, classes: int
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.conditioning = conditioning
        self.encoder = build_encoder(network, (channels + (conditioning == "concat"), height, width), outputs=1)
        if conditioning == "concat":
            self.class_maps = nn.Embedding(classes, height * width)
        elif conditioning == "projection":
            self.class_vectors = nn.Embedding(classes, self.encoder.feature_count)
            # As small as the head's weights, so that the class term does not outweigh the features at first.
            nn.init.normal_(self.class_vectors.weight, std=self.encoder.feature_count**-0.5)
            if spectrally_normalized(self.encoder):
                spectral_norm(self.class_vectors)

    @property
    def twice_differentiable(self) -> bool:
        """False if slopes of scores have no gradients."""
        return self.encoder.twice_differentiable

    @property
    def mixes_images(self) -> bool:
        """True if batch normalization makes an image's score depend on the other images of its batch."""
        return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self.modules())

    def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
        return self.features_and_scores(images, labels)[1]

    def features_and_scores(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of the trunk, [B, feature_count, ...], and the scores, float32 [B, ...]."""
        if self.conditioning == "concat":
            assert labels is not None
            class_maps = self.class_maps(labels).view(-1, 1, *images.shape[2:])
            images = torch.cat([images, class_maps.to(images.dtype)], dim=1)
        features = self.encoder.features(images)
        scores = self.encoder.head(features).squeeze(1).float()
        if self.conditioning == "projection":
            assert labels is not None
            vectors = self.class_vectors(labels)
            places = features.float().flatten(2).mean(2) if features.ndim > 2 else features.float()
            scores = scores + (places * vectors).sum(dim=1).view(-1, *[1] * (scores.ndim - 1))
        return features, scores
