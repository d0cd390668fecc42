"""Worker of test_split_state.py: trains with and without split state in the same processes, and writes what differs.

Arguments: directory to write to, and cases.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_dist.config import MlpConfig, OptimizerConfig, TrainConfig
from gen_dist.errors import ConfigError, MachineError
from gen_dist.parallel.collectives import from_main
from gen_dist.parallel.processes import end_process, start_processes
from gen_dist.parallel.split_gradients import SplitReduction
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.testing.tape import TapeRecorder, device_noise_on_cpu
from gen_dist.training.cuda_graphs import RecordedSteps
from gen_dist.training.moving_average import SplitAverage
from gen_dist.training.run import train
from gen_dist.training.schedule import Schedule
from gen_dist.training.trainer import Trainer
from tests.parallel.rank_worker import config_of_ranks
from tests.support.runs import all_tensors, make_trainer, run_steps, small_config
from tests.support.two_players import without_shared_weights

STEPS = 4
SGD = OptimizerConfig(optimizer="sgd", clip_norm=0.1, ema_decay=0.9)
ADAMW = OptimizerConfig(optimizer="adamw", clip_norm=0.1, weight_decay=0.01)


def config_of(case: str) -> TrainConfig:
    """Config of a case: an objective, and after a plus what else it has."""
    objective, *more = case.split(" + ")
    config = config_of_ranks(objective)
    for one in more:
        match one:
            case "shards":
                config = config.with_options(shards=4)
            case "sgd, clipped":
                config = config.with_options(optimization=SGD)
            case "adamw, no average":
                config = config.with_options(optimization=ADAMW)
            case "accumulated":
                config = config.with_options(accumulation=2)
            case "compiled":
                config = config.with_options(compile=True)
    return config


@contextlib.contextmanager
def scattering(scatters: bool) -> Iterator[None]:
    """Context in which gradients are scattered, as on GPUs."""
    if not scatters:
        yield
        return

    def scattered(parameters: list[nn.Parameter], bucket_bytes: int | None, *, scatters: bool) -> SplitReduction:
        assert not scatters
        return SplitReduction(parameters, 1000, scatters=True)

    with mock.patch("gen_dist.parallel.choice.SplitReduction", scattered):
        yield


def compare(case: str) -> dict[str, Any]:
    """Differences between runs with and without split state, and how many values of state this process has."""
    config = config_of(case)
    shared = contextlib.nullcontext() if case.endswith("shared memory") else without_shared_weights()
    with shared, scattering(case.endswith("scattered")):
        plain, split = make_trainer(config), make_trainer(config.with_options(split_state=True))
    found: list[Any] = []
    for trainer in (plain, split):
        logs = trainer.average_logs([trainer.run_step(step) for step in range(STEPS)])
        found.append((logs, trainer.evaluate(trainer.dataset.test, decoded_per_batch=7), all_tensors(trainer)))
    different = _different(found[0][2], found[1][2]) if split.processes.is_main else []
    values = [_values_of_state(trainer) for trainer in (plain, split)]
    resumed = _resumed(config, split, case)
    for trainer in (plain, split):
        trainer.close()
    return {
        "different": different,
        "figures": found[0][:2] == found[1][:2],
        "values": values,
        "resumed": resumed,
        "finite": all(bool(value.isfinite().all()) for value in found[1][2].values()),
    }


def _different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    if first.keys() != second.keys():
        return [f"names: {sorted(first.keys() ^ second.keys())}"]
    return [name for name in first if not torch.equal(first[name], second[name])]


def _values_of_state(trainer: Trainer) -> list[int]:
    """Numbers of values that this process has of the optimizers' state and of the average."""
    states = [
        value.numel()
        for turn in trainer._turns.values()
        for state in turn._update.optimizer.state.values()
        for value in state.values()
        if value is not None and value.ndim
    ]
    average = trainer._average
    if isinstance(average, SplitAverage):
        assert all(one.numel() == 0 for one in average.objective.networks.parameters())
        return [sum(states), sum(piece.numel() for pieces in average._pieces for piece in pieces)]
    kept = [] if average is None else list(average.objective.networks.parameters())
    return [sum(states), sum(one.numel() for one in kept)]


def _resumed(config: TrainConfig, split: Trainer, case: str) -> list[str]:
    """Differences after more steps, by a run that went on and by new trainers that took its state."""
    copied = {group: {name: one.clone() for name, one in named.items()} for group, named in split.tensors().items()}
    tensors = from_main(copied, split.processes)  # of the main process alone, as in a checkpoint
    facts = {"data_digest": split.dataset.digest, "loss_scales": split.loss_scales()}
    run_steps(split, STEPS, STEPS + 2)
    wanted = all_tensors(split)
    different: list[str] = []
    for splits in (True, False):
        with without_shared_weights(), scattering(case.endswith("scattered")):
            other = make_trainer(config.with_options(split_state=splits))
        other.load(Checkpoint(STEPS, tensors, facts))
        run_steps(other, STEPS, STEPS + 2)
        found = all_tensors(other)
        if split.processes.is_main:
            different += _different(wanted, found)
        other.close()
    return different


def recorded(name: str) -> dict[str, Any]:
    """Compare recorded steps with launched ones, with split state."""
    config = config_of_ranks(name).with_options(split_state=True)
    trainers = []
    for _ in range(2):
        with scattering(True), without_shared_weights():
            trainer = make_trainer(config)
        trainer._schedule = Schedule(config, torch.device("cpu"), in_tensors=True)
        trainers.append(trainer)
    trainers[0]._recorded = RecordedSteps(TapeRecorder)
    with device_noise_on_cpu():
        losses = [run_steps(trainer, 0, STEPS + 1) for trainer in trainers]
    states = [all_tensors(trainer) for trainer in trainers]
    assert trainers[0]._recorded._recorded, "nothing was recorded"
    return {"losses": losses[0] == losses[1], "different": _different(*states)}


def whole_runs(out: Path) -> None:
    """Run directories with and without split state, with pictures, tests and checkpoints."""
    network = MlpConfig(hidden_sizes=(24, 17), latent_dim=5)
    config = small_config("vae", steps=8, checkpoint_every=4, evaluate_every=3, sample_every=2, network=network)
    for name, splits in (("plain", False), ("split", True)):
        with without_shared_weights():
            train(config.with_options(split_state=splits, run_dir=str(out / name)), say=lambda _line: None)


def refusal() -> str:
    """Error of half precision with a loss scale."""
    try:
        make_trainer(small_config("vae", precision="fp16", split_state=True))
    except ConfigError as error:
        return str(error)
    return "none"


def advice() -> dict[str, str]:
    """Advice for a step that lacks memory."""
    plain, adam = OptimizerConfig(optimizer="sgd", betas=(0.0, 0.9)), OptimizerConfig()
    options: dict[str, dict[str, Any]] = {
        "state": {"optimization": adam},
        "nothing": {"optimization": plain},
        "average": {"optimization": replace(plain, ema_decay=0.9)},
        "split": {"split_state": True},
    }
    config = small_config("vae")
    with without_shared_weights():
        trainers = {name: make_trainer(config.with_options(**changes)) for name, changes in options.items()}
    trainers["shared state"] = make_trainer(config.with_options(optimization=adam))
    trainers["shared state, average"] = make_trainer(config)
    return {name: _advice_of(trainer) for name, trainer in trainers.items()}


def _advice_of(trainer: Trainer) -> str:
    lacking = mock.patch.object(trainer, "_take_turns", side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    try:
        with lacking:
            trainer.run_step(0)
    except MachineError as error:
        return str(error)
    return "none"


def main(out: Path, cases: list[str]) -> None:
    start_processes(TrainConfig(device="cpu"))
    results: dict[str, Any] = {case: compare(case) for case in cases}
    results["recorded"] = {name: recorded(name) for name in ("gan",)}
    results["refusal"] = refusal()
    results["advice"] = advice()
    whole_runs(out)
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, results)
    if dist.get_rank() == 0:
        (out / "results.json").write_text(json.dumps(of_all))
    end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
