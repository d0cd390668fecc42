"""Card of a set of latents: what its columns mean, what they were made of, and code that reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gen_dist.data.forms import written
from gen_dist.data.naming import printable
from gen_dist.inference.latent_files import FileFormat
from gen_dist.inference.latent_set import LatentSet
from gen_dist.inference.markdown import code, text
from gen_dist.inference.model import GenerativeModel

_OPENINGS: dict[FileFormat, list[str]] = {
    "parquet": [
        "import numpy as np",
        "import pyarrow.parquet as pq",
        "from pathlib import Path",
        "",
        'table = pq.read_table(sorted(Path(".").glob("{split}-*.parquet")))',
        'values = {{name: table[name].combine_chunks() for name in ("{latents}", "squared_error", "label")}}',
        '{latents} = values["{latents}"].flatten().to_numpy().reshape(-1, {sides})',
        'error, labels = (values[name].to_numpy() for name in ("squared_error", "label"))',
    ],
    "safetensors": [
        "import json",
        "import numpy as np",
        "from pathlib import Path",
        "from safetensors import safe_open",
        "",
        'shards = [safe_open(file, "np") for file in sorted(Path(".").glob("{split}-*.safetensors"))]',
        'values = ("{latents}", "squared_error", "label")',
        "{latents}, error, labels = (np.concatenate([one.get_tensor(name) for one in shards]) for name in values)",
    ],
    "npz": [
        "import numpy as np",
        "",
        'table = np.load("{split}.npz")',
        '{latents}, error, labels = table["{latents}"], table["squared_error"], table["label"]',
    ],
    "csv": [
        "import csv",
        "import numpy as np",
        "",
        'with open("{split}.csv", newline="", encoding="utf-8") as file:',
        "    table = list(csv.DictReader(file))",
        '{latents} = np.array([[one[f"{latents}_{{i}}"] for i in range({size})] for one in table], np.float32)'
        ".reshape(-1, {sides})",
        'error = np.array([one["squared_error"] for one in table], np.float32)',
        'labels = np.array([int(one["label"]) for one in table])',
    ],
}
_NAMES = {
    "parquet": 'names = table["name"].to_pylist()',
    "safetensors": 'names = [name for one in shards for name in json.loads(one.metadata()["gen_dist"])["name"]]',
    "npz": 'names = table["name"]',
    "csv": 'names = [one["name"] for one in table]',
}
_CODES = {
    "parquet": 'codes = np.stack(table["codes"].to_numpy()).reshape(-1, {places})',
    "safetensors": 'codes = np.concatenate([one.get_tensor("codes") for one in shards])',
    "npz": 'codes = table["codes"]',
    "csv": 'codes = np.array([[int(one[f"codes_{{i}}"]) for i in range({count})] for one in table])'
    ".reshape(-1, {places})",
}


def latent_card(wanted: LatentSet, manifest: Mapping[str, Any], model: GenerativeModel) -> str:
    """The card as Markdown, with metadata of the Hugging Face Hub.

    Args:
        wanted: the set.
        manifest: content of its encoding.json, complete.
        model: the model that encoded it.
    """
    about, statistics = wanted.about, manifest["statistics"]
    facts = {
        "run": f"{code(about['run'])}, step {about['step']:,}, preset {code(about['preset'])}",
        "weights": f"SHA-256 {wanted.made_of['weights']}",
        "data": f"{code(about['data'])}, digest {wanted.made_of['data_digest']}",
        "images": ", ".join(f"{rows:,} of {split}" for split, rows in wanted.rows.items())
        + f"; {written(model.scale.form, model.image_shape)}"
        + (" (channels, height, width)" if model.scale.form == "images" else ""),
        **({} if model.scale.is_plain else {"values": f"{model.scale}: the model sees that range as 0..1"}),
        "classes": text(", ".join(about["class_names"])) if len(about["class_names"]) > 1 else "none",
        "latents": f"[{', '.join(map(str, model.objective.latent_shape))}] for an image",
        "scaling factor": "none: the latents do not vary"
        if statistics["scaling_factor"] is None
        else f"{statistics['scaling_factor']:.6g}: times this, latents have a standard deviation of 1",
    }
    columns = [
        (f"`{one.name}`", one.dtype, f"[{', '.join(map(str, one.shape))}]" if one.shape else "", text(one.meaning))
        for one in wanted.columns
    ]
    sections = [
        _metadata(wanted, model),
        f"# Latents of {text(about['data'])} by {text(about['preset'])}, step {about['step']:,}",
        _table(("", ""), list(facts.items())),
        "## Columns",
        _table(("column", "dtype", "shape", "meaning"), columns),
        _layout(wanted),
        "## Reading",
        f"```python\n{reading_code(wanted)}\n```",
        f"`gen_dist.load(RUN).decode` makes {model.scale.form} of `{_latents(wanted)}`. Rows are in the order of the "
        "data, each once. `encoding.json` has the digest of each file, and mean and deviation of each channel.",
    ]
    return "\n\n".join(sections) + "\n"


def reading_code(wanted: LatentSet) -> str:
    """Python code that reads one split from the working directory."""
    columns = {column.name: column for column in wanted.columns}
    latents = columns[_latents(wanted)]
    words = {"latents": latents.name, "split": next(iter(wanted.rows)), "size": latents.size}
    words |= {"sides": ", ".join(map(str, latents.shape))}
    lines = list(_OPENINGS[wanted.file_format])
    if codes := columns.get("codes"):
        lines.append(_CODES[wanted.file_format])
        words |= {"places": ", ".join(map(str, codes.shape)), "count": codes.size}
    if "name" in columns:
        lines.append(_NAMES[wanted.file_format])
    return "\n".join(line.format(**words) for line in lines)


def _layout(wanted: LatentSet) -> str:
    """Where arrays, texts and facts stand in a file."""
    match wanted.file_format:
        case "parquet":
            where = f"each shard has {wanted.shard_size:,} rows; arrays are fixed-size lists in C order"
        case "safetensors":
            where = f"each shard has {wanted.shard_size:,} rows; names are a list in the metadata `gen_dist`, JSON"
        case "npz":
            where = "one file a split, an array for each column"
        case "csv":
            latents = _latents(wanted)
            where = f"one file a split; arrays are columns `{latents}_0`, `{latents}_1`, ... in C order"
    return f"Files: {where}."


def _latents(wanted: LatentSet) -> str:
    """Name of the column that decodes to images."""
    return next(one.name for one in wanted.columns if one.name in ("mean", "latents"))


def _metadata(wanted: LatentSet, model: GenerativeModel) -> str:
    config = model.config
    tags = dict.fromkeys(["gen_dist", "latents", config.objective.kind, config.network.kind])
    lines = ["# license: say here under which license you publish it, such as mit", "tags:"]
    lines += [f"- {json.dumps(printable(tag))}" for tag in tags]
    if wanted.file_format == "parquet":
        lines += ["configs:", "- config_name: default", "  data_files:"]
        lines += [line for split in wanted.rows for line in (f"  - split: {split}", f"    path: {split}-*.parquet")]
    return "\n".join(["---", *lines, "---"])


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
