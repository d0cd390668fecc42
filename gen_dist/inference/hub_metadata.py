"""Metadata of a model card for the Hugging Face Hub: the YAML block at its start.

Its strings are written as JSON, which YAML reads; so names of classes and files say what they are, and nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gen_dist.data.naming import printable
from gen_dist.inference.exported import LIBRARY
from gen_dist.inference.model import GenerativeModel

HUB_DATASETS = {
    "mnist": "ylecun/mnist",
    "mnist5k": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
}
"""Names on the Hub of data sets that stand there."""
_NOT_YAML = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Measured(NamedTuple):
    """Metrics of an exported model."""

    source: str
    """Source of the figures, in words."""
    split: str
    values: Mapping[str, float]
    names: Mapping[str, str]
    """Titles of some of them, by metric."""
    warnings: Mapping[str, str]
    """Findings on the model, as clauses, by metric."""


def metadata(model: GenerativeModel, form: str, has_decoder: bool, measured: Measured | None) -> str:
    """The block with its fences. The license is left to the user.

    Args:
        model: the exported model.
        form: format of the files.
        has_decoder: False if only the encoder is exported.
        measured: metrics of this checkpoint.
    """
    generates = model.objective.generates and has_decoder
    # The Hub's lists of tasks have none for images of a chosen class.
    task = "unconditional-image-generation" if generates else "image-feature-extraction"
    if model.scale.form != "images":
        task = "other"
    config = model.config
    source = config.data.partition(":")[0]  # a path is private
    library = "library_name: diffusers" if form == "diffusers" else LIBRARY
    form = {"torch-export": "pytorch"}.get(form, form)
    # No export has the discriminator.
    kinds = {role: getattr(config.roles, role).kind for role in config.objective.roles if role != "discriminator"}
    tags = dict.fromkeys(["gen_dist", config.objective.kind, *kinds.values(), form])
    lines = ["# license: say here under which license you publish it, such as mit", library, f"pipeline_tag: {task}"]
    lines += ["tags:", *(f"- {_quoted(tag)}" for tag in tags), f"networks: {_quoted(kinds)}"]
    if source in HUB_DATASETS:
        lines += ["datasets:", f"- {HUB_DATASETS[source]}"]
    if measured and (metrics := list(_metrics(measured))):
        dataset = {"type": HUB_DATASETS.get(source, source), "name": source, "split": measured.split}
        result = {"task": {"type": task}, "dataset": dataset, "metrics": metrics}
        lines += ["model-index:", f"- {_quoted({'name': config.preset, 'results': [result]})}"]
    return "\n".join(["---", *lines, "---"])


def _metrics(measured: Measured) -> Iterator[dict[str, Any]]:
    for name, value in measured.values.items():
        if math.isfinite(value):
            yield {"type": name, "value": value, "name": measured.names.get(name, name)}


def _quoted(value: Any) -> str:
    """A value of JSON as YAML on one line, without the characters that YAML refuses."""
    text = json.dumps(_printable(value), ensure_ascii=False)
    return _NOT_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _printable(value: Any) -> Any:
    match value:
        case str():
            return printable(value)
        case dict():
            return {name: _printable(one) for name, one in value.items()}
        case list():
            return [_printable(one) for one in value]
    return value
