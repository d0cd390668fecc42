"""Model card of an export: what its files are, how they were trained, and how to load them."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from gen_dist.config import RoleName
from gen_dist.config.data import FORMS
from gen_dist.errors import CheckpointError
from gen_dist.inference.exported import PRIOR
from gen_dist.inference.fitted_prior import FittedPrior
from gen_dist.inference.hub_metadata import Measured, metadata
from gen_dist.inference.markdown import code, text
from gen_dist.inference.model import GenerativeModel
from gen_dist.inference.truncation import truncating_decoder
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.records.environment import ENVIRONMENT_SHAPE
from gen_dist.records.reading import OBJECT, Kind, either, read_object
from gen_dist.records.run_paths import RunPaths
from gen_dist.records.summary import SUMMARY_SHAPE


class Port(NamedTuple):
    """Input or output of an exported network."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Shape of one image or latent, without the batch dimension."""
    meaning: str

    def __str__(self) -> str:
        return f"`{self.name}` {self.dtype} [{', '.join(map(str, ('N', *self.shape)))}], {text(self.meaning)}"


class Part(NamedTuple):
    """An exported network."""

    name: str
    """`decoder` or `encoder`."""
    file: str
    network: str
    """Its name in the objective. The decoder of a GAN is its generator."""
    inputs: Sequence[Port]
    outputs: Sequence[Port]


def card(
    model: GenerativeModel,
    checkpoint: Checkpoint,
    run: Path,
    form: str,
    parts: Sequence[Part],
    files: Mapping[str, bytes],
    announce: Callable[[str], None],
    prior: FittedPrior | None = None,
) -> str:
    """The card as Markdown.

    Args:
        model: the exported model.
        checkpoint: its checkpoint.
        run: run directory, for metrics and command.
        form: format of the files.
        parts: exported networks.
        files: content of each file beside the card, by its name.
        announce: takes a line about each file of the run that cannot be read.
        prior: prior that was fitted to these weights.
    """
    config, step, rows = model.config, checkpoint.step, model.scale.form
    kinds = f"objective {text(config.objective.kind)}, network {text(config.network.kind)}"
    for role in get_args(RoleName):
        if own := getattr(config, role):
            kinds += f", {role} {text(own.kind)}"
    images_seen = step * config.global_batch_size
    ema = config.optimization.ema_decay
    decay = f"decay {ema:g}" if ema is not None else f"half-life {config.schedule.final_ema_images} images"
    weights = f"the moving average of the weights, {decay}" if "averaged" in checkpoint.tensors else "as trained"
    trained = {
        "run": f"{code(run.name)}, step {step:,} of {config.steps:,}",
        "preset": f"{code(config.preset)}: {kinds}",
        "data": f"{code(config.data)}, digest {text(checkpoint.facts['data_digest'])}",
        rows: f"{_shape(model)}, {images_seen:,} seen",
        "values": None if model.scale.is_plain else f"{model.scale}: the model sees that range as 0..1",
        "classes": text(", ".join(model.class_names)) if model.classes > 1 else None,
        "labels": None if model.labels.kind == "classes" else text(model.labels.meaning),
        "training": f"{checkpoint.facts['training_seconds']:.1f} s",
        "weights": weights,
        "styles": _styles(model, form),
        "prior": None if prior is None else _prior(prior, form),
        "command": _command(_read(RunPaths(run).environment, ENVIRONMENT_SHAPE, announce)),
        "again": f"`gen-dist train --config {'gen_dist.json' if form == 'diffusers' else 'config.json'}`",
    }
    what = " and ".join(part.network for part in parts)
    measured = _measured(run, step, announce)
    sections = [
        metadata(model, form, any(part.name == "decoder" for part in parts), measured),
        f"# {text(config.preset)}, step {step:,}: {what} ({form})",
        "In eval mode: batch normalization uses the statistics of the training. N is the number of images, from 1 on.",
        "\n".join(_lines_of(part) for part in parts),
        "## Loading",
        f"```python\n{_code(model, form, parts)}\n```",
        *(
            [f"`gen_dist.load(DIRECTORY)` does the same, and samples and encodes {model.scale.dtype} {rows}."]
            * (form == "safetensors")
        ),
        "## Training",
        _table(("", ""), [(name, value) for name, value in trained.items() if value]),
        "## Metrics",
        _metrics(measured),
        "## Files",
        _table(
            ("file", "bytes", "SHA-256"),
            [(name, f"{len(data):,}", hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _shape(model: GenerativeModel) -> str:
    axes = {"images": "channels, height, width", "signals": "channels, length", "vectors": "values"}[model.scale.form]
    return f"{' x '.join(map(str, model.own_shape))} ({axes})"


def _styles(model: GenerativeModel, form: str) -> str | None:
    """Where the mean style is, of models whose samples can be truncated."""
    if truncating_decoder(model.objective) is None:
        return None
    if form == "safetensors":
        return (
            "their mean is `decoder.mean_style`; `gen_dist.load(DIRECTORY).sample(64, truncation=0.7)` is nearer to it"
        )
    return "`gen-dist export --truncation 0.7` writes a program whose images are nearer to the mean style"


def _prior(prior: FittedPrior, form: str) -> str:
    """Place of the fitted prior, and a way to draw from it."""
    use = '`gen_dist.load(DIRECTORY).sample(64, prior="fitted")` draws from it'
    if form != "safetensors":
        use = (
            "latents are `centre + c @ directions`; of a component k drawn by `weights`, the first c are `means[k] + "
            "factors[k] @ noise`, and the others `deviations * noise`"
        )
    return f"{prior.told}, in {code(PRIOR)}: {use}"


def _lines_of(part: Part) -> str:
    lines = [f"- **`{part.file}`**, the {part.network}"]
    lines += [f"  - takes {port}" for port in part.inputs]
    lines += [f"  - gives {port}" for port in part.outputs]
    return "\n".join(lines)


def _code(model: GenerativeModel, form: str, parts: Sequence[Part]) -> str:
    """Python code that loads the files from its working directory, and uses them once."""
    if form == "diffusers":
        return _code_of_diffusers(model)
    array = "np" if form == "onnx" else "torch"
    lines = [*_opening(model, form, parts[0]), *(_load(part, form) for part in parts)]
    for part in reversed(parts):  # the encoder first: that of an autoencoder gives the decoder's latents
        for port in part.inputs:
            sides = ", ".join(map(str, port.shape))
            if port.name in FORMS:
                zeros = f"np.zeros((64, {sides}), np.float32)" if array == "np" else f"torch.zeros(64, {sides})"
                lines.append(f"{port.name} = {zeros}  # {port.meaning if 'values' in port.meaning else 'in 0..1'}")
            elif port.name == "labels":
                lines.append(_labels(model, array))
            elif model.objective.generates or len(parts) == 1:
                normal = (
                    f"np.random.randn(64, {sides}).astype(np.float32)" if array == "np" else f"torch.randn(64, {sides})"
                )
                lines.append(f"latents = {normal}")
            elif model.objective.gives_logvar:
                lines.append("latents = mean")
        lines.append(_call(part, form))
    return "\n".join(lines)


def _code_of_diffusers(model: GenerativeModel) -> str:
    sides = ", ".join(map(str, model.image_shape))
    name, encoded = (
        ("VQModel", "latents") if model.objective.codebook_size else ("AutoencoderKL", "latent_dist.sample()")
    )
    return "\n".join(
        [
            *("import torch", f"from diffusers import {name}", ""),
            f'vae = {name}.from_pretrained(".").eval()',
            f"images = torch.zeros(4, {sides})  # in 0..1",
            f"encoded = vae.encode(images * 2 - 1).{encoded}",
            "latents = encoded * vae.config.scaling_factor  # what a diffusion model learns",
            "decoded = vae.decode(latents / vae.config.scaling_factor).sample * 0.5 + 0.5",
        ]
    )


def _opening(model: GenerativeModel, form: str, part: Part) -> list[str]:
    match form:
        case "onnx":
            return ["import numpy as np", "import onnxruntime", ""]
        case "torch-export":
            return ["import torch", ""]
    return [
        *("from pathlib import Path", "", "import torch", "from safetensors.torch import load_file", ""),
        *("from gen_dist.config import TrainConfig", "from gen_dist.objectives import build_objective", ""),
        'config = TrainConfig.from_json(Path("config.json").read_text(), "config.json")',
        *_labels_of_data(model, part),
    ]


def _labels(model: GenerativeModel, array: str) -> str:
    """Line that makes labels of 64 images."""
    if model.labels.kind == "classes":
        return f"labels = {array}.arange(64) % {model.classes}"
    row = ", ".join(
        f"{value:.0f}" if model.labels.kind == "attributes" else repr(value) if value == value else f"{array}.nan"
        for value in model.labels.examples[0]
    )
    if array == "np":
        return f"labels = np.array([[{row}]] * 64, np.{model.labels.dtype})  # as of a training image"
    return f"labels = torch.tensor([[{row}]] * 64, dtype=torch.{model.labels.dtype})  # as of a training image"


def _labels_of_data(model: GenerativeModel, part: Part) -> list[str]:
    """Lines that build the objective."""
    build = f"model = build_objective(config, {model.image_shape}, {{}}).eval().requires_grad_(False)"
    if model.labels.is_plain:
        return [build.format(model.classes)]
    return [
        "import json",
        "from safetensors import safe_open",
        "from gen_dist.config.labels import scheme_of_json",
        f'with safe_open("{part.file}", "pt") as file:  # its metadata say what the labels mean',
        '    labels = scheme_of_json(json.loads(file.metadata()["labels"]), ())',
        build.format("labels"),
    ]


def _load(part: Part, form: str) -> str:
    match form:
        case "onnx":
            return f'{part.name} = onnxruntime.InferenceSession("{part.file}")'
        case "torch-export":
            return f'{part.name} = torch.export.load("{part.file}").module()'
    return f'model.networks["{part.network}"].load_state_dict(load_file("{part.file}"))'


def _call(part: Part, form: str) -> str:
    inputs, outputs = [port.name for port in part.inputs], [port.name for port in part.outputs]
    given = ", ".join(outputs)
    match form:
        case "onnx":  # always returns a list
            fed = ", ".join(f'"{name}": {name}' for name in inputs)
            return f"{given}{',' * (len(outputs) == 1)} = {part.name}.run(None, {{{fed}}})"
        case "torch-export":
            return f"{given} = {part.name}({', '.join(inputs)})"
    if part.name == "encoder":  # returns a pair, whose second part may be None, and takes 0..255
        return f"{given}{', _' * (len(outputs) == 1)} = model.encode(images * 255)"
    return f"{given} = model.pixels(model.decode({', '.join(inputs)}))"


def _command(environment: Mapping[str, Any]) -> str | None:
    """Command that last started the run; None if it was not one of ours, e.g. in a worker of Ray."""
    program, *options = environment.get("command") or [""]
    path = Path(program)
    if path.parent.name == "launch":
        program = f"python -m gen_dist.launch.{path.stem}"
    elif path.stem == "gen-dist":
        program = "gen-dist"
    else:
        return None
    return code(f"{program} {shlex.join(options)}")


def _measured(run: Path, step: int, announce: Callable[[str], None]) -> Measured | None:
    """Metrics of exactly this step: from an evaluation, or else from the end of the run."""
    files = RunPaths(run).evaluation, RunPaths(run).evaluation_best
    found_of = [_read(file, {"metrics": OBJECT, "warnings": either(OBJECT, None)}, announce) for file in files]
    evaluation = next((one for one in found_of if one.get("checkpoint_step") == step), {})
    summary = _read(RunPaths(run).summary, SUMMARY_SHAPE, announce)
    names: dict[str, str] = {}
    warnings: dict[str, str] = {}
    if evaluation:
        split = str(evaluation.get("split", "test"))
        source, found = f"evaluation of the {split} split", evaluation.get("metrics", {})
        warnings = {str(name): str(line) for name, line in (evaluation.get("warnings") or {}).items()}
    elif summary.get("steps") == step:
        split, source = "test", "the end of the run"
        found, names = summary.get("final") or {}, summary.get("names") or {}
        found = {name: value for name, value in found.items() if name.startswith(("test/", "samples/", "evaluation/"))}
    else:
        return None
    values = {name: one for name, one in found.items() if isinstance(one, int | float)}
    return Measured(source, split, values, names, warnings)


def _metrics(measured: Measured | None) -> str:
    if measured is None:
        return "No metrics are recorded for this step."
    titles = {name: f"{name} ({title})" for name, title in measured.names.items()}
    rows = [(text(titles.get(name, name)), f"{value:.6g}") for name, value in measured.values.items()]
    told = "".join(f"{text(name)}: {text(line)}.\n\n" for name, line in measured.warnings.items())
    return f"From {text(measured.source)}.\n\n{told}{_table(('metric', 'value'), rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _read(file: Path, shape: Mapping[str, Kind], announce: Callable[[str], None]) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file is missing, damaged or cannot be read just now."""
    try:
        return read_object(file, shape, "the card goes without it")
    except FileNotFoundError:
        return {}
    except CheckpointError as error:
        announce(str(error))
        return {}
