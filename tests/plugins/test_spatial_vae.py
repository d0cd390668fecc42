"""Latents with places, [C, h, w], by a user's network: everything that vectors have."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gen_dist.config import AutoencoderConfig, GanConfig, ObjectiveConfig, TrainConfig, VaeConfig, VaeGanConfig
from gen_dist.data import open_dataset
from gen_dist.errors import ConfigError, UserError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.inference.encoding import encode
from gen_dist.inference.export import export
from gen_dist.inference.latent_files import FileFormat
from gen_dist.inference.latent_walks import MOST_DIRECTIONS, great_circles, principal_directions
from gen_dist.inference.loading import load
from gen_dist.inference.model import GenerativeModel
from gen_dist.kernels import reparameterize_kl
from gen_dist.objectives import Batch, vae
from gen_dist.randomness import Stream
from gen_dist.records.checkpoint import load_newest
from gen_dist.reports import comparison_picture
from gen_dist.reports.page import report_html
from gen_dist.reports.run_record import read_run
from gen_dist.testing.objectives import (
    OBJECTIVE_CHECKS,
    SLOW_OBJECTIVE_CHECKS,
    check_a_recorded_step_equals_a_launched_one,
    check_micro_batches_equal_the_batch,
)
from gen_dist.testing.report import Check, raise_failures, run_checks
from gen_dist.testing.trial import ObjectiveTrial
from gen_dist.training.run import train
from tests.support.runs import (
    SMALL_MLP,
    assert_same_bits,
    make_trainer,
    run_steps,
    small_config,
)

SHAPE = (2, 7, 7)


def _silent(_line: str) -> None:
    pass


@pytest.fixture
def config(spatial_vae: ModuleType, tmp_path: Path) -> TrainConfig:
    network = spatial_vae.SpatialConfig(feature_maps=(4, 4, 8), latent_dim=2)
    return small_config("vae", network=network, run_dir=str(tmp_path / "run"), steps=8, checkpoint_every=4)


@pytest.fixture(scope="module")
def trained(spatial_vae: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spatial") / "run"
    network = spatial_vae.SpatialConfig(feature_maps=(4, 4, 8), latent_dim=2)
    train(small_config("vae", network=network, run_dir=str(path), steps=8, checkpoint_every=4), say=_silent)
    return path


@pytest.fixture
def model(trained: Path) -> GenerativeModel:
    return load(trained, announce=_silent)


def test_spatial_latents_resume_bit_equal(config: TrainConfig, trained: Path) -> None:
    half = dataclasses.replace(config, optimization=dataclasses.replace(config.optimization))
    train(half, say=_silent)
    newest = max((Path(config.run_path) / "checkpoints").glob("step_*"))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    (config.run_path / "summary.json").unlink()
    train(half, say=_silent)
    found, expected = (load_newest(path, _silent) for path in (config.run_path, trained))
    assert found is not None and expected is not None and found[0].step == expected[0].step == 8
    for group, tensors in expected[0].tensors.items():
        assert_same_bits(dict(found[0].tensors[group]), dict(tensors))


def test_spatial_latents_have_one_shape_everywhere(model: GenerativeModel) -> None:
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    mean, logvar = model.encode(images)
    assert logvar is not None and mean.shape == logvar.shape == (3, *SHAPE)
    assert model.prior_latents(5).shape == (5, *SHAPE)
    assert torch.equal(model.prior_latents(5)[2:], model.prior_latents(3, first_row=2))
    assert model.sample(4).shape == model.reconstruct(images[:1].repeat(4, 1, 1, 1)).shape == (4, 1, 28, 28)
    with pytest.raises(UserError, match=r"latents are \[3, 98\]; the model takes \[N, 2, 7, 7\]"):
        model.decode(mean.flatten(1))


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
def test_spatial_latents_of_a_set_keep_their_places(
    file_format: FileFormat, model: GenerativeModel, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = encode(trained, tmp_path / "out", split="test", file_format=file_format, announce=_silent)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(out)
    found: dict[str, Any] = {}
    exec(code, found)
    images = open_dataset("synthetic", ".", model.config.packing, _silent).test.images[:]
    np.testing.assert_allclose(found["mean"], model.encode(torch.from_numpy(images))[0], rtol=1e-5, atol=1e-6)
    assert len(json.loads((out / "encoding.json").read_text())["statistics"]["std"]) == SHAPE[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_kernel_takes_spatial_parameters_as_they_are(
    layout: torch.memory_format, model: GenerativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = model.objective.to(memory_format=layout)
    taken: list[Tensor] = []
    given: list[Tensor] = []
    kernel = reparameterize_kl

    def watched(parameters: Tensor, *words: Any, **named: Any) -> tuple[Tensor, Tensor]:
        taken.append(parameters)
        return kernel(parameters, *words, **named)

    monkeypatch.setattr(vae, "reparameterize_kl", watched)
    objective.networks["encoder"].register_forward_hook(lambda _module, _inputs, output: given.append(output))
    decoded: list[Tensor] = []
    objective.networks["decoder"].register_forward_pre_hook(lambda _module, inputs: decoded.append(inputs[0]))
    assert isinstance(objective, vae.Vae)
    batch = Batch(
        torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8),
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([0, 0]),
        0,
    )
    objective.log_weights(objective.targets(batch, Stream.LATENTS), batch, Stream.LATENTS, 2)
    (latents,) = decoded
    assert taken[0].data_ptr() == given[0].data_ptr() and taken[0].stride() == given[0].stride()
    assert taken[0].is_contiguous(memory_format=layout) and latents.is_contiguous(memory_format=layout)


QUICK = (Check(check_micro_batches_equal_the_batch), Check(check_a_recorded_step_equals_a_launched_one))


@pytest.mark.parametrize(
    "checks",
    [
        QUICK,
        pytest.param((*OBJECTIVE_CHECKS, *SLOW_OBJECTIVE_CHECKS), marks=pytest.mark.slow),
    ],
)
def test_spatial_latents_pass_the_checks_of_objectives(checks: tuple[Check, ...], config: TrainConfig) -> None:
    raise_failures(run_checks("spatial", checks, ObjectiveTrial(config.objective, config.network, (1, 8, 8))))


ROLES: dict[str, tuple[ObjectiveConfig, tuple[str, ...]]] = {
    "autoencoder": (AutoencoderConfig(), ("encoder", "decoder")),
    "iwae, path gradient": (VaeConfig(importance_samples=3, gradient="path"), ("encoder", "decoder")),
    "conditional gan": (GanConfig(conditioning="concat"), ("generator",)),
    "vae-gan": (VaeGanConfig(), ("encoder", "generator")),
}
"""Objectives, and the roles whose network has spatial latents."""


@pytest.mark.parametrize("name", ROLES)
def test_every_objective_trains_on_spatial_latents(name: str, config: TrainConfig) -> None:
    objective, roles = ROLES[name]
    own = dict.fromkeys(roles, config.network)
    trainer = make_trainer(dataclasses.replace(config, network=SMALL_MLP, objective=objective, **own))  # type: ignore[arg-type]
    assert trainer.objective.latent_shape == SHAPE
    assert all(np.isfinite(run_steps(trainer, 0, 3)))


def test_a_spatial_run_is_evaluated_and_reported_on(trained: Path) -> None:
    found = evaluate(trained, samples=20, nll_samples=3, nll_images=4, announce=_silent)
    assert np.isfinite(found.metrics["nll_k3_4"]) and found.metrics["active_units"] in range(99)
    assert "latent_scatter" in {path.stem for path in trained.glob("*.png")}
    assert "walks along the principal directions" in report_html([read_run(trained)], [None], None)


@pytest.mark.parametrize("form", ["safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_spatial_model_is_exported_with_its_shape(form: Any, trained: Path, tmp_path: Path) -> None:
    out = export(trained, form, tmp_path / "out", announce=_silent)
    assert "2, 7, 7" in (out / "README.md").read_text()


def test_walks_between_latents_keep_their_shape(model: GenerativeModel) -> None:
    ends = model.prior_latents(6).numpy()
    walks = great_circles(ends[::2], ends[1::2], 4)
    assert walks.shape == (12, *SHAPE)
    assert np.allclose(walks[::4], ends[::2], atol=1e-5) and np.allclose(walks[3::4], ends[1::2], atol=1e-5)
    mosaic = comparison_picture._walks(model)
    assert mosaic.shape[0] > comparison_picture.WALKS * 28 and mosaic.max() > 0


def test_images_that_cannot_be_halved_are_refused(config: TrainConfig, spatial_vae: ModuleType) -> None:
    network = spatial_vae.SpatialConfig(feature_maps=(4, 4, 4, 4))
    with pytest.raises(ConfigError, match="images of 28 x 28 cannot be halved 3 times"):
        make_trainer(dataclasses.replace(config, network=network))


def test_directions_of_many_latents_equal_those_of_their_covariance() -> None:
    points = np.random.default_rng(0).normal(size=(40, MOST_DIRECTIONS + 8)) * np.linspace(3, 0.1, MOST_DIRECTIONS + 8)
    _, directions, deviations, shares = principal_directions(points)
    covariance = np.cov(points.T)
    variances = np.linalg.eigvalsh(covariance)[::-1][:39]
    assert np.allclose(deviations[:39] ** 2, variances, rtol=1e-6)
    assert np.allclose(covariance @ directions[0], variances[0] * directions[0], atol=1e-6)
    assert shares.sum() == pytest.approx(1.0)
