"""Train a small VAE on shards in one of two processes, and write down which images each step takes.

    python -m tests.data.many_shards_worker RUN_DIR CACHE STEPS BATCH DATA

At the end each process writes its peak of resident memory, in MiB, to RUN_DIR-RANK.peak.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import gen_dist
from gen_dist.config import DataConfig
from gen_dist.data import TrainBatches
from gen_dist.data.prefetching import Gathering
from tests.support.runs import small_config

# Steps of a small set are quicker than what the test does to them.
PAUSE_SECONDS = 0.1


def main(run_dir: str, cache: str, steps: str, batch: str, data: str) -> None:
    """Train."""
    log = Path(f"{run_dir}-{os.environ['RANK']}.rows").open("a")  # noqa: SIM115  open until the process ends
    begin = TrainBatches._begin

    def logged(batches: TrainBatches, place: tuple[int, int]) -> Gathering:
        found = begin(batches, place)
        time.sleep(PAUSE_SECONDS)
        log.write(json.dumps([place[0], batches._indices(place).tolist()]) + "\n")
        log.flush()
        return found

    setattr(TrainBatches, "_begin", logged)  # noqa: B010  a method that mypy would not have assigned
    config = small_config(
        "vae",
        data=data,
        steps=int(steps),
        global_batch_size=int(batch),
        packing=DataConfig(
            cache_dir=cache, cache_gib=0.5, image_size=8, resident_budget_mib=0, synthetic_images=20_000
        ),
        log_every=1,
        checkpoint_every=max(1, int(steps) // 8),
        sample_every=int(steps),
        evaluate_every=int(steps),
        run_dir=run_dir,
    )
    gen_dist.train(config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(f"{run_dir}-{os.environ['RANK']}.peak").write_text(str(peak))


if __name__ == "__main__":
    main(*sys.argv[1:])
