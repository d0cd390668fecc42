"""What the trainer knows of an objective: its networks, and an ordered list of phases that train them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gen_dist.config import Likelihood, NetworkConfig
from gen_dist.errors import UserError
from gen_dist.kernels import Key
from gen_dist.networks import Decoder, build_decoder, build_encoder
from gen_dist.randomness import Stream


def unit_interval(images: Tensor) -> Tensor:
    """Intensities uint8 0..255 as float32 0..1."""
    return images * (1.0 / 255.0)


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    images: Tensor
    """uint8 [B, C, H, W], 0..255."""
    labels: Tensor
    """int64 [B]."""
    rng: Tensor
    """int64 [2], (seed, step), on the device of the images: the key of all noise."""
    first_row: int
    """Global row of images[0]: its place in the global batch, whatever rank holds it."""
    penalized: bool = True
    """Whether a penalty that a phase computes at some steps only is due."""
    carried: Mapping[str, Tensor] = {}
    """What earlier phases of the same step computed from this micro-batch, by name."""

    def key(self, stream: Stream) -> Key:
        """Key of the draws of one stream for the rows of this micro-batch."""
        return Key(self.rng, stream, self.first_row)


class TurnResult(NamedTuple):
    """What a phase computes of a micro-batch."""

    loss: Tensor
    """float32 []: to be minimized, a mean over the images."""
    logs: dict[str, Tensor]
    """What is logged, detached: means [] over the images; or a value for each image, [B], to make a histogram of."""
    carried: Mapping[str, Tensor] = {}  # a default of a named tuple, and nobody writes to it
    """For the phases after it in the same step. Detached, unless the phase `carries_graphs`."""


class Phase(nn.Module):
    """One optimizer's turn within a step: `forward(batch)` is the whole computation of that turn.

    It holds the objective with all its networks, and names those it trains (all, unless it says otherwise); the
    trainer freezes the rest. So it can be wrapped by DistributedDataParallel and compiled as one thing.

    On a GPU, Python runs for the first steps of a kind alone, and what they had the device do is replayed from then on.
    So whatever changes from step to step has to come from `batch.rng`, (seed, step), or other tensors; and the host may
    neither wait for results, as `item` and boolean masks do, nor copy to the device.
    """

    trains: Sequence[str]
    """Names of the networks that this phase trains."""
    every: int = 1
    """The phase takes its turn at steps divisible by this."""
    penalty_every: int = 1
    """Its batches are `penalized` at steps divisible by this (lazy regularization: Karras et al. 2020, appendix B)."""
    logs_gradient_norm: bool = False
    """The norm of its gradients is logged, clipped or not."""
    carries_graphs: bool = False
    """What it hands on may have a graph, for a later phase to go backward through. The trainer says so."""

    def __init__(self, objective: "Objective") -> None:
        super().__init__()
        self.objective = objective
        self.trains = tuple(objective.networks)

    def forward(self, batch: Batch) -> TurnResult:
        """Loss, logs and what later phases of the step can use."""
        raise NotImplementedError


class Objective(nn.Module):
    """Networks, how they are trained (phases) and how they are used (encode, decode, sample).

    Methods that an objective does not have raise UserError with the reason; `encodes` and `generates` tell beforehand.
    """

    networks: nn.ModuleDict
    latent_dim: int
    encodes: bool = False
    """Has `encode`: images can be mapped to latents and reconstructed."""
    generates: bool = False
    """Latents drawn from the prior decode to new images."""
    conditional: bool = False
    """Images are decoded from latents and labels."""
    evaluation_samples: int = 1
    """Latents that `evaluate` decodes for one image: what its batches have to be smaller by."""

    def phases(self) -> dict[str, Phase]:
        """New phases over the networks of this objective, by name, in the order of their turns."""
        raise NotImplementedError

    def start_at(self, mean_image: Tensor) -> None:
        """Set initial values that the training data tell, from their mean image, float32 [C, H, W] in 0..1."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Posterior of images uint8 [B, C, H, W]: mean [B, D] and log-variance [B, D], None where there is none."""
        raise UserError(f"a {type(self).__name__} has no encoder")

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the decoder or generator says of latents [B, D]: logits or means [B, C, H, W].

        `labels`, int64 [B], are for a conditional objective.
        """
        raise NotImplementedError

    def pixels(self, decoded: Tensor) -> Tensor:
        """Intensities in 0..1 from what `decode` returned."""
        raise NotImplementedError

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Metrics of held-out images, one value per image: each float [B]. `first_row` is the place in the split.

        The first is the one that the objective is judged by, and less of it is better. None of them, for objectives
        that say nothing of single images.
        """
        return {}


class EncoderDecoder(Objective):
    """An objective whose decoder gives the parameters of a likelihood of pixels, and whose encoder the latents."""

    encodes = True

    def __init__(
        self, likelihood: Likelihood, network: NetworkConfig, image_shape: tuple[int, int, int], encoder_outputs: int
    ) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.latent_dim = network.latent_dim
        self.networks = nn.ModuleDict(
            {
                "encoder": build_encoder(network, image_shape, encoder_outputs),
                "decoder": build_decoder(network, image_shape),
            }
        )

    def start_at(self, mean_image: Tensor) -> None:
        decoder = self.networks["decoder"]
        assert isinstance(decoder, Decoder)
        decoder.start_at(likelihood_parameters(mean_image, self.likelihood))

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.networks["decoder"](latents).float()

    def pixels(self, decoded: Tensor) -> Tensor:
        return decoded.sigmoid() if self.likelihood == "bernoulli" else decoded.clamp(0.0, 1.0)


def likelihood_parameters(mean_image: Tensor, likelihood: Likelihood) -> Tensor:
    """What a decoder says of pixels with these mean intensities in 0..1: logits, or the means themselves.

    Output biases start there, as in the code of Burda et al. 2016: the first steps need not learn the mean image.
    """
    if likelihood == "gaussian":
        return mean_image
    return torch.logit(mean_image, eps=1e-3)  # pixels that are never inked would start at minus infinity
