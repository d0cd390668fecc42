"""Generated images are judged once a step where both turns can use it: the same as where each turn judges them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from gen_dist.config import DcganConfig, GanConfig, NetworkConfig, TrainConfig
from gen_dist.kernels.convolution import _Doubling, _Halving
from gen_dist.kernels.linear import _OneDnnLinear
from gen_dist.objectives.gan import FAKE_SCORES, Gan
from gen_dist.parallel.processes import Processes
from gen_dist.training.trainer import Trainer
from tests.support.flops import TorchsCount
from tests.support.runs import SMALL_DCGAN, SMALL_SNGAN, UNMIXED_DCGAN, make_trainer, small_config, small_dataset

needs_onednn_linear = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN linear operator"
)
# Few channels on the large side of its first layer, whose gradients are products then; the others are torch's own.
NETWORK = DcganConfig(feature_maps=8, latent_dim=5)


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions as on a processor where some are products."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")


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
    trainer._turns["generator"].phase.carries_graphs = False
    return trainer


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _assert_same_state(once: Trainer, twice: Trainer) -> None:
    """Weights, their averages and moments. The discriminator's own statistics see two passes a step, not three; nothing
    reads them."""
    for group, tensors in twice.tensors().items():
        for name, value in tensors.items():
            if not (name.startswith("discriminator") and name.endswith(STATISTICS)):
                assert torch.equal(once.tensors()[group][name], value), (group, name)


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
        _assert_same_state(once, twice)
    parameters = list(once.objective.networks.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)


def test_judging_once_in_bfloat16_finds_the_same_gradients_to_rounding() -> None:
    """Those of real images and of generated ones are added in float32 then, not in bfloat16."""
    config = _config(GanConfig(), precision="bf16")
    once, twice = make_trainer(config), _judging_twice(config)
    with _judging_of(once) as passes:
        once.run_step(0)
    twice.run_step(0)
    assert len(passes) == 2
    moments = [trainer.tensors() for trainer in (once, twice)]
    for player in ("generator", "discriminator"):
        found, expected = (
            torch.cat(
                [value.flatten() for name, value in tensors[f"optimizer-{player}"].items() if name.endswith(":exp_avg")]
            )
            for tensors in moments
        )
        assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"], ids=["layers of ours", "torch's layers"])
def test_a_pass_forward_is_all_that_it_saves_and_no_gradient_is_computed_for_nobody(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    config = _config(GanConfig())
    config = replace(config, packing=replace(config.packing, channels=3))
    once, twice = make_trainer(config), _judging_twice(config)
    flops = []
    for trainer in (once, twice):
        with TorchsCount() as count:
            trainer.run_step(0)
        flops.append(count.flops)
    game = once.objective
    assert isinstance(game, Gan)
    with TorchsCount() as count, torch.no_grad():
        game.scores(torch.zeros(24, *once.dataset.image_shape), torch.zeros(24, dtype=torch.int64))
    assert flops[1] - flops[0] == count.flops > 0


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
    assert isinstance(game, Gan) and not game.images_can_be_judged_once()
    with _judging_of(trainer) as passes:
        trainer.run_step(0)
    assert sum(passes) == 3 * 24


@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"compile": True}, {"precision": "fp16"}], ids=str)
def test_no_graph_is_handed_on_in_parts_to_be_compiled_or_scaled(changes: dict[str, Any]) -> None:
    assert not _may_hand_on_graphs(make_trainer(_config(GanConfig(), **changes)))


@pytest.mark.parametrize("rows", [24, 25], ids=["even", "uneven"])
@pytest.mark.parametrize("common", [True, False], ids=["weights in common", "DistributedDataParallel"])
def test_of_two_processes_those_with_weights_in_common_and_as_many_images_hand_graphs_on(
    rows: int, common: bool
) -> None:
    """An image's gradient goes over all processes where batch normalization does, and so before any share weighs it."""
    config = _config(GanConfig(), global_batch_size=rows)
    two = Processes(0, 0, 2, torch.device("cpu"))
    with (
        mock.patch("gen_dist.training.turn.weights_in_common", return_value=mock.MagicMock() if common else None),
        mock.patch("gen_dist.training.turn.averaging_gradients", side_effect=lambda phase, _processes: phase),
        mock.patch("gen_dist.training.turn.build_optimizer"),
    ):
        trainer = Trainer(config, small_dataset(config), two)
    assert _may_hand_on_graphs(trainer) == (common and rows == 24)


def _may_hand_on_graphs(trainer: Trainer) -> bool:
    (may,) = {turn.phase.carries_graphs for turn in trainer._turns.values()}
    return may


def test_the_generator_phase_hands_on_no_graph_unless_told_that_it_may() -> None:
    trainer = make_trainer(_config(GanConfig()))
    carried: list[Any] = []
    generator = trainer._turns["generator"].phase
    forward = generator.forward

    def watched(batch: Any) -> Any:
        result = forward(batch)
        carried.append(result.carried)
        return result

    with mock.patch.object(generator, "forward", watched):
        trainer.run_step(0)
        generator.carries_graphs = False
        trainer.run_step(1)
    assert carried[0][FAKE_SCORES].requires_grad and not carried[0]["generated"].requires_grad
    assert set(carried[1]) == {"generated"}


CASES: dict[Any, tuple[list[tuple[int, ...]], Any]] = {
    _Halving: ([(2, 3, 8, 8), (8, 3, 4, 4), (8,)], functools.partial(F.conv2d, stride=2, padding=1)),
    _Doubling: ([(2, 8, 4, 4), (8, 3, 4, 4), (3,)], functools.partial(F.conv_transpose2d, stride=2, padding=1)),
    _OneDnnLinear: ([(2, 3), (4, 3), (4,)], F.linear),
}
"""Shapes of inputs, weight and bias, and torch's own function."""
each_function = pytest.mark.parametrize(
    "function", [_Halving, _Doubling, pytest.param(_OneDnnLinear, marks=needs_onednn_linear)]
)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2)], ids=["inputs", "weight", "bias", "weight and bias"])
@pytest.mark.parametrize("when", ["before", "after"])
@each_function
def test_what_is_frozen_before_or_after_the_forward_pass_has_no_gradient_and_all_else_has_torchs(
    function: Any, when: str, frozen: tuple[int, ...]
) -> None:
    shapes, torchs = CASES[function]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = torch.autograd.grad(torchs(*leaves).sum(), leaves)

    def freeze() -> None:
        for index in frozen:
            leaves[index].requires_grad_(False)

    if when == "before":
        freeze()
    result = function.apply(*leaves)
    if when == "after":
        freeze()
    gradients = result.grad_fn.apply(torch.ones_like(result))
    for index, (found, reference) in enumerate(zip(gradients, expected, strict=True)):
        assert (found is None) == (index in frozen)
        if found is not None:
            torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)


@each_function
def test_a_function_transform_has_the_gradient_of_a_bias_alone(function: Any) -> None:
    inputs, weight, (count,) = CASES[function][0]
    others = torch.randn(inputs), torch.randn(weight)
    found = torch.func.grad(lambda bias: function.apply(*others, bias).sum())(torch.randn(count))
    outputs = function.apply(*others, torch.zeros(count))
    assert found.tolist() == [outputs.numel() / count] * count
