"""Names, shapes and configs of diffusers' autoencoders, and ours: the same networks, exchanged without diffusers.

Read from AutoencoderKL and VQModel of diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gen_dist.config import AutoencoderKlConfig
from gen_dist.errors import ConfigError

Weights = Mapping[str, Mapping[str, Tensor]]
"""State of the networks `encoder` and `decoder`."""
_OUTSIDE = {"encoder": "quant_conv.", "decoder": "post_quant_conv."}
"""Layers that are in our networks, and beside the networks in diffusers."""
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of attention's layers before diffusers 0.15, which many published files have."""
_CODEBOOK, _OUR_CODEBOOK = "quantize.embedding.weight", "bottleneck.codebook"
_USAGE, CODE_SUMS = "bottleneck.usage", "bottleneck.sums"
"""Statistics of our codebooks: each code's share of all places, and the sum of its vectors by the number of all."""


def diffusers_config(
    network: AutoencoderKlConfig, image_shape: tuple[int, int, int], scaling_factor: float, codes: int = 0
) -> dict[str, Any]:
    """Fields of config.json for a network: of AutoencoderKL, or with codes of VQModel.

    Args:
        network: config of the encoder and the decoder.
        image_shape: (C, H, W) of the images.
        scaling_factor: factor that gives latents a standard deviation of 1.
        codes: size of the codebook; 0 without one.
    """
    levels = range(len(network.feature_maps))
    attends = ["Attn" if 2**level in network.attention_factors else "" for level in levels]
    channels, height, width = image_shape
    return {
        "_class_name": "VQModel" if codes else "AutoencoderKL",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "block_out_channels": list(network.feature_maps),
        "down_block_types": [f"{attention}DownEncoderBlock2D" for attention in attends],
        "in_channels": channels,
        "latent_channels": network.latent_dim,
        "layers_per_block": network.blocks,
        "mid_block_add_attention": network.middle_attention,
        "norm_num_groups": network.groups,
        "out_channels": channels,
        "sample_size": height if height == width else [height, width],
        "scaling_factor": scaling_factor,
        "up_block_types": [f"{attention}UpDecoderBlock2D" for attention in reversed(attends)],
        **({"num_vq_embeddings": codes, "vq_embed_dim": network.latent_dim} if codes else {}),
    }


def network_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `autoencoder-kl` that a config.json stands for. Absent fields have diffusers' defaults.

    Raises:
        ConfigError: its network differs from ours by more than options, or there is no such network.
    """
    widths = config.get("block_out_channels", [64])
    types = config.get("down_block_types", ["DownEncoderBlock2D"])
    known = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
    if others := [one for one in types if one not in known]:
        raise ConfigError(f"its blocks {others[0]!r} are not those of {', '.join(known)}")
    if len(types) != len(widths):
        raise ConfigError(f"it has {len(widths)} block_out_channels and {len(types)} down_block_types")
    mirrored = [one.replace("Down", "Up").replace("Encoder", "Decoder") for one in reversed(types)]
    if config.get("up_block_types", mirrored) != mirrored:
        raise ConfigError(f"its up_block_types are not {', '.join(mirrored)}, the mirror of its down_block_types")
    if (activation := config.get("act_fn", "silu")) != "silu":
        raise ConfigError(f"its activation is {activation}, not silu")
    if (norm := config.get("norm_type", "group")) != "group":
        raise ConfigError(f"its normalization is {norm}, not group")
    latents = config.get("latent_channels", 4 if config["_class_name"] == "AutoencoderKL" else 3)
    if (width := config.get("vq_embed_dim", latents)) != latents:
        raise ConfigError(f"its codes have {width} channels and its latents {latents}")
    options: dict[str, Any] = {
        "feature_maps": tuple(widths),
        "blocks": config.get("layers_per_block", 1),
        "latent_dim": latents,
        "groups": config.get("norm_num_groups", 32),
        "middle_attention": config.get("mid_block_add_attention", True),
        "attention_factors": tuple(2**level for level, one in enumerate(types) if known[one]),
    }
    AutoencoderKlConfig(**options)  # refuses numbers that no network has
    return options


def codes_of(config: Mapping[str, Any]) -> int:
    """Size of the codebook of a config.json; 0 if its class has none."""
    codes: int = config.get("num_vq_embeddings", 256) if config["_class_name"] == "VQModel" else 0
    return codes


def option_changes(found: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Words of a command line that make options of ours those that were found."""
    changes = []
    for name, value in found.items():
        if ours[name] != value:
            option = name.replace("_", "-")
            if isinstance(value, bool):
                changes.append(f"--{option}" if value else f"--no-{option}")
            else:
                changes.append(f"--{option} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return changes


def to_diffusers(weights: Weights) -> dict[str, Tensor]:
    """Weights by diffusers' names. Statistics of a codebook have none."""
    named = {}
    for network, tensors in weights.items():
        for name, tensor in tensors.items():
            if name == _OUR_CODEBOOK:
                named[_CODEBOOK] = tensor.contiguous()
            elif not name.startswith("bottleneck."):
                named[name if name.startswith(_OUTSIDE[network]) else f"{network}.{name}"] = tensor.contiguous()
    return named


def from_diffusers(named: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Weights of our networks from those by diffusers' names, of any floating-point dtype; as float32.

    Usage of codes is even, as after a long training, so that none counts as dead. Models without the 1 x 1 convolutions
    beside the networks get identities for them.
    """
    weights: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in named.items():
        network, _, rest = name.partition(".")
        if network not in weights:
            network, rest = next((one for one, start in _OUTSIDE.items() if name.startswith(start)), "decoder"), name
        if name == _CODEBOOK and tensor.ndim == 2 and len(tensor):
            codes = tensor.float()
            even = torch.full(codes.shape[:1], 1.0 / len(codes))
            weights["decoder"] |= {_OUR_CODEBOOK: codes, _USAGE: even, CODE_SUMS: codes / len(codes)}
            continue
        words = rest.split(".")
        if "attentions" in words[:-2] and words[-2] in _OLD_ATTENTION:
            rest = ".".join([*words[:-2], _OLD_ATTENTION[words[-2]], words[-1]])
            tensor = tensor.flatten(1) if tensor.ndim > 2 else tensor  # the oldest are 1 x 1 convolutions
        weights[network][rest] = tensor.float()
    for network, layer, channels in (
        ("encoder", _OUTSIDE["encoder"], _rows(weights["encoder"].get("conv_out.weight"), 0)),
        ("decoder", _OUTSIDE["decoder"], _rows(weights["decoder"].get("conv_in.weight"), 1)),
    ):
        if f"{layer}weight" not in weights[network] and channels:
            weights[network][f"{layer}weight"] = torch.eye(channels)[:, :, None, None]
            weights[network][f"{layer}bias"] = torch.zeros(channels)
    return weights


def _rows(weight: Tensor | None, dimension: int) -> int:
    return weight.shape[dimension] if weight is not None and weight.ndim == 4 else 0
