"""Memory of evaluation, encoding and use: passes hold so many bytes, whatever the number and the size of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gen_dist
from gen_dist.config import AutoencoderKlConfig, DataConfig
from gen_dist.evaluation.context import ROWS_PER_BLOCK
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.inference import latent_rows
from gen_dist.inference.encoding import encode
from gen_dist.inference.model import IMAGES_PER_CHUNK, GenerativeModel
from gen_dist.objectives import build_objective, evaluating
from gen_dist.objectives.evaluating import largest_tensor, rows_per_pass
from gen_dist.training.run import train
from tests.support.runs import make_trainer, small_config

SIDE, IMAGES = 64, 12
CHANNELS: Final = 3
WIDEST = 8 * SIDE * SIDE * 4
"""Bytes of the widest map of an image: eight channels at the full size."""


def _config(run: Path) -> gen_dist.TrainConfig:
    config = small_config("latent autoencoder, fsq", steps=1, evaluate_every=1, sample_every=1, run_dir=str(run))
    network = AutoencoderKlConfig(feature_maps=(4, 8), latent_dim=2, blocks=1, groups=2, middle_attention=False)
    packing = DataConfig(synthetic_images=IMAGES, image_size=SIDE, channels=CHANNELS)
    return replace(config, network=network, packing=packing, global_batch_size=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    train(_config(path), say=_silent)
    return path


@pytest.fixture
def two_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "MOST_BYTES", 2 * WIDEST)
    monkeypatch.setattr(evaluating, "SMALL_PASS", 2 * CHANNELS * SIDE * SIDE)
    monkeypatch.setattr("gen_dist.inference.model.SMALL_PASS", 2 * CHANNELS * SIDE * SIDE)
    monkeypatch.setattr(latent_rows, "_MOST_BYTES", 2 * WIDEST)


@contextmanager
def _passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of the maps that convolutions give meanwhile."""
    found: list[int] = []
    forward = nn.Conv2d.forward

    def counted(layer: nn.Conv2d, maps: Tensor) -> Tensor:
        result = forward(layer, maps)
        found.append(result.numel() * result.element_size())
        return result

    with monkeypatch.context() as patched:
        patched.setattr(nn.Conv2d, "forward", counted)
        yield found


def _silent(_line: str) -> None:
    pass


def test_the_largest_tensor_of_a_pass_is_measured(run: Path) -> None:
    model = gen_dist.load(run, announce=_silent)
    images = torch.zeros(3, CHANNELS, SIDE, SIDE, dtype=torch.uint8)
    assert largest_tensor(lambda: model.reconstruct(images[:1])) == WIDEST
    assert largest_tensor(lambda: model.reconstruct(images)) == 3 * WIDEST


def test_a_pass_has_as_many_images_as_fit() -> None:
    row = lambda: torch.zeros(2**24, device="meta")  # noqa: E731
    assert rows_per_pass(250, 3 * 256**2, row) == evaluating.MOST_BYTES // 2**26
    assert rows_per_pass(250, 3 * 4096**2, lambda: torch.zeros(2**27, device="meta")) == 1
    assert rows_per_pass(2, 3 * 256**2, row) == 2
    assert rows_per_pass(1000, 28 * 28, lambda: pytest.fail("a small image is measured")) == 1000


@pytest.mark.slow
def test_the_published_presets_pass_in_bounded_memory() -> None:
    """Without memory or arithmetic: the network has shapes alone, as have its results."""
    config = gen_dist.preset("kl-f8").with_options(perceptual_weight=0.0)
    with FakeTensorMode():
        objective = build_objective(config, (3, 256, 256), 1)
        images = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
        found = largest_tensor(lambda: objective.decode(objective.encode(images)[0]))
    assert found == 256 * 256**2 * 4  # 256 channels at the full size, behind the last enlargement
    assert (evaluating.MOST_BYTES // found, latent_rows._MOST_BYTES // found) == (4, 1)


@pytest.mark.usefixtures("two_in_a_pass")
def test_no_use_of_a_model_passes_more_images_than_fit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses: dict[str, Callable[[], object]] = {
        "evaluate": lambda: evaluate(run, ["psnr", "codebook_usage"], announce=_silent),
        "encode": lambda: encode(run, tmp_path / "latents", split="test", announce=_silent),
        "reconstruct": lambda: gen_dist.load(run).reconstruct(torch.zeros(9, CHANNELS, SIDE, SIDE).byte()),
    }
    trainer = make_trainer(_config(tmp_path / "other"))
    uses["test of a training"] = lambda: trainer.evaluate(trainer.dataset.test)
    for name, use in uses.items():
        with _passes(monkeypatch) as found:
            use()
        assert WIDEST // 2 <= max(found) <= 2 * WIDEST, name


@pytest.mark.usefixtures("two_in_a_pass")
def test_only_images_of_one_pass_are_float32(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = gen_dist.load(run, announce=_silent), []
    pixels = model.objective.pixels

    def counted(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return pixels(images)

    monkeypatch.setattr(model.objective, "pixels", counted)
    assert len(model.reconstruct(torch.zeros(9, CHANNELS, SIDE, SIDE).byte())) == 9
    assert max(sizes) <= 2


def test_small_passes_change_no_figure(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    names = ["psnr", "reconstruction_error", "codebook_perplexity", "latent_std"]
    (run / "evaluation.json").unlink(missing_ok=True)
    whole = evaluate(run, names, announce=_silent).metrics
    encode(run, tmp_path / "whole", announce=_silent, file_format="npz", split="test")
    (run / "evaluation.json").unlink()
    assert whole.keys() == set(names)
    request.getfixturevalue("two_in_a_pass")
    parts = evaluate(run, names, announce=_silent).metrics
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-6), name
    encode(run, tmp_path / "parts", announce=_silent, file_format="npz", split="test")
    one, other = (np.load(tmp_path / name / "test.npz") for name in ("whole", "parts"))
    for name in [name for name in one if one[name].dtype.kind in "fi"]:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_sizes_of_small_images_stay(run: Path) -> None:
    model = gen_dist.load(run, announce=_silent)
    digits = GenerativeModel(model.objective, model.config, (1, 28, 28), ())
    assert digits._rows_of(model.objective.decode, [torch.zeros(1000, 2, 7, 7)]) == IMAGES_PER_CHUNK
    assert ROWS_PER_BLOCK * 28 * 28 <= evaluating.SMALL_PASS
