"""The door to diffusers: runs loaded by its classes, runs started from its directories, and bad directories."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gen_dist
from gen_dist import commands
from gen_dist.config import LatentAutoencoderConfig, TrainConfig, VaeConfig
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.inference.diffusers_format import latent_scale, read_published
from gen_dist.inference.export import export
from gen_dist.networks.diffusers_layout import from_diffusers, to_diffusers
from gen_dist.records.checkpoint import load_newest
from gen_dist.records.reading import read_config
from gen_dist.reports.run_record import read_run
from gen_dist.training.run import train
from tests.support.diffusers_classes import SMALL, assert_close, diffusers
from tests.support.runs import assert_same_bits, make_trainer, small_config, small_dataset


def _silent(_line: str) -> None:
    pass


def _config(path: Path, **changes: Any) -> TrainConfig:
    base = dataclasses.replace(
        small_config("vae"), objective=LatentAutoencoderConfig(), network=SMALL, run_dir=str(path), steps=4
    )
    return dataclasses.replace(base, checkpoint_every=2, evaluate_every=4, sample_every=4, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    path = tmp_path_factory.mktemp("run") / "run"
    train(_config(path), say=_silent)
    return path


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export."""
    return export(run, "diffusers", tmp_path_factory.mktemp("export") / "vae", announce=_silent)


def test_a_run_is_loaded_by_diffusers_as_it_is(run: Path, exported: Path) -> None:
    theirs = diffusers().AutoencoderKL.from_pretrained(exported).eval()
    model = gen_dist.load(run, announce=_silent)
    images = torch.randint(0, 256, (3, *model.image_shape), dtype=torch.uint8)
    mean, logvar = model.encode(images)
    assert logvar is not None
    with torch.no_grad():
        posterior = theirs.encode(images / 127.5 - 1).latent_dist
        torch.testing.assert_close(posterior.mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, logvar, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.decode(mean).sample, model.decode(mean), rtol=1e-5, atol=1e-5)


def test_the_factor_scales_latents_to_one(run: Path, exported: Path) -> None:
    model = gen_dist.load(run, announce=_silent)
    images = torch.from_numpy(small_dataset(model.config).train.images[:])
    mean, logvar = model.encode(images)
    assert logvar is not None
    numbers = torch.Generator().manual_seed(0)
    draws = [mean + torch.exp(logvar / 2) * torch.randn(mean.shape, generator=numbers) for _ in range(4)]
    factor = json.loads((exported / "config.json").read_text())["scaling_factor"]
    assert float(torch.stack(draws).double().std()) * factor == pytest.approx(1.0, rel=5e-3)
    assert latent_scale(model, small_dataset(model.config).train, _silent).images == len(images)
    card = (exported / "README.md").read_text()
    assert f"standard deviation {1 / factor:.4g} over {len(images):,} training images" in card
    assert "library_name: diffusers" in card and "AutoencoderKL.from_pretrained" in card


def test_an_export_for_diffusers_needs_no_diffusers(exported: Path) -> None:
    files = {"README.md", "card.md", "config.json", "diffusion_pytorch_model.safetensors", "gen_dist.json"}
    assert {file.name for file in exported.iterdir()} == files
    published = read_published(exported)
    assert (
        published.digest == hashlib.sha256((exported / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    )
    assert read_config(exported / "gen_dist.json").network == SMALL


def test_a_run_starts_from_a_directory_and_resumes_without_it(exported: Path, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    shutil.copytree(exported, vae)
    start = from_diffusers(load_file(vae / "diffusion_pytorch_model.safetensors"))
    digest = read_published(vae).digest
    for name in ("whole", "resumed"):
        train(_config(tmp_path / name, start_from=f"diffusers:{vae}"), say=_silent)
        assert read_config(tmp_path / name / "config.json").start_digest == digest
    shutil.rmtree(vae)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000004")
    train(_config(tmp_path / "resumed", start_from=f"diffusers:{vae}"), say=_silent)
    assert read_config(tmp_path / "resumed" / "config.json").start_digest == digest
    whole, resumed = (load_newest(tmp_path / name, _silent) for name in ("whole", "resumed"))
    assert whole is not None and resumed is not None and whole[0].step == resumed[0].step == 4
    for group, tensors in whole[0].tensors.items():
        assert_same_bits(dict(resumed[0].tensors[group]), dict(tensors))
    moved = whole[0].tensors["networks"]["encoder.conv_in.weight"]
    assert 0 < float((moved - start["encoder"]["conv_in.weight"]).abs().max()) < 0.05


def test_the_first_step_has_the_directory_s_weights(exported: Path, run: Path, tmp_path: Path) -> None:
    trainer = make_trainer(_config(tmp_path / "new", start_from=f"diffusers:{exported}"))
    trainer.start()
    model = gen_dist.load(run, announce=_silent)
    for objective in (trainer.objective, trainer.averaged):
        assert objective is not None
        for name in ("encoder", "decoder"):
            assert_same_bits(objective.networks[name].state_dict(), model.objective.networks[name].state_dict())


def test_the_decoder_alone_is_trained_if_asked(exported: Path, tmp_path: Path) -> None:
    config = _config(tmp_path / "run", start_from=f"diffusers:{exported}", from_train="decoder")
    train(config, say=_silent)
    found = load_newest(tmp_path / "run", _silent)
    assert found is not None
    start = from_diffusers(load_file(exported / "diffusion_pytorch_model.safetensors"))
    for group in ("networks", "averaged"):
        ended = found[0].tensors[group]
        assert all(torch.equal(ended[f"encoder.{name}"], value) for name, value in start["encoder"].items())
        assert not any(torch.equal(ended[f"decoder.{name}"], value) for name, value in start["decoder"].items())
    assert not any("encoder" in name for name in found[0].tensors["optimizer-autoencoder"])


VQ = LatentAutoencoderConfig(bottleneck="vq", codebook_size=16)


@pytest.fixture(scope="module", params=["moving_average", "gradient"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """Config of a finished run with a codebook, and its export."""
    path = tmp_path_factory.mktemp("vq")
    config = _config(path / "run", objective=dataclasses.replace(VQ, codebook_update=request.param))
    train(config, say=_silent)
    return config, export(path / "run", "diffusers", path / "vq", announce=_silent)


def test_a_run_with_codes_is_loaded_by_diffusers(quantized: tuple[TrainConfig, Path]) -> None:
    config, exported = quantized
    theirs = diffusers().VQModel.from_pretrained(exported).eval()
    model = gen_dist.load(config.run_path, announce=_silent)
    images = torch.randint(0, 256, (3, *model.image_shape), dtype=torch.uint8)
    latents, _ = model.encode(images)
    with torch.no_grad():
        assert_close([theirs.encode(images / 127.5 - 1).latents], [latents])
        codes = theirs.quantize(latents)[2][2].view(3, *model.objective.latent_shape[1:])
        assert torch.equal(codes, model.objective.codes(images))
        assert_close([theirs.decode(latents).sample], [model.decode(latents)])
    assert "VQModel.from_pretrained" in (exported / "README.md").read_text()


def test_a_run_with_codes_starts_from_its_export(quantized: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, exported = quantized
    start = dataclasses.replace(config, start_from=f"diffusers:{exported}", run_dir=str(tmp_path / "run"))
    trainer = make_trainer(start)
    trainer.start()
    expected = gen_dist.load(config.run_path, announce=_silent).objective.networks["decoder"].bottleneck
    for objective in (trainer.objective, trainer.averaged):
        assert objective is not None
        found = objective.networks["decoder"].bottleneck
        assert torch.equal(found.codebook, expected.codebook)  # type: ignore[arg-type, union-attr]
        assert torch.equal(found.usage, torch.full((16,), 1 / 16))  # type: ignore[arg-type, union-attr]
    train(dataclasses.replace(start, from_train="decoder"), say=_silent)
    ended = load_newest(tmp_path / "run", _silent)
    assert ended is not None
    published = from_diffusers(load_file(exported / "diffusion_pytorch_model.safetensors"))
    for name in ("encoder.conv_in.weight", "decoder.bottleneck.codebook", "decoder.conv_in.weight"):
        network, _, key = name.partition(".")
        unchanged = torch.equal(ended[0].tensors["networks"][name], published[network][key])
        assert unchanged == (name != "decoder.conv_in.weight"), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": LatentAutoencoderConfig()}, "has the class VQModel, and this run needs AutoencoderKL"),
        ({"objective": dataclasses.replace(VQ, codebook_size=8)}, "use --codebook-size 16"),
        ({"objective": LatentAutoencoderConfig(bottleneck="fsq")}, "the bottleneck fsq, but for kl and vq; leave out"),
    ],
)
def test_codebooks_of_other_runs_are_one_line(
    changes: dict[str, Any], message: str, quantized: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    config, exported = quantized
    network: dict[str, Any] = {"network": dataclasses.replace(SMALL, latent_dim=4)} if "fsq" in message else {}
    start = dataclasses.replace(config, start_from=f"diffusers:{exported}", run_dir=str(tmp_path), **changes, **network)
    with pytest.raises(ConfigError, match=message):
        make_trainer(start).start()


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        file = directory / "config.json"
        fields = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))

    return edit


def _edit_weights(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edited(directory: Path) -> None:
        file = directory / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        edit(weights)
        save_file(weights, file)

    return edited


def _as_in_old_files(weights: dict[str, Tensor]) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [name for name in weights if ".to_" in name]:
        new = next(one for one in old if f".{one}." in name)
        tensor = weights.pop(name)
        weights[name.replace(new, old[new])] = tensor[:, :, None, None].clone() if tensor.ndim > 1 else tensor


@pytest.mark.parametrize("case", ["old names", "float16", "no 1 x 1 convolutions", "other file name"])
def test_directories_of_other_makers_are_read(case: str, exported: Path, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    shutil.copytree(exported, vae)
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    tolerance = 0.0
    if case == "old names":
        _edit_weights(_as_in_old_files)(vae)
    elif case == "float16":
        _edit_weights(lambda found: found.update({name: one.half() for name, one in found.items()}))(vae)
        tolerance = 1e-3
    elif case == "other file name":
        (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    else:
        outer = [name for name in weights if "quant_conv" in name]
        _edit_weights(lambda found: [found.pop(name) for name in outer])(vae)
        for name in outer:
            eye = torch.eye(len(weights[name]))[:, :, None, None]
            weights[name] = eye if name.endswith("weight") else torch.zeros(len(weights[name]))
    trainer = make_trainer(_config(tmp_path / "new", start_from=f"diffusers:{vae}"))
    trainer.start()
    found = to_diffusers({name: trainer.objective.networks[name].state_dict() for name in ("encoder", "decoder")})
    torch.testing.assert_close(found, weights, rtol=tolerance, atol=tolerance)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "none there": (shutil.rmtree, "; name one that save_pretrained or gen-dist export wrote"),
    "empty": (lambda path: (path / "config.json").unlink(), "autoencoders: it has no config.json"),
    "a pipeline": (lambda path: (path / "model_index.json").touch(), "but of a whole pipeline; name the part in it"),
    "another class": (
        _edit_config(_class_name="UNet2DModel"),
        "but of the class UNet2DModel; use AutoencoderKL or VQModel",
    ),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), "in config.json, Expecting property name"),
    "no class": (_edit_config(_class_name=None), "in config.json, it has no _class_name"),
    "a wrong field": (_edit_config(block_out_channels="wide"), "block_out_channels is not a list"),
    "pickled weights": (
        lambda path: (path / "diffusion_pytorch_model.safetensors").rename(path / "diffusion_pytorch_model.bin"),
        "it has no diffusion_pytorch_model.safetensors; save the model again with safe_serialization=True",
    ),
    "weights in several files": (
        lambda path: (path / "diffusion_pytorch_model.safetensors").rename(
            path / "diffusion_pytorch_model.safetensors.index.json"
        ),
        "autoencoders in one file; save the model again with max_shard_size='100GB'",
    ),
    "damaged weights": (
        lambda path: (path / "diffusion_pytorch_model.safetensors").write_bytes(b"12345678"),
        "is no whole model of diffusers: ",
    ),
    "another size": (
        _edit_config(block_out_channels=[8, 16, 16], down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=None),
        "is of another network than this config's; use --feature-maps 8 16 16",
    ),
    "other options": (
        _edit_config(latent_channels=4, mid_block_add_attention=False),
        "use --latent-dim 4 --no-middle-attention",
    ),
    "another activation": (_edit_config(act_fn="relu"), "is of another network: its activation is relu, not silu"),
    "another block": (_edit_config(down_block_types=["DownBlock2D"]), "its blocks 'DownBlock2D' are not those of"),
    "a block without a name": (_edit_config(down_block_types=[""]), "its blocks '' are not those of"),
    "types of other levels": (
        _edit_config(down_block_types=["DownEncoderBlock2D"]),
        "is of another network: it has 2 block_out_channels and 1 down_block_types",
    ),
    "another way up": (
        _edit_config(up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]),
        "its up_block_types are not ",
    ),
    "no groups": (_edit_config(norm_num_groups=0), "is of another network: groups 0 is less than 1"),
    "no levels": (
        _edit_config(block_out_channels=[], down_block_types=[], up_block_types=[]),
        "is of another network: feature_maps is empty",
    ),
    "whole numbers": (
        _edit_weights(lambda found: found.update({"encoder.conv_in.bias": torch.zeros(8, dtype=torch.int8)})),
        "encoder.conv_in.bias of ",
    ),
    "weights that are not finite": (
        _edit_weights(lambda found: found.update({"encoder.conv_in.bias": torch.full((8,), float("nan"))})),
        "has values that are not finite; fetch the weights again",
    ),
    "other channels": (
        _edit_weights(lambda found: found.update({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)})),
        r"weights of another shape: encoder.conv_in.weight is [8, 3, 3, 3], and this run's [8, 1, 3, 3]",
    ),
    "a missing weight": (
        _edit_weights(lambda found: found.pop("decoder.conv_out.bias")),
        "decoder.conv_out.bias is not in the weights of",
    ),
    "one weight more": (
        _edit_weights(lambda found: found.update({"quantize.embedding.weight": torch.zeros(4, 2)})),
        "decoder.bottleneck.codebook is only in the weights of",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_bad_directory_is_one_line_and_loses_nothing(
    case: str, fresh: bool, exported: Path, run: Path, tmp_path: Path
) -> None:
    vae, old = tmp_path / "vae", tmp_path / "old"
    shutil.copytree(exported, vae)
    spoil, message = BAD[case]
    spoil(vae)
    if fresh:
        shutil.copytree(run, old)
    before = {file: file.read_bytes() for file in old.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError) as error:
        train(_config(old, start_from=f"diffusers:{vae}"), fresh=fresh, say=_silent)
    assert message in str(error.value) and "\n" not in str(error.value)
    after = {file: file.read_bytes() for file in old.rglob("*") if file.is_file()}
    assert {file: after.get(file) for file in before} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": ""}, "from '' is neither a run directory nor diffusers:DIR, as diffusers:vae/"),
        ({"start_from": "diffusers:"}, "from 'diffusers:' is neither a run directory nor diffusers:DIR"),
        ({"from_train": "decoder"}, "from_train decoder needs weights to start from; add --from"),
        (
            {"start_from": "runs/vae", "from_train": "decoder", "objective": VaeConfig()},
            "from_train decoder needs the objective latent-autoencoder, not vae; leave it out",
        ),
        ({"start_from": "diffusers:x", "objective": VaeConfig()}, "needs the objective latent-autoencoder"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        dataclasses.replace(_config(tmp_path), **changes)


def test_replay_asks_for_the_weights_that_a_run_started_from(exported: Path, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    shutil.copytree(exported, vae)
    config = _config(tmp_path / "run", start_from=f"diffusers:{vae}")
    train(config, say=_silent)
    recorded = read_config(tmp_path / "run" / "config.json")
    _edit_weights(lambda found: found["decoder.conv_out.bias"].add_(1.0))(vae)
    trainer = make_trainer(recorded)
    with pytest.raises(ConfigError, match="are not those that the run started from"):
        trainer.start()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": VaeConfig()}, "diffusers has no class for the objective vae"),
        (
            {"objective": LatentAutoencoderConfig(bottleneck="none")},
            "no class for the bottleneck none, but for kl and vq; use --format",
        ),
        ({"decoder": dataclasses.replace(SMALL, blocks=2)}, "those of this run differ"),
    ],
)
def test_models_without_a_class_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    train(dataclasses.replace(_config(tmp_path / "run"), **changes, steps=1), say=_silent)
    with pytest.raises(ConfigError, match=message):
        export(tmp_path / "run", "diffusers", announce=_silent)


def test_an_export_for_diffusers_has_no_parts(run: Path) -> None:
    with pytest.raises(ConfigError, match="one file for both parts; leave out --parts"):
        export(run, "diffusers", parts=["decoder"], announce=_silent)


def test_an_export_for_diffusers_is_told_from_a_run(exported: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is an export for other programs; .* exports with --format safetensors"):
        gen_dist.load(exported)
    for command in (functools.partial(evaluate, announce=_silent), read_run):
        with pytest.raises(CheckpointError, match="is an export; name the run that it was made of"):
            command(exported)


def test_the_command_line_takes_both_ways_of_the_door(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["gen-dist", *words])
        with pytest.raises(SystemExit) as stop:
            commands.main()
        return int(stop.value.code or 0)

    assert command("export", str(run), "--format", "diffusers", "--out", str(tmp_path / "out")) == 0
    again = (tmp_path / "out" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert again == (exported / "diffusion_pytorch_model.safetensors").read_bytes()
    words = ["train", "--config", str(run / "config.json"), "--run-dir", str(tmp_path / "run"), "--steps", "1"]
    assert command(*words, "--from", f"diffusers:{tmp_path / 'out'}", "--from-train", "decoder") == 0
    assert "to train the decoder alone" in capsys.readouterr().err
    assert command(*words, "--fresh", "--from", f"diffusers:{tmp_path}") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no directory of one of diffusers' autoencoders")
