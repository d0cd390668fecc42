"""Weights of diffusers' autoencoders are ours and ours are theirs: equal outputs, names, shapes and configs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gen_dist.config import AutoencoderKlConfig
from gen_dist.networks import build_decoder, build_encoder
from gen_dist.networks.diffusers_layout import (
    codes_of,
    diffusers_config,
    from_diffusers,
    network_options,
    to_diffusers,
)
from tests.support.diffusers_classes import SMALL, assert_close, diffusers
from tests.support.runs import assert_same_bits

CONFIGS = {
    "kl-f4": AutoencoderKlConfig(feature_maps=(16, 32, 64), groups=8, latent_dim=3),
    "kl-f8": AutoencoderKlConfig(feature_maps=(16, 32, 64, 64), groups=8),
    "attention at two sides": AutoencoderKlConfig(
        feature_maps=(8, 16, 16), blocks=1, groups=4, attention_factors=(2, 4)
    ),
    "no attention": dataclasses.replace(SMALL, middle_attention=False),
}
"""The published networks at an eighth of their width, and what else diffusers' classes can be."""
PUBLISHED = {
    "kl-f4": (AutoencoderKlConfig(feature_maps=(128, 256, 512), latent_dim=3), 55_312_063),
    "kl-f8": (AutoencoderKlConfig(), 83_653_863),
}


def _pair(config: AutoencoderKlConfig, shape: tuple[int, int, int]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    outputs = 2 * config.latent_dim
    return {"encoder": build_encoder(config, shape, outputs).eval(), "decoder": build_decoder(config, shape).eval()}


def _theirs(config: AutoencoderKlConfig, shape: tuple[int, int, int]) -> Any:
    return diffusers().AutoencoderKL.from_config(diffusers_config(config, shape, 1.0)).eval()


def _inputs(config: AutoencoderKlConfig, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    latents = config.latent_shape(shape)
    return torch.rand(2, *shape, generator=numbers) * 2 - 1, torch.randn(2, *latents, generator=numbers)


@torch.no_grad()
def _outputs(ours: dict[str, nn.Module], inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [ours["encoder"](inputs[0]).float(), ours["decoder"](inputs[1]).float()]


@torch.no_grad()
def _their_outputs(theirs: Any, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [theirs.encode(inputs[0]).latent_dist.parameters.float(), theirs.decode(inputs[1]).sample.float()]


def _assert_exchangeable(config: AutoencoderKlConfig, shape: tuple[int, int, int]) -> None:
    ours, theirs, inputs = _pair(config, shape), _theirs(config, shape), _inputs(config, shape)
    assert network_options(dict(theirs.config) | {"_class_name": "AutoencoderKL"}) == {
        name: getattr(config, name) for name in network_options({"_class_name": "AutoencoderKL"})
    }
    before = _outputs(ours, inputs)
    # Theirs in ours.
    for name, state in from_diffusers(theirs.state_dict()).items():
        ours[name].load_state_dict(state)
    found, expected = _outputs(ours, inputs), _their_outputs(theirs, inputs)
    assert_close(found, expected)
    assert not torch.allclose(found[0], before[0], atol=0.01)
    # Ours in theirs.
    ours = _pair(config, shape)
    theirs.load_state_dict(to_diffusers({name: part.state_dict() for name, part in ours.items()}), strict=True)
    assert_close(_their_outputs(theirs, inputs), before)
    # In bfloat16, whose values are 2^-8 apart: no farther from float32 than theirs, up to luck.
    halves = inputs[0].bfloat16(), inputs[1].bfloat16()
    errors = [
        [float((one - exact).abs().mean() / exact.abs().mean()) for one, exact in zip(outputs, before, strict=True)]
        for outputs in (
            _outputs({name: part.bfloat16() for name, part in ours.items()}, halves),
            _their_outputs(theirs.bfloat16(), halves),
        )
    ]
    for mine, other in zip(*errors, strict=True):
        assert mine < 1.5 * other + 2**-8 and mine < 0.1, errors


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(3, 24, 40), (1, 8, 8)], ids=str)
def test_weights_are_exchanged_with_equal_outputs(name: str, shape: tuple[int, int, int]) -> None:
    _assert_exchangeable(CONFIGS[name], shape)


def test_codebooks_are_exchanged_with_even_usage() -> None:
    config, shape = CONFIGS["kl-f4"], (3, 24, 40)
    theirs = diffusers().VQModel.from_config(diffusers_config(config, shape, 1.0, codes=16)).eval()
    fields = dict(theirs.config) | {"_class_name": "VQModel"}
    assert codes_of(fields) == 16 and network_options(fields)["latent_dim"] == config.latent_dim
    weights = from_diffusers(theirs.state_dict())
    codebook, usage, sums = (weights["decoder"].pop(f"bottleneck.{name}") for name in ("codebook", "usage", "sums"))
    assert torch.equal(codebook, theirs.quantize.embedding.weight)
    torch.testing.assert_close(sums / usage[:, None], codebook)  # as moving averages define a codebook
    assert float(usage.sum()) == pytest.approx(1.0)
    parts = build_encoder(config, shape, config.latent_dim).eval(), build_decoder(config, shape).eval()
    for part, state in zip(parts, weights.values(), strict=True):
        part.load_state_dict(state)
    images, latents = _inputs(config, shape)

    @torch.no_grad()
    def outputs(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        given = images.to(dtype), latents.to(dtype)
        mine = [part.to(dtype)(one).float() for part, one in zip(parts, given, strict=True)]
        theirs.to(dtype)
        other = [theirs.encode(given[0]).latents, theirs.decode(given[1], force_not_quantize=True).sample]
        return mine, [one.float() for one in other]

    exact = outputs(torch.float32)
    assert_close(*exact)
    for mine, other, wanted in zip(*outputs(torch.bfloat16), exact[1], strict=True):
        errors = [float((one - wanted).abs().mean() / wanted.abs().mean()) for one in (mine, other)]
        assert errors[0] < 1.5 * errors[1] + 2**-8 and errors[0] < 0.1
    theirs.float()
    theirs.load_state_dict(to_diffusers(weights | {"decoder": weights["decoder"] | {"bottleneck.codebook": codebook}}))
    weights["decoder"]["bottleneck.codebook"] = codebook
    assert_same_bits(to_diffusers(weights), theirs.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_autoencoders_are_exchanged(name: str) -> None:
    config, shape = PUBLISHED[name][0], (3, 24, 40)
    _assert_exchangeable(config, shape)
    # In float64 they are one function: the rest is rounding, of theirs as much as of ours.
    ours, theirs = _pair(config, shape), _theirs(config, shape).double()
    images, latents = (one.double() for one in _inputs(config, shape))
    theirs.load_state_dict(to_diffusers({name: part.state_dict() for name, part in ours.items()}), strict=True)
    with torch.no_grad():
        for found, expected in (
            (ours["encoder"].double()(images), theirs.encode(images).latent_dist.parameters),
            (ours["decoder"].double()(latents), theirs.decode(latents).sample),
        ):
            torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_autoencoders_have_diffusers_parameters(name: str) -> None:
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        theirs = _theirs(config, (3, 256, 256))
        ours = _pair(config, (3, 256, 256))
    assert sum(one.numel() for one in theirs.parameters()) == count
    assert sum(one.numel() for part in ours.values() for one in part.parameters()) == count


def test_a_published_quantized_autoencoder_has_its_parameters() -> None:
    config, shape = PUBLISHED["kl-f4"][0], (3, 256, 256)
    with torch.device("meta"):
        theirs = diffusers().VQModel.from_config(diffusers_config(config, shape, 1.0, codes=8192))
        ours = [build_encoder(config, shape, config.latent_dim), build_decoder(config, shape)]
    count = sum(one.numel() for part in ours for one in part.parameters()) + 8192 * config.latent_dim
    assert sum(one.numel() for one in theirs.parameters()) == count
