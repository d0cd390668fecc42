"""Forward and backward pass as one compiled graph, compared with autograd's gradients."""

import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import InductorError

from gen_dist.errors import ConfigError
from gen_dist.objectives import Batch, Objective, Phase, TurnResult
from gen_dist.training.compiled_phase import CompiledPhase
from gen_dist.training.turn import computing


class Sums(Phase):
    """Phase with two layers that are added, so that their biases have equal gradients, and one unused layer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        objective = Objective()
        maps = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        layers = {name: nn.Linear(4 * 4 * 4, 3) for name in ("first", "second", "idle")}
        objective.networks = nn.ModuleDict({"maps": maps, **layers})
        super().__init__(objective)

    def forward(self, batch: Batch) -> TurnResult:
        networks = self.objective.networks
        images = batch.images / 255.0
        features = networks["maps"](images).flatten(1)
        loss = (networks["first"](features) + networks["second"](features)).square().mean()
        return TurnResult(loss, {"loss": loss.detach()}, {"images": images})


def batch_of(seed: int) -> Batch:
    images = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Batch(images, torch.zeros(5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 0)


def autograds(phase: Sums, weights: list[float]) -> list[Tensor | None]:
    for seed, weight in enumerate(weights):
        (TurnResult(*phase(batch_of(seed))).loss * weight).backward()
    found = [parameter.grad for parameter in phase.parameters()]
    phase.zero_grad()
    return found


def test_gradients_are_autograds_of_one_graph() -> None:
    phase = Sums()
    weights = [1.0, 0.5]
    expected = autograds(phase, weights)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole = CompiledPhase(phase, list(phase.parameters()))
    for seed, weight in enumerate(weights):
        logs, carried = whole.add_gradients(batch_of(seed), weight)
        assert set(logs) == {"loss"}
        torch.testing.assert_close(carried["images"], batch_of(seed).images / 255.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    found = [parameter.grad for parameter in phase.parameters()]
    torch.testing.assert_close([one for one in found if one is not None], [one for one in expected if one is not None])
    assert [one is None for one in found] == [one is None for one in expected] == [False] * 6 + [True] * 2


def test_gradients_have_the_parameters_layout_and_own_memory() -> None:
    """Even if the compiler returns one tensor for two biases, or a contiguous gradient of a channels-last weight."""
    phase = Sums()
    layers = dict(phase.named_parameters())
    trained = [layers[f"objective.networks.{name}"] for name in ("first.bias", "second.bias", "maps.weight")]
    whole = CompiledPhase(phase, trained)
    values, rows = torch.arange(3.0), torch.randn(4, 3, 3, 3)

    def compiled(_batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[Tensor, ...]]:
        shared = values.clone()
        return {}, {}, (shared, shared, rows.clone())

    with mock.patch.object(whole, "_compiled", compiled):
        for _ in range(2):
            whole.add_gradients(batch_of(0), 1.0)
    for parameter, gradient in zip(trained, (values, values, rows), strict=True):
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_gradients_of_float32_operations_stay_float32_in_bf16() -> None:
    """An example is a gradient penalty: autocast ends before the backward pass."""
    phase = Wide()
    whole = CompiledPhase(phase, list(phase.parameters()))
    # The same operations, not compiled.
    with torch.autocast("cpu", torch.bfloat16), mock.patch.object(whole, "_compiled", whole._turn):
        loss = phase(batch_of(0)).loss
        whole.add_gradients(batch_of(0), 1.0)
    (expected,) = torch.autograd.grad(loss, list(phase.parameters()))
    (found,) = [parameter.grad for parameter in phase.parameters()]
    assert found is not None
    assert torch.equal(found, expected)


class Wide(Phase):
    """Phase with a matrix product outside autocast."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        objective = Objective()
        objective.networks = nn.ModuleDict({"net": nn.Linear(108, 64, bias=False)})
        super().__init__(objective)

    def forward(self, batch: Batch) -> TurnResult:
        with torch.autocast("cpu", enabled=False):
            loss = self.objective.networks["net"](batch.images.flatten(1) / 255.0).square().mean()
        return TurnResult(loss, {"loss": loss.detach()})


def test_a_torn_file_in_the_compilers_cache_is_named(tmp_path: Path) -> None:
    torn = tmp_path / "torn.so"
    torn.touch()
    spec = importlib.util.spec_from_file_location("torn", torn)
    assert spec is not None
    with pytest.raises(ConfigError) as failure, computing(torch.device("cpu"), torch.float32):
        try:
            importlib.util.module_from_spec(spec)
        except ImportError as error:
            raise InductorError(error, None) from None
    assert str(failure.value) == (
        f"torch.compile failed: ImportError: {torn}: file too short; if a run was killed while it wrote {torn}, remove "
        "that file, or leave out --compile"
    )
