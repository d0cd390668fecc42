"""Registered operators of the latent step on CPU tensors, where they run the kernels' twins with the device noise."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from gen_dist.kernels import Key, normal, reparameterize_kl
from gen_dist.kernels.device_noise import device_normal
from gen_dist.kernels.latent import (
    plain_latents_kl,
    reparameterize_kl_backward_operator,
    reparameterize_kl_operator,
    twin_backward,
    twin_forward,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RNG = torch.tensor([7, 3])
SHAPES: dict[str, tuple[tuple[int, ...], torch.memory_format]] = {
    "rows": ((3, 14), torch.contiguous_format),
    "no rows": ((0, 14), torch.contiguous_format),
    "image": ((2, 6, 3, 4), torch.contiguous_format),
    "channels_last": ((2, 6, 3, 4), torch.channels_last),
    "channels_last_3d": ((2, 4, 3, 2, 2), torch.channels_last_3d),
}
OPTIONS = {  # samples, deterministic, prior
    "standard prior": (1, False, False),
    "3 samples, prior": (3, False, True),
    "deterministic, prior": (2, True, True),
}


def draw(shape: tuple[int, ...], memory_format: torch.memory_format, seed: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=memory_format)


def inputs(shape: str, options: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the operator."""
    samples, deterministic, with_prior = OPTIONS[options]
    parameters = draw(*SHAPES[shape], 1, dtype).requires_grad_()
    prior = draw(*SHAPES[shape], 2, dtype).requires_grad_() if with_prior else None
    return parameters, prior, RNG, 2, 7, samples, deterministic


@pytest.mark.parametrize(
    ("options", "shape", "dtype"),
    [
        *((options, shape, torch.float32) for options in OPTIONS for shape in SHAPES),
        *(
            ("3 samples, prior", shape, dtype)
            for shape in ("rows", "channels_last")
            for dtype in (torch.bfloat16, torch.float64)
        ),
    ],
    ids=str,
)
def test_operators_pass_opcheck(options: str, shape: str, dtype: torch.dtype) -> None:
    arguments = inputs(shape, options, dtype)
    torch.library.opcheck(reparameterize_kl_operator, arguments)
    latents, kl_nats = reparameterize_kl_operator(*arguments)
    detached = [each.detach() if isinstance(each, Tensor) else each for each in arguments]
    for gradients in ((latents.detach(), kl_nats.detach()), (None, kl_nats.detach()), (latents.detach(), None)):
        torch.library.opcheck(reparameterize_kl_backward_operator, (*gradients, *detached))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "no rows"])
def test_gradients_pass_gradcheck_in_float64(shape: str, options: str) -> None:
    parameters, prior, *rest = inputs(shape, options, torch.float64)
    if prior is None:
        assert torch.autograd.gradcheck(lambda p: reparameterize_kl_operator(p, None, *rest), (parameters,))
    else:
        assert torch.autograd.gradcheck(lambda p, q: reparameterize_kl_operator(p, q, *rest), (parameters, prior))


@pytest.mark.parametrize("unused", ["latents", "kl"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_one_output_alone_equal_those_of_autograd(options: str, unused: str) -> None:
    """The gradient of the other output is None; that of the divergence is one number for all rows."""
    parameters, prior, rng, stream, first_row, samples, deterministic = inputs("image", options, torch.float64)
    leaves = [leaf for leaf in (parameters, prior) if leaf is not None]
    outputs = reparameterize_kl_operator(parameters, prior, rng, stream, first_row, samples, deterministic)
    used = outputs[unused == "latents"]
    found = torch.autograd.grad(used.sum(), leaves, allow_unused=True)
    noise = device_normal(rng, stream, first_row, 2, 36, samples=samples, dtype=torch.float64).view(2, samples, 3, 3, 4)
    plain = plain_latents_kl(parameters, None if deterministic else noise, samples, prior)
    expected: tuple[Tensor | None, ...] = torch.autograd.grad(
        plain[unused == "latents"].sum(), leaves, allow_unused=True
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


def test_backward_keeps_nothing_but_the_inputs() -> None:
    parameters, prior, *rest = inputs("channels_last", "3 samples, prior", torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reparameterize_kl_operator(parameters, prior, *rest)
    assert [each.data_ptr() for each in kept] == [each.data_ptr() for each in (parameters, prior, RNG)]


def test_tensors_with_gaps_give_what_dense_ones_give() -> None:
    dense = draw((4, 6, 3, 5), torch.contiguous_format, 1, torch.float32)
    gaps = torch.zeros(4, 6, 3, 10)[..., ::2].copy_(dense)
    for one, other in zip(
        reparameterize_kl_operator(gaps, None, RNG, 2, 7, 2, False),
        reparameterize_kl_operator(dense, None, RNG, 2, 7, 2, False),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert one.is_contiguous()


def test_noise_of_latents_is_that_of_normal_in_memory_order() -> None:
    """Means 0 and log-variances 0 give the noise itself; the samples of an image are adjacent."""
    noise = device_normal(RNG, 2, 7, 4, 30)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parameters = torch.zeros(4, 6, 2, 5).contiguous(memory_format=memory_format)
        latents, kl_nats = reparameterize_kl_operator(parameters, None, RNG, 2, 7, 1, False)
        in_memory = torch.as_strided(latents, (4, 30), (30, 1))
        assert torch.equal(in_memory, noise)
        assert not kl_nats.any()
        two = reparameterize_kl_operator(parameters, None, RNG, 2, 7, 2, False)[0]
        assert torch.equal(two[::2], latents)
        assert not torch.isin(two[1::2], latents).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_twins_in_float32_equal_those_in_float64(options: str, dtype: torch.dtype) -> None:
    parameters, prior, *rest = inputs("channels_last", options, dtype)
    parameters, prior = parameters.detach(), None if prior is None else prior.detach()
    wide_prior = None if prior is None else prior.double()
    latents, kl_nats = twin_forward(parameters, prior, *rest)
    expected_latents, expected_kl = twin_forward(parameters.double(), wide_prior, *rest)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(latents.double(), expected_latents, rtol=rounding, atol=2e-6)
    torch.testing.assert_close(kl_nats.double(), expected_kl, rtol=1e-6, atol=0)
    found = twin_backward(latents, kl_nats, parameters, prior, *rest)
    expected = twin_backward(latents.double(), kl_nats.double(), parameters.double(), wide_prior, *rest)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rounding, atol=1e-6 * other.abs().max().item())


class Step(nn.Module):
    """A training step around the latent step: reconstruct 12 numbers through 4 latents."""

    def __init__(self, latent_step: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(12, 8), nn.Linear(4, 12)
        self.latent_step = latent_step

    def forward(self, images: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
        latents, kl_nats = self.latent_step(self.encoder(images), rng)
        return ((self.decoder(latents) - images).square().sum(1) + kl_nats).mean(), latents.detach()


def operator(parameters: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
    return reparameterize_kl_operator(parameters, None, rng, 2, 0, 1, False)


def public(parameters: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
    return reparameterize_kl(parameters, Key(rng, 2, 0))


def plain(parameters: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
    """Textbook formula of the latent step."""
    noise = torch.randn(len(parameters), 1, parameters.shape[1] // 2)
    latents, kl_nats = plain_latents_kl(parameters, noise, 1)
    return latents.squeeze(1), kl_nats


@pytest.mark.parametrize("latent_step", [operator, public])
def test_compiled_steps_equal_eager_ones_with_new_noise_each(
    latent_step: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    images = draw((16, 12), torch.contiguous_format, 3, torch.float32)
    eager = Step(latent_step)
    models = [eager, copy.deepcopy(eager)]
    steps: list[Callable[..., tuple[Tensor, Tensor]]] = [models[0], torch.compile(models[1], fullgraph=True)]
    losses: list[list[float]] = [[], []]
    noises: list[Tensor] = []
    for index, (model, step) in enumerate(zip(models, steps, strict=True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for number in range(20):
            rng = torch.tensor([7, number])
            mean, logvar = model.encoder(images).detach().chunk(2, dim=1)
            loss, latents = step(images, rng)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[index].append(loss.item())
            if index == 1:
                noises.append((latents - mean) / (0.5 * logvar).exp())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < 0.9 * losses[0][0]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for number, noise in enumerate(noises):
        key = Key(torch.tensor([7, number]), 2, 0)
        expected = device_normal(*key, 16, 4) if latent_step is operator else normal(key, 16, 4)
        torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-4)
    assert len(torch.stack(noises).flatten(1).round(decimals=2).unique(dim=0)) == 20


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compilation_keeps_the_memory_format_of_the_noise(
    memory_format: torch.memory_format,
) -> None:
    """Inductor prefers channels_last outputs of convolutions."""
    torch.manual_seed(0)
    encoder = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=memory_format)
    images = draw((4, 3, 6, 5), memory_format, 1, torch.float32)

    def step(images: Tensor) -> tuple[Tensor, Tensor]:
        return reparameterize_kl_operator(encoder(images), None, RNG, 2, 0, 1, False)

    latents, kl_nats = step(images)
    compiled_latents, compiled_kl = torch.compile(step, fullgraph=True)(images)
    assert latents.is_contiguous(memory_format=memory_format)
    assert compiled_latents.stride() == latents.stride()
    torch.testing.assert_close(compiled_latents, latents)
    torch.testing.assert_close(compiled_kl, kl_nats)


def gradient_error(latent_step: Callable[..., tuple[Tensor, Tensor]], memory_budget: float) -> float:
    """Error of a compiled gradient against the formula, given the latents of the same call."""
    torch._dynamo.reset()

    def step(parameters: Tensor, weights: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
        latents, kl_nats = latent_step(parameters * 1.0, rng)
        return torch.tanh(latents @ weights).sum() + kl_nats.sum(), latents.detach()

    parameters = draw((64, 32), torch.contiguous_format, 1, torch.float32).requires_grad_()
    weights = draw((16, 16), torch.contiguous_format, 2, torch.float32)
    with functorch_config.patch(activation_memory_budget=memory_budget):
        loss, latents = torch.compile(step, fullgraph=True)(parameters, weights, RNG)
        loss.backward()
    mean, logvar = parameters.detach().chunk(2, dim=1)
    by_latents = (1 - torch.tanh(latents @ weights).square()) @ weights.t()
    expected = torch.cat([by_latents + mean, 0.5 * (by_latents * (latents - mean) + logvar.exp() - 1)], dim=1)
    assert parameters.grad is not None
    return (parameters.grad - expected).abs().max().item()


@pytest.mark.parametrize("latent_step", [operator, public])
@pytest.mark.parametrize("memory_budget", [0.0, 0.5, 0.9, 1.0])
def test_gradients_are_right_at_every_activation_memory_budget(
    latent_step: Callable[..., tuple[Tensor, Tensor]], memory_budget: float
) -> None:
    """Below 1 the backward pass recomputes activations. Recomputed noise must be the same noise."""
    assert gradient_error(latent_step, memory_budget) < 1e-4


def test_the_plain_formula_is_wrong_where_ours_is_right() -> None:
    """Reason for the test above: torch.compile recomputes `torch.randn` with other numbers."""
    assert gradient_error(plain, 1.0) < 1e-4
    if gradient_error(plain, 0.5) < 1e-4:
        pytest.skip(f"torch {torch.__version__} differentiates the plain formula right at activation_memory_budget 0.5")
    assert gradient_error(operator, 0.5) < 1e-4
