"""Result of evaluating a checkpoint: the content of evaluation.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gen_dist.errors import CheckpointError, DamagedError, OtherVersionError, UserError
from gen_dist.evaluation.guide import FITTED, base_name
from gen_dist.evaluation.metric import Value
from gen_dist.evaluation.metrics import all_metrics
from gen_dist.files import file_lock, reason_of
from gen_dist.records.readable import readable_figure
from gen_dist.records.reading import (
    COUNT,
    NUMBER,
    OBJECT,
    TEXT,
    check_fields,
    either,
    list_of,
    object_with,
    read_object,
    values_of,
    write_object,
)
from gen_dist.records.run_paths import RunPaths, WhichCheckpoint

FORMAT = 1

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of one checkpoint, and how they were measured."""

    checkpoint_step: int
    preset: str
    data: str
    data_digest: str
    split: str
    """Split used for likelihoods and compared with samples."""
    features: dict[str, Any] | None
    """`name` and `digest` of the network, and for digits `accuracy` on the split. None without features."""
    pixels: dict[str, str]
    """Pixel model of each likelihood: `binarized`, `real-valued`, or the dtype of whole numbers, such as uint8. They do
    not compare with each other."""
    metrics: dict[str, Value]
    unavailable: dict[str, str]
    """Requested metrics that are not available for the model or the data, with reasons."""
    seconds: dict[str, float]
    """Time of each stage."""
    environment: dict[str, Any]
    intervals: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """95 % confidence interval of metrics, [low, high]. Older evaluations have none, nor warnings."""
    warnings: dict[str, str] = dataclasses.field(default_factory=dict)
    """Finding of a metric on the model, as a clause, by the metric."""
    references: dict[str, str] = dataclasses.field(default_factory=dict)
    """Images other than the test split that samples are compared with, by their name in metrics."""
    fitted_prior: str | None = None
    """Digest of the fitted prior that figures named `fitted` are of. None without such figures."""

    def added_to(self, before: Evaluation | None) -> Evaluation:
        """Merge with the figures of `before`, if it is of the same checkpoint and data.

        If feature networks differ, figures of `before` that rest on features are dropped. If fitted priors differ,
        those of samples from one are.
        """
        if before is None:
            return self
        if (before.checkpoint_step, before.data_digest) != (self.checkpoint_step, self.data_digest):
            return self
        if before.features and self.features and before.features["digest"] != self.features["digest"]:
            before = before._without_features()
        if before.fitted_prior and self.fitted_prior and before.fitted_prior != self.fitted_prior:
            before = before._without(lambda name: name.endswith(FITTED))
        metrics = before.metrics | self.metrics
        return dataclasses.replace(
            self,
            features=(before.features or {}) | (self.features or {}) or None,
            pixels=before.pixels | self.pixels,
            metrics=metrics,
            unavailable={k: v for k, v in (before.unavailable | self.unavailable).items() if k not in metrics},
            seconds=before.seconds | self.seconds,
            intervals=before._kept(before.intervals, self) | self.intervals,
            warnings=before._kept(before.warnings, self) | self.warnings,
            references=before.references | self.references,
            fitted_prior=self.fitted_prior or before.fitted_prior,
        )

    def _kept(self, of_metrics: dict[str, T], after: Evaluation) -> dict[str, T]:
        """Entries of these metrics that another evaluation has not measured again."""
        return {name: one for name, one in of_metrics.items() if name in self.metrics and name not in after.metrics}

    def _without_features(self) -> Evaluation:
        """Copy without the figures that rest on features; likelihoods, which take minutes, stay."""
        resting = {name for name, metric in all_metrics().items() if metric.rests_on_features}
        return dataclasses.replace(
            self._without(lambda name: base_name(name.removesuffix("_data")) in resting), features=None
        )

    def _without(self, dropped: Callable[[str], bool]) -> Evaluation:
        """Copy without some figures, by their names."""
        kept: dict[str, Any] = {
            field: {name: one for name, one in getattr(self, field).items() if not dropped(name)}
            for field in ("metrics", "unavailable", "intervals", "warnings")
        }
        return dataclasses.replace(self, **kept)

    def fields(self) -> dict[str, Any]:
        """Fields of evaluation.json."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def lines(self) -> list[str]:
        """Table for the terminal, unavailable metrics last."""
        width = max(map(len, (*self.metrics, *self.unavailable)), default=0)
        values = {name: _readable(value) + self._spread(name) for name, value in self.metrics.items()}
        return [
            f"{self.preset} at step {self.checkpoint_step}, against the {self.split} split of {self.data}",
            *(f"  {name:{width}}  {value}" for name, value in values.items()),
            *(f"  {name:{width}}  are {images}" for name, images in self.references.items()),
            *(f"  {name:{width}}  none: {reason}" for name, reason in self.unavailable.items()),
            *(f"warning: {name}: {line}" for name, line in self.warnings.items()),
        ]

    def _spread(self, name: str) -> str:
        interval = self.intervals.get(name)
        return f"  ({' to '.join(map(readable_figure, interval))})" if interval else ""


_FIGURE = either(NUMBER, list_of(NUMBER))
_SHAPE = {
    "checkpoint_step": COUNT,
    **dict.fromkeys(("preset", "data", "data_digest", "split"), TEXT),
    "features": either(object_with(name=TEXT, digest=TEXT), None),
    "pixels": values_of(TEXT),
    "metrics": values_of(_FIGURE),
    "unavailable": values_of(TEXT),
    "seconds": values_of(NUMBER),
    "environment": OBJECT,
    "intervals": either(values_of(list_of(NUMBER)), None),
    "warnings": either(values_of(TEXT), None),
    "references": either(values_of(TEXT), None),
    "fitted_prior": either(TEXT, None),
}
_NAMES = {"format", *_SHAPE}


def read_evaluation(run: Path, which: WhichCheckpoint = "newest") -> Evaluation | None:
    """Read the evaluation of the newest or the best checkpoint of a run directory; None if it has none.

    Raises:
        CheckpointError: it is damaged, of another version, or cannot be read just now.
    """
    file = RunPaths(run).evaluation_of(which)
    try:
        content = read_object(file, {"format": COUNT}, "remove it")
    except FileNotFoundError:
        return None
    if content["format"] != FORMAT or set(content) - _NAMES:
        raise OtherVersionError(f"{file} is of another version than this one, which reads format {FORMAT}; remove it")
    del content["format"]
    try:
        check_fields(content, _SHAPE)
        return Evaluation(**{name: value for name, value in content.items() if value is not None or name == "features"})
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{file} is damaged: {error}; remove it") from None


class EvaluationError(UserError):
    """An evaluation that is not complete."""

    evaluation: Evaluation | None = None
    """The figures that there are, so that they are not lost."""


class UnwrittenError(EvaluationError):
    """An evaluation that was measured and cannot be written."""


class UnmeasuredError(EvaluationError):
    """An evaluation without the figures of a metric that fails."""


def add_evaluation(
    run: Path, evaluation: Evaluation, announce: Callable[[str], None], which: WhichCheckpoint = "newest"
) -> Evaluation:
    """Merge an evaluation with that in the run directory and write both there; returns what was written.

    Another evaluation may do the same at the same time: a lock makes it wait.

    Raises:
        UnwrittenError: the directory cannot be written to, or what is there cannot be read.
    """
    paths = RunPaths(run)
    file = paths.evaluation_of(which)
    try:
        with file_lock(paths.evaluation_lock, announce, wait=True):
            merged = evaluation.added_to(read_evaluation(run, which))
            write_object(file, merged.fields())
            return merged
    except CheckpointError as error:
        raise UnwrittenError(f"the evaluation is not written: {error}") from None
    except OSError as error:
        raise UnwrittenError(
            f"{file} cannot be written: {reason_of(error)}; fix that, or copy the run to where it can be"
        ) from None


def _readable(value: Value) -> str:
    return " ".join(f"{one:.3f}" for one in value) if isinstance(value, list) else readable_figure(value)
