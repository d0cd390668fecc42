"""summary.json: a finished run in a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gen_dist.config import TrainConfig
from gen_dist.records.collapse import CollapseWatch
from gen_dist.records.reading import COUNT, OBJECT, SECONDS, TEXT, either, values_of

SUMMARY_SHAPE = {
    **{"steps": COUNT, "training_seconds": SECONDS, "epochs": SECONDS, "final": either(OBJECT, None)},
    **{"best": either(OBJECT, None), "names": either(values_of(TEXT), None)},
}
"""Fields of summary.json on which readers rely."""


def last_values(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of each metric, such as `test/loss`, in the records of metrics.jsonl."""
    values: dict[str, Any] = {}
    for record in records:
        values |= {name: value for name, value in record.items() if "/" in name}
    return values


def summary_of(
    config: TrainConfig,
    records: Sequence[Mapping[str, Any]],
    *,
    step: int,
    train_images: int,
    training_seconds: float,
    pictures: Mapping[str, Path],
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        config: of the run.
        records: the objects of metrics.jsonl.
        step: optimizer steps done.
        train_images: size of the train split.
        training_seconds: wall time of the steps, without evaluation, pictures and checkpoints.
        pictures: final pictures by name, as paths relative to the run directory.
    """
    final = last_values(records)
    headline = next((f"test/{name}" for name in config.objective.test_metrics), "")
    tested = [record for record in records if record.get(headline) is not None]
    best = min(tested, key=lambda record: float(record[headline]), default=None)
    images = step * config.global_batch_size
    return {
        "preset": config.preset,
        "steps": step,
        "images_seen": images,
        "epochs": images / train_images,
        "training_seconds": training_seconds,
        "images_per_second": images / training_seconds if training_seconds else None,
        "final": final,
        "names": {
            f"test/{name}": f"{named.title}, {named.unit}"
            for name, named in config.objective.figure_names.items()
            if f"test/{name}" in final
        },
        "best": {"step": best["step"], headline: best[headline]} if best else None,
        "collapses": [collapse.text for collapse in CollapseWatch(config.steps, records).present],
        "pictures": {name: str(path) for name, path in pictures.items()},
    }
