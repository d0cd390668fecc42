"""Models of vectors and signals, through every door that models of images have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gen_dist
from gen_dist.commands import compare, report, sample
from gen_dist.config import GanConfig, MlpConfig, R3ganConfig, TrainConfig, VaeConfig, WganGpConfig
from gen_dist.errors import ConfigError, UserError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.inference.encoding import encode
from gen_dist.inference.export import export
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.run_paths import RunPaths
from tests.support.runs import assert_same_bits

TIMES = np.linspace(0.0, 2.0 * np.pi, 48)
DRAWS = np.random.default_rng(0).uniform(0.5, 1.5, (160, 2))
SIGNALS = (DRAWS[:, :1, None] * np.stack([np.sin(TIMES), np.cos(TIMES)])[None] * 300.0 - 1000.0).astype(np.float32)
VECTORS = (DRAWS[:, :1] * np.array([10.0, -3.0, 500.0]) + DRAWS[:, 1:]).astype(np.float32)
LABELS = (DRAWS[:, 0] > 1.0).astype(int)
DATA: dict[str, tuple[Any, dict[str, Any]]] = {
    "vectors": (VECTORS, {"range_per_channel": True}),
    "signals": (SIGNALS, {"array_of": "signals"}),
}


def config_of(path: Path, name: str, **changes: Any) -> TrainConfig:
    usual = {
        "objective": VaeConfig(likelihood="gaussian"),
        "network": MlpConfig(hidden_sizes=(24,), latent_dim=3),
        "steps": 8,
        "global_batch_size": 32,
        "learning_rate": 1e-2,
        "run_dir": str(path / "run"),
        "cache_dir": str(path / "cache"),
        "log_every": 1,
        **dict.fromkeys(("checkpoint_every", "sample_every", "evaluate_every"), 4),
    }
    return gen_dist.preset("vae-mnist").with_options(**{**usual, **DATA[name][1], **changes})


def trained(path: Path, name: str, data: Any = None, **changes: Any) -> gen_dist.Outcome:
    lines: list[str] = []
    found = gen_dist.train(
        config_of(path, name, **changes), data=DATA[name][0] if data is None else data, say=lines.append
    )
    assert any(line.lstrip().startswith(f"{name} ") for line in lines), lines
    return found


@pytest.mark.parametrize("name", DATA)
def test_a_model_gives_shapes_and_units_of_its_data_back(tmp_path: Path, name: str) -> None:
    values = DATA[name][0]
    outcome = trained(tmp_path, name, steps=200, sample_every=200, evaluate_every=200, checkpoint_every=200)
    model = gen_dist.load(outcome.run_path)
    rows = torch.from_numpy(values[:20])
    given = model.reconstruct(rows)
    assert given.shape == rows.shape and given.dtype == torch.float32
    spread = (rows - rows.mean(0)).abs().mean(0).clamp(min=1.0)
    assert float(((given - rows).abs().mean(0) / spread).mean()) < 0.6  # in units, and better than the mean
    drawn = model.sample(5)
    assert drawn.shape[1:] == rows.shape[1:]
    assert float(drawn.min()) >= values.min() - 1e-2 and float(drawn.max()) <= values.max() + 1e-2
    assert model.encode(rows)[0].shape == (20, 3)
    assert model.decode(model.encode(rows)[0]).shape == rows.shape
    with pytest.raises(UserError, match=rf"{name} are float32 .*; the model takes float32 \[N, "):
        model.encode(rows[:, :1])
    again = gen_dist.load(export(outcome.run_path, "safetensors", announce=lambda _line: None))
    assert torch.equal(again.reconstruct(rows), given) and torch.equal(again.sample(5), drawn)


@pytest.mark.parametrize("name", ["vectors", pytest.param("signals", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path, name: str) -> None:
    whole = trained(tmp_path / "whole", name)
    cut = trained(tmp_path / "cut", name)
    shutil.rmtree(RunPaths(cut.run_path).checkpoint(8))
    config = config_of(tmp_path / "cut", name, data=f"array:{_digest(whole.run_path)}")
    resumed = gen_dist.train(config, say=lambda _line: None)  # without the data, which the cache has
    first, second = (checkpoints.load_newest(one.run_path, print) for one in (whole, resumed))
    assert first and second
    assert_same_bits(dict(first[0].tensors["networks"]), dict(second[0].tensors["networks"]))


def _digest(run: Path) -> str:
    return str(json.loads((run / "config.json").read_text())["data"]).removeprefix("array:")


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("vectors", GanConfig(conditioning="concat")),
        ("signals", R3ganConfig(conditioning="projection")),
        pytest.param("signals", GanConfig(instance_noise=0.1, penalty_weight=1.0), marks=pytest.mark.slow),
        pytest.param("vectors", WganGpConfig(generator_every=2), marks=pytest.mark.slow),
        pytest.param("signals", VaeConfig(likelihood="bernoulli", conditioning="concat"), marks=pytest.mark.slow),
        pytest.param("vectors", VaeConfig(likelihood="laplace", importance_samples=2), marks=pytest.mark.slow),
    ],
)
def test_gans_and_vaes_take_vectors_and_signals(tmp_path: Path, name: str, objective: Any) -> None:
    outcome = trained(tmp_path, name, (DATA[name][0], LABELS), objective=objective)
    model = gen_dist.load(outcome.run_path)
    assert model.sample(6).shape[1:] == DATA[name][0].shape[1:]
    assert all(path.exists() for path in outcome.pictures.values())
    sample(outcome.run_path, count=6, out=tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.mode == "RGB"


@pytest.mark.parametrize("name", DATA)
def test_an_evaluation_leaves_metrics_of_images_out(tmp_path: Path, name: str) -> None:
    outcome = trained(tmp_path, name)
    found = evaluate(outcome.run_path, samples=40, nll_samples=20, nll_images=10, announce=lambda _line: None)
    told = [name.partition("_")[0] for name in found.unavailable]
    assert {"fid", "kid", "ssim", "sharpness", "rfid", "perceptual", "path"} <= set(told), found.unavailable
    assert all(
        "it is of images, and the data are" in found.unavailable[one] for one in found.unavailable if "ssim" in one
    )
    assert {"psnr", "nll_k20_10", "diversity_40", "negative_elbo"} <= set(found.metrics)
    assert all(np.isfinite(value).all() for value in found.metrics.values())
    with pytest.raises(UserError, match=f"features inception are of images, and the data are {name} of"):
        evaluate(outcome.run_path, ["fid"], features="inception", announce=lambda _line: None)
    with pytest.raises(UserError, match=f"reference mnist5k: samples are compared as images, and the data are {name}"):
        evaluate(outcome.run_path, reference="mnist5k", announce=lambda _line: None)


@pytest.mark.parametrize("name", [pytest.param("vectors", marks=pytest.mark.slow), "signals"])
def test_reports_comparisons_and_latents_take_them(tmp_path: Path, name: str) -> None:
    values = DATA[name][0]
    outcomes = [
        trained(tmp_path / kind, name, objective=objective)
        for kind, objective in (("vae", VaeConfig(likelihood="gaussian")), ("gan", GanConfig()))
    ]
    runs = tuple(outcome.run_path for outcome in outcomes)
    report(runs[:1], evaluate=False, step_times=False)
    assert f"{name} of {' x '.join(map(str, values.shape[1:]))}" in (runs[0] / "report.html").read_text()
    compare(runs, out=tmp_path / "compared", evaluate=False)
    assert (tmp_path / "compared" / "compare.png").exists()
    np.save(tmp_path / "more.npy", values[:30])
    for data in (None, f"array:{tmp_path / 'more.npy'}"):
        out = tmp_path / f"latents-{data is None}"
        encode(runs[0], out, data=data, file_format="npz", announce=lambda _line: None)
        with np.load(out / "train.npz") as latents:
            assert latents["mean"].shape == (144 if data is None else 27, 3)
            errors = latents["squared_error"]
            assert errors.shape == latents["row"].shape and np.isfinite(errors).all()


@pytest.mark.slow
def test_programs_take_and_give_units_and_own_shapes(tmp_path: Path) -> None:
    for name, (values, _) in DATA.items():
        outcome = trained(tmp_path / name, name)
        path = export(outcome.run_path, "torch-export", announce=lambda _line: None)
        model = gen_dist.load(outcome.run_path)
        rows = torch.from_numpy(values[:5])
        encoder, decoder = (torch.export.load(path / f"{part}.pt2").module() for part in ("encoder", "decoder"))
        mean, _ = encoder(rows)
        assert torch.allclose(mean, model.encode(rows)[0], rtol=1e-3, atol=1e-4)
        assert torch.allclose(decoder(mean), model.images(mean), rtol=1e-4, atol=1e-2)
        card = (path / "README.md").read_text()
        assert f"`{name}` float32 [N, {', '.join(map(str, values.shape[1:]))}]" in card
        code = card.split("```python\n")[1].split("```")[0]
        assert f"{name} = torch.zeros(64, " in code


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"network": "conv"}, "encoder conv takes images, and the data are vectors; use --network mlp"),
        ({"objective": GanConfig(), "network": "dcgan"}, "generator dcgan takes images"),
        ({"objective": GanConfig(), "discriminator": "conv"}, "discriminator conv takes images"),
        ({"objective": GanConfig(augmentation=("colour",))}, "augmentation colour is for images"),
        ({"objective": GanConfig(ada=("blit", "colour"))}, "ada blit colour is for images"),
        ({"augment": ("flip",)}, "augment is for images, and the data are vectors; leave it out"),
    ],
)
def test_what_is_for_images_is_refused_for_vectors(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        trained(tmp_path, "vectors", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_the_card_s_code_of_plain_weights_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = trained(tmp_path, "signals")
    path = export(outcome.run_path, "safetensors", announce=lambda _line: None)
    code = (path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["images"].shape == (64, 2, 1, 48)
