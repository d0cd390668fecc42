"""A small classifier of digits whose last hidden layer is features; bench/quality/train_digit_features.py trains it.

Its weights come with the package, as float16, and digits.json beside them records their training and accuracy. Neither
generated images nor test images were used in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS_FILE = Path(__file__).with_name("digits.safetensors")
CARD_FILE = Path(__file__).with_name("digits.json")
IMAGE_SHAPE = (1, 28, 28)
FEATURES = 64


class DigitFeatures(NamedTuple):
    """Output of the digit network."""

    features: Tensor
    """float32 [B, 64], none below 0."""
    logits: Tensor
    """float32 [B, 10]."""


class DigitNetwork(nn.Module):
    """Two convolutions, a hidden layer of 64 units, and ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5, padding=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=5, padding=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, FEATURES),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, intensities: Tensor) -> DigitFeatures:
        """Features and logits of images float32 [B, 1, 28, 28] in 0..1."""
        features: Tensor = self.trunk(intensities)
        return DigitFeatures(features, self.head(self.dropout(features)))


def load_digit_network(file: Path = WEIGHTS_FILE) -> DigitNetwork:
    """The network that comes with the package, in eval mode and float32."""
    network = DigitNetwork()
    network.load_state_dict({name: value.float() for name, value in load_file(file).items()}, strict=False)
    # One-channel images are in both memory layouts at once, so the weights decide that of the maps. CPUs pool faster
    # in channels_last, which saves a third of the total time.
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
