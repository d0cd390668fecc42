"""`kernels/` against torch's own ways, eager or compiled (`--compiled`).

Both give the same values, which is checked before anything is timed; draws have other values and no backward pass. In a
tight loop everything is in the caches, unlike in a step: compare ours with its twin, and look at the times
inside a step in the files beside. Each draw of ours is of another step, as in training: of the same one it would
be looked up. bench/gpu/kernels.py counts bytes and launches of the latent step on GPUs.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu.kernels import plain
from bench.measuring.measured import Measurement
from gen_dist.kernels import (
    DoublingConvolution,
    HalvingConvolution,
    Key,
    Linear,
    binarize,
    group_norm_silu,
    normal,
    reparameterize_kl,
)
from gen_dist.kernels.convolution import pixel_by_pixel
from gen_dist.objectives.losses import bernoulli_nll

ROWS, LATENT_DIM, PIXELS = 192, 20, 784  # of `vae-mnist`
GAN_ROWS = 64  # of `dcgan-mnist` and `dcgan-64`
ROUNDS = 15
WARMUP_ROUNDS = 2
# Normals are drawn for sixteen steps at once: a round is as many, so that its time is fair.
DRAWS_OF_A_ROUND = 16

Function = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A function of ours, torch's function for the same, and their inputs."""

    ours: Function
    twin: Function
    inputs: Tensor
    is_draw: bool = False
    calls: int = 5
    """Calls of a round."""


def steps_of_draws(device: torch.device) -> Iterator[Tensor]:
    """Keys (seed, step) of successive steps, int64 [2], made in advance as in a run."""
    calls = 1 + (WARMUP_ROUNDS + ROUNDS) * DRAWS_OF_A_ROUND
    return itertools.cycle(torch.tensor([[0, step] for step in range(calls)], device=device).unbind())


def latent_step(device: torch.device) -> Case:
    """Reparameterization and KL divergence; the noise is keyed in ours, of torch's generator in the twin."""
    rngs = steps_of_draws(device)
    return Case(
        lambda parameters: reparameterize_kl(parameters, Key(next(rngs), 1, 0)),
        plain,
        torch.randn(ROWS, 2 * LATENT_DIM, device=device),
        is_draw=True,
        calls=DRAWS_OF_A_ROUND,
    )


def drawing_normals(device: torch.device) -> Case:
    """Standard normals of one step."""
    rngs = steps_of_draws(device)
    return Case(
        lambda like: normal(Key(next(rngs), 1, 0), *like.shape),
        torch.randn_like,
        torch.empty(ROWS, LATENT_DIM, device=device),
        is_draw=True,
        calls=DRAWS_OF_A_ROUND,
    )


def binarizing(device: torch.device) -> Case:
    """A Bernoulli draw for each pixel of a batch."""
    rngs = steps_of_draws(device)
    images = torch.randint(0, 256, (ROWS, 1, 28, 28), dtype=torch.uint8, device=device)
    return Case(
        lambda images: binarize(images, Key(next(rngs), 1, 0)),
        lambda images: torch.bernoulli(images.float().div_(255.0)),
        images,
        is_draw=True,
        calls=DRAWS_OF_A_ROUND,
    )


def cross_entropy(device: torch.device) -> Case:
    """Cross-entropy of pixels, summed over an image."""
    targets = torch.rand(ROWS, PIXELS, device=device)
    return Case(
        lambda logits: bernoulli_nll(logits, targets),
        lambda logits: F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1),
        torch.randn(ROWS, PIXELS, device=device),
    )


def linear(inputs: int, outputs: int, device: torch.device) -> Case:
    """A layer of the digit nets."""
    ours, twin = Linear(inputs, outputs).to(device), nn.Linear(inputs, outputs).to(device)
    twin.load_state_dict(ours.state_dict())
    return Case(ours, twin, torch.randn(ROWS, inputs, device=device))


def halving(inputs: int, outputs: int, side: int, device: torch.device) -> Case:
    """A convolution of a discriminator, on maps with channels last as nets of ours have them."""
    ours = HalvingConvolution(inputs, outputs).to(device)
    twin = nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1).to(device)
    return convolution(ours, twin, torch.randn(GAN_ROWS, inputs, side, side, device=device))


def doubling(inputs: int, outputs: int, side: int, device: torch.device) -> Case:
    """A transposed convolution of a generator."""
    ours = DoublingConvolution(inputs, outputs).to(device)
    twin = nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1).to(device)
    return convolution(ours, twin, torch.randn(GAN_ROWS, inputs, side, side, device=device))


def convolution(ours: nn.Module, twin: nn.Module, maps: Tensor) -> Case:
    """Both with the same weights, in the memory format of the maps."""
    twin.load_state_dict(ours.state_dict())
    layout = torch.channels_last
    return Case(ours.to(memory_format=layout), twin.to(memory_format=layout), pixel_by_pixel(maps), calls=1)


def group_norm(channels: int, side: int, layout: torch.memory_format, device: torch.device) -> Case:
    """Group normalization and SiLU of an autoencoder."""
    weight, bias = (torch.ones(channels, device=device, requires_grad=True) for _ in range(2))
    return Case(
        lambda maps: group_norm_silu(maps, weight, bias, 32, 1e-6),
        lambda maps: F.silu(F.group_norm(maps, 32, weight, bias, 1e-6)),
        torch.randn(GAN_ROWS // 2, channels, side, side, device=device).contiguous(memory_format=layout),
    )


CASES: dict[str, Callable[[torch.device], Case]] = {
    "reparameterize_kl": latent_step,
    "normal": drawing_normals,
    "binarize": binarizing,
    "bernoulli_nll": cross_entropy,
    "Linear 784-400": functools.partial(linear, PIXELS, 400),
    "Linear 400-784": functools.partial(linear, 400, PIXELS),
    "halving 1-32, 28": functools.partial(halving, 1, 32, 28),
    "halving 32-64, 14": functools.partial(halving, 32, 64, 14),
    "doubling 64-32, 7": functools.partial(doubling, 64, 32, 7),
    "doubling 32-1, 14": functools.partial(doubling, 32, 1, 14),
    "halving 256-512, 8": functools.partial(halving, 256, 512, 8),
    "group norm 128, 32": functools.partial(group_norm, 128, 32, torch.channels_last),
    "group norm 128, 16": functools.partial(group_norm, 128, 16, torch.channels_last),
    "group norm 128, 16, contiguous": functools.partial(group_norm, 128, 16, torch.contiguous_format),
}
WITHOUT_GRADIENT = ("normal", "binarize")
DIRECTIONS = [
    (case, direction)
    for case in CASES
    for direction in ("forward", "backward")
    if direction == "forward" or case not in WITHOUT_GRADIENT
]


@pytest.mark.parametrize("version", ["ours", "eager", "compiled"])
@pytest.mark.parametrize(("case", "direction"), DIRECTIONS)
def test_kernel(measurement: Measurement, case: str, direction: str, version: str, device: torch.device) -> None:
    """Forward as in training, with what backward needs; backward with gradients of inputs and weights."""
    torch.manual_seed(0)
    made = CASES[case](device)
    function = {"ours": made.ours, "eager": made.twin, "compiled": compiled(made.twin)}[version]
    inputs = made.inputs.requires_grad_(made.inputs.is_floating_point() and case not in WITHOUT_GRADIENT)
    outputs = as_tuple(function(inputs))
    if not made.is_draw:
        torch.testing.assert_close(outputs, as_tuple(made.twin(inputs)), rtol=1e-3, atol=1e-3)
    call: Callable[[], object] = functools.partial(function, inputs)
    if direction == "backward":
        differentiated = [inputs, *(function.parameters() if isinstance(function, nn.Module) else ())]
        gradients = [torch.randn_like(output) for output in outputs]
        call = functools.partial(torch.autograd.grad, outputs, differentiated, gradients, retain_graph=True)
    measurement.time(call, rounds=ROUNDS, iterations=made.calls, warmup_rounds=WARMUP_ROUNDS, images=len(inputs))


def compiled(function: Function) -> Function:
    """As torch.compile makes it. Its backward pass is run many times, so it may not free what it was given."""
    torch._functorch.config.donated_buffer = False
    made: Function = torch.compile(function, dynamic=False)
    return made


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Also of one tensor."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs
