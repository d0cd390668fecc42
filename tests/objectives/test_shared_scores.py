"""Scoring generated images once a step gives the same results as scoring them in each turn."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
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
from gen_dist.objectives.shared_scores import FAKE_SCORES, SharedScoresGan
from gen_dist.parallel.gradients import Reduction
from gen_dist.parallel.processes import Processes
from gen_dist.training.trainer import Trainer
from tests.support.flops import TorchsCount
from tests.support.runs import SMALL_DCGAN, SMALL_SNGAN, UNMIXED_DCGAN, make_trainer, small_config, small_dataset

needs_onednn_linear = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN linear operator"
)
# With few channels on the large side, gradients of the first layer are products; those of the others are torch's.
NETWORK = DcganConfig(feature_maps=8, latent_dim=5)


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Select the convolutions of a processor on which some are products."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")


def _config(objective: GanConfig, network: NetworkConfig = NETWORK, **changes: Any) -> TrainConfig:
    return replace(small_config("dcgan"), objective=objective, network=network, **changes)


@contextmanager
def _scored_images(trainer: Trainer) -> Iterator[list[int]]:
    """Numbers of images in each pass of the discriminator."""
    passes: list[int] = []
    discriminator = trainer.objective.networks["discriminator"]
    handle = discriminator.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    try:
        yield passes
    finally:
        handle.remove()


def _scoring_twice(config: TrainConfig) -> Trainer:
    trainer = make_trainer(config)
    trainer.objective.carries_graphs = False
    return trainer


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _assert_same_state(once: Trainer, twice: Trainer) -> None:
    """Assert equal weights, averages and moments.

    Running statistics of the discriminator count two passes a step, not three; nothing reads them.
    """
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
def test_scoring_once_is_the_same_run_bit_for_bit(objective: GanConfig) -> None:
    once, twice = make_trainer(_config(objective)), _scoring_twice(_config(objective))
    for step in range(6):
        with _scored_images(once) as fewer, _scored_images(twice) as more:
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


def test_scoring_once_in_bfloat16_gives_equal_gradients() -> None:
    """Gradients of real and generated images are added in float32 then, not in bfloat16."""
    config = _config(GanConfig(), precision="bf16")
    once, twice = make_trainer(config), _scoring_twice(config)
    with _scored_images(once) as passes:
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
def test_scoring_once_saves_one_forward_pass_exactly(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    config = _config(GanConfig())
    config = replace(config, packing=replace(config.packing, channels=3))
    once, twice = make_trainer(config), _scoring_twice(config)
    flops = []
    for trainer in (once, twice):
        with TorchsCount() as count:
            trainer.run_step(0)
        flops.append(count.flops)
    gan = once.objective
    assert isinstance(gan, SharedScoresGan)
    with TorchsCount() as count, torch.no_grad():
        gan.scores(torch.zeros(24, *once.dataset.image_shape), torch.zeros(24, dtype=torch.int64))
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
def test_images_that_change_between_turns_are_scored_twice(objective: GanConfig, network: NetworkConfig) -> None:
    trainer = make_trainer(_config(objective, network))
    assert isinstance(trainer.objective, SharedScoresGan) and not trainer.objective.scores_are_shared()
    with _scored_images(trainer) as passes:
        trainer.run_step(0)
    assert sum(passes) == 3 * 24


@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"compile": True}, {"precision": "fp16"}], ids=str)
def test_accumulated_compiled_or_scaled_turns_carry_no_graph(changes: dict[str, Any]) -> None:
    assert not _carries_graphs(make_trainer(_config(GanConfig(), **changes)))


@pytest.mark.parametrize("rows", [24, 25], ids=["even", "uneven"])
def test_processes_with_equal_rows_carry_graphs(rows: int) -> None:
    """With batch normalization over processes, gradients cross processes before ranks are weighted."""
    config = _config(GanConfig(), global_batch_size=rows)
    two = Processes(0, 0, 2, torch.device("cpu"))

    def choose(parameters: Sequence[torch.nn.Parameter], *_: object, **__: object) -> Reduction:
        return Reduction(parameters)

    # There is no second process: nothing to copy from, and nothing to reduce.
    alone = mock.patch("gen_dist.training.trainer.copy_from_main")
    with alone, mock.patch("gen_dist.training.turn.choose_reduction", choose):
        trainer = Trainer(config, small_dataset(config), two)
    assert _carries_graphs(trainer) == (rows == 24)


def _carries_graphs(trainer: Trainer) -> bool:
    return trainer.objective.carries_graphs


def test_the_generator_carries_a_graph_only_if_allowed() -> None:
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
        trainer.objective.carries_graphs = False
        trainer.run_step(1)
    assert carried[0][FAKE_SCORES].requires_grad and not carried[0]["generated"].requires_grad
    assert set(carried[1]) == {"generated"}


CASES: dict[Any, tuple[list[tuple[int, ...]], Any]] = {
    _Halving: ([(2, 3, 8, 8), (8, 3, 4, 4), (8,)], functools.partial(F.conv2d, stride=2, padding=1)),
    _Doubling: ([(2, 8, 4, 4), (8, 3, 4, 4), (3,)], functools.partial(F.conv_transpose2d, stride=2, padding=1)),
    _OneDnnLinear: ([(2, 3), (4, 3), (4,)], F.linear),
}
"""Shapes of inputs, weight and bias, and torch's function, by our function."""
each_function = pytest.mark.parametrize(
    "function", [_Halving, _Doubling, pytest.param(_OneDnnLinear, marks=needs_onednn_linear)]
)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2)], ids=["inputs", "weight", "bias", "weight and bias"])
@pytest.mark.parametrize("when", ["before", "after"])
@each_function
def test_frozen_inputs_of_a_layer_have_no_gradient(function: Any, when: str, frozen: tuple[int, ...]) -> None:
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
def test_a_function_transform_has_the_gradient_of_a_bias(function: Any) -> None:
    inputs, weight, (count,) = CASES[function][0]
    others = torch.randn(inputs), torch.randn(weight)
    found = torch.func.grad(lambda bias: function.apply(*others, bias).sum())(torch.randn(count))
    outputs = function.apply(*others, torch.zeros(count))
    assert found.tolist() == [outputs.numel() / count] * count
