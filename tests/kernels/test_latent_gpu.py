"""The fused latent kernel on a real GPU: results, shards, under torch.compile and in a CUDA graph."""

import pytest
import torch
from torch import Tensor

from gen_dist.kernels import Key, binarize, normal, reparameterize_kl
from gen_dist.kernels.device_noise import device_binarize, device_normal
from gen_dist.kernels.latent import twin_backward, twin_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]

STREAM, FIRST_ROW = 3, 5


def _rng(step: int = 7) -> Tensor:
    return torch.tensor([2**40 + 11, step], device="cuda")


def _parameters(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 14), (130, 40), (5, 4100), (2, 8, 16, 16), (2, 6, 3, 5, 7)])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_kernel_equals_its_twin(
    shape: tuple[int, ...], dtype: torch.dtype, samples: int, channels_last: bool
) -> None:
    parameters = _parameters(*shape, dtype=dtype)
    if channels_last:
        if len(shape) < 4:
            pytest.skip("no channels_last format")
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        parameters = parameters.to(memory_format=memory_format)
    parameters.requires_grad_()
    latents, kl_nats = reparameterize_kl(parameters, Key(_rng(), STREAM, FIRST_ROW), samples=samples)
    gradients = torch.randn_like(latents), torch.randn_like(kl_nats)
    (gradient,) = torch.autograd.grad((latents, kl_nats), parameters, gradients)
    arguments = (None, _rng(), STREAM, FIRST_ROW, samples, False)
    wide = parameters.detach().double()
    expected, expected_kl = twin_forward(wide, *arguments)
    (expected_gradient,) = twin_backward(gradients[0].double(), gradients[1].double(), wide, *arguments)
    bound = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(latents.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(kl_nats.double(), expected_kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2 * bound, atol=samples * bound)


def test_normals_equal_their_definition_and_shards_the_whole() -> None:
    drawn = normal(Key(_rng(), STREAM, FIRST_ROW), 300, 37)
    torch.testing.assert_close(drawn, device_normal(_rng(), STREAM, FIRST_ROW, 300, 37), rtol=0, atol=2e-6)
    assert torch.equal(normal(Key(_rng(), STREAM, FIRST_ROW + 100), 50, 37), drawn[100:150])


@pytest.mark.parametrize("shape", [(300, 1, 28, 28), (7, 3, 5, 3), (3, 2000)])
def test_pixels_are_drawn_as_they_are_defined(shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=torch.Generator("cuda"))
    drawn = binarize(images, Key(_rng(), STREAM, FIRST_ROW))
    assert torch.equal(drawn, device_binarize(images, _rng(), STREAM, FIRST_ROW))
    if len(shape) == 4:
        assert torch.equal(
            binarize(images.to(memory_format=torch.channels_last), Key(_rng(), STREAM, FIRST_ROW)), drawn
        )


def test_two_shards_of_rows_have_the_bits_of_the_whole() -> None:
    parameters = _parameters(64, 600)
    whole = reparameterize_kl(parameters, Key(_rng(), STREAM, 0))
    halves = [reparameterize_kl(parameters[first : first + 32], Key(_rng(), STREAM, first)) for first in (0, 32)]
    for value, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(value, torch.cat(parts))


def test_compiled_it_is_one_graph_with_new_noise_at_each_step() -> None:
    def step(parameters: Tensor, rng: Tensor) -> Tensor:
        latents, kl_nats = reparameterize_kl(parameters, Key(rng, STREAM, 0))
        return (latents.square().sum(1) + kl_nats).mean()

    compiled = torch.compile(step, fullgraph=True)
    parameters = _parameters(64, 40).requires_grad_()
    losses = []
    for number in range(5):
        loss, eager = compiled(parameters, _rng(number)), step(parameters, _rng(number))
        torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(loss, parameters)[0], torch.autograd.grad(eager, parameters)[0], rtol=1e-4, atol=1e-6
        )
        losses.append(loss.item())
    assert len(set(losses)) == 5


def test_a_cuda_graph_reads_the_step_tensor_at_each_replay() -> None:
    parameters, rng = _parameters(64, 40), _rng(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            reparameterize_kl(parameters, Key(rng, STREAM, 0))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latents, kl_nats = reparameterize_kl(parameters, Key(rng, STREAM, 0))
    for number in range(4):
        rng[1] = number
        graph.replay()
        expected, expected_kl = reparameterize_kl(parameters, Key(_rng(number), STREAM, 0))
        assert torch.equal(latents, expected)
        assert torch.equal(kl_nats, expected_kl)
