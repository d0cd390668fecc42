"""The training step: a turn for each phase, then the moving average. Also the state that a run saves and loads."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_dist.config import TrainConfig
from gen_dist.data import Dataset, Split, TrainBatches
from gen_dist.errors import CheckpointError, MachineError, is_out_of_memory
from gen_dist.objectives import Batch, Objective, build_objective
from gen_dist.parallel.choice import choose_sums
from gen_dist.parallel.collectives import copy_from_main
from gen_dist.parallel.processes import Processes
from gen_dist.parallel.sync_batch_norm import synchronize
from gen_dist.records.checkpoint import Checkpoint, first_difference
from gen_dist.training.cuda_graphs import RecordedSteps, choose_recording
from gen_dist.training.image_changes import choose_changes
from gen_dist.training.log_averages import choose_log_averages
from gen_dist.training.memory_advice import StepFacts, memory_advice, step_facts
from gen_dist.training.moving_average import choose_average
from gen_dist.training.precision import resolve_precision
from gen_dist.training.rows import refuse_batch, rows_of_rank
from gen_dist.training.schedule import Schedule
from gen_dist.training.starting_weights import take_starting_weights
from gen_dist.training.testing import mean_metrics
from gen_dist.training.turn import Lap, Turn, no_lap

Due = dict[str, bool]
"""Names of the phases that take their turn, in order. The value is True if the penalty is due."""


class Trainer:
    """Training steps of an objective. `run_step(t)` is a pure function of config, data, t and the state before t."""

    def __init__(self, config: TrainConfig, dataset: Dataset, processes: Processes) -> None:
        """Build networks, optimizers and batches. A collective call.

        Raises:
            ConfigError: config, data and number of processes contradict each other.
            DataError: fewer images than one global batch.
        """
        self.config = config
        self.dataset = dataset
        self.processes = processes
        self._change_images = choose_changes(config, dataset)
        self.dtype = resolve_precision(config.precision, processes.device)
        self._sums = choose_sums(config, processes)
        self._rows = rows_of_rank(config, processes)
        self._average_logs = choose_log_averages(processes, self._rows, self._sums)
        self.objective = self._build_objective()
        self._average = choose_average(self.objective, config, processes)
        self._turns = self._make_turns()
        self._phase = ""
        """Name of the phase whose turn was the last."""
        self._schedule = Schedule(config, processes.device, in_tensors=processes.device.type == "cuda")
        self._recorded: RecordedSteps | None = choose_recording(config, processes, self.dtype)
        self.batches = TrainBatches(
            dataset.train,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            micro_batches=self._rows.micro_batches,
            device=processes.device,
            resident_budget_bytes=config.packing.resident_budget_mib * 2**20,
        )

    def _build_objective(self) -> Objective:
        config, dataset = self.config, self.dataset
        with torch.random.fork_rng(devices=[]):
            # Drawn on the CPU, so that the same weights start on every device and rank.
            torch.manual_seed(config.seed)
            objective = build_objective(config, dataset.image_shape, dataset.labels, dataset.scale)
        self._refuse_batch(objective)
        if config.sync_batch_norm:
            synchronize(objective, self._sums)
        self._sums.refuse_network(objective)
        objective.sum_over_processes, objective.sum_over_batch = self._sums.total, self._sums.over
        objective.start_at(_mean_image(dataset.train.sample))
        if config.from_train == "decoder":
            objective.fix_latents()
        objective = objective.to(self.processes.device)
        # On a processor of another kind, draws of one seed differ in their last digits.
        copy_from_main([*objective.parameters(), *objective.buffers()], self.processes)
        return objective

    def _refuse_batch(self, objective: Objective) -> None:
        """Raise ConfigError if no batch of this size and in these micro-batches can be trained on."""
        refuse_batch(objective, self.config, self.processes)

    def _make_turns(self) -> dict[str, Turn]:
        config, weights, phases = self.config, self._rows.batch_weights, self.objective.phases()
        self.objective.refuse_phases(phases)
        trained = [
            p for phase in phases.values() for name in phase.trains for p in self.objective.networks[name].parameters()
        ]
        # A shared weight has one address, so a weight of two phases or two networks cannot be moved to shared memory.
        shareable = len(set(map(id, trained))) == len(trained) and self.dtype != torch.float16
        turns = {
            name: Turn(phase, config, self.processes, self.dtype, weights, self._sums, shareable=shareable)
            for name, phase in phases.items()
        }
        self.objective.carries_graphs = all(turn.carries_graphs for turn in turns.values())
        return turns

    @property
    def averaged(self) -> Objective | None:
        """The objective with averaged weights; None if no average is kept. See `whole_average`."""
        return self._average.objective if self._average else None

    @property
    def best_objective(self) -> Objective:
        """The objective to use: with averaged weights if an average is kept."""
        return self.objective if self.averaged is None else self.averaged

    def whole_average(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which `averaged` has all its weights. A collective call."""
        return self._average.whole() if self._average else contextlib.nullcontext()

    def run_step(self, step: int, lap: Lap | None = None) -> dict[str, Tensor]:
        """Take one optimizer step of every phase that is due, and return the logs, still on the device.

        Args:
            step: number of the step, from 0.
            lap: called at the end of each part of the step: `data`; `PHASE/forward`, `PHASE/backward` (for both in one
                compiled graph, `PHASE/gradients`) and `PHASE/optimizer`; `moving average`. Gradients inside a loss,
                e.g. of a penalty, are part of `forward`. A CUDA graph has no parts, so none is used with `lap`.

        Returns:
            Logs of this process's images, which `average_logs` makes global.

        Raises:
            MachineError: out of memory. The state is that of no step then: this process has to end.
        """
        micro_batches, due = self._micro_batches(step), self.due_at(step)
        try:
            return self._step(micro_batches, due, lap)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            advice = self._memory_advice(error, micro_batches, due)
        raise advice

    def try_step(self, step: int) -> None:
        """Take a step as `run_step` does, but let torch's RuntimeError pass if memory is short."""
        self._step(self._micro_batches(step), self.due_at(step), None)

    def due_at(self, step: int) -> Due:
        """Phases that take their turn at a step."""
        return {name: turn.phase.penalized_at(step) for name, turn in self._turns.items() if turn.phase.due_at(step)}

    def kinds_of_steps(self) -> list[int]:
        """First step of each kind: steps of a kind have the same phases and penalties due."""
        phases = [turn.phase for turn in self._turns.values()]
        starts = {0, *(start for one in phases for start in (one.first_step, one.first_penalized_step))}
        period = math.lcm(*(every for one in phases for every in (one.every, one.penalty_every)))
        first: dict[tuple[tuple[str, bool], ...], int] = {}
        for start in sorted(starts):
            for step in range(start, min(start + period, self.config.steps)):
                first.setdefault(tuple(self.due_at(step).items()), step)
        return list(first.values())

    def _micro_batches(self, step: int) -> list[Batch]:
        schedule = self._schedule.at(step)
        batches = [
            Batch(*self.batches.micro_batch(step, index), schedule.rng, first_row, scheduled=schedule.of_objective)
            for index, (first_row, _) in enumerate(self._rows.micro_batches)
        ]
        return [*map(self._change_images, batches)] if self._change_images else batches

    def _step(self, micro_batches: list[Batch], due: Due, lap: Lap | None) -> dict[str, Tensor]:
        if self._recorded and lap is None:
            kind = tuple(due.items())
            return self._recorded.run(kind, micro_batches, lambda batches: self._take_turns(batches, due))
        lap = lap or no_lap
        lap("data")
        return self._take_turns(micro_batches, due, lap)

    def _take_turns(self, micro_batches: list[Batch], due: Due, lap: Lap = no_lap) -> dict[str, Tensor]:
        """Do the device's work of a step. Everything that changes between steps is in tensors, for recordings."""
        logs: dict[str, Tensor] = {}
        for name, penalized in due.items():
            turn = self._turns[name]
            self._phase = name
            micro_batches = [batch._replace(penalized=penalized) for batch in micro_batches]
            turn_logs, carried = turn.take(micro_batches, *self._schedule.rates, _lap_of_phase(lap, name))
            micro_batches = [
                batch._replace(carried={**batch.carried, **more})
                for batch, more in zip(micro_batches, carried, strict=True)
            ]
            prefix = f"{name}/" if len(self._turns) > 1 else ""
            logs |= {prefix + key: value for key, value in turn_logs.items()}
        if self._average:
            self._average.move(self._schedule.newest_weight)
            lap("moving average")
        return logs

    def _memory_advice(self, error: RuntimeError, micro_batches: list[Batch], due: Due) -> MachineError:
        """Find out with how many micro-batches a step fits that did not. The state is that of no step afterwards."""
        if self._recorded:
            self._recorded.forget()
        whole = max(micro_batches, key=lambda batch: len(batch.images))

        def fits(rows: int) -> bool:
            some = whole._replace(images=whole.images[:rows], labels=whole.labels[:rows])
            for turn in self._turns.values():
                turn.discard_gradients()
                turn.batch_weights = [0.5, 0.5]
            self.objective.carries_graphs = False
            self._take_turns([some, some], due)
            return True

        return memory_advice(error, self.facts_of_step(len(whole.images)), self.config, self.processes, fits)

    def facts_of_step(self, rows: int) -> StepFacts:
        """Facts of a step whose micro-batch has so many rows, for advice about memory."""
        keeps = bool(self._average) or any(turn.keeps_whole_state for turn in self._turns.values())
        return step_facts(self._phase, rows, self.objective, self.dtype, keeps_whole_state=keeps)

    def average_logs(self, logs: list[dict[str, Tensor]]) -> list[dict[str, float | list[float]]]:
        """Average the logs of some steps over all processes, as numbers; see `log_averages`. A collective call."""
        return self._average_logs(logs)

    def evaluate(self, split: Split, decoded_per_batch: int = 1000) -> dict[str, float]:
        """Compute mean metrics of the best objective over a split; see `testing`. A collective call."""
        measure = functools.partial(mean_metrics, decoded_per_batch=decoded_per_batch)
        best, seed = self.best_objective, self.config.seed
        with self.whole_average():
            return measure(best, split, self.processes, self._sums, seed=seed, dtype=self.dtype)

    def broken_networks(self) -> list[str]:
        """List the networks with a weight, or averaged weight, that is NaN or infinite. A collective call."""
        both = self.objective.networks, self.best_objective.networks
        with self.whole_average():
            weights = {name: [p for networks in both for p in networks[name].parameters()] for name in both[0]}
            return [name for name, of in weights.items() if not all(bool(weight.isfinite().all()) for weight in of)]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Collect all tensors of the run's state, by group, as `load` takes them. A collective call."""
        groups = {"networks": dict(self.objective.networks.state_dict())}
        if self.averaged is not None:
            with self.whole_average():
                groups["averaged"] = dict(self.averaged.networks.state_dict())
        return groups | {f"optimizer-{name}": turn.optimizer_tensors() for name, turn in self._turns.items()}

    def loss_scales(self) -> dict[str, dict[str, Any]]:
        """State of the loss scales, by phase; empty for a phase without one."""
        return {name: turn.loss_scale() for name, turn in self._turns.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the state of a checkpoint.

        Raises:
            CheckpointError: the checkpoint is of other networks or another data set.
        """
        _refuse_others(checkpoint, self.dataset, self.objective.networks.state_dict(), self.config)
        try:
            self.objective.networks.load_state_dict(dict(checkpoint.tensors["networks"]))
            if self.averaged is not None:
                with self.whole_average():
                    self.averaged.networks.load_state_dict(dict(checkpoint.tensors["averaged"]))
            if self._recorded:
                self._recorded.forget()
            for name, turn in self._turns.items():
                turn.load(checkpoint.tensors[f"optimizer-{name}"], checkpoint.facts["loss_scales"][name])
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint of step {checkpoint.step} is of other networks: {reason}") from None

    def start(self) -> None:
        """Take the weights that the config starts from, if it names any.

        Raises:
            ConfigError: they cannot be read, or are of other networks, or the objective is not for such data.
        """
        self.objective.refuse_new(self.dataset.scale)
        with self.whole_average():
            take_starting_weights(filter(None, (self.objective, self.averaged)), self.config)

    def close(self) -> None:
        """Stop the thread that gathers batches."""
        self.batches.close()


def _lap_of_phase(lap: Lap, phase: str) -> Lap:
    return lap if lap is no_lap else lambda part: lap(f"{phase}/{part}")


def _mean_image(split: Split) -> Tensor:
    """Mean of about 10,000 images across a split: float32 [C, H, W] in 0..1."""
    places = np.arange(0, len(split.images), max(1, len(split.images) // 10_000))
    # A few at a time, since float32 takes four times the memory of uint8.
    total = sum(
        split.for_model(places[i : i + 256]).sum(dim=0, dtype=torch.float64) for i in range(0, len(places), 256)
    )
    assert isinstance(total, Tensor)
    return (total / (255.0 * len(places))).float()


def _refuse_others(
    checkpoint: Checkpoint, dataset: Dataset, weights: Mapping[str, Tensor], config: TrainConfig
) -> None:
    """Raise CheckpointError if a checkpoint is of other data, or of networks with other weights."""
    if checkpoint.facts["data_digest"] != dataset.digest:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} was trained on other data than {config.data} has here "
            "(another digest); put the old data back, or start over with --fresh"
        )
    if different := first_difference(checkpoint.tensors.get("networks", {}), weights):
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} is of other networks than this version's: {different}; "
            "resume it with the version that environment.json names, or start over with --fresh"
        )
