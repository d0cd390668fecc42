"""What an evaluation found of a run's checkpoint: the content of evaluation.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from gen_dist.atomic_files import write_atomically
from gen_dist.errors import UserError

EVALUATION_FILE = "evaluation.json"
FORMAT = 1

Value = float | int | list[float]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of one checkpoint, and how they were measured."""

    checkpoint_step: int
    preset: str
    data: str
    data_digest: str
    split: str
    """The split that likelihoods are of, and that samples are compared with."""
    features: dict[str, Any] | None
    """`name` and `digest` of the network, and `accuracy` on the split where it tells digits. None without features."""
    pixels: dict[str, str]
    """By metric, what pixels a likelihood is of: `binarized`, or `real-valued`. The two do not compare."""
    metrics: dict[str, Value]
    unavailable: dict[str, str]
    """Metrics that were asked for and that the model or the data have not, and why."""
    seconds: dict[str, float]
    """By stage."""
    environment: dict[str, Any]

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    def lines(self) -> list[str]:
        """A table for the terminal, and what there is not."""
        width = max(map(len, (*self.metrics, *self.unavailable)), default=0)
        values = {name: _readable(value) for name, value in self.metrics.items()}
        return [
            f"{self.preset} at step {self.checkpoint_step}, against the {self.split} split of {self.data}",
            *(f"  {name:{width}}  {value}" for name, value in values.items()),
            *(f"  {name:{width}}  none: {reason}" for name, reason in self.unavailable.items()),
        ]


def read_evaluation(run: Path) -> Evaluation | None:
    """The evaluation that stands in a run directory; None where there is none.

    Raises:
        UserError: it is damaged, or of a format that this version does not know.
    """
    file = run / EVALUATION_FILE
    try:
        content = json.loads(file.read_text())
        if content.pop("format") != FORMAT:
            raise UserError(f"{file} is of another format than {FORMAT}, which this version reads; remove it")
        evaluation = Evaluation(**content)
        if not all(isinstance(getattr(evaluation, name), dict) for name in ("metrics", "unavailable", "pixels")):
            raise ValueError("metrics, unavailable and pixels are to be objects")
        return evaluation
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}; remove it") from None


def write_evaluation(run: Path, evaluation: Evaluation) -> None:
    """Write it into a run directory, whole.

    Raises:
        UserError: the directory cannot be written to.
    """
    file = run / EVALUATION_FILE
    try:
        write_atomically(file, evaluation.to_json())
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; mend that first") from None


def _readable(value: Value) -> str:
    if isinstance(value, list):
        return " ".join(f"{one:.3f}" for one in value)
    return str(value) if isinstance(value, int) else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
