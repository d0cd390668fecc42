"""A judge of generated digits: a classifier trained on MNIST here, right for over 99 % of its test images.

It is trained anew where it is not in the cache, about a minute on two cores, and never sees a generated image.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save
from torch import Tensor, nn
from tqdm import tqdm

from gen_dist.atomic_files import write_atomically
from gen_dist.data import Dataset, Split, image_indices

EPOCHS = 4
BATCH_SIZE = 128
LEAST_ACCURACY = 0.99


class DigitClassifier(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 24, kernel_size=5, padding=2),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(24, 48, kernel_size=5, padding=2),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(48 * 7 * 7, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 1, 28, 28] -> logits [B, 10]."""
        logits: Tensor = self.layers((images * (1.0 / 255.0)).contiguous(memory_format=torch.channels_last))
        return logits

    def classes_of(self, images: Tensor) -> Tensor:
        """The class of each image: int64 [N]."""
        self.eval()
        with torch.no_grad():
            return torch.cat([self(chunk).argmax(dim=1) for chunk in images.split(500)])


def digit_classifier(dataset: Dataset, file: Path) -> tuple[DigitClassifier, float]:
    """A classifier from a file, or trained and saved there, and its accuracy on the test split.

    Raises:
        ValueError: it is right for fewer than 99 % of the test images; then it is not saved.
    """
    classifier = DigitClassifier()
    if trained := not file.exists():
        _train(classifier, dataset.train)
    else:
        load_model(classifier, file)
    found = classifier.classes_of(torch.from_numpy(dataset.test.images))
    accuracy = float((found == torch.from_numpy(dataset.test.labels)).double().mean())
    if accuracy < LEAST_ACCURACY:
        origin = "trained just now" if trained else f"in {file}"
        raise ValueError(f"the classifier {origin} is right for {accuracy:.2%} of the test images only")
    if trained:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save(classifier.state_dict()))
    return classifier, accuracy


def _train(classifier: DigitClassifier, split: Split) -> None:
    steps = EPOCHS * (len(split.images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    classifier.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in tqdm(range(steps), desc="digit classifier", unit="step"):
            chosen = image_indices(len(split.images), 0, step, BATCH_SIZE, 0, BATCH_SIZE)
            images, labels = torch.from_numpy(split.images[chosen]), torch.from_numpy(split.labels[chosen])
            optimizer.zero_grad()
            F.cross_entropy(classifier(images), labels).backward()
            optimizer.step()
            schedule.step()
