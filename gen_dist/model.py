"""Using a trained model: load a run or checkpoint, then sample, encode, decode, reconstruct."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from gen_dist import checkpoint as checkpoints
from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError, UserError
from gen_dist.objectives import Objective, build_objective
from gen_dist.randomness import Stream
from kernels import normal

Result = TypeVar("Result")

IMAGES_PER_CHUNK = 1000
"""Images that go through a network at once, whatever number is asked for."""


class GenerativeModel:
    """A trained objective in eval mode, images in and out as uint8. Results depend on arguments alone."""

    def __init__(self, objective: Objective, config: TrainConfig, image_shape: tuple[int, int, int]) -> None:
        self.objective = objective
        self.config = config
        self.image_shape = image_shape

    @property
    def device(self) -> torch.device:
        """Where the weights are, and so where inputs are moved to."""
        return next(self.objective.parameters()).device

    def prior_latents(self, count: int, seed: int = 0) -> Tensor:
        """Standard normal latents float32 [count, D]; the first rows are the same whatever the count and the device.

        Raises:
            UserError: the seed is not in 0 .. 2^63 - 1.
        """
        if not 0 <= seed < 2**63:
            raise UserError(f"seed {seed} is not in 0 .. 2^63 - 1")
        # Drawn on the CPU, whatever the device: others draw other numbers. The copy is the caller's to write to.
        latents = normal(torch.tensor([seed, 0]), Stream.PRIOR, 0, count, self.objective.latent_dim).clone()
        return latents.to(self.device)

    def sample(self, count: int, labels: Tensor | None = None, seed: int = 0) -> Tensor:
        """New images from the prior: uint8 [count, C, H, W]; the same ones for the same seed.

        Raises:
            UserError: the model has no prior, count is not positive, the seed is out of range, or labels are given to a
                model without classes.
        """
        if not self.objective.generates:
            raise UserError(
                f"a model of preset {self.config.preset} reconstructs but cannot generate: it has no prior over its "
                "latents; use a VAE preset such as vae-mnist"
            )
        if count < 1:
            raise UserError(f"count {count} is less than 1")
        if labels is not None:
            raise UserError(f"a model of preset {self.config.preset} knows no classes; leave out the labels")
        return self.images(self.prior_latents(count, seed))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Posterior of images uint8 [N, C, H, W]: mean float32 [N, D] and log-variance [N, D] (None without one).

        Raises:
            UserError: the images are of another shape or dtype than the model's, or the model has no encoder.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise UserError(
                f"images are {str(images.dtype).removeprefix('torch.')} {list(images.shape)}; "
                f"the model takes uint8 [N, {', '.join(map(str, self.image_shape))}]"
            )
        means, logvars = zip(*self._chunked(self.objective.encode, images), strict=True)
        return torch.cat(means), None if logvars[0] is None else torch.cat(logvars)

    def decode(self, latents: Tensor) -> Tensor:
        """Logits (Bernoulli) or means (Gaussian) float32 [N, C, H, W] of latents float32 [N, D].

        Raises:
            UserError: the latents are of another width than the model's.
        """
        if latents.ndim != 2 or latents.shape[1] != self.objective.latent_dim:
            raise UserError(f"latents are {list(latents.shape)}; the model takes [N, {self.objective.latent_dim}]")
        return torch.cat(self._chunked(self.objective.decode, latents))

    def images(self, latents: Tensor) -> Tensor:
        """Images uint8 [N, C, H, W] that latents float32 [N, D] decode to."""
        return self.objective.pixels(self.decode(latents)).mul(255.0).round().to(torch.uint8)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images uint8 [N, C, H, W] decoded from the posterior means of images of the same shape."""
        return self.images(self.encode(images)[0])

    def _chunked(self, function: Callable[[Tensor], Result], inputs: Tensor) -> list[Result]:
        was_training = self.objective.training
        self.objective.eval()
        try:
            with torch.no_grad():
                return [function(chunk.to(self.device)) for chunk in inputs.split(IMAGES_PER_CHUNK)]
        finally:
            self.objective.train(was_training)


def load(path: str | Path, device: str = "cpu", announce: Callable[[str], None] = print) -> GenerativeModel:
    """The trained model of a run directory (its newest whole checkpoint) or of one checkpoint directory.

    The weights are the moving average where the run kept one.

    Raises:
        CheckpointError: there is no run or checkpoint at the path, or it is damaged.
        UserError: a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU here; use cpu")
    path = Path(path)
    if (path / "state.json").exists() or (path / "SHA256SUMS").exists():
        checkpoint, config = checkpoints.load(path)
    else:
        found = checkpoints.load_newest(path, announce)
        if found is None:
            what = "has no checkpoint yet" if (path / "config.json").exists() else "is no run or checkpoint directory"
            raise CheckpointError(f"{path} {what}; train one with launch/train.py PRESET --run-dir {path}")
        checkpoint, config = found
    channels, height, width = checkpoint.facts["image_shape"]
    objective = build_objective(config, (channels, height, width))
    weights = checkpoint.tensors.get("averaged", checkpoint.tensors["networks"])
    objective.networks.load_state_dict(dict(weights))
    return GenerativeModel(objective.to(device).eval(), config, (channels, height, width))
