"""Training in Ray's workers for test_ray.py: some objectives, as rank_worker.py trains them under Accelerate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray.train

from tests.parallel.rank_worker import config_of_ranks
from tests.support.runs import make_trainer


def train_objectives(settings: dict[str, Any]) -> None:
    """Train each objective; the main worker writes the logs."""
    logs = {}
    for objective in settings["objectives"]:
        config = config_of_ranks(objective)
        trainer = make_trainer(config)
        logs[objective] = trainer.average_logs([trainer.run_step(step) for step in range(config.steps)])
        trainer.close()
    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        Path(settings["out"]).write_text(json.dumps({"world_size": context.get_world_size(), "logs": logs}))
