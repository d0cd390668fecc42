"""The textbook's way to train a VAE on MNIST, as the examples of PyTorch have it: what our speed is measured against.

784-400-20 with a sigmoid at the end, images read one by one through torchvision, batches of 128, Adam at 1e-3, the sum
of cross-entropy and KL as loss, and a pass over the test set after each epoch. Everything is at torch's defaults.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


class Epoch(NamedTuple):
    """One epoch of the recipe."""

    seconds: float
    """Wall time of training and test pass."""
    test_negative_elbo: float
    """Nats per test image: real-valued pixels, one latent sample."""


class Vae(nn.Module):
    """Encoder and decoder of one hidden layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(784, 400)
        self.mean = nn.Linear(400, 20)
        self.logvar = nn.Linear(400, 20)
        self.decoder = nn.Linear(20, 400)
        self.output = nn.Linear(400, 784)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 1, 28, 28] in 0..1 -> means of the pixels [B, 784], posterior mean and logvar [B, 20]."""
        hidden = F.relu(self.encoder(images.view(-1, 784)))
        mean, logvar = self.mean(hidden), self.logvar(hidden)
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(logvar)
        return torch.sigmoid(self.output(F.relu(self.decoder(latents)))), mean, logvar


class Recipe:
    """A training that goes on epoch by epoch."""

    def __init__(self, data_root: Path, seed: int) -> None:
        torch.manual_seed(seed)
        to_tensor = transforms.ToTensor()
        train = datasets.MNIST(data_root, train=True, download=True, transform=to_tensor)
        test = datasets.MNIST(data_root, train=False, transform=to_tensor)
        self.train_loader = DataLoader(train, batch_size=128, shuffle=True)
        self.test_loader = DataLoader(test, batch_size=128, shuffle=False)
        self.test_images = len(test)
        self.model = Vae()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def epoch(self) -> Epoch:
        """Train on every image once, then test."""
        start = time.perf_counter()
        self.train_epoch()
        test_negative_elbo = self.test()
        return Epoch(time.perf_counter() - start, test_negative_elbo)

    def train_epoch(self, after_step: Callable[[float], None] = lambda _loss: None) -> None:
        """Train on every image once; `after_step` takes the loss of each batch, a mean over its images."""
        self.model.train()
        train_loss = 0.0
        for images, _ in self.train_loader:
            self.optimizer.zero_grad()
            loss = self._negative_elbo(images)
            loss.backward()
            nats = loss.item()
            train_loss += nats
            self.optimizer.step()
            after_step(nats / len(images))

    def test(self) -> float:
        """Negative ELBO of the test images, nats an image."""
        self.model.eval()
        test_loss = 0.0
        with torch.no_grad():
            for images, _ in self.test_loader:
                test_loss += self._negative_elbo(images).item()
        return test_loss / self.test_images

    def _negative_elbo(self, images: Tensor) -> Tensor:
        """Sum over the images, in nats."""
        pixels, mean, logvar = self.model(images)
        nll = F.binary_cross_entropy(pixels, images.view(-1, 784), reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        return nll + kl
