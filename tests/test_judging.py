"""Generated images are judged once a step where both turns can use it: the same run as where each turn judges them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from gen_dist.config import DcganConfig, GanConfig, NetworkConfig, TrainConfig
from gen_dist.objectives.adversarial import JUDGED, Adversarial
from gen_dist.trainer import Trainer
from kernels.convolution import _Doubling, _Halving
from kernels.linear import _OneDnnLinear
from tests.runs import SMALL_DCGAN, SMALL_SNGAN, UNMIXED_DCGAN, make_trainer, small_config

needs_onednn_linear = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN linear operator"
)
# Its discriminator has layers of both kinds: few channels, whose gradients are products, and torch's own.
NETWORK = DcganConfig(feature_maps=8, latent_dim=5)


def _config(objective: GanConfig, network: NetworkConfig = NETWORK, **changes: Any) -> TrainConfig:
    return replace(small_config("dcgan"), objective=objective, network=network, **changes)


@contextmanager
def _judging_of(trainer: Trainer) -> Iterator[list[int]]:
    """The numbers of images that the discriminator judges, pass by pass."""
    passes: list[int] = []
    discriminator = trainer.objective.networks["discriminator"]
    handle = discriminator.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    try:
        yield passes
    finally:
        handle.remove()


def _judging_twice(config: TrainConfig) -> Trainer:
    trainer = make_trainer(config)
    trainer._turns["generator"].phase.hands_on_graphs = False
    return trainer


def _assert_same_weights(first: Trainer, second: Trainer) -> None:
    for (name, one), two in zip(
        first.objective.networks.named_parameters(), second.objective.networks.parameters(), strict=True
    ):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    "objective",
    [
        GanConfig(),
        GanConfig(loss="hinge", conditioning="projection"),
        GanConfig(loss="least_squares", conditioning="concat", generator_every=2),
    ],
    ids=["non-saturating", "hinge, projection", "least squares, concatenation, every other step"],
)
def test_judging_once_is_the_same_run_bit_for_bit(objective: GanConfig) -> None:
    once, twice = make_trainer(_config(objective)), _judging_twice(_config(objective))
    for step in range(6):
        with _judging_of(once) as fewer, _judging_of(twice) as more:
            logs, expected = once.run_step(step), twice.run_step(step)
        turn_of_both = step % objective.generator_every == 0
        assert (fewer, more) == ([24] * 2, [24] * (3 if turn_of_both else 2))
        assert logs.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(logs[name], value), name
        assert not any(value.requires_grad for value in logs.values())
        _assert_same_weights(once, twice)
    parameters = list(once.objective.networks.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)


def test_judging_once_in_bfloat16_is_the_same_run_to_rounding() -> None:
    """Gradients from real images and from generated ones are added in float32 then, not in bfloat16."""
    config = _config(GanConfig(), precision="bf16")
    once, twice = make_trainer(config), _judging_twice(config)
    for step in range(3):
        with _judging_of(once) as passes:
            logs, expected = once.run_step(step), twice.run_step(step)
        assert len(passes) == 2
        for part in ("generator", "discriminator"):
            for name in (f"{part}/loss", f"{part}/gradient_norm"):
                torch.testing.assert_close(logs[name], expected[name], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize(
    ("objective", "network"),
    [
        (GanConfig(instance_noise=0.1), SMALL_DCGAN),
        (GanConfig(augmentation=("translation",)), SMALL_DCGAN),
        (GanConfig(), replace(SMALL_DCGAN, spectral_norm=True)),
        (GanConfig(), SMALL_SNGAN),
        (GanConfig(), UNMIXED_DCGAN),
    ],
    ids=["noise", "augmentation", "spectral norm", "residual", "no batch statistics"],
)
def test_what_the_discriminator_would_see_otherwise_or_at_once_is_judged_in_both_turns(
    objective: GanConfig, network: NetworkConfig
) -> None:
    trainer = make_trainer(_config(objective, network))
    game = trainer.objective
    assert isinstance(game, Adversarial) and not game.can_judge_once
    with _judging_of(trainer) as passes:
        trainer.run_step(0)
    assert sum(passes) == 3 * 24


@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"compile": True}, {"precision": "fp16"}], ids=str)
def test_graphs_are_not_handed_on_where_others_have_the_gradients(changes: dict[str, Any]) -> None:
    """Graphs of all micro-batches would stay in memory, compiled ones end with their phase, scaled ones mix scales."""
    phases = [turn.phase for turn in make_trainer(_config(GanConfig(), **changes))._turns.values()]
    assert not any(phase.hands_on_graphs for phase in phases)


def test_the_generator_phase_hands_on_no_graph_unless_told_that_it_may() -> None:
    trainer = make_trainer(_config(GanConfig()))
    handed_on: list[Any] = []
    generator = trainer._turns["generator"].phase
    forward = generator.forward

    def watched(batch: Any) -> Any:
        result = forward(batch)
        handed_on.append(result.handed_on)
        return result

    with mock.patch.object(generator, "forward", watched):
        trainer.run_step(0)
        generator.hands_on_graphs = False
        trainer.run_step(1)
    assert handed_on[0][JUDGED].requires_grad and not handed_on[0]["generated"].requires_grad
    assert set(handed_on[1]) == {"generated"}


@pytest.mark.parametrize("frozen", ["inputs", "weight"])
@pytest.mark.parametrize("function", [_Halving, _Doubling, pytest.param(_OneDnnLinear, marks=needs_onednn_linear)])
def test_what_is_frozen_after_the_forward_pass_costs_no_gradient(function: Any, frozen: str) -> None:
    """torch's own layers leave such gradients out; nothing else tells functions of ours."""
    shapes = {
        _Halving: ((2, 3, 8, 8), (8, 3, 4, 4), (8,)),
        _Doubling: ((2, 8, 4, 4), (8, 3, 4, 4), (3,)),
        _OneDnnLinear: ((2, 3), (4, 3), (4,)),
    }[function]
    leaves = inputs, weight, bias = [torch.randn(shape, requires_grad=True) for shape in shapes]
    result = function.apply(*leaves)
    for leaf in [inputs] if frozen == "inputs" else [weight, bias]:
        leaf.requires_grad_(False)
    gradients = result.grad_fn.apply(torch.ones_like(result))
    assert [gradient is not None for gradient in gradients] == [leaf.requires_grad for leaf in leaves]
