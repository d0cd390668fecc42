"""The discriminator of patches: its layers, initial weights, sizes, and batch statistics over processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gen_dist.config import GanConfig, PatchganConfig, networks
from gen_dist.errors import ConfigError
from gen_dist.networks import build_decoder, build_encoder
from gen_dist.networks.players import Discriminator
from gen_dist.parallel.sync_batch_norm import SyncBatchNorm
from tests.support.runs import make_trainer, small_config


def test_the_published_patchgan_sees_70_pixels_in_its_layers() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(networks["patchgan"](), (3, 256, 256), 1)
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    widths = [(one.in_channels, one.out_channels, one.stride[0], one.bias is not None) for one in convolutions]
    assert widths == [
        (3, 64, 2, True),
        (64, 128, 2, False),
        (128, 256, 2, False),
        (256, 512, 1, False),
        (512, 1, 1, True),
    ]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in encoder.modules()) == 3
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 2_765_633
    for one in convolutions[1:]:
        assert float(one.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    images = torch.zeros(1, 3, 256, 256, requires_grad=True)
    scores = encoder.eval()(images)
    assert scores.shape == (1, 1, 30, 30)
    scores[0, 0, 15, 15].backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 24, 41), (4, 64, 32)], ids=str)
def test_logits_have_a_place_for_each_patch(norm: str, shape: tuple[int, int, int]) -> None:
    config = PatchganConfig(feature_maps=8, discriminator_norm=norm)  # type: ignore[arg-type]
    scores = Discriminator(config, shape, "none", 1)(torch.rand(2, *shape), None)
    assert scores.shape == (2, *config.latent_shape(shape)[1:])
    assert scores.dtype == torch.float32 and float(scores.detach().std()) > 0


def test_images_too_small_for_patches_are_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        build_encoder(PatchganConfig(), (3, 20, 28), 1)
    assert str(error.value) == (
        "patchgan with layers 3 needs images of at least 24 x 24, not 20 x 28; use --image-size 24 or "
        "--discriminator.layers 2"
    )
    build_encoder(PatchganConfig(layers=2), (3, 20, 28), 1)


def test_a_patchgan_is_no_decoder() -> None:
    with pytest.raises(ConfigError, match="--discriminator patchgan, not --network"):
        build_decoder(PatchganConfig(), (3, 32, 32))


def test_batch_statistics_of_patches_go_over_all_processes() -> None:
    patches = PatchganConfig(feature_maps=4, layers=1)
    config = replace(small_config("gan"), objective=GanConfig(loss="hinge"), discriminator=patches)
    trainer = make_trainer(config.with_options(sync_batch_norm=True))
    discriminator = trainer.objective.networks["discriminator"]
    assert isinstance(discriminator, Discriminator) and discriminator.mixes_images
    assert sum(isinstance(module, SyncBatchNorm) for module in discriminator.modules()) == 1
