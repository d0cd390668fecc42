"""Labels as inputs of networks: vectors, maps of an image's size, and vectors of a discriminator's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gen_dist.config.labels import LabelScheme


class LabelVectors(nn.Module):
    """Labels as vectors float32 [B, width], without weights of its own.

    Classes and values of attributes are one-hot; an unknown one has a place of its own, so the weights that a network
    gives that place are learned. Numbers are standardized. A missing one is 0, the mean of the others, and a further
    place is 1 where it is missing: its weight is learned too.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, labels: LabelScheme) -> None:
        super().__init__()
        self.kind = labels.kind
        self.may_miss = any(labels.unknown)
        # Buffers, so that they are on the device; not in checkpoints, whose facts have the scheme.
        if labels.kind == "numbers":
            self.register_buffer("mean", torch.tensor(labels.mean), persistent=False)
            self.register_buffer("deviation", torch.tensor(labels.deviation), persistent=False)
        self.counts = [len(of) for of in labels.values] or [labels.classes]

    @property
    def width(self) -> int:
        """Numbers of one vector."""
        return len(self.mean) * (1 + self.may_miss) if self.kind == "numbers" else sum(self.counts)

    def forward(self, labels: Tensor) -> Tensor:
        """Vectors of labels int64 [B] or [B, A], or float32 [B, A]."""
        if self.kind == "numbers":
            missing = labels.isnan()
            vectors = torch.where(missing, 0.0, (labels - self.mean) / self.deviation)
            return torch.cat([vectors, missing.float()], dim=1) if self.may_miss else vectors
        columns = labels[:, None] if labels.ndim == 1 else labels
        one_hot = [
            columns[:, place, None] == torch.arange(count, device=labels.device)
            for place, count in enumerate(self.counts)
        ]
        return torch.cat(one_hot, dim=1).float()


def with_labels(latents: Tensor, vectors: Tensor) -> Tensor:
    """Latents [B, D] or [B, C, h, w] with vectors [B, width] as further channels, the same at each place."""
    places = latents.shape[2:]
    vectors = vectors.view(*vectors.shape, *[1] * len(places)).expand(-1, -1, *places)
    return torch.cat([latents, vectors.to(latents.dtype)], dim=1)


def label_table(labels: LabelScheme, outputs: int, deviation: float | None = None) -> nn.Module:
    """Learned vectors [B, outputs] of labels: a table of classes, or for other labels a sum over their values.

    Weights start as normal numbers; None is a standard deviation of 1. With several labels their sum has it, about.
    """
    if labels.kind == "classes":
        table = nn.Embedding(labels.classes, outputs)
        if deviation is not None:  # drawn a second time, whatever the deviation
            nn.init.normal_(table.weight, std=deviation)
        return table
    return _LabelSums(labels, outputs, (1.0 if deviation is None else deviation) / len(labels.names) ** 0.5)


class _LabelSums(nn.Module):
    """Vectors [B, outputs]: a linear function of `LabelVectors`."""

    def __init__(self, labels: LabelScheme, outputs: int, deviation: float) -> None:
        super().__init__()
        self.vectors = LabelVectors(labels)
        # Laid out as a table, [places, outputs], so that spectral normalization finds it under the name of a table's.
        self.weight = nn.Parameter(torch.empty(self.vectors.width, outputs))
        nn.init.normal_(self.weight, std=deviation)

    def forward(self, labels: Tensor) -> Tensor:
        """Vectors of labels int64 or float32 [B, A]."""
        return self.vectors(labels) @ self.weight
