"""Scheduled values: by half a cosine wave over images, tensors in recorded steps, and the same in resumed runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gen_dist.config import GanConfig, OptimizerConfig, R3ganConfig, ScheduleConfig, TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.presets import get_preset
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.testing.tape import ComparingRecorder, device_noise_on_cpu
from gen_dist.training.cuda_graphs import RecordedSteps
from gen_dist.training.optimizers import LightAdam
from gen_dist.training.schedule import Schedule, learning_rate_at, logged_at
from gen_dist.training.trainer import Trainer
from tests.support.runs import all_tensors, assert_same_bits, make_trainer, run_steps, small_config

ALL = ScheduleConfig(
    schedule_images=200,
    final_learning_rate=1e-4,
    final_beta2=0.99,
    final_ema_images=100,
    final_penalty_weight=0.01,
    final_instance_noise=0.0,
    final_ada_probability=0.6,
)


def scheduled_config(**changes: Any) -> TrainConfig:
    objective = R3ganConfig(penalty_weight=0.5, instance_noise=0.4, ada=("blit", "colour"), ada_probability=0.1)
    optimization = OptimizerConfig(betas=(0.0, 0.9), epsilon=1e-3, discriminator_rate_factor=2.0)
    config = small_config("gan", objective=objective, optimization=optimization, learning_rate=5e-4, steps=20)
    return replace(config, schedule=ALL, **changes)


def cosine(first: float, final: float, step: int) -> float:
    """`cosine_decay_with_warmup` of the code of Huang et al. 2024, for 24 images a step and 200 in all."""
    decay = 0.5 * (1 + np.cos(np.pi * min(24 * step / 200, 1.0)))
    return float(first + (1 - decay) * (final - first))


def test_values_are_those_of_the_published_schedule() -> None:
    config = scheduled_config()
    schedule = Schedule(config, torch.device("cpu"), in_tensors=False)
    for step in (0, 1, 4, 8, 9, 19):
        schedule.at(step)
        assert schedule.learning_rate == pytest.approx(cosine(5e-4, 1e-4, step))
        assert schedule.beta2 == pytest.approx(cosine(0.9, 0.99, step))
        half_life = cosine(0.0, 100.0, step)
        assert schedule.newest_weight == pytest.approx(1 - 0.5 ** (24 / max(half_life, 1e-8)))
        found = {name: value.item() for name, value in schedule.of_objective.items()}
        wanted = {"penalty_weight": cosine(0.5, 0.01, step), "instance_noise": cosine(0.4, 0.0, step)}
        wanted["ada_probability"] = cosine(0.1, 0.6, step)
        assert found == pytest.approx(wanted)
        assert logged_at(config, step) == pytest.approx(
            {"learning_rate": cosine(5e-4, 1e-4, step), "beta2": cosine(0.9, 0.99, step), **wanted}
        )
    whole_run = replace(config, schedule=replace(ALL, schedule_images=None))
    schedule = Schedule(whole_run, torch.device("cpu"), in_tensors=False)
    schedule.at(10)
    assert schedule.beta2 == pytest.approx(0.945)


def test_a_scheduled_rate_per_image_is_multiplied_by_the_batch() -> None:
    config = scheduled_config()
    per_image = replace(config, optimization=replace(config.optimization, rate_per_image=True))
    for step in (0, 4, 19):
        assert learning_rate_at(per_image, step) == pytest.approx(24 * cosine(5e-4, 1e-4, step))


def test_a_run_without_schedules_has_only_its_learning_rate() -> None:
    config = small_config("gan")
    schedule = Schedule(config, torch.device("cpu"), in_tensors=True)
    schedule.at(3)
    assert schedule.beta2 is None and not schedule.of_objective
    assert list(logged_at(config, 3)) == ["learning_rate"]


def trained(config: TrainConfig, steps: int, *, recorder: Any = None, in_tensors: bool = False) -> Trainer:
    trainer = make_trainer(config)
    trainer._schedule = Schedule(config, torch.device("cpu"), in_tensors=in_tensors)
    if recorder is not None:
        trainer._recorded = RecordedSteps(lambda: recorder)
    run_steps(trainer, 0, steps)
    return trainer


def test_a_recorded_step_has_the_scheduled_values_of_its_step() -> None:
    config = scheduled_config()
    with device_noise_on_cpu():
        recorded = trained(config, 8, recorder=ComparingRecorder(), in_tensors=True)
        launched = trained(config, 8, in_tensors=True)
        numbers = trained(config, 8)
    assert_same_bits(all_tensors(recorded), all_tensors(launched))
    others = all_tensors(numbers)
    for name, value in all_tensors(launched).items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_resumed_run_has_the_values_and_bits_of_one_that_was_not_stopped() -> None:
    config = scheduled_config()
    whole = trained(config, 4)
    tensors = {group: {name: one.clone() for name, one in named.items()} for group, named in whole.tensors().items()}
    losses = run_steps(whole, 4, 8)
    resumed = make_trainer(config)
    facts = {"data_digest": resumed.dataset.digest, "loss_scales": resumed.loss_scales()}
    resumed.load(Checkpoint(4, tensors, facts))
    assert run_steps(resumed, 4, 8) == losses
    assert_same_bits(all_tensors(resumed), all_tensors(whole))


@pytest.mark.slow
def test_compiled_steps_with_schedules_equal_eager_ones_and_compile_once() -> None:
    config = scheduled_config()
    wanted = run_steps(make_trainer(config), 0, 6)
    compiled = make_trainer(replace(config, compile=True))
    found = run_steps(compiled, 0, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        found += run_steps(compiled, 2, 6)
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("constant", [1.0, 3.0])
def test_scheduled_penalties_noise_and_probabilities_reach_the_loss(constant: float) -> None:
    """A schedule from a value to itself is that value, and another value is another loss."""
    objective = GanConfig(penalty_weight=1.0, instance_noise=0.3, ada=("geometric",), ada_probability=0.5)
    plain = run_steps(make_trainer(small_config("gan", objective=objective)), 0, 2)
    schedule = ScheduleConfig(
        schedule_images=1, final_penalty_weight=constant, final_instance_noise=0.3, final_ada_probability=0.5
    )
    changed = run_steps(make_trainer(small_config("gan", objective=objective, schedule=schedule)), 0, 2)
    assert changed[:2] == pytest.approx(plain[:2], rel=1e-6)  # the first step has the first values
    assert (changed[2:] == pytest.approx(plain[2:], rel=1e-6)) == (constant == 1.0)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_with_a_tensor_equals_the_fused_kernel(decoupled: bool) -> None:
    weights: list[list[Tensor]] = []
    for in_tensors in (False, True):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(3))]
        options = {"weight_decay": 0.1, "eps": 1e-8, "decoupled_weight_decay": decoupled}
        optimizer = LightAdam(parameters, lr=1e-2, betas=(0.3, 0.9), **options)
        for step in range(6):
            for parameter in parameters[: 1 if step == 2 else 2]:
                parameter.grad = torch.randn_like(parameter)
            beta2 = 0.9 + 0.01 * step
            group = optimizer.param_groups[0]
            group["betas"] = (0.3, torch.tensor(beta2) if in_tensors else beta2)
            group["lr"] = torch.tensor(1e-2) if in_tensors else 1e-2
            optimizer.update()
        weights.append([parameter.detach() for parameter in parameters])
    for number, tensor in zip(*weights, strict=True):
        torch.testing.assert_close(tensor, number, rtol=1e-4, atol=1e-5)


def test_schedules_of_what_a_run_does_not_have_are_refused() -> None:
    preset = get_preset("r3gan-mnist").with_options(final_instance_noise=None)
    for options, told in (
        ({"final_learning_rate": 1e-5}, "with decay linear, which ends at 0; add --decay constant"),
        ({"final_beta2": 1.0}, "final_beta2 1.0 is not in"),
        ({"final_ema_images": 1000}, "in place of ema_decay 0.999; add --ema-decay None"),
        ({"final_ada_probability": 0.3}, "objective r3gan has none; add --ada-probability"),
        ({"schedule_images": 1000}, "without a value to schedule; add one"),
        ({"final_beta2": 0.99, "optimizer": "sgd"}, "needs adam or adamw, not sgd"),
    ):
        with pytest.raises(ConfigError, match=told):
            preset.with_options(**options)
    with pytest.raises(ConfigError, match="objective vae has none; add --penalty-weight"):
        get_preset("vae-mnist").with_options(final_penalty_weight=0.1)
    with pytest.raises(ConfigError, match="objective gan has none"):
        get_preset("dcgan-mnist").with_options(final_penalty_weight=0.1)
    with pytest.raises(
        ConfigError, match=r"gan has none; add --instance-noise, or leave it out \(--final-instance-noise None"
    ):
        get_preset("gan-mnist").with_options(instance_noise=0.0, final_instance_noise=0.1)
    changed = preset.with_options(final_beta2=0.999, schedule_images=5000)
    assert TrainConfig.from_json(changed.to_json(), "config") == changed
    assert math.isclose(changed.schedule.beta2(changed.optimization, 1.0) or 0.0, 0.999)
