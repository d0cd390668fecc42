"""Worker of test_ranks.py in several processes: trains objectives and writes the main process's results."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from gen_dist.config import MlpConfig, TrainConfig
from gen_dist.data import Split
from gen_dist.evaluation.context import Context
from gen_dist.evaluation.metrics import codebook
from gen_dist.inference.model import GenerativeModel
from gen_dist.objectives.evaluating import evaluating
from gen_dist.parallel.collectives import sum_over_processes
from gen_dist.parallel.gradients import SharedReduction
from gen_dist.parallel.processes import Processes, end_process
from gen_dist.training.trainer import Trainer
from tests.support.runs import SMALL_VQ, WITH_BATCH_STATISTICS, all_tensors, make_trainer, run_steps, small_config
from tests.support.two_players import STEPS, state_norms, two_players, watched_collectives, without_shared_weights

LARGE_LAYER = small_config("vae", network=MlpConfig(hidden_sizes=(400,)), steps=3)
"""Config with layers of 784 x 400, larger than the smallest bucket of gradients, 1 MiB."""
LOCAL_STATISTICS = "averaged weights of local statistics.safetensors"
UNEVEN = (61, 2, 1)
"""Sizes of splits: odd, one image for each of two ranks, and no image for one of them."""


def evaluations_of_uneven_splits(trainer: Trainer) -> list[dict[str, float]]:
    """Evaluate the first images of the train split for each size in UNEVEN, in batches with a remainder."""
    split = trainer.dataset.train
    return [trainer.evaluate(Split("some", split.images[:n], split.labels[:n]), decoded_per_batch=16) for n in UNEVEN]


def trained_codebook(trainer: Trainer) -> list[list[float]]:
    """Vectors of the codebook; empty without one."""
    state = trainer.objective.networks.state_dict()
    return state["decoder.bottleneck.codebook"].tolist() if "decoder.bottleneck.codebook" in state else []


CODEBOOKS = ("moving_average", "gradient")
CODEBOOK_STEPS = 6


def codebook_of_ranks(update: str) -> dict[str, Any]:
    """Train a codebook whose dead codes are drawn again, and measure its use by test images in blocks of three."""
    changes = {"codebook_update": update, "code_restart": 0.5, "codebook_decay": 0.8}
    objective = replace(SMALL_VQ, **changes)  # type: ignore[arg-type]
    trainer = make_trainer(replace(small_config("latent autoencoder, codebook by gradient"), objective=objective))
    run_steps(trainer, 0, CODEBOOK_STEPS)
    state, dataset = trainer.objective.networks.state_dict(), trainer.dataset
    found = {name: state[f"decoder.bottleneck.{name}"].tolist() for name in ("codebook", "usage")}
    model = GenerativeModel(trainer.objective, trainer.config, dataset.image_shape, dataset.class_names)
    context = Context(model, dataset, trainer.processes, None, 0, 0, np.arange(1))
    with mock.patch("gen_dist.evaluation.context.ROWS_PER_BLOCK", 3), evaluating(trainer.objective):
        found["counts"] = codebook.code_counts(context).tolist()
        found |= codebook.measure_usage(context) | codebook.measure_perplexity(context)
    return found


def config_of_ranks(objective: str) -> TrainConfig:
    """Make a config whose run does not depend on the number of ranks."""
    return small_config(objective, sync_batch_norm=objective in WITH_BATCH_STATISTICS)


def spread(tensors: list[torch.Tensor], processes: Processes) -> float:
    """Compute the variance over the ranks of the sum of all values."""
    checksum = torch.stack([tensor.detach().double().sum() for tensor in tensors]).sum()
    mean = sum_over_processes(checksum.clone()) / processes.world_size
    return float(sum_over_processes((checksum - mean) ** 2) / processes.world_size)


def parameter_spread(trainer: Trainer) -> float:
    """Compute the spread of the weights, which ranks of one host share, and of each rank's own moving average."""
    return spread([*trainer.objective.parameters(), *trainer.best_objective.parameters()], trainer.processes)


def _reduced_by_steps(config: TrainConfig) -> tuple[Trainer, list[dict[str, Any]], dict[str, list[int]]]:
    """Train all steps; return the trainer, the logs, and the sizes of the collectives."""
    with watched_collectives() as reduced:
        trainer = make_trainer(config)
        reduced["other"].clear()  # collectives of its construction
        logs = [trainer.run_step(step) for step in range(config.steps)]
        in_steps = {name: list(sizes) for name, sizes in reduced.items()}
    return trainer, trainer.average_logs(logs), in_steps


def _evaluated_with_local_statistics(path: Path) -> dict[str, Any]:
    """Measure the spread of batch statistics over the ranks before and after an evaluation; save the main state."""
    trainer = make_trainer(small_config("vae-gan"))
    run_steps(trainer, 0, 4)
    buffers = list(trainer.best_objective.buffers())
    before = spread(buffers, trainer.processes)
    averaged = trainer.tensors()["averaged"]
    if trainer.processes.is_main:
        save_file(averaged, path)
    tested = trainer.evaluate(trainer.dataset.test)
    return {"before": before, "test": tested, "after": spread(buffers, trainer.processes)}


def _without_shared_memory() -> dict[str, Any]:
    """Compare a run on shared weights with one through gloo; `shared` is True if memory can be shared here."""
    runs, shared = [], True
    for share in (False, True):
        with nullcontext() if share else without_shared_weights():
            trainer = make_trainer(small_config("vae"))
        run_steps(trainer, 0, 10)
        runs.append(all_tensors(trainer))
        shared = all(isinstance(turn._reduction, SharedReduction) for turn in trainer._turns.values())
    apart = {name: float((tensor - runs[1][name]).abs().max()) for name, tensor in runs[0].items()}
    return {"shared": shared, "names": list(runs[0]) == list(runs[1]), "apart": max(apart.values())}


def main() -> None:
    results: dict[str, object] = {}
    out, names = Path(sys.argv[1]), [word for word in sys.argv[2:] if word != "--compiled"]
    for name in names:
        trainer, logs, reduced = _reduced_by_steps(config_of_ranks(name))
        results[name] = {
            "logs": logs,
            "reduced": reduced,
            "test": trainer.evaluate(trainer.dataset.test),
            "uneven": evaluations_of_uneven_splits(trainer),
            "parameter_spread": parameter_spread(trainer),
            "codebook": trained_codebook(trainer),
        }
        trainer.close()
    results["reduced by large layers"] = _reduced_by_steps(LARGE_LAYER)[2]
    with without_shared_weights(), watched_collectives() as buckets:
        large, players = make_trainer(LARGE_LAYER), two_players(accumulation=2)
        run_steps(large, 0, LARGE_LAYER.steps)
        run_steps(players, 0, STEPS)
        results["buckets"] = {name: list(sizes) for name, sizes in buckets.items() if name != "other"}
        results["parameter spread through gloo"] = parameter_spread(players)
    results["codebooks"] = {update: codebook_of_ranks(update) for update in CODEBOOKS}
    results["without shared memory"] = _without_shared_memory()
    results["local statistics"] = _evaluated_with_local_statistics(out.parent / LOCAL_STATISTICS)
    with watched_collectives() as reduced:
        players = two_players(accumulation=2)
        reduced["other"].clear()
        steps = [players.run_step(step) for step in range(STEPS)]
        reduced_in_steps = {name: list(sizes) for name, sizes in reduced.items()}
    results["two players"] = {
        "logs": players.average_logs(steps),
        "state": state_norms(players),
        "parameter_spread": parameter_spread(players),
        "reduced": reduced_in_steps,
    }
    if "--compiled" in sys.argv:
        compiled = two_players(accumulation=2, compile=True)
        steps = [compiled.run_step(step) for step in range(STEPS)]
        results["compiled players"] = {"logs": compiled.average_logs(steps), "state": state_norms(compiled)}
    processes = players.processes
    if processes.is_main:
        results["world_size"] = processes.world_size
        results["threads"] = torch.get_num_threads()
        out.write_text(json.dumps(results))
    end_process(0)


if __name__ == "__main__":
    main()
