"""Directories of diffusers' autoencoders: written for its classes, and read to start a training. It is not needed here.

config.json                           class, sizes, and the factor that scales latents
diffusion_pytorch_model.safetensors   weights, float32
gen_dist.json                         config of the run, if an export wrote the directory
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gen_dist.config import AutoencoderKlConfig, LatentAutoencoderConfig, TrainConfig
from gen_dist.data import Split
from gen_dist.errors import ConfigError, shortened
from gen_dist.files import read_regular, reason_of
from gen_dist.inference.exported import DIFFUSERS_WEIGHTS
from gen_dist.inference.latent_rows import deviation_of, sums_of
from gen_dist.inference.model import GenerativeModel
from gen_dist.inference.model_card import Part, Port
from gen_dist.networks import diffusers_layout
from gen_dist.objectives import Objective
from gen_dist.records.reading import COUNT, FLAG, NUMBER, TEXT, either, list_of, parsed_object

CONFIG, WEIGHTS, RUN_CONFIG = "config.json", DIFFUSERS_WEIGHTS, "gen_dist.json"
FILES = (CONFIG, WEIGHTS, RUN_CONFIG)
_HALF_WEIGHTS = "diffusion_pytorch_model.fp16.safetensors"
_CLASSES = {"kl": "AutoencoderKL", "vq": "VQModel"}
"""Classes of diffusers by bottleneck."""
_OTHER_FORMATS = "use --format safetensors, onnx or torch-export"
_IMAGES = 1000
"""Most images that latents are measured on."""
_ROWS = 8
"""Images that are encoded at once: those of such models are large."""
_NAMES = either(list_of(TEXT), None)
_SHAPE = {
    "_class_name": TEXT,
    "block_out_channels": either(list_of(COUNT), None),
    "down_block_types": _NAMES,
    "up_block_types": _NAMES,
    "act_fn": either(TEXT, None),
    "layers_per_block": either(COUNT, None),
    "latent_channels": either(COUNT, None),
    "norm_num_groups": either(COUNT, None),
    "mid_block_add_attention": either(FLAG, None),
    "scaling_factor": either(NUMBER, None),
    "num_vq_embeddings": either(COUNT, None),
    "vq_embed_dim": either(COUNT, None),
    "norm_type": either(TEXT, None),
}


class LatentScale(NamedTuple):
    """Spread of the latents of some images."""

    deviation: float
    """Standard deviation of all entries of latents drawn from the posteriors."""
    images: int


def class_of(config: TrainConfig, way_out: str = _OTHER_FORMATS) -> str:
    """Class of diffusers for the model of a config. `way_out` ends the error.

    Raises:
        ConfigError: it has none; the line says why.
    """
    _network_of(config, way_out)
    assert isinstance(config.objective, LatentAutoencoderConfig)
    return _CLASSES[config.objective.bottleneck]


def latent_scale(model: GenerativeModel, split: Split, announce: Callable[[str], None]) -> LatentScale:
    """Measure the latents of up to 1000 images that are spread over a split.

    Raises:
        ConfigError: the latents do not vary, or are not finite.
    """
    images = torch.from_numpy(split.images[:: max(1, len(split.images) // _IMAGES)][:_IMAGES])
    announce(f"measuring the scale of the latents of {len(images):,} images")
    sums = []
    for rows in images.split(_ROWS):
        mean, logvar = model.encode(rows)
        sums.append(sums_of(mean.cpu().numpy(), None if logvar is None else logvar.cpu().numpy()))
    deviation = deviation_of(sums)
    if not deviation > 0.0:
        raise ConfigError(
            f"the latents of {len(images):,} images have the standard deviation {deviation:g}, so no factor scales "
            "them to 1; train the model first"
        )
    return LatentScale(deviation, len(images))


def parts_of(model: GenerativeModel, scale: LatentScale) -> list[Part]:
    """Descriptions of the networks for the card."""
    latents = model.objective.latent_shape
    of_values = "" if model.scale.is_plain else f", the range of values {model.scale}"
    images = Port("images", "float32", model.image_shape, f"in -1..1{of_values}")
    spread = f"standard deviation {scale.deviation:.4g} over {scale.images:,} training images"
    drawn = [Port("latents", "float32", latents, f"not scaled: {spread}")]
    posterior = [
        Port("mean", "float32", latents, "mean of the posterior"),
        Port("logvar", "float32", latents, "logarithm of its variance"),
    ]
    return [
        Part("decoder", WEIGHTS, "decoder", drawn, [images]),
        Part("encoder", WEIGHTS, "encoder", [images], posterior),
    ]


def files_of(model: GenerativeModel, scale: LatentScale) -> dict[str, bytes]:
    """Content of the directory's files by name, but for the card.

    Raises:
        ConfigError: diffusers has no class for the model.
    """
    network = _network_of(model.config)
    codes = model.objective.codebook_size
    fields = diffusers_layout.diffusers_config(network, model.image_shape, 1.0 / scale.deviation, codes)
    weights = {name: model.objective.networks[name].state_dict() for name in ("encoder", "decoder")}
    run_config = dataclasses.replace(model.config, run_dir=None)  # the path of the run is private
    return {
        CONFIG: (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS: safetensors.torch.save(diffusers_layout.to_diffusers(weights), {"format": "pt"}),
        RUN_CONFIG: run_config.to_json().encode(),
    }


def _network_of(config: TrainConfig, way_out: str = _OTHER_FORMATS) -> AutoencoderKlConfig:
    """The one network of encoder and decoder.

    Raises:
        ConfigError: the model is not one of diffusers' classes.
    """
    objective = config.objective
    if not isinstance(objective, LatentAutoencoderConfig):
        raise ConfigError(
            f"diffusers has no class for the objective {objective.kind}: its autoencoders take images in -1..1, as "
            f"latent-autoencoder does; {way_out}"
        )
    if objective.bottleneck not in _CLASSES:
        known = " and ".join(_CLASSES)
        raise ConfigError(
            f"diffusers has no class for the bottleneck {objective.bottleneck}, but for {known}; {way_out}"
        )
    found = []
    for network in (config.roles.encoder, config.roles.decoder):
        if not isinstance(network, AutoencoderKlConfig):
            raise ConfigError(f"diffusers' classes have the network autoencoder-kl, not {network.kind}; {way_out}")
        found.append(dataclasses.replace(network, checkpointing=False))
    encoder, decoder = found
    if encoder != decoder:
        raise ConfigError(
            f"diffusers' classes have one config for encoder and decoder, and those of this run differ; {way_out}"
        )
    return encoder


class Published(NamedTuple):
    """Weights of a directory, as read."""

    place: str
    """The directory, for errors."""
    fields: dict[str, Any]
    """Fields of config.json."""
    weights: dict[str, Tensor]
    """Weights by diffusers' names."""
    digest: str
    """SHA-256 of the file of weights."""


def digest_of(directory: Path) -> str:
    """SHA-256 of the weights of a directory.

    Raises:
        ConfigError: it is no directory of one of diffusers' autoencoders, or cannot be read.
    """
    return hashlib.sha256(_read(_file_of_weights(directory))).hexdigest()


def read_published(directory: Path) -> Published:
    """Read a directory that diffusers' `save_pretrained` or an export wrote.

    Raises:
        ConfigError: as `digest_of`, or a file is damaged.
    """
    file = _file_of_weights(directory)
    content = _read(file)
    try:
        fields = parsed_object(_read(directory / CONFIG), _SHAPE)
        weights = safetensors.torch.load(content)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{directory} is no whole model of diffusers: {shortened(str(error))}; fetch it again"
        ) from None
    found = {name: value for name, value in fields.items() if value is not None}
    return Published(str(directory), found, weights, hashlib.sha256(content).hexdigest())


def _file_of_weights(directory: Path) -> Path:
    """The file of weights, after a look at what the directory is."""
    said = f"{directory} is no directory of one of diffusers' autoencoders"
    if not directory.is_dir():
        raise ConfigError(f"there is no directory {directory}; name one that save_pretrained or gen-dist export wrote")
    if (directory / "model_index.json").exists():
        raise ConfigError(f"{said}, but of a whole pipeline; name the part in it: {directory / 'vae'}")
    if not (directory / CONFIG).exists():
        raise ConfigError(f"{said}: it has no {CONFIG}")
    try:
        name = parsed_object(_read(directory / CONFIG), {"_class_name": TEXT})["_class_name"]
    except ValueError as error:
        raise ConfigError(f"{said}: in {CONFIG}, {shortened(str(error))}") from None
    if name not in _CLASSES.values():
        raise ConfigError(f"{said}, but of the class {shortened(name)}; use {' or '.join(_CLASSES.values())}")
    files = [directory / WEIGHTS, directory / _HALF_WEIGHTS]
    for file in files:
        if file.exists():
            return file
    if (directory / f"{WEIGHTS}.index.json").exists():
        raise ConfigError(f"{said} in one file; save the model again with max_shard_size='100GB'")
    raise ConfigError(f"{said}: it has no {WEIGHTS}; save the model again with safe_serialization=True")


def _read(file: Path) -> bytes:
    try:
        return read_regular(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {reason_of(error)}; fix that, or name another --from") from None


def start_from(objective: Objective, config: TrainConfig, published: Published) -> None:
    """Give the encoder and the decoder of an objective the weights of a directory.

    Raises:
        ConfigError: they are of another network; the line has the options that make it ours, or the first shape.
    """
    place = published.place
    expected = class_of(config, "leave out --from")
    if (found := published.fields["_class_name"]) != expected:
        raise ConfigError(f"{place} has the class {found}, and this run needs {expected}; choose another --bottleneck")
    try:
        options = diffusers_layout.network_options(published.fields)
    except ConfigError as error:
        raise ConfigError(f"{place} is of another network: {shortened(str(error))}") from None
    network = dataclasses.asdict(_network_of(config))
    network["attention_factors"] = tuple(sorted(network["attention_factors"]))
    options |= {"codebook_size": codes} if (codes := diffusers_layout.codes_of(published.fields)) else {}
    if changes := diffusers_layout.option_changes(options, network | {"codebook_size": objective.codebook_size}):
        raise ConfigError(f"{place} is of another network than this config's; use {' '.join(changes)}")
    _refuse_values(published)
    weights = diffusers_layout.from_diffusers(published.weights)
    for name, tensors in weights.items():
        ours = objective.networks[name].state_dict()
        if diffusers_layout.CODE_SUMS not in ours:  # of a codebook that gradients move
            tensors.pop(diffusers_layout.CODE_SUMS, None)
        if missing := sorted(ours.keys() ^ tensors.keys()):
            here = "is not in" if missing[0] in ours else "is only in"
            raise ConfigError(f"{shortened(f'{name}.{missing[0]}')} {here} the weights of {place}; fetch them again")
        for key, tensor in tensors.items():
            if tensor.shape != ours[key].shape:
                raise ConfigError(
                    f"{place} has weights of another shape: {name}.{key} is {list(tensor.shape)}, and this run's "
                    f"{list(ours[key].shape)}; use images of as many channels"
                )
    for name, tensors in weights.items():
        objective.networks[name].load_state_dict(tensors)


def _refuse_values(published: Published) -> None:
    """Raise ConfigError if a weight is not of a floating-point dtype, or not finite."""
    for name, tensor in published.weights.items():
        where = f"{shortened(name)} of {published.place}"
        if not tensor.is_floating_point():
            raise ConfigError(f"{where} is {tensor.dtype}; save the model again as float32, float16 or bfloat16")
        if not tensor.float().isfinite().all():
            raise ConfigError(f"{where} has values that are not finite; fetch the weights again")
