"""StyleGAN2 against its equations in float64, one image at a time, and the published numbers of parameters."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from gen_dist.config import Stylegan2Config
from gen_dist.errors import ConfigError
from gen_dist.networks import build_decoder, build_encoder
from gen_dist.networks.stylegan2_discriminator import MinibatchDeviation
from gen_dist.testing import check_network
from tests.support.runs import close_losses, make_trainer, run_steps, small_config

Array = NDArray[np.float64]
SMALL = Stylegan2Config(latent_dim=5, style_dim=7, mapping_layers=2, channel_base=64, channel_max=8)
BINOMIAL = np.outer([1.0, 3.0, 3.0, 1.0], [1.0, 3.0, 3.0, 1.0]) / 64


def correlated(maps: Array, weight: Array, padding: int, stride: int = 1) -> Array:
    """Sum of the maps' shifts, [C, H, W], weighted by [O, C, k, k]."""
    padded = np.pad(maps, ((0, 0), (padding, padding), (padding, padding)))
    kernel = weight.shape[2]
    height, width = ((side - kernel) // stride + 1 for side in padded.shape[1:])
    total = np.zeros((len(weight), height, width))
    for row, column in itertools.product(range(kernel), repeat=2):
        shift = padded[:, row : row + stride * height : stride, column : column + stride * width : stride]
        total += np.tensordot(weight[:, :, row, column], shift[:, :height, :width], axes=1)
    return total


def filtered(maps: Array, padding: int, gain: float = 1.0, stride: int = 1) -> Array:
    return np.concatenate(
        [correlated(each[None], gain * BINOMIAL[None, None], padding, stride) for each in maps], axis=0
    )


def spread(maps: Array, weight: Array) -> Array:
    """Every pixel's kernel, at twice its place: [O, 2 H + k - 2, 2 W + k - 2]."""
    _, height, width = maps.shape
    kernel = weight.shape[2]
    total = np.zeros((len(weight), 2 * height + kernel - 2, 2 * width + kernel - 2))
    for row, column in itertools.product(range(kernel), repeat=2):
        places = total[:, row : row + 2 * height - 1 : 2, column : column + 2 * width - 1 : 2]
        places += np.tensordot(weight[:, :, row, column], maps, axes=1)
    return total


def doubled(image: Array) -> Array:
    """Image with zeros between its pixels, through the binomial filter (Karras et al. 2020, figure 7)."""
    return np.concatenate([spread(each[None], 4 * BINOMIAL[None, None])[:, 1:-1, 1:-1] for each in image], axis=0)


def activated(values: Array) -> Array:
    return math.sqrt(2) * np.where(values > 0, values, 0.2 * values)


def linear(values: Array, weights: dict[str, Array], name: str, rate: float = 1.0) -> Array:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return (rate / math.sqrt(weight.shape[1])) * weight @ values + rate * bias


def modulated(maps: Array, style: Array, weights: dict[str, Array], name: str, *, norm: bool, up: bool) -> Array:
    """Convolution with one image's own weights (Karras et al. 2020, eq. 1 and 3)."""
    weight = weights[f"{name}.weight"]
    own = weight / math.sqrt(weight[0].size) * linear(style, weights, f"{name}.style")[None, :, None, None]
    if norm:
        own = own / np.sqrt((own**2).sum(axis=(1, 2, 3), keepdims=True) + 1e-8)
    if up:
        return filtered(spread(maps, own), padding=1, gain=4.0)
    return correlated(maps, own, weight.shape[2] // 2)


def reference_image(weights: dict[str, Array], latents: Array, noise: Array, config: Stylegan2Config) -> Array:
    """Image of one row of latents."""
    style = latents / np.sqrt((latents**2).mean() + 1e-8)
    for layer in range(config.mapping_layers):
        style = activated(linear(style, weights, f"mapping.layers.{layer}", config.mapping_rate))
    maps, image = weights["constant"], None
    for level in range(sum(name.endswith("to_image.bias") for name in weights)):
        for layer in range(2 if level else 1):
            name = f"levels.{level}.layers.{layer}"
            up = level > 0 and layer == 0
            maps = modulated(maps, style, weights, f"{name}.convolution", norm=True, up=up)
            own, noise = noise[: maps[0].size], noise[maps[0].size :]
            maps = maps + own.reshape(maps[0].shape) * weights[f"{name}.noise_strength"]
            maps = activated(maps + weights[f"{name}.bias"][:, None, None])
        name = f"levels.{level}.to_image"
        addend = modulated(maps, style, weights, f"{name}.convolution", norm=False, up=False)
        addend = addend + weights[f"{name}.bias"][:, None, None]
        image = addend if image is None else doubled(image) + addend
    assert image is not None and not len(noise)
    return image


def reference_scores(weights: dict[str, Array], images: Array, group: int) -> Array:
    """Scores of images, with the deviation of every `group` of them."""

    def convolved(maps: Array, name: str, padding: int, stride: int = 1) -> Array:
        weight = weights[f"{name}.weight"]
        bias = weights.get(f"{name}.bias", np.zeros(len(weight)))
        return correlated(maps, weight / math.sqrt(weight[0].size), padding, stride) + bias[:, None, None]

    found = []
    for image in images:
        maps = activated(convolved(image, "from_image", padding=0))
        for block in range(sum(name.endswith("shortcut.weight") for name in weights)):
            name = f"blocks.{block}"
            inner = filtered(activated(convolved(maps, f"{name}.first", padding=1)), padding=2)
            inner = activated(convolved(inner, f"{name}.second", padding=0, stride=2))
            outer = convolved(filtered(maps, padding=1), f"{name}.shortcut", padding=0, stride=2)
            maps = (inner + outer) / math.sqrt(2)
        found.append(maps)
    scores = []
    for place, maps in enumerate(found):
        beside = np.stack(found[place // group * group : place // group * group + group])
        deviation = np.sqrt(beside.var(axis=0) + 1e-8).mean()
        maps = np.concatenate([maps, np.full((1, *maps.shape[1:]), deviation)])
        maps = activated(convolved(maps, "convolution", padding=1))
        scores.append(linear(activated(linear(maps.ravel(), weights, "dense")), weights, "head"))
    return np.stack(scores)


def arrays_of(network: nn.Module) -> dict[str, Array]:
    return {name: value.detach().double().numpy() for name, value in network.named_parameters()}


def unlike_at_first(network: nn.Module) -> None:
    """Move biases and strengths of noise from where they start, so that none can be left out unseen."""
    numbers = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                value.add_(torch.randn(value.shape, generator=numbers) * (30.0 if "mapping" in name else 0.3))


def compare_with_the_equations(config: Stylegan2Config, shape: tuple[int, int, int], rows: int) -> None:
    torch.manual_seed(0)
    generator, discriminator = build_decoder(config, shape), build_encoder(config, shape, 1)
    unlike_at_first(generator)
    unlike_at_first(discriminator)
    latents, noise = torch.randn(rows, config.latent_dim), torch.randn(rows, generator.noise_count)
    with torch.no_grad():
        images = generator(latents, noise)
        scores = discriminator(images)
    weights = arrays_of(generator)
    pairs = zip(latents.double().numpy(), noise.double().numpy(), strict=True)
    expected = np.stack([reference_image(weights, *pair, config) for pair in pairs])
    size = float(np.abs(expected).max())
    assert float(np.abs(images.double().numpy() - expected).max()) < 1e-5 * size
    expected = reference_scores(arrays_of(discriminator), images.double().numpy(), config.minibatch_group)
    size = float(np.abs(expected).max())
    assert float(np.abs(scores.double().numpy() - expected).max()) < 1e-5 * size


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 14, 28)], ids=str)
def test_both_networks_are_their_equations(shape: tuple[int, int, int]) -> None:
    compare_with_the_equations(dataclasses.replace(SMALL, minibatch_group=2), shape, rows=4)


@pytest.mark.slow
def test_both_networks_are_their_equations_at_256_pixels() -> None:
    compare_with_the_equations(dataclasses.replace(Stylegan2Config(), minibatch_group=2), (3, 256, 256), rows=2)


@pytest.mark.parametrize(
    ("side", "generator", "discriminator"),
    # The discriminator at 1024 pixels: the total in logs of the authors' code, configuration F. The others are sums of
    # the paper's layers, of which parts of such logs show the same counts.
    [(256, 30_034_338, 28_864_129), (1024, 30_370_060, 29_012_513)],
)
def test_parameters_are_as_many_as_published(side: int, generator: int, discriminator: int) -> None:
    with torch.device("meta"):
        networks = (
            build_decoder(Stylegan2Config(), (3, side, side)),
            build_encoder(Stylegan2Config(), (3, side, side), 1),
        )
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert counts == [generator, discriminator]


def test_it_passes_the_checks_of_networks() -> None:
    check_network(SMALL, image_shape=(3, 16, 16))


def test_styles_are_of_normalized_latents() -> None:
    generator = build_decoder(SMALL, (1, 8, 8))
    latents = torch.randn(2, 5)
    torch.testing.assert_close(generator(3.0 * latents), generator(latents))


def test_classes_follow_the_latents() -> None:
    generator = build_decoder(SMALL, (1, 8, 8), inputs=5 + 3)
    latents = torch.randn(1, 5).expand(3, 5)
    with torch.no_grad():
        images = generator(torch.cat([latents, torch.eye(3)], dim=1))
    assert float((images[0] - images[1]).abs().max()) > 1e-4
    assert float((images[1] - images[2]).abs().max()) > 1e-4


def test_weights_start_with_unit_variance() -> None:
    torch.manual_seed(0)
    config = Stylegan2Config(channel_base=1024, channel_max=64, style_dim=64, latent_dim=64)
    generator, discriminator = build_decoder(config, (3, 32, 32)), build_encoder(config, (3, 32, 32), 1)
    for name, value in (*generator.named_parameters(), *discriminator.named_parameters()):
        if name.endswith("weight") and value.numel() > 1000:
            assert float(value.detach().std()) == pytest.approx(100.0 if "mapping" in name else 1.0, rel=0.1)
        elif name.endswith(("bias", "noise_strength")):
            assert torch.equal(value, torch.full_like(value, float(name.endswith("style.bias"))))


def test_deviation_is_that_of_rows_together() -> None:
    layer = MinibatchDeviation(4)
    maps = torch.randn(8, 3, 2, 2, dtype=torch.float64)
    whole = layer(maps)
    assert torch.equal(whole, torch.cat([layer(half) for half in maps.chunk(2)]))
    expected = maps[4:].std(dim=0, correction=0).mean()
    torch.testing.assert_close(whole[4:, 3], expected.float().expand(4, 2, 2).double())
    assert float(layer.eval()(maps)[:, 3].max()) == pytest.approx(1e-4)  # of a group of one image


@pytest.mark.parametrize("changes", [{"accumulation": 3}, {"shards": 2}], ids=str)
def test_groups_do_not_depend_on_micro_batches(changes: dict[str, object]) -> None:
    network = dataclasses.replace(SMALL, channel_base=56, channel_max=4)
    whole, split = (
        run_steps(make_trainer(dataclasses.replace(small_config("gan", **more), network=network)), 0, 3)
        for more in ({}, changes)
    )
    assert split == close_losses(whole)


def test_latents_of_an_encoder_are_those_of_one_image() -> None:
    """As in evaluation, which sees each by itself."""
    images = torch.randn(8, 3, 16, 16)
    for outputs, alone in ((4, True), (1, False)):
        network = build_encoder(SMALL, (3, 16, 16), outputs)
        with torch.no_grad():
            found, expected = network.train()(images), network.eval()(images)
        assert torch.equal(found, expected) == alone


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"global_batch_size": 6}, "global-batch-size 4 or 8,"),
        ({"global_batch_size": 12, "accumulation": 2}, "global-batch-size 8 or 16,"),
        ({"global_batch_size": 8, "shards": 4}, "global-batch-size 16,"),
    ],
)
def test_micro_batches_that_split_a_group_are_refused(changes: dict[str, object], way_out: str) -> None:
    with pytest.raises(ConfigError, match=f"MinibatchDeviation takes 4 images .*{way_out}"):
        make_trainer(dataclasses.replace(small_config("gan", **changes), network=SMALL))
