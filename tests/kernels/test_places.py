"""Pixels at places: values and gradients of torch's `gather`, with gradients of gradients, in one order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen_dist.kernels import pixels_at
from gen_dist.kernels.places import _sum_by_index

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def maps_and_places(device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    maps = torch.randn(3, 2, 5, dtype=dtype)
    return maps.to(device).requires_grad_(), torch.tensor([[0, 4, 4, 4], [1, 1, 0, 1], [2, 3, 0, 4]]).to(device)


def test_pixels_and_their_gradients_are_those_of_gather() -> None:
    maps, places = maps_and_places()
    wanted = maps.gather(2, places[:, None].expand(-1, 2, -1))
    found = pixels_at(maps, places)
    assert torch.equal(found, wanted)
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((one * weights).sum(), maps)[0] for one in (found, wanted))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda one: pixels_at(one, places), maps)
    assert torch.autograd.gradgradcheck(lambda one: pixels_at(one.square(), places), maps)


def test_penalties_of_slopes_are_right_under_transforms_and_compiled() -> None:
    maps, places = maps_and_places()

    def penalty(given: Tensor) -> Tensor:
        slopes = torch.func.grad(lambda one: pixels_at(one, places).pow(3).sum())(given)
        return slopes.square().sum()

    plain = maps.gather(2, places[:, None].expand(-1, 2, -1)).pow(3).sum()
    (slopes,) = torch.autograd.grad(plain, maps, create_graph=True)
    (wanted,) = torch.autograd.grad(slopes.square().sum(), maps)
    torch.testing.assert_close(torch.autograd.grad(penalty(maps), maps)[0], wanted)
    compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(maps), maps)[0], wanted)


def test_sums_as_on_gpus_are_those_of_cpus() -> None:
    maps, places = maps_and_places()
    values = pixels_at(maps, places).detach()
    assert torch.equal(_sum_by_index(values, places, 5), torch.ops.gen_dist.sum_at(values, places, 5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_sums_on_a_gpu_have_the_same_bits_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 50, (8, 4096), generator=generator).cuda()
    values = torch.randn(8, 3, 4096, generator=generator).cuda()
    torch.ops.gen_dist.sum_at(values, places, 50)  # what it needs is there before the recording
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        recorded = torch.ops.gen_dist.sum_at(values, places, 50)
    sums = []
    for _ in range(5):
        graph.replay()
        sums.append(recorded.clone())
    assert all(torch.equal(one, sums[0]) for one in sums)
    wanted = torch.ops.gen_dist.sum_at(values.double().cpu(), places.cpu(), 50)
    torch.testing.assert_close(sums[0].double().cpu(), wanted, rtol=1e-5, atol=1e-4)
