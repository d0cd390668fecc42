"""LightAdam compared with torch's Adam, and the rates of a GAN's two networks."""

import copy
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gen_dist.config import GanConfig, OptimizerConfig, ScheduleConfig
from gen_dist.errors import ConfigError
from gen_dist.presets import get_preset
from gen_dist.training import optimizers
from gen_dist.training.optimizers import LARGEST_PIECE, SMALLEST_PIECE, LightAdam, build_optimizer, piece_size
from tests.support.runs import make_trainer, rates_and_betas, run_steps, small_config


def _nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    return net, copy.deepcopy(net)


def _backward(net: nn.Module, step: int) -> None:
    net(torch.randn(4, 7, generator=torch.Generator().manual_seed(step))).square().sum().backward()


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize(("weight_decay", "piece"), [(0.0, 0), (0.1, 0), (0.1, 4)])
def test_light_adam_equals_torchs(name: str, weight_decay: float, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "piece_size", lambda _parameters: piece)
    # A CPU rounds the remainder of a tensor differently from whole vectors, and pieces have more remainders.
    same = functools.partial(torch.allclose, rtol=1e-5, atol=1e-6) if piece else torch.equal
    ours, theirs = _nets()
    config = OptimizerConfig(optimizer=name, betas=(0.8, 0.95), weight_decay=weight_decay)  # type: ignore[arg-type]
    light = build_optimizer(list(ours.parameters()), config, 0.01)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    torchs = kind(theirs.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=weight_decay, fused=True)
    assert isinstance(light, LightAdam)
    for step in range(12):
        for optimizer in (light, torchs):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        _backward(ours, step)
        _backward(theirs, step)
        light.update()
        torchs.step()
        torchs.zero_grad()
        if step == 5:  # as a resumed run does
            light.load_state_dict(copy.deepcopy(light.state_dict()))
        assert all(same(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in ours.parameters())
    for mine, other in zip(light.state.values(), torchs.state.values(), strict=True):
        assert all(same(mine[key], other[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    ours, _ = _nets()
    light = build_optimizer(list(ours.parameters()), OptimizerConfig(), 0.01)
    assert isinstance(light, LightAdam)
    for step in range(4):
        before = [parameter.detach().clone() for parameter in ours.parameters()]
        _backward(ours, step)
        if step % 2 == 0:
            next(ours.parameters()).grad = None
        light.update()
        after = list(ours.parameters())
        assert torch.equal(before[0], after[0]) == (step % 2 == 0)
        assert not torch.equal(before[1], after[1])
    assert [light.state[parameter]["step"].item() for parameter in ours.parameters()] == [2.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("elements", "size"),
    [(100, SMALLEST_PIECE), (256 * SMALLEST_PIECE, SMALLEST_PIECE), (256 * SMALLEST_PIECE + 256, 2 * SMALLEST_PIECE)],
)
def test_gpus_take_small_nets_in_pieces(elements: int, size: int) -> None:
    def parameters(count: int) -> list[torch.Tensor]:
        return [_OnGpu(torch.empty(count // 2, device="meta")) for _ in range(2)]

    assert piece_size(parameters(elements)) == size
    assert piece_size(parameters(256 * LARGEST_PIECE)) == 0  # enough blocks without pieces
    assert piece_size([torch.zeros(elements)]) == 0


class _OnGpu(torch.Tensor):
    device = torch.device("cuda")


def test_training_does_not_import_the_compiler(tmp_path: Path) -> None:
    """The import would add a second to the start of a run."""
    program = """
import sys, numpy, gen_dist
from gen_dist.presets import get_preset

images = numpy.arange(16 * 64, dtype=numpy.uint8).reshape(16, 1, 8, 8)
options = {"steps": 2, "global_batch_size": 8, "hidden_sizes": (8,), "run_dir": "run", "cache_dir": "cache"}
gen_dist.train(get_preset("vae-mnist").with_options(**options), data=images, test_data=images, say=lambda _line: None)
assert "torch" in sys.modules
assert not {"torch._dynamo", "torch._inductor"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


@pytest.mark.parametrize("case", ["plain", "lazy", "scheduled"])
def test_a_discriminator_has_a_rate_of_its_own(case: str) -> None:
    """Its betas are those of the generator: two time scales change the rate alone (Heusel et al. 2017)."""
    c = 16 / 17 if case == "lazy" else 1.0
    config = small_config(
        "gan",
        objective=GanConfig(penalty_weight=1.0, penalty_every=16),
        optimization=OptimizerConfig(betas=(0.5, 0.99), lazy_scaling=case == "lazy", discriminator_rate_factor=4.0),
        schedule=ScheduleConfig(final_beta2=0.9) if case == "scheduled" else ScheduleConfig(),
        learning_rate=1e-4,
    )
    trainer = make_trainer(config)
    run_steps(trainer, 0, 1)
    rates = rates_and_betas(trainer)
    assert rates["generator"] == pytest.approx((1e-4, 0.5, 0.99))
    assert rates["discriminator"] == pytest.approx((4e-4 * c, 0.5**c, 0.99**c))


def test_a_rate_of_a_discriminator_needs_one() -> None:
    with pytest.raises(ConfigError, match=r"rate_factor 4.0 with objective vae, which trains no discrim"):
        small_config("vae", optimization=OptimizerConfig(discriminator_rate_factor=4.0))
    with pytest.raises(
        ConfigError, match=r"rate_factor 4.0 with objective latent-autoencoder, which trains no discrim"
    ):
        get_preset("kl-mnist").with_options(discriminator_rate_factor=4.0)
    with_adversary = get_preset("kl-mnist").with_options(discriminator_rate_factor=4.0, adversarial_weight=0.5)
    assert with_adversary.optimization.discriminator_rate_factor == 4.0
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"discriminator_rate_factor {value} is not a positive number"):
            OptimizerConfig(discriminator_rate_factor=value)
