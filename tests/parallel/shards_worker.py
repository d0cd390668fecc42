"""Worker of test_shards.py: trains objectives with shards, and writes logs, test metrics and state of the main process.

Arguments: directory to write to, number of steps, and objectives.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from gen_dist.config import TrainConfig
from gen_dist.parallel.processes import end_process
from tests.parallel.rank_worker import config_of_ranks
from tests.support.runs import all_tensors, make_trainer

SHARDS = 8
UNEVEN = "vae, uneven shards, clipped"
ROUNDED = "dcgan, bf16"


def config_with_shards(name: str) -> TrainConfig:
    """Config of an objective of tests, of UNEVEN or of ROUNDED, with shards."""
    if name == UNEVEN:
        return config_of_ranks("vae").with_options(shards=SHARDS, global_batch_size=27, clip_norm=0.1)
    if name == ROUNDED:
        return config_of_ranks("dcgan").with_options(shards=SHARDS, precision="bf16")
    return config_of_ranks(name).with_options(shards=SHARDS)


def main(out: Path, steps: int, names: list[str]) -> None:
    results: dict[str, Any] = {}
    for name in names:
        trainer = make_trainer(config_with_shards(name))
        logs = trainer.average_logs([trainer.run_step(step) for step in range(steps)])
        results[name] = {"logs": logs, "test": trainer.evaluate(trainer.dataset.test, decoded_per_batch=7)}
        state = {key: value.contiguous() for key, value in all_tensors(trainer).items()}
        if trainer.processes.is_main:
            save_file(state, out / f"{name}.safetensors")
        trainer.close()
    if trainer.processes.is_main:
        (out / "results.json").write_text(json.dumps(results))
    end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
