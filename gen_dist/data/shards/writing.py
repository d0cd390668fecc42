"""Bytes of shards that `shards:` reads, a function of their samples alone: no times, no owners, one order."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from gen_dist.errors import DataError

ShardKind = Literal["tar", "parquet"]
FILE_KEY = "file"
"""Key of the sidecar with the name that the image had."""
_BYTES_A_ROW_GROUP = 2**23


class Sample(NamedTuple):
    """An encoded image with its label."""

    key: str
    """Name within the shard, without a dot."""
    image: bytes
    ending: str
    """Ending of its file name: `png`."""
    label: str | None
    """Name of its class."""
    file: str
    """Name that the image had in its source."""


def tar_shard(samples: Sequence[Sample]) -> bytes:
    """A tar file in the WebDataset layout: `KEY.png` and `KEY.json` with `label` and `file`, for each sample.

    Format: POSIX.1-1988, "ustar Interchange Format".
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            facts = {FILE_KEY: sample.file} | ({} if sample.label is None else {"label": sample.label})
            sidecar = json.dumps(facts, ensure_ascii=True, sort_keys=True).encode()
            for ending, content in ((sample.ending, sample.image), ("json", sidecar)):
                entry = tarfile.TarInfo(f"{sample.key}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def parquet_shard(samples: Sequence[Sample], class_names: Sequence[str] | None) -> bytes:
    """A parquet file in the Hugging Face layout: columns `image` (bytes and path) and `label`.

    Args:
        samples: the rows.
        class_names: names of the labels 0, 1, ..., which the file's metadata keep in their order. If there are none,
            labels are texts, empty for images without one. None leaves out the column: no image has a label.

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
    if class_names is not None and not class_names:
        columns["label"] = pyarrow.array([sample.label or "" for sample in samples], pyarrow.string())
        features["label"] = {"dtype": "string", "_type": "Value"}
    elif class_names is not None:
        numbers = {name: number for number, name in enumerate(class_names)}
        labels = [None if sample.label is None else numbers[sample.label] for sample in samples]
        columns["label"] = pyarrow.array(labels, pyarrow.int64())
        features["label"] = {"names": list(class_names), "_type": "ClassLabel"}
    table = pyarrow.table(columns)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    size = sum(len(sample.image) for sample in samples)
    rows = max(1, len(samples) * _BYTES_A_ROW_GROUP // max(size, 1))
    stream = io.BytesIO()
    # Encoded images hardly compress.
    pyarrow.parquet.write_table(table, stream, row_group_size=min(rows, max(len(samples), 1)), compression="none")
    return stream.getvalue()
