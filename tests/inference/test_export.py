"""Exported networks compute the outputs of the model, and come with instructions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import gen_dist
from gen_dist import commands
from gen_dist.config import AutoencoderKlConfig, MlpConfig, ResnetConfig, Stylegan2Config, TrainConfig
from gen_dist.errors import CheckpointError, ConfigError, UserError
from gen_dist.inference.export import _Exported, _program, export
from gen_dist.inference.exported import SUFFIXES, Format
from gen_dist.inference.hub_metadata import HUB_DATASETS
from gen_dist.inference.model_card import Part, Port
from gen_dist.presets import get_preset, presets
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.reading import read_object, write_object
from gen_dist.training.run import train
from tests.conftest import REPOSITORY
from tests.support.runs import OBJECTIVES, brief_preset, each_of, small_config

PROGRAMS: tuple[Format, ...] = ("onnx", "torch-export")
TOLERANCE = {"onnx": 1e-5, "torch-export": 1e-6}
"""Relative tolerance, and absolute tolerance for intensities in 0..1."""
UNSQUASHED_TOLERANCE = {"onnx": 1e-5, "torch-export": 3e-6}
"""Those of decoders that end without the sigmoid or tanh whose slope makes rounding errors smaller."""
QUICK = frozenset({"autoencoder", "vae, convolutional", "conditional dcgan", "r3gan"})
"""One of each kind of network, and models that encode, decode or both. `make test-all` has the others."""


def _silent(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function from the name of an objective to a finished run of it."""
    parent = tmp_path_factory.mktemp("runs")

    def run_of(objective: str) -> Path:
        path = parent / str(list(OBJECTIVES).index(objective))
        if not path.exists():
            train(small_config(objective, steps=4, checkpoint_every=2, run_dir=str(path)), say=_silent)
        return path

    return run_of


@pytest.fixture(scope="module")
def exports(runs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Format], Path]:
    """Function from the name of an objective and a format to an export of its run."""
    parent = tmp_path_factory.mktemp("exports")

    def export_of(objective: str, form: Format) -> Path:
        path = parent / f"{list(OBJECTIVES).index(objective)}-{form}"
        return path if path.exists() else export(runs(objective), form, path, announce=_silent)

    return export_of


def _functions(directory: Path, form: str) -> dict[str, Callable[..., list[Tensor]]]:
    """Functions of the files of an export, by name of the part."""
    return {path.stem: _function(path, form) for path in directory.glob(f"*.{SUFFIXES[form]}")}  # type: ignore[index]


def _function(path: Path, form: str) -> Callable[..., list[Tensor]]:
    if form == "torch-export":
        program = torch.export.load(path).module()

        def run_program(*inputs: Tensor) -> list[Tensor]:
            outputs = program(*inputs)
            return [outputs] if isinstance(outputs, Tensor) else list(outputs)

        return run_program
    session = onnxruntime.InferenceSession(path)
    names = [port.name for port in session.get_inputs()]

    def run_session(*inputs: Tensor) -> list[Tensor]:
        values = [each.numpy() for each in inputs]
        return [torch.from_numpy(output) for output in session.run(None, dict(zip(names, values, strict=True)))]

    return run_session


def _assert_equal_to_the_model(run: Path, form: Format, exported: Path, tolerance: float) -> None:
    model, computed = gen_dist.load(run), _functions(exported, form)
    assert computed.keys() == ({"decoder", "encoder"} if model.objective.encodes else {"decoder"})
    agree = {"rtol": tolerance, "atol": tolerance}
    for count in (1, 3, 7):
        latents = model.prior_latents(count, seed=count)
        labels = (torch.arange(count) % model.classes,) if model.conditional else ()
        expected = model.objective.pixels(model.decode(latents, *labels))
        (images,) = computed["decoder"](latents, *labels)
        torch.testing.assert_close(images, expected, **agree)  # type: ignore[arg-type]
        if "encoder" in computed:
            pictures = torch.randint(0, 256, (count, *model.image_shape), dtype=torch.uint8)
            posterior = [each for each in model.encode(pictures) if each is not None]
            torch.testing.assert_close(computed["encoder"](pictures / 255), posterior, **agree)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", PROGRAMS)
@each_of(OBJECTIVES, left_out=OBJECTIVES.keys() - QUICK)
def test_programs_compute_what_the_model_computes(
    objective: str, form: Format, runs: Callable[[str], Path], exports: Callable[[str, Format], Path]
) -> None:
    unsquashed = objective.startswith(("latent autoencoder", "stylegan2"))
    tolerance = (UNSQUASHED_TOLERANCE if unsquashed else TOLERANCE)[form]
    _assert_equal_to_the_model(runs(objective), form, exports(objective, form), tolerance)


def _run_of_preset(preset: str, path: Path) -> Path:
    config = replace(brief_preset(preset), run_dir=str(path))
    train(config, say=_silent)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets())
def test_every_preset_exports_at_its_full_size(preset: str, tmp_path: Path) -> None:
    run = _run_of_preset(preset, tmp_path / "run")
    for form in PROGRAMS:
        # On CPUs, eager code uses another memory layout, which rounds differently: by up to 2e-6 in deep networks.
        deep = isinstance(get_preset(preset).network, ResnetConfig | AutoencoderKlConfig | Stylegan2Config)
        tolerance = 1e-5 if deep else TOLERANCE[form]
        _assert_equal_to_the_model(run, form, export(run, form, announce=_silent), tolerance)
    _assert_weights_give_the_same_bits(run, export(run, "safetensors", announce=_silent))


def _code_of(directory: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def _run_code_of(directory: Path) -> dict[str, Any]:
    """Variables after running the code of a card in its directory."""
    variables: dict[str, Any] = {}
    with contextlib.chdir(directory):
        exec(_code_of(directory), variables)
    return variables


def _assert_weights_give_the_same_bits(run: Path, exported: Path) -> None:
    model, loaded = gen_dist.load(run), _run_code_of(exported)["model"]
    latents = model.prior_latents(7)
    labels = (torch.arange(7) % model.classes,) if model.conditional else ()
    assert torch.equal(loaded.decode(latents, *labels), model.decode(latents, *labels))
    if model.objective.encodes:
        pictures = torch.randint(0, 256, (7, *model.image_shape), dtype=torch.uint8)
        for one, expected in zip(loaded.encode(pictures), model.encode(pictures), strict=True):
            assert (one is None) == (expected is None)
            assert one is None or expected is None or torch.equal(one, expected)


@each_of(OBJECTIVES, left_out=OBJECTIVES.keys() - QUICK)
def test_weights_loaded_as_the_card_says_give_the_same_bits(
    objective: str, runs: Callable[[str], Path], exports: Callable[[str, Format], Path]
) -> None:
    _assert_weights_give_the_same_bits(runs(objective), exports(objective, "safetensors"))


@each_of(OBJECTIVES, left_out=OBJECTIVES.keys() - QUICK)
def test_load_of_an_export_gives_the_bits_of_its_run(
    objective: str, runs: Callable[[str], Path], exports: Callable[[str, Format], Path]
) -> None:
    model, loaded = gen_dist.load(runs(objective)), gen_dist.load(exports(objective, "safetensors"))
    assert (loaded.image_shape, loaded.class_names) == (model.image_shape, model.class_names)
    if model.objective.generates:
        assert torch.equal(loaded.sample(7, seed=3), model.sample(7, seed=3))
    if model.objective.encodes:
        pictures = torch.randint(0, 256, (7, *model.image_shape), dtype=torch.uint8)
        assert torch.equal(loaded.reconstruct(pictures), model.reconstruct(pictures))


def test_exports_that_load_cannot_use_are_one_line(
    runs: Callable[[str], Path], exports: Callable[[str, Format], Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"an export for other programs.*--format safetensors"):
        gen_dist.load(exports("conditional dcgan", "torch-export"))
    out = export(runs("vae"), "safetensors", tmp_path / "out", ["decoder"], _silent)
    decoder = gen_dist.load(out)
    assert len(decoder.sample(2)) == 2
    with pytest.raises(UserError, match="does not hold the encoder"):
        decoder.encode(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    weights = out / "decoder.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors is damaged"):
        gen_dist.load(out)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"damaged or changed: its SHA-256 is \w{12}, and README\.md lists \w"):
        gen_dist.load(out)
    (out / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"and card\.md lists"):
        gen_dist.load(out)
    weights.write_bytes(whole)
    (out / "card.md").unlink()
    config = TrainConfig.from_json((out / "config.json").read_text(), "config")
    (out / "config.json").write_text(replace(config, network=MlpConfig(hidden_sizes=(9999,))).to_json())
    with pytest.raises(CheckpointError, match="of other networks than its config"):
        gen_dist.load(out)


def test_a_card_is_what_the_hugging_face_hub_takes(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    run = runs("conditional dcgan")
    monkeypatch.setitem(HUB_DATASETS, gen_dist.load(run).config.data.partition(":")[0], "ylecun/mnist")
    # YAML refuses or reads otherwise what a name may hold.
    hostile = {"a: b # c": 1.5, '"quoted"': 2.5, "no": 3.5, "\x07\uffff\ud83d\ude00": 4.5, "lost": float("nan")}
    write_object(run / "evaluation.json", {"checkpoint_step": 4, "split": "test", "metrics": hostile})
    try:
        out = export(run, "safetensors", tmp_path / "out", announce=_silent)
    finally:
        (run / "evaluation.json").unlink()
    card = hub.ModelCard.load(out / "README.md")
    assert (out / "card.md").read_text() in (out / "README.md").read_text()
    assert (card.data.library_name, card.data.pipeline_tag) == ("gen_dist", "unconditional-image-generation")
    assert {"gen_dist", "safetensors", "dcgan"} <= set(card.data.tags)
    assert card.data.to_dict()["networks"] == {"generator": "dcgan"}
    assert card.data.datasets == ["ylecun/mnist"]
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert list(results.values()) == [1.5, 2.5, 3.5, 4.5]
    assert {"a: b # c", '"quoted"', "no"} < results.keys()
    assert card.data.eval_results[0].dataset_split == "test"
    assert card.text.lstrip().startswith("# ")


@pytest.mark.parametrize("objective", ["autoencoder", "vae, convolutional", "conditional dcgan"])
@pytest.mark.parametrize("form", SUFFIXES)
def test_the_code_of_a_card_runs_as_it_stands(
    objective: str, form: Format, exports: Callable[[str, Format], Path]
) -> None:
    images = _run_code_of(exports(objective, form))["images"]
    assert tuple(images.shape) == (64, 1, 28, 28)
    assert 0 <= images.min() < images.max() <= 1


def test_a_torch_export_loads_where_there_is_no_gen_dist(exports: Callable[[str, Format], Path]) -> None:
    """One new process loads both kinds: a decoder with an encoder, and a decoder that takes labels."""
    both = [exports(objective, "torch-export") for objective in ("vae, convolutional", "conditional dcgan")]
    code = "import os, sys\n"
    for out in both:
        code += f"os.chdir({str(out)!r})\n{_code_of(out)}\nprint(tuple(images.shape))\n"
    code += "print({'gen_dist', 'kernels'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=both[0], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["(64, 1, 28, 28)", "(64, 1, 28, 28)", "set()"], done.stderr


def _stored(path: Path) -> bytes:
    if path.suffix != ".pt2":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize("form", SUFFIXES)
def test_files_hold_neither_the_discriminator_nor_paths(
    form: Format, runs: Callable[[str], Path], exports: Callable[[str, Format], Path]
) -> None:
    run, out = runs("vae-gan"), exports("vae-gan", form)
    for path in out.iterdir():
        stored = _stored(path)
        assert path.suffix == ".json" or b"discriminator" not in stored
        assert str(REPOSITORY).encode() not in stored
        assert str(run.parent).encode() not in stored


def test_exported_weights_are_the_moving_average(
    runs: Callable[[str], Path], exports: Callable[[str, Format], Path]
) -> None:
    run, out = runs("conditional dcgan"), exports("conditional dcgan", "safetensors")
    found = checkpoints.load_newest(run, _silent)
    assert found is not None
    prefix = "generator."
    averaged = {name: value for name, value in found[0].tensors["averaged"].items() if name.startswith(prefix)}
    weights = load_file(out / "decoder.safetensors")
    assert weights.keys() == {name.removeprefix(prefix) for name in averaged}
    assert all(torch.equal(weights[name.removeprefix(prefix)], value) for name, value in averaged.items())
    with safetensors.safe_open(out / "decoder.safetensors", "pt") as file:
        header = file.metadata()
    assert header["checkpoint_step"] == "4"
    assert header["weights"] == "moving average"
    assert json.loads(header["image_shape"]) == [1, 28, 28]
    assert "decay 0.99" in (out / "README.md").read_text()
    assert TrainConfig.from_json((out / "config.json").read_text(), "config") == replace(found[1], run_dir=None)


def test_the_batch_of_an_onnx_file_is_free_and_named(exports: Callable[[str, Format], Path]) -> None:
    session = onnxruntime.InferenceSession(exports("conditional dcgan", "onnx") / "decoder.onnx")
    ports = {port.name: (port.type, port.shape) for port in (*session.get_inputs(), *session.get_outputs())}
    assert ports == {
        "latents": ("tensor(float)", ["N", 5]),
        "labels": ("tensor(int64)", ["N"]),
        "images": ("tensor(float)", ["N", 1, 28, 28]),
    }
    assert session.get_modelmeta().custom_metadata_map["checkpoint_step"] == "4"


def test_a_card_tells_digests_and_the_metrics_of_its_own_step(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs("vae")
    file = run / "evaluation.json"
    evaluation = {"checkpoint_step": 4, "split": "test", "metrics": {"fid_10k": 12.3456, "class_shares": [0.5, 0.5]}}
    try:
        cards = []
        for step in (4, 3):
            file.write_text(json.dumps(evaluation | {"checkpoint_step": step}))
            cards.append((export(run, "safetensors", tmp_path / "out", announce=_silent) / "README.md").read_text())
    finally:
        file.unlink()
    assert "| fid_10k | 12.3456 |" in cards[0]
    assert "fid_10k" not in cards[1]
    assert "| test/negative_elbo (negative ELBO, nats per image) | " in cards[1]
    assert "| test/nll (reconstruction term of the negative ELBO, nats per image) | " in cards[1]
    for path in (tmp_path / "out").iterdir():
        if path.name not in ("README.md", "card.md"):
            assert f"| {hashlib.sha256(path.read_bytes()).hexdigest()} |" in cards[1]
    before = export(checkpoints.checkpoint_paths(run)[1], "safetensors", tmp_path / "before", announce=_silent)
    assert "No metrics are recorded for this step." in (before / "README.md").read_text()


def test_the_command_of_a_card_is_ours_alone(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs("vae")
    file = run / "environment.json"
    environment = read_object(file, {}, "")
    for program, shown in (("/home/one/gen_dist/launch/train.py", True), ("/ray/default_worker.py", False)):
        write_object(file, environment | {"command": [program, "vae-mnist", "--data", "folder:a|b"]})
        card = (export(run, "safetensors", tmp_path / "out", announce=_silent) / "README.md").read_text()
        assert (r"`python -m gen_dist.launch.train vae-mnist --data 'folder:a\|b'`" in card) == shown
        assert "/home/one" not in card and "default_worker" not in card


def test_exporting_again_replaces_only_an_export(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run, out = runs("vae"), tmp_path / "deep/out"
    export(run, "safetensors", out, ["decoder", "encoder"], _silent)
    assert {file.name for file in out.iterdir()} == {
        *("decoder.safetensors", "encoder.safetensors"),
        *("README.md", "card.md", "config.json"),
    }
    export(run, "safetensors", out, ["decoder"], _silent)
    assert {file.name for file in out.iterdir()} == {"decoder.safetensors", "README.md", "card.md", "config.json"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    kept = out / "notes.txt"
    kept.write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt"):
        export(run, "safetensors", out, announce=_silent)
    assert kept.read_text() == "mine"


def test_an_export_made_again_has_the_same_bytes(
    runs: Callable[[str], Path], exports: Callable[[str, Format], Path], tmp_path: Path
) -> None:
    first = exports("conditional dcgan", "safetensors")
    again = export(runs("conditional dcgan"), "safetensors", tmp_path / first.name, announce=_silent)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {
        path.name: path.read_bytes() for path in again.iterdir()
    }


def test_an_export_is_by_default_in_its_runs_directory(runs: Callable[[str], Path]) -> None:
    run = runs("vae")
    assert export(run, "safetensors", announce=_silent) == run / "export-safetensors"
    assert export(checkpoints.checkpoint_paths(run)[0], "safetensors", announce=_silent) == run / "export-safetensors"


def _error_of(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["gen-dist", "export", *words])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    return printed.err


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["none", "--format", "onnx"], "none is not a run"),
        (["{run}", "--format", "pickle"], "--format"),
        (["{run}"], "--format"),
        (["{run}", "--format", "safetensors", "--parts", "encoder"], "has no encoder"),
        (["{run}", "--format", "safetensors", "--out", "/proc/none"], "/proc/none cannot be written"),
        (["{run}", "--format", "safetensors", "--out", "{run}"], "which is not of an export"),
        (["{run}", "--format", "safetensors", "--out", "{run}/config.json"], "cannot be written: Not a directory"),
    ],
)
def test_bad_exports_give_one_line_and_exit_code_2(
    words: list[str],
    mentioned: str,
    runs: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = runs("gan")
    before = sorted(run.iterdir())
    capsys.readouterr()  # of the training
    assert mentioned in _error_of([word.format(run=run) for word in words], monkeypatch, capsys)
    assert sorted(run.iterdir()) == before


def test_a_network_of_a_fixed_number_of_images_is_told() -> None:
    class Fixed(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return latents.view(len(latents), 1, 2, 2)

    part = Part("decoder", "decoder.pt2", "decoder", [Port("latents", "float32", (4,), "latents")], [])
    with pytest.raises(UserError, match=r"the decoder takes the number of images for a constant.*x.shape\[0\]"):
        _program(_Exported(part, Fixed(), Fixed()))


def test_a_run_without_a_checkpoint_is_told_so(
    runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_bytes((runs("gan") / "config.json").read_bytes())
    capsys.readouterr()  # of the training
    assert "has no checkpoint yet" in _error_of([str(tmp_path), "--format", "onnx"], monkeypatch, capsys)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(
    package: str,
    runs: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = runs("gan")
    capsys.readouterr()  # of the training
    monkeypatch.setitem(sys.modules, package, None)
    error = _error_of([str(run), "--format", "onnx"], monkeypatch, capsys)
    assert f"needs the package {package};" in error
    assert "`export`" in error
