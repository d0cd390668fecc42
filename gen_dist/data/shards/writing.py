"""Bytes of shards that `shards:` reads, a function of their samples alone: no times, no owners, one order."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gen_dist.errors import DataError

ShardKind = Literal["tar", "parquet"]
CLASS_KEY = "label"
"""Key of the sidecar, or column, with the class."""
FILE_KEY = "file"
"""Key of the sidecar with the name that the image had."""
PLAN_FILE = "plan.json"
"""File that stands beside shards which `ray_pack` made."""
_BYTES_A_ROW_GROUP = 2**23


def index_place(shard: str) -> str:
    """Path or URL of the contents of a shard that `ray_pack` made, which `Contents.to_bytes` gave."""
    directory, _, name = shard.rpartition("/")
    return f"{directory}/reports/{name}.index"


class Sample(NamedTuple):
    """An encoded image with its label."""

    key: str
    """Name within the shard, without a dot."""
    image: bytes
    ending: str
    """Ending of its file name: `png`."""
    labels: Mapping[str, Any]
    """Label by name: `label` of a class; or attributes and numbers. None is a missing one."""
    file: str
    """Name that the image had in its source."""


def tar_shard(samples: Sequence[Sample]) -> bytes:
    """A tar file in the WebDataset layout: `KEY.png` and `KEY.json` with the labels and `file`, for each sample.

    Format: POSIX.1-1988, "ustar Interchange Format".
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            facts = {FILE_KEY: sample.file} | {name: one for name, one in sample.labels.items() if one is not None}
            sidecar = json.dumps(facts, ensure_ascii=True, sort_keys=True).encode()
            for ending, content in ((sample.ending, sample.image), ("json", sidecar)):
                entry = tarfile.TarInfo(f"{sample.key}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def parquet_shard(samples: Sequence[Sample], names: Sequence[str], class_names: Sequence[str] | None) -> bytes:
    """A parquet file in the Hugging Face layout: columns `image` (bytes and path), and one for each label.

    Args:
        samples: the rows.
        names: names of the labels.
        class_names: names of the classes 0, 1, ..., which the file's metadata keep in their order, if `label` is one.
            None writes classes as texts, empty for images without one.

    Raises:
        DataError: pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("parquet shards need pyarrow; pip install pyarrow, or --container tar") from None
    images = pyarrow.array(
        [{"bytes": sample.image, "path": sample.file} for sample in samples],
        pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
    )
    columns: dict[str, Any] = {"image": images}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    for name in names:
        values = [sample.labels.get(name) for sample in samples]
        if name == CLASS_KEY and class_names is not None:
            numbers = {text: number for number, text in enumerate(class_names)}
            columns[name] = pyarrow.array([None if one is None else numbers[one] for one in values], pyarrow.int64())
            features[name] = {"names": list(class_names), "_type": "ClassLabel"}
        elif any(isinstance(one, str) for one in values) or (list(names) == [CLASS_KEY] and set(values) <= {None}):
            columns[name] = pyarrow.array(["" if one is None else str(one) for one in values], pyarrow.string())
            features[name] = {"dtype": "string", "_type": "Value"}
        else:
            whole = all(isinstance(one, int) for one in values if one is not None)
            columns[name] = pyarrow.array(values, pyarrow.int64() if whole else pyarrow.float32())
            features[name] = {"dtype": "int64" if whole else "float32", "_type": "Value"}
    table = pyarrow.table(columns)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    size = sum(len(sample.image) for sample in samples)
    rows = max(1, len(samples) * _BYTES_A_ROW_GROUP // max(size, 1))
    stream = io.BytesIO()
    # Encoded images hardly compress.
    pyarrow.parquet.write_table(table, stream, row_group_size=min(rows, max(len(samples), 1)), compression="none")
    return stream.getvalue()
