"""Export of the networks of a trained model for other programs: decoder or generator, and encoder, with a model card.

An export is one directory:

    decoder.SUFFIX         latents (and labels, for a conditional model) to images
    encoder.SUFFIX         images to latents, if the model has an encoder
    README.md              model card: what they are, how they were trained, how to load them
    card.md                the same without the Hub's metadata
    config.json            the config of the run, for `gen-dist train --config`
    plugins/               copies of the plug-ins that are single files

The card has the form of the Hugging Face Hub, so that the directory can be uploaded as it is. The format `diffusers`
has other files in place of config.json and the parts; see `diffusers_format`.

Decoders return intensities float32 in 0..1, and encoders take them. For data other than 8-bit images, programs (onnx
and torch-export) return and take the data's own values, and plain weights have the range of values beside them.
"""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from gen_dist.config.data import FORMS, Form
from gen_dist.data.forms import as_held, as_own
from gen_dist.errors import CheckpointError, ConfigError, UserError
from gen_dist.files import sync, whole_directory
from gen_dist.inference import diffusers_format
from gen_dist.inference.exported import CARD, CONFIG, LIBRARY, PLAIN_CARD, PLUGINS, PRIOR, SUFFIXES, Format, PartName
from gen_dist.inference.fitted_prior import FittedPrior, prior_bytes
from gen_dist.inference.loading import fitted_prior_of, home_of, model_of, read_checkpoint
from gen_dist.inference.model import GenerativeModel
from gen_dist.inference.model_card import Part, Port, card
from gen_dist.inference.truncation import take_mean_style, truncated
from gen_dist.objectives import Objective
from gen_dist.plugins.loading import contents_of
from gen_dist.records.checkpoint import Checkpoint, is_checkpoint
from gen_dist.records.run_data import open_run_data
from gen_dist.records.run_mark import is_run
from gen_dist.records.run_paths import RunPaths, WhichCheckpoint


class _Decode(nn.Module):
    """Map latents float32 [N, D], and labels [N] or [N, A] for a conditional model, to images float32 [N, C, H, W],
    signals [N, C, L] or vectors [N, D]: intensities in 0..1, or values in units."""

    def __init__(self, objective: Objective, units: nn.Module, form: Form) -> None:
        super().__init__()
        self.objective = objective
        self.units = units
        self.form = form

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        images: Tensor = self.units(self.objective.pixels(self.objective.decode(latents, labels)))
        return as_own(self.form, images)


class _Encode(nn.Module):
    """Map images float32 [N, C, H, W], signals [N, C, L] or vectors [N, D], intensities in 0..1 or values in units, to
    mean and log-variance [N, D], or to latents alone."""

    def __init__(self, objective: Objective, intensities: nn.Module, form: Form) -> None:
        super().__init__()
        self.objective = objective
        self.intensities = intensities
        self.form = form

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        # Objectives take 0..255; the numbers need not be whole.
        mean, logvar = self.objective.encode(self.intensities(as_held(self.form, images)) * 255.0)
        return mean if logvar is None else (mean, logvar)


class _Affine(nn.Module):
    """Map ranges of values to others, channel by channel: `source` [low, high] to `target`, clamped to the target."""

    source: Tensor
    target: Tensor

    def __init__(self, source: Sequence[Sequence[float]], target: Sequence[Sequence[float]]) -> None:
        super().__init__()
        for name, ends in (("source", source), ("target", target)):
            self.register_buffer(name, torch.tensor(ends, dtype=torch.float32)[:, :, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        low, high = self.source.unbind()
        least, most = self.target.unbind()
        share = ((images - low) / (high - low)).clamp(0.0, 1.0)
        return least + share * (most - least)


class _Exported(NamedTuple):
    """A part of the export, and the modules behind it."""

    part: Part
    function: nn.Module
    """Computes the outputs from the inputs."""
    network: nn.Module
    """The network with its weights."""


class _Prepared(NamedTuple):
    """An export about to be written, after everything that may refuse it."""

    parts: list[Part]
    contents: Callable[[], dict[str, bytes]]
    """Computes the files, which may take minutes."""


def export(
    run: Path,
    form: Format,
    out: Path | None = None,
    parts: Sequence[PartName] = (),
    announce: Callable[[str], None] = print,
    *,
    truncation: float = 1.0,
    data: str | None = None,
    data_root: str | None = None,
    checkpoint: WhichCheckpoint = "newest",
) -> Path:
    """Write the networks of a checkpoint of a run, or of one checkpoint directory; returns the directory of the export.

    The weights are their moving average if the run kept one. A previous export in the same directory is replaced.

    Args:
        run: directory of a run, or of one checkpoint.
        form: `safetensors` (plain weights), `onnx` or `torch-export` (whole programs for any number of images), or
            `diffusers` (a directory that its AutoencoderKL or VQModel loads, with the scale of the latents).
        out: directory to write. None is `export-FORM` in the run directory.
        parts: what to export. An empty sequence exports everything that the model has.
        announce: takes a line for each part, because its conversion takes seconds.
        truncation: distance of styles from their mean in a program, as a fraction; see `GenerativeModel.sample`, which
            takes it for plain weights.
        data: where the training data are now, if they have moved since the run; for `diffusers`.
        data_root: directory with torchvision's data sets, if it has moved since the run; for `diffusers`.
        checkpoint: that of a run directory: the newest whole one, or the best that the run keeps.

    Raises:
        ConfigError: the format or a part is unknown, the model does not have a part or has no class in diffusers, or
            the directory holds other files or cannot be written to.
        DataError: `diffusers` needs the training data, which are missing or damaged.
        CheckpointError: there is no run or checkpoint at the path, or it is damaged.
        UserError: a package for this format is missing, or the truncation is not in 0..1, or the model has no styles.
    """
    if form not in get_args(Format):
        raise ConfigError(f"format {form!r} is not one of {', '.join(get_args(Format))}")
    if unknown := [part for part in parts if part not in get_args(PartName)]:
        raise ConfigError(f"part {unknown[0]!r} is not one of {', '.join(get_args(PartName))}")
    if truncation != 1.0 and form not in ("onnx", "torch-export"):
        raise ConfigError(
            f"format {form} holds weights, to which no truncation belongs; leave it out, and give it to "
            "gen_dist.load(...).sample, or use --format onnx or torch-export"
        )
    if form == "onnx":
        _find_onnx()
    read, config = read_checkpoint(run, announce, checkpoint)
    home = run.resolve().parent.parent if is_checkpoint(run) else run.resolve()  # RUN/checkpoints/step_00001500
    if out is None and not is_run(home):
        raise ConfigError(f"{run} is a checkpoint outside of a run, in whose directory an export would be; name --out")
    out = Path(os.path.abspath(out or home / f"export-{form}"))
    _refuse_other_files(out)
    model = model_of(read, config)
    prior = _fitted_prior(model, run, checkpoint, announce)
    take_mean_style(model.objective, model.labels_in_turn)
    if form == "diffusers":
        prepared = _prepared_for_diffusers(model, read, run, parts, announce, data, data_root)
    else:
        with truncated(model.objective, truncation, model.labels_in_turn):  # parts are copies, which keep it
            prepared = _prepared_parts(model, read, form, parts, announce, truncation)
    try:
        with whole_directory(out) as directory:
            files = prepared.contents()
            if prior:
                files[PRIOR] = prior_bytes(prior)
            text = card(model, read, home, form, prepared.parts, files, announce, prior)
            plain = text.split("\n---\n", 1)[-1].lstrip()  # without the Hub's metadata
            cards = {CARD: text, PLAIN_CARD: plain}
            files |= {name: card_text.encode(errors="backslashreplace") for name, card_text in cards.items()}
            for name, content in files.items():
                (directory / name).write_bytes(content)
            _write_plugins(directory / PLUGINS, contents_of(config.plugins))
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}; choose another --out") from None
    return out


def _fitted_prior(
    model: GenerativeModel, run: Path, checkpoint: WhichCheckpoint, announce: Callable[[str], None]
) -> FittedPrior | None:
    """Prior that was fitted to these weights, if there is one."""
    if not RunPaths(home_of(run)).fitted_prior.exists():
        return None
    try:
        return fitted_prior_of(model, run, checkpoint)
    except CheckpointError as error:
        announce(f"the export has no fitted prior: {error}")
        return None


def _prepared_parts(
    model: GenerativeModel,
    checkpoint: Checkpoint,
    form: Format,
    parts: Sequence[PartName],
    announce: Callable[[str], None],
    truncation: float,
) -> _Prepared:
    """A file for each part, and the config."""
    if "encoder" in parts and not model.objective.encodes:
        raise ConfigError(f"a model of preset {model.config.preset} has no encoder; use --parts decoder")
    wanted = _parts_of(model, form, parts, truncation)

    def contents() -> dict[str, bytes]:
        # The path of the run is private. A run trained with this config goes to the default directory.
        files = {CONFIG: replace(model.config, run_dir=None).to_json().encode()}
        for place, one in enumerate(wanted):
            announce(f"{one.part.file} ({place + 1} of {len(wanted)})")
            files[one.part.file] = _WRITERS[form](one, _facts(model, checkpoint, one.part))
        return files

    return _Prepared([one.part for one in wanted], contents)


def _prepared_for_diffusers(
    model: GenerativeModel,
    checkpoint: Checkpoint,
    run: Path,
    parts: Sequence[PartName],
    announce: Callable[[str], None],
    data: str | None,
    data_root: str | None,
) -> _Prepared:
    """A directory of diffusers, after its latents' scale is measured on the training images."""
    if parts:
        raise ConfigError("format diffusers has one file for both parts; leave out --parts")
    diffusers_format.class_of(model.config)  # before the data are opened
    digest = checkpoint.facts["data_digest"]
    dataset = open_run_data(run, model.config, announce, digest=digest, data=data, data_root=data_root)
    scale = diffusers_format.latent_scale(model, dataset.train.sample, announce)
    return _Prepared(diffusers_format.parts_of(model, scale), lambda: diffusers_format.files_of(model, scale))


def _refuse_other_files(out: Path) -> None:
    """Raise ConfigError if the directory holds anything but a previous export."""
    ours = {
        CARD,
        PLAIN_CARD,
        CONFIG,
        PLUGINS,
        PRIOR,
        *diffusers_format.FILES,
        *(f"{part}.{suffix}" for part in get_args(PartName) for suffix in SUFFIXES.values()),
    }
    try:
        found = {file.name for file in out.iterdir()}
        # Many directories have a README.md and a config.json.
        is_export = PLAIN_CARD in found or (CARD in found and LIBRARY in (out / CARD).read_text(errors="replace"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; choose another --out") from None
    others = found - ours or (set() if is_export else found)
    if others:
        raise ConfigError(f"{out} holds {min(others)}, which is not of an export; choose another --out")


def _write_plugins(directory: Path, contents: Mapping[str, bytes]) -> None:
    if contents:
        directory.mkdir()
    for name, content in contents.items():
        (directory / name).write_bytes(content)
        sync(directory / name)


def _parts_of(
    model: GenerativeModel, form: Format, wanted: Sequence[PartName], truncation: float = 1.0
) -> list[_Exported]:
    objective, latents = model.objective, model.objective.latent_shape
    shape, rows = model.own_shape, model.scale.form
    if form == "safetensors":  # plain weights take and give what networks do
        shape, rows = model.image_shape, "images"
    scale, units = model.scale, not model.scale.is_plain and form != "safetensors"
    told = f"values of the data as float32: {scale}" if units else "in 0..1"
    images = told if units else "intensities in 0..1; divide uint8 by 255"
    if not scale.is_plain and not units:
        told = images = f"intensities in 0..1, the range of values {scale}"
    of_model, of_data = ([[0.0], [1.0]], [scale.low, scale.high])
    to_units, to_model = (
        _Affine(*ends) if units else nn.Identity() for ends in ((of_model, of_data), (of_data, of_model))
    )
    drawn = "of the prior: standard normal" if objective.generates else "as the encoder gives them"
    if truncation != 1.0:
        drawn += f"; their styles are truncated to {truncation:g} of the distance from the mean style"
    inputs = [Port("latents", "float32", latents, drawn)]
    if objective.conditional:
        inputs.append(Port("labels", model.labels.dtype, model.labels.shape, model.labels.meaning))
    name = "generator" if "generator" in objective.networks else "decoder"
    decoder = Part("decoder", f"decoder.{SUFFIXES[form]}", name, inputs, [Port(rows, "float32", shape, told)])
    found = [_Exported(decoder, _Decode(_alone(objective, name), to_units, rows), objective.networks[name])]
    if objective.encodes:
        code = [
            Port("mean", "float32", latents, "mean of the posterior"),
            Port("logvar", "float32", latents, "logarithm of its variance: sigma = exp(logvar / 2)"),
        ]
        if not objective.gives_logvar:
            code = [Port("latents", "float32", latents, "what decodes to the image")]
        taken = [Port(rows, "float32", shape, images)]
        encoder = Part("encoder", f"encoder.{SUFFIXES[form]}", "encoder", taken, code)
        encode = _Encode(_alone(objective, "encoder"), to_model, rows)
        found.append(_Exported(encoder, encode, objective.networks["encoder"]))
    return [one for one in found if not wanted or one.part.name in wanted]


def _alone(objective: Objective, network: str) -> Objective:
    """Copy an objective with only one of its networks: an exported program contains every module it can reach."""
    alone = copy.deepcopy(objective).eval().requires_grad_(False)
    for name in set(alone.networks) - {network}:
        del alone.networks[name]
    return alone


def _facts(model: GenerativeModel, checkpoint: Checkpoint, part: Part) -> dict[str, str]:
    """Metadata of a file."""
    return {
        "network": part.network,
        "parameters": str(sum(parameter.numel() for parameter in model.objective.parameters())),
        "preset": model.config.preset,
        "checkpoint_step": str(checkpoint.step),
        "weights": "moving average" if "averaged" in checkpoint.tensors else "as trained",
        "data": model.config.data,
        "data_digest": checkpoint.facts["data_digest"],
        "image_shape": json.dumps(model.image_shape),
        "class_names": json.dumps(model.class_names),
        **({} if model.scale.is_plain else {"values": json.dumps(model.scale.as_json())}),
        **({} if model.labels.is_plain else {"labels": json.dumps(model.labels.as_json())}),
    }


def _safetensors(one: _Exported, facts: dict[str, str]) -> bytes:
    weights = {name: tensor.contiguous() for name, tensor in one.network.state_dict().items()}
    return _with_sorted_metadata(safetensors.torch.save(weights, {"format": "pt", **facts}))


def _with_sorted_metadata(content: bytes) -> bytes:
    """Content of a safetensors file with its metadata sorted: the library writes them in another order each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def _torch_export(one: _Exported, facts: dict[str, str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(_program(one), file, extra_files={"facts.json": json.dumps(facts)})
    return file.getvalue()


def _onnx(one: _Exported, facts: dict[str, str]) -> bytes:
    named = torch.onnx.export(
        _program(one),
        dynamo=True,
        input_names=[port.name for port in one.part.inputs],
        output_names=[port.name for port in one.part.outputs],
        # Named once: all inputs have the same batch size, and a second name causes a warning.
        dynamic_shapes={_argument(port): {} if place else {0: "N"} for place, port in enumerate(one.part.inputs)},
        verbose=False,
    )
    assert named is not None
    proto = named.model_proto
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=value)
    serialized: bytes = proto.SerializeToString()
    return serialized


_WRITERS: dict[Format, Callable[[_Exported, dict[str, str]], bytes]] = {
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torch-export": _torch_export,
}


def _program(one: _Exported) -> torch.export.ExportedProgram:
    """Trace a part to a graph of torch's own operators, without the faster kernels of eager mode."""
    rows = torch.export.Dim("N", min=1)
    # Two rows: torch would take one row for a constant.
    examples = tuple(
        torch.zeros(2, *port.shape, dtype=torch.int64 if port.dtype == "int64" else torch.float32)
        for port in one.part.inputs
    )
    shapes = {_argument(port): {0: rows} for port in one.part.inputs}
    try:
        program = torch.export.export(one.function, examples, dynamic_shapes=shapes)
    except RuntimeError as error:
        if "Constraints violated (N)" not in str(error):
            raise
        raise UserError(
            f"the {one.part.name} takes the number of images for a constant, as len(x) does in a program, so it cannot "
            "be exported for any number of them; write x.shape[0], or -1 in a view"
        ) from None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # holds private paths
    return program


def _argument(port: Port) -> str:
    """Name of an input in `forward`."""
    return "images" if port.name in FORMS else port.name


def _find_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"format onnx needs the package {error.name}; run `pip install onnx onnxscript`, the extra `export`"
        ) from None
