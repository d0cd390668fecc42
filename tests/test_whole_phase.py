"""Forward and backward as one compiled graph, against autograd's own gradients."""

import torch
from torch import Tensor, nn

from gen_dist.objectives import Batch, Objective, Phase, TurnResult
from gen_dist.whole_phase import WholePhase


class Sums(Phase):
    """Two layers whose outputs are added, so that their biases have equal gradients, and one that has no part in it."""

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


def test_gradients_are_autograds_and_each_has_memory_of_its_own() -> None:
    phase = Sums()
    weights = [1.0, 0.5]
    expected = autograds(phase, weights)
    whole = WholePhase(phase, list(phase.parameters()))
    for seed, weight in enumerate(weights):
        logs, handed_on = whole.add_gradients(batch_of(seed), weight)
        assert set(logs) == {"loss"}
        torch.testing.assert_close(handed_on["images"], batch_of(seed).images / 255.0)
    found = [parameter.grad for parameter in phase.parameters()]
    torch.testing.assert_close([one for one in found if one is not None], [one for one in expected if one is not None])
    assert [one is None for one in found] == [one is None for one in expected] == [False] * 6 + [True] * 2
    having = [(parameter, parameter.grad) for parameter in phase.parameters() if parameter.grad is not None]
    assert all(gradient.stride() == parameter.stride() for parameter, gradient in having)
    assert len({gradient.data_ptr() for _, gradient in having}) == len(having)
