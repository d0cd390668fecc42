"""The same VAE in Lightning, as its examples have one: a module, a loader of torchvision's images, a Trainer.

The Trainer is at its defaults, with its progress bar, its logger and its checkpoint of each epoch.
"""

from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from bench.peers import BATCH_SIZE, ENDLESS, LEARNING_RATE
from bench.peers.recipe import Vae
from bench.peers.turnstile import Turnstile


class VaeModule(lightning.LightningModule):
    """The net of the plain loop, with the loss of the mean image."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = Vae()

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Loss of a batch."""
        loss = self.negative_elbo(batch[0])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)

    def negative_elbo(self, images: Tensor) -> Tensor:
        """Nats an image, of images [B, 1, 28, 28] in 0..1."""
        pixels, mean, logvar = self.vae(images)
        nll = F.binary_cross_entropy(pixels, images.flatten(1), reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        return (nll + kl) / len(images)


class _AfterEachStep(lightning.Callback):
    def __init__(self, test: DataLoader[Any], turnstile: Turnstile) -> None:
        self._test = test
        self._turnstile = turnstile

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step of the optimizer is done."""
        self._turnstile.passed(outputs["loss"], lambda: self._negative_elbo(pl_module))

    def _negative_elbo(self, module: Any) -> float:
        module.eval()
        with torch.no_grad():
            losses = [(module.negative_elbo(images).item() * len(images), len(images)) for images, _ in self._test]
        module.train()
        return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


def train(data_root: Path, directory: Path, seed: int, turnstile: Turnstile) -> None:
    """Train until the turnstile ends the process."""
    lightning.seed_everything(seed)
    to_tensor = transforms.ToTensor()
    images = datasets.MNIST(data_root, train=True, download=True, transform=to_tensor)
    test = DataLoader(datasets.MNIST(data_root, train=False, transform=to_tensor), batch_size=BATCH_SIZE)
    trainer = lightning.Trainer(
        max_epochs=ENDLESS, accelerator="cpu", default_root_dir=directory, callbacks=[_AfterEachStep(test, turnstile)]
    )
    trainer.fit(VaeModule(), DataLoader(images, batch_size=BATCH_SIZE, shuffle=True))
