"""Generator and discriminator, with or without classes, on any decoder and encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gen_dist.config import Conditioning, NetworkConfig
from gen_dist.config.labels import LabelScheme, scheme_of
from gen_dist.networks import build_decoder, build_encoder
from gen_dist.networks.label_inputs import LabelVectors, label_table, with_labels
from gen_dist.networks.spectral_norm import spectrally_normalized


class Generator(nn.Module):
    """Latents [B, D] or [B, C, h, w], and labels [B] or [B, A] if conditional, to images [B, C, H, W]."""

    def __init__(
        self, network: NetworkConfig, image_shape: tuple[int, int, int], labels: int | LabelScheme | None
    ) -> None:
        """Build the decoder. With labels, or a number of classes, its latents include their vectors (Mirza & Osindero
        2014)."""
        super().__init__()
        self.label_vectors = LabelVectors(scheme_of(labels)) if labels else None
        width = self.label_vectors.width if self.label_vectors else 0
        self.decoder = build_decoder(network, image_shape, network.latent_shape(image_shape)[0] + width)

    @property
    def noise_count(self) -> int:
        """Numbers of noise for each image; see `Decoder.noise_count`."""
        return getattr(self.decoder, "noise_count", 0)  # a plug-in's decoder may be any module

    def forward(self, latents: Tensor, labels: Tensor | None, noise: Tensor | None = None) -> Tensor:
        latents = self.labelled(latents, labels)
        return self.decoder(latents) if noise is None else self.decoder(latents, noise)

    def labelled(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """Latents with the vectors of their labels, as the decoder takes them."""
        if not self.label_vectors:
            return latents
        assert labels is not None
        return with_labels(latents, self.label_vectors(labels))


class Discriminator(nn.Module):
    """Images [B, C, H, W], and labels [B] or [B, A] if conditional, to scores [B], or [B, h, w] of patches."""

    def __init__(
        self,
        network: NetworkConfig,
        image_shape: tuple[int, int, int],
        conditioning: Conditioning,
        labels: int | LabelScheme,
    ) -> None:
        """`labels` is their meaning, or a number of classes."""
        super().__init__()
        channels, height, width = image_shape
        self.conditioning = conditioning
        self.encoder = build_encoder(network, (channels + (conditioning == "concat"), height, width), outputs=1)
        if conditioning == "concat":
            self.class_maps = label_table(scheme_of(labels), height * width)
        elif conditioning == "projection":
            # As small as the head's weights, so that the class term does not outweigh the features at first.
            width = self.encoder.feature_count
            self.class_vectors = label_table(scheme_of(labels), width, width**-0.5)
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
