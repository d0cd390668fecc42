"""A run says in one block what it runs on, what it trains, and how to resume it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gen_dist.pictures.gallery import Gallery
from gen_dist.training.opening import opening_lines
from gen_dist.training.run import train
from tests.support.runs import make_trainer, small_config, small_dataset


def _block(objective: str, path: str = "runs/a", **changes: object) -> str:
    config = replace(small_config(objective), **changes)  # type: ignore[arg-type]
    with contextlib.closing(make_trainer(config)) as trainer:
        return "\n".join(opening_lines(trainer, Path(path)))


@pytest.mark.parametrize("objective", ["vae", "gan", "vae-gan", "autoencoder"])
def test_the_block_names_each_network_with_its_size(objective: str) -> None:
    with contextlib.closing(make_trainer(small_config(objective))) as trainer:
        block = "\n".join(opening_lines(trainer, Path("run")))
        for name, network in trainer.objective.networks.items():
            size = sum(parameter.numel() for parameter in network.parameters())
            assert f"{name} of {size:,} parameters" in block


def test_the_block_has_device_images_and_epochs() -> None:
    config = small_config("vae")
    images = len(small_dataset(config).train.images)
    block = _block("vae", steps=1000)
    threads = torch.get_num_threads()
    assert "CPU in float32" in block and f"1 with {threads} thread" in block
    assert f"{images:,} of {config.data} to train on" in block
    epochs = 1000 * config.global_batch_size / images
    assert f"1,000 steps of {config.global_batch_size} images, {epochs:.3g} epochs" in block


def test_thousands_of_epochs_are_written_out() -> None:
    config = small_config("vae")
    images = len(small_dataset(config).train.images)
    steps = 7_654 * images // config.global_batch_size
    epochs = steps * config.global_batch_size / images
    assert f", {epochs:,.0f} epochs" in _block("vae", steps=steps)


@pytest.mark.parametrize(
    ("variables", "is_told"),
    [
        ({"OMP_NUM_THREADS": "77"}, True),
        ({"OMP_NUM_THREADS": "77", "GEN_DIST_THREADS": "1"}, False),
        ({"OMP_NUM_THREADS": "77", "TORCHELASTIC_RUN_ID": "a"}, False),
        ({"OMP_NUM_THREADS": "77", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}, False),
        ({"OMP_NUM_THREADS": "as many"}, False),
        ({"OMP_NUM_THREADS": "77", "GEN_DIST_THREADS": ""}, True),
        *(({"OMP_NUM_THREADS": value}, False) for value in ("4,2", "0", "1000000", "7" * 5000)),
        ({}, False),
    ],
)
def test_threads_that_are_not_followed_are_told(
    variables: dict[str, str], is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name in ("OMP_NUM_THREADS", "GEN_DIST_THREADS", "TORCHELASTIC_RUN_ID") or name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("as many", str(torch.get_num_threads())))
    block = _block("vae")
    assert ("is not followed" in block) == is_told
    assert ("OMP_NUM_THREADS=77 is not followed, GEN_DIST_THREADS=77 would be" in block) == is_told


def test_the_block_says_how_to_resume_without_losing_the_run() -> None:
    assert "runs/a b; the same command, without --fresh, resumes it" in _block("vae", "runs/a b")


def test_half_precision_is_named() -> None:
    assert "CPU in bfloat16" in _block("vae", precision="bf16")


def test_a_run_shows_its_block_once_and_a_finished_one_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for drawn in ("at_step", "at_end"):
        monkeypatch.setattr(Gallery, drawn, lambda *_: {})  # pictures take seconds
    lines: list[str] = []
    config = small_config("vae", steps=2, run_dir=str(tmp_path / "run"))
    train(config, say=lines.append)
    assert [line for line in lines if line.startswith("  directory")] == [
        f"  directory  {tmp_path / 'run'}; the same command, without --fresh, resumes it from its newest checkpoint"
    ]
    lines.clear()
    train(config, say=lines.append)
    assert not [line for line in lines if line.startswith("  ")]
