"""A tracker for tests, which prints nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from gen_dist.config import TrainConfig
from gen_dist.records.tracker import Tracker


def make_tracker(
    path: Path, *, steps: int = 2000, start_step: int = 0, stream: io.StringIO | None = None, **options: Any
) -> Tracker:
    return Tracker(
        path,
        TrainConfig(steps=steps, **options),
        start_step=start_step,
        images_per_step=128,
        wandb_id="abc12345",
        stream=io.StringIO() if stream is None else stream,
    )
