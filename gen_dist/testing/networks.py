"""Checks of networks: shapes, dtypes, gradients, and that a row does not depend on the rows beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gen_dist.config import NetworkConfig
from gen_dist.networks import build_decoder, build_encoder
from gen_dist.testing.graph import generator_states
from gen_dist.testing.report import Announce, Check, Failure, Result, Skipped, nobody, raise_failures, run_checks

OUTPUTS = 3
ROWS = 3


class NetworkTrial:
    """An encoder and a decoder of a config, with inputs for them."""

    def __init__(self, config: NetworkConfig, image_shape: tuple[int, int, int] = (1, 28, 28)) -> None:
        self.config = config
        self.image_shape = image_shape
        numbers = torch.Generator().manual_seed(1)
        self.images = torch.rand(ROWS, *image_shape, generator=numbers) * 2 - 1
        # A network with spatial latents overrides `latent_shape`.
        shape_of = getattr(config, "latent_shape", None)
        self.latent_shape: tuple[int, ...] = shape_of(image_shape) if callable(shape_of) else (config.latent_dim,)
        self.latents = torch.randn(ROWS, *self.latent_shape, generator=numbers)

    def networks(self, seed: int = 0) -> dict[str, nn.Module]:
        """New networks, with weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made: dict[str, nn.Module] = {}
            if hasattr(self.config, "encoder") or not hasattr(self.config, "decoder"):
                made["encoder"] = build_encoder(self.config, self.image_shape, OUTPUTS)
            if hasattr(self.config, "decoder"):  # a network may serve as discriminator alone
                made["decoder"] = build_decoder(self.config, self.image_shape, self.latent_shape[0])
            return made

    def inputs_of(self, name: str) -> Tensor:
        """Images for the encoder, latents for the decoder."""
        return self.images if name == "encoder" else self.latents


def _made(trial: NetworkTrial, name: str) -> nn.Module:
    made = trial.networks()
    if name not in made:
        raise Skipped(f"it has no {name}")
    return made[name]


def check_outputs_have_their_shape(trial: NetworkTrial) -> None:
    """Encoders give [B, outputs] (or maps of as many channels), decoders [B, C, H, W]: float32 and finite."""
    spatial = trial.latent_shape[1:]
    expected = {"encoder": (ROWS, OUTPUTS, *spatial), "decoder": (ROWS, *trial.image_shape)}
    for name, network in trial.networks().items():
        found = network(trial.inputs_of(name))
        kind = str(found.dtype).removeprefix("torch.")
        if tuple(found.shape) != expected[name] or found.dtype != torch.float32:
            raise Failure(
                f"the {name} {type(network).__name__} maps {list(trial.inputs_of(name).shape)} to {kind} "
                f"{list(found.shape)}, not to float32 {list(expected[name])}{_ways_out(found, expected[name])}"
            )
        if not bool(found.isfinite().all()):
            raise Failure(f"the {name} {type(network).__name__} gives values that are not finite")


def _ways_out(found: Tensor, expected: tuple[int, ...]) -> str:
    """Clause for an encoder whose outputs have places that its config does not tell."""
    if tuple(found.shape[:2]) != expected[:2] or found.ndim <= len(expected):
        return ""
    return (
        "; if outputs have places, latent_shape(image_shape) of its config has to say (C, h, w), and its decoder takes "
        "that; the config of a discriminator alone names no decoder"
    )


def check_gradients_reach_all_parameters(trial: NetworkTrial) -> None:
    """Every parameter that requires a gradient is part of the output's graph, in its own memory order."""
    for name, network in trial.networks().items():
        parameters = {key: value for key, value in network.named_parameters() if value.requires_grad}
        outputs = network(trial.inputs_of(name)).square().sum()
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            outputs, list(parameters.values()), allow_unused=True
        )
        if unused := [key for key, value in zip(parameters, gradients, strict=True) if value is None]:
            raise Failure(f"parameter {unused[0]} of the {name} {type(network).__name__} is not used: leave it out")
        if other := [key for key, value in parameters.items() if not value.is_contiguous()]:
            raise Failure(f"parameter {other[0]} of the {name} is not contiguous, which fused optimizers need")


def check_the_seed_alone_decides_the_weights(trial: NetworkTrial) -> None:
    """Initial weights are drawn from torch's generator, which the seed of a run sets."""
    for name, network in trial.networks().items():
        again = trial.networks()[name].state_dict()
        if other := [key for key, value in network.state_dict().items() if not torch.equal(value, again[key])]:
            raise Failure(f"{other[0]} of the {name} starts at other values for the same seed")


def check_evaluation_is_deterministic(trial: NetworkTrial) -> None:
    """In eval mode a network gives the same bits twice and draws nothing."""
    for name, network in trial.networks().items():
        network.eval()
        before = generator_states()
        with torch.no_grad():
            first, second = (network(trial.inputs_of(name)) for _ in range(2))
        if generator_states() != before or not torch.equal(first, second):
            raise Failure(f"the {name} {type(network).__name__} draws random numbers in eval mode")


def check_a_row_does_not_depend_on_the_others(trial: NetworkTrial) -> None:
    """In eval mode a batch of one gives the same row as a batch of three."""
    for name, network in trial.networks().items():
        network.eval()
        inputs = trial.inputs_of(name)
        with torch.no_grad():
            whole, alone = network(inputs), network(inputs[:1])
        if whole[:1].shape != alone.shape or not torch.allclose(whole[:1], alone, rtol=1e-4, atol=1e-5):
            raise Failure(f"the {name} {type(network).__name__} maps a row in a batch of 3 otherwise than alone")


def check_channels_last_equals_contiguous(trial: NetworkTrial) -> None:
    """The memory layout of images does not change the output."""
    network = _made(trial, "encoder").eval()
    with torch.no_grad():
        plain = network(trial.images)
        other = network(trial.images.contiguous(memory_format=torch.channels_last))
    if not torch.allclose(plain, other, rtol=1e-4, atol=1e-5):
        raise Failure(f"{type(network).__name__} gives other values for images that are channels_last")


def check_decoders_start_at_an_image(trial: NetworkTrial) -> None:
    """After `start_at`, every latent decodes to the given colour, relative to black."""
    decoder = _made(trial, "decoder").eval()
    start_at = getattr(decoder, "start_at", None)
    if start_at is None:
        raise Failure(f"{type(decoder).__name__} has no start_at; derive it from gen_dist.networks.Decoder")
    decoded = []
    for level in (0.0, 0.5):
        start_at(torch.full(trial.image_shape, level))
        with torch.no_grad():
            decoded.append(decoder(trial.latents))
    if not torch.allclose(decoded[1] - decoded[0], torch.full_like(decoded[0], 0.5), rtol=1e-3, atol=1e-4):
        raise Failure(f"{type(decoder).__name__}.start_at does not move the decoded images by the colour it is given")


_SHAPE = "outputs have their shape"
NETWORK_CHECKS = (
    Check(check_outputs_have_their_shape),
    Check(check_gradients_reach_all_parameters, (_SHAPE,)),
    Check(check_the_seed_alone_decides_the_weights, (_SHAPE,)),
    Check(check_evaluation_is_deterministic, (_SHAPE,)),
    Check(check_a_row_does_not_depend_on_the_others, (_SHAPE, "evaluation is deterministic")),
    Check(check_channels_last_equals_contiguous, (_SHAPE, "evaluation is deterministic")),
    Check(check_decoders_start_at_an_image, (_SHAPE, "evaluation is deterministic")),
)


def check_network(
    config: NetworkConfig, *, image_shape: tuple[int, int, int] = (1, 28, 28), announce: Announce = nobody
) -> list[Result]:
    """Check the encoder and the decoder of a network.

    Raises:
        Failure: a line for each check that failed.
    """
    results = run_checks(
        config.kind or type(config).__name__, NETWORK_CHECKS, NetworkTrial(config, image_shape), announce
    )
    raise_failures(results)
    return results
