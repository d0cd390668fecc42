"""Encoders and decoders: shapes, initial weights, the papers' arithmetic, spectral norms, invalid sizes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from gen_dist.config import (
    Activation,
    ConvConfig,
    DcganConfig,
    MlpConfig,
    NetworkConfig,
    ResnetConfig,
    Stylegan2Config,
    networks,
)
from gen_dist.errors import ConfigError
from gen_dist.kernels import group_norm_silu
from gen_dist.networks import Decoder, Encoder, build_decoder, build_encoder
from gen_dist.networks.dcgan import DcganDecoder
from gen_dist.networks.self_attention import SelfAttention
from tests.support.fused_norm import normalize_as_on_gpus

# A new network has one line here, such as `"mine": networks["mine"](latent_dim=5)`.
SMALL: dict[str, NetworkConfig] = {
    "mlp": networks["mlp"](hidden_sizes=(16, 8), latent_dim=5),
    "conv": ConvConfig(feature_maps=(4, 6), hidden_size=16, latent_dim=5),
    "dcgan": DcganConfig(feature_maps=4, latent_dim=5),
    "dcgan, group norm": DcganConfig(feature_maps=4, latent_dim=5, generator_norm="group", discriminator_norm="group"),
    "dcgan, no norm": DcganConfig(feature_maps=4, latent_dim=5, generator_norm="none", discriminator_norm="none"),
    "dcgan, hidden layer": DcganConfig(feature_maps=4, latent_dim=5, hidden_size=8, discriminator_norm="group"),
    "dcgan, centred hidden layer": DcganConfig(
        feature_maps=4, latent_dim=5, hidden_size=8, centred_hidden=True, discriminator_norm="none"
    ),
    "dcgan, spectral norm": DcganConfig(feature_maps=4, latent_dim=5, discriminator_norm="none", spectral_norm=True),
    "sngan": ResnetConfig(feature_maps=(4, 6, 8), latent_dim=5),
    "sngan, two blocks and norms": ResnetConfig(
        feature_maps=(4, 6, 6), blocks=2, latent_dim=5, generator_norm="batch", discriminator_norm="group"
    ),
    "sngan, attention": ResnetConfig(feature_maps=(4, 6, 8), latent_dim=5, attention_factor=2, spectral_norm=True),
    "sngan, conditional norm": ResnetConfig(
        feature_maps=(4, 6, 8), latent_dim=5, generator_norm="batch", conditional_norm=True
    ),
    "sngan, spectral norm": ResnetConfig(feature_maps=(4, 6, 8), latent_dim=5, spectral_norm=True),
    "stylegan2": Stylegan2Config(latent_dim=5, style_dim=6, mapping_layers=2, channel_base=64, channel_max=6),
    "r3gan": ResnetConfig(block="r3gan", feature_maps=(8, 12, 12), latent_dim=5),
    "r3gan, two blocks and norms": ResnetConfig(
        block="r3gan", feature_maps=(8, 12), blocks=2, latent_dim=5, generator_norm="batch", discriminator_norm="group"
    ),
    "r3gan, spectral norm": ResnetConfig(block="r3gan", feature_maps=(8, 12), latent_dim=5, spectral_norm=True),
}
SPECTRAL = [name for name, config in SMALL.items() if getattr(config, "spectral_norm", False)]
SHAPE = (3, 16, 16)


def make(
    config: NetworkConfig,
    shape: tuple[int, int, int] = SHAPE,
    outputs: int = 3,
    inputs: int | None = None,
    seed: int = 0,
) -> tuple[Encoder, Decoder]:
    torch.manual_seed(seed)
    return build_encoder(config, shape, outputs), build_decoder(config, shape, inputs)


def let_gradients_through(network: nn.Module) -> None:
    """The last convolutions of r3gan blocks and the factor of attention start at zero, which blocks gradients of the
    layers before them."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.1)
        elif isinstance(module, SelfAttention):
            nn.init.constant_(module.factor, 0.5)


def some_images(shape: tuple[int, int, int] = SHAPE, count: int = 4, seed: int = 1) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 80), (1, 96, 96)], ids=str)
def test_images_become_outputs_and_latents_become_images(name: str, shape: tuple[int, int, int]) -> None:
    encoder: Any
    encoder, decoder = make(SMALL[name], shape, inputs=9)
    images = some_images(shape)
    features = encoder.features(images)
    assert features.shape == (4, encoder.feature_count)
    assert encoder.head.in_features == encoder.feature_count
    assert encoder(images).shape == (4, 3)
    decoded = decoder(torch.randn(4, 9))
    assert decoded.shape == (4, *shape)
    assert bool(decoded.isfinite().all())
    assert float(decoded.detach().std()) > 0


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_the_head_of_the_features(name: str) -> None:
    encoder, decoder = make(SMALL[name])
    encoder.eval()
    images = some_images()
    assert torch.equal(encoder(images), encoder.head(encoder.features(images)))
    assert decoder(torch.randn(2, 5)).shape == (2, *SHAPE)  # without `inputs`, they are latent_dim


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [SHAPE, (1, 16, 16)], ids=str)
def test_gradients_reach_every_parameter_in_its_memory_order(name: str, shape: tuple[int, int, int]) -> None:
    encoder, decoder = make(SMALL[name], shape)
    let_gradients_through(encoder)
    let_gradients_through(decoder)
    (encoder(some_images(shape)).square().sum() + decoder(torch.randn(4, 5)).square().sum()).backward()
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0
        assert parameter.is_contiguous() and parameter.grad.is_contiguous()  # fused optimizers assume equal layouts


@pytest.mark.parametrize("name", SMALL)
def test_every_latent_can_be_made_to_start_at_a_colour(name: str) -> None:
    _, decoder = make(SMALL[name])
    colour = torch.tensor([0.5, -1.0, 2.0])[:, None, None].expand(SHAPE)
    with torch.no_grad():
        decoder.start_at(torch.zeros(SHAPE))
        at_zero = decoder(torch.zeros(2, 5))
        decoder.start_at(colour)
        torch.testing.assert_close(decoder(torch.zeros(2, 5)) - at_zero, colour.expand(2, -1, -1, -1))
    assert copy.deepcopy(decoder).state_dict().keys() == decoder.state_dict().keys()


@pytest.mark.parametrize("name", ["dcgan, group norm", "dcgan, no norm", "sngan, two blocks and norms", "r3gan"])
def test_without_batch_norm_images_are_independent(name: str) -> None:
    encoder, _ = make(SMALL[name])
    images = some_images()
    torch.testing.assert_close(encoder(images)[:1], encoder(images[:1]))


@pytest.mark.parametrize("name", [name for name in SMALL if name != "dcgan"])  # it has batch normalization
def test_penalties_of_gradients_have_gradients_themselves(name: str) -> None:
    encoder, _ = make(SMALL[name], outputs=1)
    let_gradients_through(encoder)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        network, twin = (copy.deepcopy(encoder).to(dtype) for _ in range(2))
        images = some_images().to(dtype).requires_grad_()
        (slopes,) = torch.autograd.grad(network(images).sum(), images, create_graph=True)
        torch.testing.assert_close(torch.func.grad(lambda x, twin=twin: twin(x).sum())(images.detach()), slopes)
        weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
        gradients.append(torch.autograd.grad(slopes.square().sum(), weights))
    for single, double in zip(*gradients, strict=True):
        assert float(double.abs().sum()) > 0
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4 * float(double.abs().max()))


def run_twice_differentiated(name: str) -> list[Tensor]:
    """Outputs of encoder and decoder, gradients of their squares, and gradients of a penalty on slopes."""
    encoder, decoder = (network.double() for network in make(SMALL[name], outputs=1))
    let_gradients_through(encoder)
    images, latents = some_images().double(), torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)
    outputs = [encoder(images), decoder(latents)]
    weights = [*encoder.parameters(), *decoder.parameters()]
    gradients = torch.autograd.grad(sum(each.square().sum() for each in outputs), weights)
    if any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules()):
        return [*outputs, *gradients]
    slopes = torch.func.grad(lambda images: encoder(images).sum())(images)
    return [*outputs, *gradients, *torch.autograd.grad(slopes.square().sum(), [*encoder.parameters()][:-1])]


@pytest.mark.parametrize("name", [name for name in SMALL if "='group'" in str(SMALL[name])])
def test_fused_normalization_changes_no_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_twice_differentiated(name)
    called = normalize_as_on_gpus(monkeypatch)
    found = run_twice_differentiated(name)
    assert called
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_other_devices_than_cpus_take_fused_normalization() -> None:
    """Tensors on "meta" represent those of other devices."""
    encoder, _ = make(SMALL["dcgan, group norm"])
    with mock.patch("gen_dist.kernels.group_norm_silu", wraps=group_norm_silu) as fused:
        encoder.to("meta")(some_images().to("meta"))
        assert fused.call_count == sum(isinstance(module, nn.GroupNorm) for module in encoder.modules()) > 0
        make(SMALL["dcgan, group norm"])[0](some_images())
        assert fused.call_count == sum(isinstance(module, nn.GroupNorm) for module in encoder.modules())


@pytest.mark.parametrize("name", ["mlp", "conv", *(name for name in SMALL if "dcgan" in name)])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activations_in_place_compute_the_same(name: str, activation: Activation) -> None:
    config = SMALL[name]
    if isinstance(config, (MlpConfig, ConvConfig)):
        config = dataclasses.replace(config, activation=activation)
    for network, inputs in zip(make(config, outputs=1), (some_images(), torch.randn(4, 5)), strict=True):
        found = []
        for in_place in (True, False):
            twin, seen = copy.deepcopy(network), inputs.clone().requires_grad_()
            activations = [module for module in twin.modules() if isinstance(module, (nn.ReLU, nn.LeakyReLU))]
            assert activations
            for module in activations:
                assert module.inplace
                module.inplace = in_place
            outputs = twin(seen)  # a leaf: autograd forbids in-place writes to it
            (slopes,) = torch.autograd.grad(outputs.sin().sum(), seen, create_graph=True)
            parameters = list(twin.parameters())
            gradients = torch.autograd.grad(outputs.sin().sum(), parameters, retain_graph=True)
            of_penalty = torch.autograd.grad(slopes.square().sum(), parameters, allow_unused=True)
            found.append(([outputs, slopes, *gradients], of_penalty))
        (fast, fast_of_penalty), (slow, slow_of_penalty) = found
        assert all(map(torch.equal, fast, slow))
        # Through batch normalization, autograd sums the terms of a penalty's gradient in another order.
        torch.testing.assert_close(fast_of_penalty, slow_of_penalty)


@pytest.mark.parametrize("name", ["dcgan", "sngan, two blocks and norms", "r3gan"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 16, 16)], ids=str)
def test_on_cpus_every_convolution_works_pixel_by_pixel(name: str, shape: tuple[int, int, int]) -> None:
    layouts = []
    for network, inputs in zip(make(SMALL[name], shape), (some_images(shape), torch.randn(4, 5)), strict=True):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.register_forward_hook(lambda _module, _inputs, maps: layouts.append((maps.shape, maps.stride())))
        network(inputs)
    strides = [stride for (_, channels, height, width), stride in layouts if channels > 1 and height * width > 1]
    assert len(strides) >= 3
    assert all(stride[1] == 1 for stride in strides)


def test_leaky_relu_has_the_slope_of_gans() -> None:
    encoder, _ = make(MlpConfig(activation="leaky_relu"))
    slopes = [module.negative_slope for module in encoder.modules() if isinstance(module, nn.LeakyReLU)]
    assert slopes == [0.2]


def _dcgan_of_the_paper() -> tuple[nn.Sequential, nn.Sequential]:
    """Discriminator and generator of 64 x 64 RGB images as in Radford et al. 2016, of convolutions alone."""
    discriminator: list[nn.Module] = []
    generator: list[nn.Module] = [nn.ConvTranspose2d(100, 512, 4, bias=False)]
    for inputs, outputs in itertools.pairwise((3, 64, 128, 256, 512)):
        discriminator.append(nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False))
        if inputs != 3:
            discriminator.append(nn.BatchNorm2d(outputs))
        discriminator.append(nn.LeakyReLU(0.2))
    for inputs, outputs in itertools.pairwise((512, 256, 128, 64, 3)):
        generator += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)]
    return nn.Sequential(*discriminator, nn.Conv2d(512, 1, 4, bias=False)).double(), nn.Sequential(*generator).double()


def _same_but_for_shape(parameters: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    """Copy parameters to those of another network with the same numbers of values, in order."""
    assert [p.numel() for p in parameters] == [p.numel() for p in others]
    with torch.no_grad():
        for theirs, mine in zip(parameters, others, strict=True):
            mine.copy_(theirs.reshape(mine.shape))


def test_a_dcgan_of_64_pixels_is_that_of_the_paper() -> None:
    encoder, decoder = make(DcganConfig(), (3, 64, 64), outputs=1)
    encoder.double(), decoder.double()
    discriminator, generator = _dcgan_of_the_paper()
    # A linear layer has its map in channels_last order, and its inputs last; a transposed convolution has them first.
    *theirs, last = discriminator.parameters()
    _same_but_for_shape([*theirs, nn.Parameter(last.permute(0, 2, 3, 1))], list(encoder.parameters()))
    first, *theirs = generator.parameters()
    _same_but_for_shape([nn.Parameter(first.permute(2, 3, 1, 0)), *theirs], list(decoder.parameters()))
    images, latents = some_images((3, 64, 64), count=3).double(), torch.randn(3, 100, dtype=torch.float64)
    torch.testing.assert_close(encoder(images), discriminator(images).flatten(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(decoder(latents), generator(latents[:, :, None, None]), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in encoder.parameters()) == 2_765_568
    assert sum(p.numel() for p in decoder.parameters()) == 3_576_704


def test_dcgan_weights_start_as_in_the_paper() -> None:
    encoder, decoder = make(DcganConfig(feature_maps=32), (3, 64, 64))
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.weight.numel() > 1000:
            assert float(module.weight.detach().mean()) == pytest.approx(0.0, abs=0.002)
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert float(module.weight.detach().mean()) == pytest.approx(1.0, abs=0.02)
            assert 0.01 < float(module.weight.detach().std()) < 0.03
            assert not bool(module.bias.any())


@pytest.mark.parametrize(("side", "widths"), [(28, [4, 8]), (32, [4, 8, 16]), (96, [4, 8, 16, 32]), (8, [4])])
def test_a_dcgan_halves_until_4_to_7_pixels_are_left(side: int, widths: list[int]) -> None:
    encoder, _ = make(SMALL["dcgan"], (1, side, side))
    found = [module.out_channels for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert found == widths
    assert encoder.feature_count == widths[-1] * (side >> len(widths)) ** 2


def test_norms_take_the_place_of_biases() -> None:
    for norm, kind in (("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)):
        config = DcganConfig(feature_maps=8, generator_norm=norm, discriminator_norm=norm)  # type: ignore[arg-type]
        for network, count in zip(make(config, (3, 32, 32)), (2, 3), strict=True):
            names = [name for name, _ in network.named_parameters() if name.endswith("bias")]
            assert len(names) == count == sum(isinstance(module, kind) for module in network.modules())
    for network in make(SMALL["dcgan, no norm"]):
        assert all(module.bias is not None for module in network.modules() if hasattr(module, "bias"))


def _sngan_block(block: nn.Module, maps: Tensor, resampling: str, first: bool) -> Tensor:
    """Block of Miyato et al. 2018 in the order of their figure: shortcuts are convolved, then pooled."""
    weights = dict(block.named_parameters())
    (w1, b1, w2, b2) = (value for name, value in weights.items() if name.startswith("residual"))
    shortcut = [value for name, value in weights.items() if name.startswith("shortcut")]
    residual = maps if first else maps.relu()
    if resampling == "up":
        residual = F.interpolate(residual, scale_factor=2, mode="nearest")
        maps = F.interpolate(maps, scale_factor=2, mode="nearest")
    residual = F.conv2d(F.conv2d(residual, w1, b1, padding=1).relu(), w2, b2, padding=1)
    if shortcut:
        weight, bias = shortcut
        maps = F.conv2d(maps, weight, bias)
    if resampling == "down":
        residual, maps = F.avg_pool2d(residual, 2), F.avg_pool2d(maps, 2)
    return maps + residual


def test_sngan_networks_are_those_of_the_paper() -> None:
    encoder: Any
    decoder: Any
    encoder, decoder = make(SMALL["sngan"])
    encoder.double(), decoder.double()
    maps = images = some_images().double()
    for block, resampling in zip(encoder.trunk.children(), ("down", "down", "none"), strict=False):
        maps = _sngan_block(block, maps, resampling, first=maps is images)
    torch.testing.assert_close(encoder.features(images), maps.relu().sum(dim=(2, 3)))
    assert maps.shape == (4, 8, 4, 4)
    latents = torch.randn(4, 5, dtype=torch.float64)
    maps = decoder.start.linear(latents).view(4, 8, 4, 4)
    *blocks, _norm, _relu, output = decoder.trunk.children()
    assert len(blocks) == 2
    for block in blocks:
        maps = _sngan_block(block, maps, "up", first=False)
    torch.testing.assert_close(decoder(latents), F.conv2d(maps.relu(), output.weight, output.bias, padding=1))


def _bilinear(maps: Tensor, scale: float) -> Tensor:
    """Bilinear resampling of images with zero padding, by torch."""
    padded = F.pad(maps, (2, 2, 2, 2))
    resampled = F.interpolate(padded, scale_factor=scale, mode="bilinear", antialias=True)
    border = int(2 * scale)
    return resampled[:, :, border:-border, border:-border]


OTHER_VALUES: dict[str, Any] = {
    "generator_norm": "group",
    "discriminator_norm": "group",
    "spectral_norm": True,
    "noise": "fixed",
    "mapping_rate": 0.5,
    "conditional_norm": True,
    "centred_hidden": True,
}
BASES: dict[str, NetworkConfig] = {
    "dcgan": DcganConfig(feature_maps=4, latent_dim=5, hidden_size=8, discriminator_norm="none"),
    "resnet": ResnetConfig(feature_maps=(4, 6, 8), latent_dim=5, generator_norm="batch"),
    "stylegan2": SMALL["stylegan2"],
}


@pytest.mark.parametrize(
    ("kind", "option"), [(kind, option) for kind, base in BASES.items() for option in base.one_sided]
)
def test_an_option_of_one_side_changes_no_network_of_the_other(kind: str, option: str) -> None:
    base = BASES[kind]
    if not hasattr(base, option):
        assert not base.changes(option, "discriminator")
        return
    value = OTHER_VALUES.get(option, getattr(base, option, 0) * 2)
    other = dataclasses.replace(base, **{option: value})
    assert value != getattr(base, option)
    sides = zip(make(base), make(other), strict=True)
    described = [
        (repr(one), {name: each.shape for name, each in one.state_dict().items()}) for pair in sides for one in pair
    ]
    same = [described[0] == described[1], described[2] == described[3]]
    if option == "latent_dim":  # an encoder's numbers of latents are given by the objective
        assert same == [True, False] and not base.changes(option, "discriminator") and base.changes(option, "encoder")
        return
    assert same[0] or base.changes(option, "discriminator")
    assert same[1] or base.changes(option, "generator")
    assert base.changes(option, "discriminator") != base.changes(option, "generator")


def test_a_centred_hidden_layer_has_mean_zero_over_the_batch() -> None:
    latents = torch.randn(64, 5)
    means = {}
    for centred in (False, True):
        _, decoder = make(DcganConfig(feature_maps=4, latent_dim=5, hidden_size=8, centred_hidden=centred))
        assert isinstance(decoder, DcganDecoder)
        hidden = decoder.train().hidden(latents)
        means[centred] = hidden.mean(0).abs().max()
        assert hidden.std(0).min() > 0.1
    assert means[True] < 1e-5 and means[False] > 0.2


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "centred_hidden without a hidden layer; add --hidden-size 512"),
        ({"hidden_size": 8, "generator_norm": "group"}, "goes with generator_norm batch, not group"),
    ],
)
def test_a_hidden_layer_that_cannot_be_centred_is_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        DcganConfig(centred_hidden=True, **options)


def test_r3gan_networks_are_those_of_the_paper() -> None:
    """Initially every block is the identity, so only resampling, 1 x 1 convolutions and the two bases act."""
    encoder: Any
    decoder: Any
    encoder, decoder = make(ResnetConfig(block="r3gan", feature_maps=(8, 8, 12), blocks=2, latent_dim=5))
    encoder.double(), decoder.double()
    images, latents = some_images().double(), torch.randn(4, 5, dtype=torch.float64)
    enter, *_, widen, _b1, _b2, last, _flat = encoder.trunk.children()
    maps = _bilinear(_bilinear(F.conv2d(images, enter.weight), 0.5), 0.5)
    expected = (F.conv2d(maps, widen.weight) * last.weight[:, 0]).sum(dim=(2, 3))
    torch.testing.assert_close(encoder.features(images), expected)
    assert encoder.head.bias is None  # relativistic losses give it no gradient
    _b1, _b2, narrow, *_, leave = decoder.trunk.children()
    maps = decoder.start.basis * decoder.start.linear(latents)[:, :, None, None]
    maps = _bilinear(_bilinear(F.conv2d(maps, narrow.weight), 2), 2)
    torch.testing.assert_close(decoder(latents), F.conv2d(maps, leave.weight, leave.bias))


def test_an_r3gan_block_is_a_bottleneck_of_grouped_convolutions() -> None:
    encoder, _ = make(ResnetConfig(block="r3gan", feature_maps=(48, 24), blocks=3))
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    widening, grouped, narrowing = convolutions[1:4]
    assert (widening.out_channels, grouped.groups, narrowing.out_channels) == (96, 6, 48)
    # Fixup: two resolutions of three blocks, three layers each; leaky ReLUs of slope 0.2 follow.
    gain = (2 / 1.04) ** 0.5 * 6**-0.25
    assert float(widening.weight.detach().std()) == pytest.approx(gain / 48**0.5, rel=0.05)
    assert float(grouped.weight.detach().std()) == pytest.approx(gain / (9 * 16) ** 0.5, rel=0.05)
    assert not bool(narrowing.weight.any())
    assert {module.groups for module in convolutions if module.kernel_size == (3, 3)} == {6, 3}


@pytest.mark.parametrize(
    "shape", [(1, 30, 30), (3, 50, 50), (3, 29, 64), (1, 6, 6), (3, 250, 300), (1, 15, 33)], ids=str
)
def test_errors_of_dcgan_sizes_name_valid_ones(shape: tuple[int, int, int]) -> None:
    for build in (lambda: build_encoder(SMALL["dcgan"], shape, 1), lambda: build_decoder(SMALL["dcgan"], shape)):
        with pytest.raises(ConfigError, match=f"{shape[1]} x {shape[2]} do not") as error:
            build()
        named = str(error.value).partition("--image-size ")[2].split(" or ")
        nearest = {30: ["28", "32"], 50: ["48", "56"], 29: ["64x28", "64x32"], 6: ["8"], 250: ["288x224", "320x256"]}
        assert named == (nearest | {15: ["32x14", "36x16"]})[shape[1]]
        for size in named:
            width, _, height = size.partition("x")
            make(SMALL["dcgan"], (shape[0], int(height or width), int(width)))


def test_errors_of_resnet_sizes_name_valid_ones() -> None:
    config = ResnetConfig(feature_maps=(4, 4, 4, 4))
    with pytest.raises(
        ConfigError, match=r"28 x 28 do not .*--image-size 24 or 32, or --feature-maps with 3 numbers at"
    ):
        make(config, (1, 28, 28))
    make(config, (1, 24, 24)), make(config, (1, 32, 32))
    make(ResnetConfig(feature_maps=(4, 4, 4)), (1, 28, 28))
    with pytest.raises(ConfigError, match=r"27 x 32 do not .*--image-size 32x24 or 32$"):
        make(config, (1, 27, 32))
    with pytest.raises(ConfigError, match=r"4 x 4 do not .*--image-size 8, or --feature-maps with 3 numbers at most"):
        make(config, (1, 4, 4))


def _weights_in_use(encoder: Encoder) -> list[Tensor]:
    return [layer.weight for layer in encoder.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_spectral_norm_makes_every_largest_singular_value_one(name: str) -> None:
    encoder, decoder = make(SMALL[name])
    for _ in range(30):
        encoder(some_images())
    encoder.eval()
    for weight in _weights_in_use(encoder):
        assert float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2)) == pytest.approx(1.0, abs=0.02)
    plain = ("bias", ".factor")  # of attention: it is no weight of a layer
    assert all(".original" in key or key.endswith(plain) for key, _ in encoder.named_parameters())
    assert not any("parametrizations" in key for key in decoder.state_dict())


@pytest.mark.parametrize("name", SPECTRAL)
def test_power_iteration_runs_once_per_training_forward(name: str) -> None:
    encoder: Any = make(SMALL[name])[0]
    vectors = {key: value.clone() for key, value in encoder.state_dict().items() if key.endswith(("_u", "_v"))}
    assert len(vectors) == 2 * len(_weights_in_use(encoder.eval()))
    encoder(some_images())
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in vectors.items())
    head = encoder.head.parametrizations.weight
    with (
        torch.no_grad(),
        mock.patch.object(
            _SpectralNorm, "_power_method", autospec=True, side_effect=_SpectralNorm._power_method
        ) as iterated,
    ):
        head.original.normal_()
        encoder.train()(some_images())
        assert sorted(Counter(id(call.args[0]) for call in iterated.call_args_list).values()) == [1] * (
            len(vectors) // 2
        )
        once = F.normalize(head.original @ vectors["head.parametrizations.weight.0._v"], dim=0)
    torch.testing.assert_close(head[0]._u, once)
    assert not torch.equal(once, vectors["head.parametrizations.weight.0._u"])


def _train(encoder: Encoder, first: int, last: int) -> None:
    for step in range(first, last):
        gradients = torch.autograd.grad(encoder(some_images(seed=step)).square().mean(), list(encoder.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
                parameter.sub_(0.1 * gradient)


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_norms_resume_exactly_from_state_and_in_copies(name: str) -> None:
    whole, _ = make(SMALL[name])
    _train(whole, 0, 3)
    resumed, _ = make(SMALL[name], seed=9)
    resumed.load_state_dict({key: value.clone() for key, value in whole.state_dict().items()})
    copied = copy.deepcopy(whole)
    for encoder in (whole, resumed, copied):
        _train(encoder, 3, 6)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)
        assert torch.equal(copied.state_dict()[key], value)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param("dcgan, spectral norm", "inductor", marks=pytest.mark.slow),
        pytest.param("sngan, two blocks and norms", "aot_eager", marks=pytest.mark.slow),
        ("r3gan", "aot_eager"),
    ],
)
def test_compiled_networks_are_the_eager_ones(name: str, backend: str) -> None:
    # In float64, since compiled code sums in another order.
    encoder, decoder = (network.double() for network in make(SMALL[name], (1, 8, 8)))
    eager = copy.deepcopy(encoder), copy.deepcopy(decoder)
    networks = [(encoder, eager[0], some_images((1, 8, 8)).double()), (decoder, eager[1], torch.randn(4, 5).double())]
    for network, other, inputs in networks:
        compiled = torch.compile(network, backend=backend, fullgraph=True)
        for _ in range(2):
            outputs, expected = compiled(inputs), other(inputs)
            torch.testing.assert_close(outputs, expected)
            outputs.square().sum().backward(), expected.square().sum().backward()
        for key, value in other.state_dict().items():
            torch.testing.assert_close(network.state_dict()[key], value)
        for parameter, twin in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, twin.grad)
