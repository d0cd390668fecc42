"""Files of an export, and reading of one in safetensors: its weights, config and images' facts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import safetensors
from torch import Tensor

from gen_dist.config import TrainConfig
from gen_dist.config.labels import LabelScheme, scheme_of_json
from gen_dist.data.values import ValueScale, scale_of_json
from gen_dist.errors import CheckpointError, DamagedError, UnreadableError, shortened
from gen_dist.files import read_regular, retrying, unreadable
from gen_dist.records.checkpoint import IMAGE_SHAPE
from gen_dist.records.reading import COUNT, TEXT, list_of, parsed_object, read_config

Format = Literal["safetensors", "onnx", "torch-export", "diffusers"]
PartName = Literal["decoder", "encoder"]
SUFFIXES: dict[Format, str] = {"safetensors": "safetensors", "onnx": "onnx", "torch-export": "pt2"}
"""Ends of the names of formats that have a file for each part."""
CARD, CONFIG, PLUGINS = "README.md", "config.json", "plugins"
PRIOR = "fitted_prior.safetensors"
"""Prior of a model to which one was fitted."""
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAIN_CARD = "card.md"
"""Card without the Hub's metadata, the only one in exports of older versions."""
LIBRARY = "library_name: gen_dist"
"""Line of the card's metadata that marks a directory as an export."""

_ROW = re.compile(r"^\| ([\w.]+) \| [\d,]+ \| ([0-9a-f]{64}) \|\s*$", re.MULTILINE)
"""Line of a card about a file: its name, bytes and digest."""
_FACTS = {"network": TEXT, "parameters": COUNT, "image_shape": IMAGE_SHAPE, "class_names": list_of(TEXT)}
_VALUES = "values"
"""Metadata of a model of other images than 8-bit ones: the range of their values."""
_LABELS = "labels"
"""Metadata of a model of other labels than classes that no image lacks: their meaning."""


class Exported(NamedTuple):
    """An export, as read."""

    weights: dict[str, dict[str, Tensor]]
    """State of each network that was exported, by the name of the network."""
    parameters: int
    """Numbers in the parameters of the whole model, together."""
    config: TrainConfig
    image_shape: tuple[int, int, int]
    labels: LabelScheme
    scale: ValueScale
    """Values of the images."""


def is_export(path: Path) -> bool:
    """True if a directory holds an exported part, in any format."""
    parts = [f"{part}.{suffix}" for part in get_args(PartName) for suffix in SUFFIXES.values()]
    return any((path / name).exists() for name in (*parts, DIFFUSERS_WEIGHTS))


def refuse_export(path: Path) -> None:
    """Raise CheckpointError if a directory is an export, where a run is needed."""
    if is_export(path):
        raise CheckpointError(f"{path} is an export; name the run that it was made of")


def read_export(path: Path) -> Exported:
    """Read an export in safetensors, and load the copies of plug-ins beside it.

    Its files are compared with the digests in its card. A file that no card lists is taken as it is.

    Raises:
        CheckpointError: it has another format or no config.json, is damaged, or cannot be read just now.
        ConfigError: its config.json is not a config of this version, or a plug-in cannot be loaded.
    """
    files = [file for part in get_args(PartName) if (file := path / f"{part}.safetensors").exists()]
    if not files:
        raise CheckpointError(
            f"{path} is an export for other programs; gen_dist.load reads runs, checkpoints and exports with --format "
            "safetensors"
        )
    try:
        config = read_config(path / CONFIG)
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {CONFIG}, which every export has; export the run again") from None
    prior = [path / PRIOR] if (path / PRIOR).exists() else []
    _compare_digests(path, [path / CONFIG, *files, *prior])
    found = [_read(file) for file in files]
    facts = found[0][1]
    weights = {facts["network"]: tensors for tensors, facts in found}
    channels, height, width = facts["image_shape"]
    return Exported(weights, facts["parameters"], config, (channels, height, width), facts[_LABELS], facts[_VALUES])


def _compare_digests(path: Path, files: Sequence[Path]) -> None:
    """Raise DamagedError if a file has another SHA-256 than the card lists for it."""
    listed: dict[str, str] = {}
    for card in (CARD, PLAIN_CARD):
        with contextlib.suppress(FileNotFoundError):
            try:
                listed = dict(_ROW.findall(read_regular(path / card).decode(errors="replace")))
            except FileNotFoundError:
                raise
            except OSError as error:
                raise UnreadableError(unreadable(path / card, error)) from None
            break
    for file in files:
        try:
            digest = retrying(lambda file=file: _digest(file))  # type: ignore[misc]
        except OSError as error:
            raise UnreadableError(unreadable(file, error)) from None
        if listed.get(file.name, digest) != digest:
            raise DamagedError(
                f"{file} is damaged or changed: its SHA-256 is {digest[:12]}, and {card} lists "
                f"{listed[file.name][:12]}; export the run again, or remove its line from {card}"
            )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    def read() -> tuple[dict[str, Tensor], dict[str, str]]:
        with safetensors.safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118

    try:
        tensors, header = retrying(read)
        values = {name: header[name] if _FACTS[name] is TEXT else json.loads(header[name]) for name in _FACTS}
        scale = scale_of_json(json.loads(header.get(_VALUES, "null")))
        facts = parsed_object(json.dumps(values), _FACTS)
        labels = scheme_of_json(json.loads(header.get(_LABELS, "null")), facts["class_names"])
        return tensors, facts | {_VALUES: scale, _LABELS: labels}
    except OSError as error:
        raise UnreadableError(unreadable(file, error)) from None
    except KeyError as error:
        raise DamagedError(f"{file} is damaged, or of an older version: no {error} in it; export again") from None
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: {shortened(str(error))}; export the run again") from None
