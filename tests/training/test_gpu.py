"""Tests that need a GPU: equal bits when repeated, resumed or mapped, and the same run as on the CPU."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.inference.loading import load
from gen_dist.objectives import Batch, TurnResult
from gen_dist.objectives.vae import MaximizeElbo
from gen_dist.parallel.gradients import FlatReduction
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.training.run import train
from tests.support.runs import (
    OBJECTIVES,
    UNLIKE_THE_REST,
    all_tensors,
    assert_same_bits,
    make_trainer,
    run_steps,
    small_config,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]


def _quiet(_line: str) -> None:
    pass


def _config(objective: str, **changes: object) -> TrainConfig:
    return small_config(objective, **{"device": "cuda", "precision": "float32", **changes})


def _losses(config: TrainConfig) -> list[float]:
    return run_steps(make_trainer(config), 0, config.steps)


def _assert_recorded_steps_are_the_steps(config: TrainConfig) -> None:
    recorded, launched = make_trainer(config), make_trainer(dataclasses.replace(config, cuda_graphs=False))
    assert run_steps(recorded, 0, config.steps) == run_steps(launched, 0, config.steps)
    assert_same_bits(all_tensors(recorded), all_tensors(launched))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_gives_the_same_bits_each_time_compiled_or_not(objective: str) -> None:
    config = _config(objective, steps=10)
    assert _losses(config) == _losses(config)
    compiled = dataclasses.replace(config, compile=True)
    assert _losses(compiled) == pytest.approx(_losses(config), rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_recorded_steps_have_the_bits_of_launched_ones(objective: str, precision: str) -> None:
    _assert_recorded_steps_are_the_steps(_config(objective, steps=16, precision=precision))


@pytest.mark.parametrize("changes", UNLIKE_THE_REST, ids=str)
def test_whatever_else_a_step_does_is_recorded(changes: dict[str, object]) -> None:
    _assert_recorded_steps_are_the_steps(_config("gan", steps=8, **changes))


def test_a_loaded_state_is_recorded_anew() -> None:
    config = _config("vae", steps=20)
    trainer = make_trainer(config)
    run_steps(trainer, 0, 6)
    facts = {"data_digest": trainer.dataset.digest, "loss_scales": trainer.loss_scales()}
    saved = {group: {k: v.clone() for k, v in named.items()} for group, named in trainer.tensors().items()}
    losses = run_steps(trainer, 6, 12)
    trainer.load(checkpoints.Checkpoint(6, saved, facts))
    assert run_steps(trainer, 6, 12) == losses


def test_a_step_that_waits_for_its_results_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MaximizeElbo.forward

    def waiting(self: MaximizeElbo, batch: Batch) -> TurnResult:
        result = forward(self, batch)
        assert result.loss.item() > 0
        return result

    monkeypatch.setattr(MaximizeElbo, "forward", waiting)
    stream = torch.cuda.current_stream()
    with pytest.raises(ConfigError, match="--no-cuda-graphs"):
        _losses(_config("vae", steps=4))
    assert torch.cuda.current_stream() == stream
    # Stream and generator still work: the same process trains without recordings.
    assert torch.randn(3, device="cuda").isfinite().all()
    assert len(_losses(_config("vae", steps=4, cuda_graphs=False))) == 4


@pytest.mark.parametrize("objective", ["vae", "vae, convolutional", "autoencoder"])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_resumed_run_ends_with_the_same_bits(objective: str, precision: str, tmp_path: Path) -> None:
    config = _config(objective, steps=8, checkpoint_every=4, precision=precision, run_dir=str(tmp_path / "run"))
    train(config, say=_quiet)
    whole, _ = checkpoints.load(checkpoint_paths(tmp_path / "run")[0])
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
    train(config, say=_quiet)
    resumed, _ = checkpoints.load(checkpoint_paths(tmp_path / "run")[0])
    assert resumed.step == whole.step == 8
    for group in whole.tensors:
        assert_same_bits(dict(resumed.tensors[group]), dict(whole.tensors[group]))


def test_mapped_batches_are_the_resident_ones() -> None:
    config = _config("vae", steps=10)
    mapped = dataclasses.replace(config, packing=dataclasses.replace(config.packing, resident_budget_mib=0))
    assert _losses(mapped) == _losses(config)


def test_deterministic_losses_are_those_of_the_cpu() -> None:
    """An autoencoder draws no noise. Noise differs between kinds of devices."""
    config = _config("autoencoder", steps=5)
    assert _losses(config) == pytest.approx(_losses(dataclasses.replace(config, device="cpu")), rel=1e-4)


def test_samples_of_one_seed_are_the_same_on_every_device(tmp_path: Path) -> None:
    train(_config("vae", steps=4, run_dir=str(tmp_path / "run")), say=_quiet)
    on_cpu, on_gpu = (load(tmp_path / "run", device=device).sample(16) for device in ("cpu", "cuda"))
    assert (on_cpu.int() - on_gpu.cpu().int()).abs().max() <= 1  # rounding of intensities


@pytest.fixture
def nccl_group(tmp_path: Path) -> Iterator[None]:
    """An NCCL group of this one process."""
    store = (tmp_path / "rendezvous").as_uri()
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("nccl_group")
@pytest.mark.parametrize("objective", ["vae", "gan", "dcgan"])
def test_steps_with_nccl_are_recorded_with_the_same_bits(objective: str) -> None:
    """Buckets are sent during backward, inside the graph; with one rank the sums are the gradients themselves."""
    config = _config(objective, steps=10, sync_batch_norm=objective == "dcgan")
    alone = make_trainer(config)

    def flat(parameters: list[nn.Parameter], *_: object, **__: object) -> FlatReduction:
        return FlatReduction(parameters, 1000)

    with mock.patch("gen_dist.training.turn.choose_reduction", flat):
        recorded, launched = make_trainer(config), make_trainer(dataclasses.replace(config, cuda_graphs=False))
    assert recorded._recorded is not None
    wanted = run_steps(alone, 0, config.steps)
    for trainer in (recorded, launched):
        assert max(len(turn._reduction._buckets) for turn in trainer._turns.values()) > 1  # type: ignore[attr-defined]
        assert run_steps(trainer, 0, config.steps) == wanted
        assert_same_bits(all_tensors(trainer), all_tensors(alone))
