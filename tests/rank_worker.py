"""Started by test_ranks.py in several processes: trains every objective and writes what the main process saw."""

import json
import sys
from pathlib import Path

import torch

from gen_dist import parallel
from gen_dist.trainer import Trainer
from tests.runs import OBJECTIVES, small_config, small_dataset


def main() -> None:
    results: dict[str, object] = {}
    for name in OBJECTIVES:
        config = small_config(name)
        processes = parallel.start_processes(config)
        trainer = Trainer(config, small_dataset(config), processes)
        losses = [row["loss"] for row in trainer.average_logs([trainer.run_step(step) for step in range(config.steps)])]
        checksum = torch.stack([p.double().sum() for p in trainer.objective.parameters()]).sum()
        spread = parallel.sum_over_processes(torch.stack([checksum, checksum**2]))
        count = processes.world_size
        results[name] = {
            "losses": losses,
            "test": trainer.evaluate(trainer.dataset.test),
            "parameter_spread": float(spread[1] / count - (spread[0] / count) ** 2),
        }
    if processes.is_main:
        results["world_size"] = processes.world_size
        results["threads"] = torch.get_num_threads()
        Path(sys.argv[1]).write_text(json.dumps(results))
    parallel.wait_for_all()
    parallel.stop_processes()


if __name__ == "__main__":
    main()
