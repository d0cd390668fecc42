"""The same VAE in pythae, as its documentation trains one: networks of one's own, its model, its pipeline, its loader.

Its loader has the images in memory as floats. Nothing is tested or saved between epochs, as that is not its default.
"""

from pathlib import Path
from typing import Any

import torch
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.pipelines import TrainingPipeline
from pythae.trainers import BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from torch import Tensor, nn
from torchvision import datasets

from bench.peers import BATCH_SIZE, ENDLESS, HIDDEN, LATENT_DIM, LEARNING_RATE, PIXELS
from bench.peers.turnstile import Turnstile

SHAPE = (1, 28, 28)
TESTED_AT_ONCE = 1000


class Encoder(BaseEncoder):
    """One hidden layer, and a head for the mean and the log-variance each."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, HIDDEN), nn.ReLU())
        self.mean = nn.Linear(HIDDEN, LATENT_DIM)
        self.logvar = nn.Linear(HIDDEN, LATENT_DIM)

    def forward(self, x: Tensor) -> ModelOutput:
        """Images [B, 1, 28, 28] in 0..1."""
        hidden = self.hidden(x)
        return ModelOutput(embedding=self.mean(hidden), log_covariance=self.logvar(hidden))


class Decoder(BaseDecoder):
    """One hidden layer, and a sigmoid at the end: its cross-entropy takes probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LATENT_DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS), nn.Sigmoid(), nn.Unflatten(1, SHAPE)
        )

    def forward(self, z: Tensor) -> ModelOutput:
        """Latents [B, 20]."""
        return ModelOutput(reconstruction=self.layers(z))


class _LastLoss:
    """A hook of the model, copied with it after each epoch: the trainer does not tell the loss, its forward does."""

    def __init__(self) -> None:
        self.value: float | Tensor = float("nan")

    def __call__(self, _model: nn.Module, _inputs: Any, output: Any) -> None:
        self.value = output.loss.detach()


class _AfterEachStep(TrainingCallback):
    """Goes through the turnstile."""

    def __init__(self, model: VAE, test: Tensor, turnstile: Turnstile) -> None:
        self._model = model
        self._test = test
        self._turnstile = turnstile
        self._loss = _LastLoss()
        model.register_forward_hook(self._loss)

    def on_train_step_end(self, training_config: BaseTrainerConfig, **_more: Any) -> None:
        """A step of the optimizer is done."""
        self._turnstile.passed(self._loss.value, self._negative_elbo)

    def _negative_elbo(self) -> float:
        self._model.eval()
        with torch.no_grad():
            sums = [
                self._model({"data": images}).loss.item() * len(images) for images in self._test.split(TESTED_AT_ONCE)
            ]
        self._model.train()
        return sum(sums) / len(self._test)


def train(data_root: Path, directory: Path, seed: int, turnstile: Turnstile) -> None:
    """Train until the turnstile ends the process."""
    torch.manual_seed(seed)
    images, test = (
        datasets.MNIST(data_root, train=train, download=True).data[:, None] / 255.0 for train in (True, False)
    )
    config = VAEConfig(input_dim=SHAPE, latent_dim=LATENT_DIM, reconstruction_loss="bce")
    model = VAE(config, Encoder(), Decoder())
    training = BaseTrainerConfig(
        output_dir=str(directory),
        num_epochs=ENDLESS,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=BATCH_SIZE,
        optimizer_cls="Adam",
        seed=seed,
        no_cuda=True,
    )
    pipeline = TrainingPipeline(model=model, training_config=training)
    pipeline(train_data=images, callbacks=[_AfterEachStep(model, test, turnstile)])
