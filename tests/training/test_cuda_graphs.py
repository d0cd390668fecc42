"""Recorded steps, on a tape that ignores values outside tensors, as a CUDA graph does."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch

from gen_dist.config import DcganConfig, TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.testing.tape import TapeRecorder, device_noise_on_cpu
from gen_dist.training.cuda_graphs import WARM_UP_STEPS, RecordedSteps, Recorder
from gen_dist.training.schedule import Schedule
from gen_dist.training.trainer import Trainer
from tests.support.fused_norm import normalize_as_on_gpus
from tests.support.runs import (
    UNLIKE_THE_REST,
    all_tensors,
    assert_same_bits,
    make_trainer,
    run_steps,
    small_config,
)

T = TypeVar("T")
STEPS = 16  # the rarest kind of step is every sixth: enough to record it, and to replay it at least once


@pytest.fixture(autouse=True)
def _device_noise() -> Iterator[None]:
    with device_noise_on_cpu():
        yield


def _trainer(config: TrainConfig, recorder: Recorder | None = None) -> Trainer:
    """Make a trainer as on a GPU: the scheduled values of a step are tensors, and steps are recorded."""
    trainer = make_trainer(config)
    trainer._schedule = Schedule(config, torch.device("cpu"), in_tensors=True)
    trainer._recorded = RecordedSteps(lambda: recorder) if recorder else None
    return trainer


class _Counting(TapeRecorder):
    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        result, replay = super().record(work)
        self.recorded += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return result, counted


def _assert_the_same(config: TrainConfig, steps: int = STEPS) -> _Counting:
    """Assert that recorded and direct steps have the same losses and final state, bit for bit."""
    plain, recorder = _trainer(config), _Counting()
    recording = _trainer(config, recorder)
    assert run_steps(recording, 0, steps) == run_steps(plain, 0, steps)
    assert_same_bits(all_tensors(recording), all_tensors(plain))
    return recorder


@pytest.mark.parametrize("changes", UNLIKE_THE_REST, ids=str)
def test_whatever_else_a_step_does(changes: dict[str, object]) -> None:
    _assert_the_same(small_config("gan", steps=STEPS, **changes), steps=6)


def test_kinds_of_steps_have_recordings_of_their_own() -> None:
    config = small_config("wgan-gp, lazy", steps=24)
    assert _assert_the_same(config, steps=24).recorded == 4  # with the generator or without, penalized or not


@pytest.mark.slow
def test_noise_of_layers_is_drawn_anew_in_recordings() -> None:
    config = small_config("stylegan2, lazy, projection", steps=STEPS)
    assert _assert_the_same(config, steps=10).recorded == 2  # penalized or not


def test_fused_group_normalization_is_recorded_with_its_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    called = normalize_as_on_gpus(monkeypatch)
    network = DcganConfig(feature_maps=4, latent_dim=5, generator_norm="group", discriminator_norm="group")
    _assert_the_same(small_config("r3gan", network=network, steps=6), steps=6)
    assert called


def test_a_loaded_state_is_recorded_anew() -> None:
    """Loading replaces the optimizer's tensors: an old recording would keep using the old ones."""
    config = small_config("vae", steps=STEPS)
    whole, recorder = _trainer(config), _Counting()
    losses = run_steps(whole, 0, 4)
    facts = {"data_digest": whole.dataset.digest, "loss_scales": whole.loss_scales()}
    saved = {group: {k: v.clone() for k, v in named.items()} for group, named in whole.tensors().items()}
    losses += run_steps(whole, 4, 10)
    again = _trainer(config, recorder)
    run_steps(again, 0, 9)
    again.load(Checkpoint(4, saved, facts))
    assert run_steps(again, 4, 10) == losses[4:]
    assert recorder.recorded == 2
    assert_same_bits(all_tensors(again), all_tensors(whole))


def test_logs_outlive_the_next_step() -> None:
    trainer = _trainer(small_config("gan"), TapeRecorder())
    logs = [trainer.run_step(step) for step in range(5)]
    values = [{name: value.clone() for name, value in log.items()} for log in logs]
    trainer.run_step(5)
    for log, kept in zip(logs, values, strict=True):
        assert_same_bits(log, kept)
    assert list(logs[0]) == list(logs[4])


def test_a_stopwatch_sees_the_parts_of_a_step() -> None:
    recorder = _Counting()
    trainer = _trainer(small_config("vae"), recorder)
    run_steps(trainer, 0, 4)
    parts: list[str] = []
    trainer.run_step(4, parts.append)
    assert parts == ["data", "vae/forward", "vae/backward", "vae/optimizer", "moving average"]
    assert recorder.replayed == 2


def test_a_step_that_cannot_be_recorded_is_an_error() -> None:
    class Refusing(TapeRecorder):
        def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    trainer = _trainer(small_config("vae"), Refusing())
    run_steps(trainer, 0, WARM_UP_STEPS)
    with pytest.raises(ConfigError, match=r"when stream is capturing; use --no-cuda-graphs$"):
        trainer.run_step(WARM_UP_STEPS)


def test_a_lack_of_memory_in_a_recording_is_one_of_the_step() -> None:
    class Lacking(TapeRecorder):
        def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    trainer = _trainer(small_config("vae"), Lacking())
    run_steps(trainer, 0, WARM_UP_STEPS)
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        trainer.try_step(WARM_UP_STEPS)


def test_a_tape_ignores_host_values_as_a_graph_does() -> None:
    """So the tests above would detect a host value that changes from step to step."""
    config = small_config("vae", steps=STEPS)
    trainers = _trainer(config, TapeRecorder()), _trainer(config)
    for trainer in trainers:
        trainer._schedule = Schedule(config, torch.device("cpu"), in_tensors=False)
    taped, plain = (run_steps(trainer, 0, 8) for trainer in trainers)
    # The first step after the recording has the recorded learning rate. Its loss is computed before the update.
    same = WARM_UP_STEPS + 2
    assert taped[:same] == plain[:same]
    assert all(ours != theirs for ours, theirs in zip(taped[same:], plain[same:], strict=True))


def test_the_cpu_records_nothing() -> None:
    assert make_trainer(small_config("vae"))._recorded is None


@pytest.mark.parametrize("wait", ["nonzero", "masked_select", "item"])
def test_a_tape_refuses_what_a_graph_does(wait: str) -> None:
    values = torch.arange(3.0)
    waits: dict[str, Callable[[], object]] = {
        "nonzero": values.nonzero,
        "masked_select": lambda: values.masked_select(values > 1),
        "item": lambda: values[1].item(),
    }
    with pytest.raises(AssertionError, match="the host"):
        TapeRecorder().record(waits[wait])
