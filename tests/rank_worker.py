"""Started by test_ranks.py in several processes: trains every objective and writes what the main process saw."""

import json
import sys
from pathlib import Path

import torch

from gen_dist import parallel
from gen_dist.data import Split
from gen_dist.trainer import Trainer
from tests.runs import OBJECTIVES, small_config, small_dataset
from tests.two_players import STEPS, state_norms, two_players, watched_collectives

UNEVEN = (61, 2, 1)
"""Sizes of splits: odd, one image a rank of two, and none for one of them."""


def evaluations_of_uneven_splits(trainer: Trainer) -> list[dict[str, float]]:
    """Metrics of the first images of the train split, in batches that leave a rest, by the sizes in UNEVEN."""
    split = trainer.dataset.train
    return [trainer.evaluate(Split("some", split.images[:n], split.labels[:n]), decoded_per_batch=16) for n in UNEVEN]


def parameter_spread(trainer: Trainer) -> float:
    """Variance over the ranks of the sum of all parameters."""
    checksum = torch.stack([p.detach().double().sum() for p in trainer.objective.parameters()]).sum()
    spread = parallel.sum_over_processes(torch.stack([checksum, checksum**2]))
    count = trainer.processes.world_size
    return float(spread[1] / count - (spread[0] / count) ** 2)


def main() -> None:
    results: dict[str, object] = {}
    for name in OBJECTIVES:
        config = small_config(name)
        processes = parallel.start_processes(config)
        trainer = Trainer(config, small_dataset(config), processes)
        losses = [row["loss"] for row in trainer.average_logs([trainer.run_step(step) for step in range(config.steps)])]
        results[name] = {
            "losses": losses,
            "test": trainer.evaluate(trainer.dataset.test),
            "uneven": evaluations_of_uneven_splits(trainer),
            "parameter_spread": parameter_spread(trainer),
        }
    with watched_collectives() as reduced:
        players = two_players(accumulation=2)
        reduced["other"].clear()  # what DistributedDataParallel agrees on when it is made
        logs = [players.run_step(step) for step in range(STEPS)]
        reduced_in_steps = {name: list(sizes) for name, sizes in reduced.items()}
    results["two players"] = {
        "logs": players.average_logs(logs),
        "state": state_norms(players),
        "parameter_spread": parameter_spread(players),
        "reduced": reduced_in_steps,
    }
    if processes.is_main:
        results["world_size"] = processes.world_size
        results["threads"] = torch.get_num_threads()
        Path(sys.argv[1]).write_text(json.dumps(results))
    parallel.end_process(0)


if __name__ == "__main__":
    main()
