"""The training step: a turn for each phase, then the average moves; and what else is done with a run's weights."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from gen_dist.config import TrainConfig
from gen_dist.data import Dataset, Split, TrainBatches
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.objectives import Batch, Objective, build_objective
from gen_dist.objectives.evaluating import evaluating
from gen_dist.parallel.collectives import copy_from_main, from_main, sum_over_processes
from gen_dist.parallel.processes import Processes
from gen_dist.parallel.sync_batch_norm import synchronize
from gen_dist.records.checkpoint import Checkpoint
from gen_dist.records.score_bins import SCORE_EDGES
from gen_dist.training.cuda_graphs import CudaRecorder, RecordedSteps
from gen_dist.training.moving_average import MovingAverage
from gen_dist.training.precision import autocast, resolve_precision
from gen_dist.training.schedule import Schedule
from gen_dist.training.turn import Lap, Turn, no_lap

Due = dict[str, bool]
"""The phases whose turn it is, in their order, each with whether its penalty is due."""


class Trainer:
    """Steps an objective over its data. `run_step(t)` is a pure function of config, data, t and the state before t."""

    def __init__(self, config: TrainConfig, dataset: Dataset, processes: Processes) -> None:
        """Build networks, optimizers and batches.

        Raises:
            ConfigError: config, data and number of processes do not go together.
            DataError: fewer images than one global batch.
        """
        self.config = config
        self.dataset = dataset
        self.processes = processes
        self.dtype = resolve_precision(config.precision, processes.device)
        self._micro_batches = _rows_of_rank(config, processes)
        rows = [rows for _, rows in self._micro_batches]
        self._share = sum(rows) * processes.world_size / config.global_batch_size
        """Of this rank's mean in the mean over all images, times the number of ranks: 1 where all have as many rows."""
        with torch.random.fork_rng(devices=[]):
            # Drawn on the CPU, so that the same weights start on every device and rank.
            torch.manual_seed(config.seed)
            self.objective = build_objective(config, dataset.image_shape, len(dataset.class_names))
        if config.sync_batch_norm:
            synchronize(self.objective)
        self.objective.start_at(_mean_image(dataset.train))
        self.objective.to(processes.device)
        self._average = MovingAverage(self.objective) if config.optimization.ema_decay is not None else None
        phases = self.objective.phases()
        trained = [
            p for phase in phases.values() for name in phase.trains for p in phase.objective.networks[name].parameters()
        ]
        # Weights have one place: those that two phases train, or two networks have, cannot be moved by each.
        shareable = len(set(map(id, trained))) == len(trained) and self.dtype != torch.float16
        shares = [self._share * count / sum(rows) for count in rows]
        self._turns = {
            name: Turn(phase, config, processes, self.dtype, shares, shareable) for name, phase in phases.items()
        }
        carries_graphs = all(turn.carries_graphs for turn in self._turns.values())
        for phase in phases.values():
            phase.carries_graphs = carries_graphs
        self._numbers = Schedule(config, processes.device, in_tensors=processes.device.type == "cuda")
        recordable = _can_be_recorded(config, processes, self.dtype)
        self._graphs = RecordedSteps(functools.partial(CudaRecorder, processes.device)) if recordable else None
        self._batches = TrainBatches(
            dataset.train,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            micro_batches=self._micro_batches,
            device=processes.device,
            resident_budget_bytes=config.packing.resident_budget_mib * 2**20,
        )

    @property
    def averaged(self) -> Objective | None:
        """The objective with averaged weights, where an average is kept."""
        return self._average.objective if self._average else None

    @property
    def best_objective(self) -> Objective:
        """The objective to use: with averaged weights where an average is kept."""
        return self.objective if self.averaged is None else self.averaged

    def run_step(self, step: int, lap: Lap | None = None) -> dict[str, Tensor]:
        """One optimizer step of every phase whose turn it is; returns their logs, still on the device.

        Values are means [] over this rank's images, or [B], one for each; `average_logs` makes them global, where ranks
        with more images weigh more. `lap` is called as each part of the step is done: `data`; `PHASE/forward`,
        `PHASE/backward`, or where one graph is compiled of both `PHASE/gradients`; `PHASE/optimizer`; `moving average`.
        (Gradients that a loss is made of, as of a penalty, are part of `forward`.) A CUDA graph has no parts: with
        `lap` there is none.
        """
        self._numbers.write(step)
        micro_batches = [
            Batch(*self._batches.micro_batch(step, index), self._numbers.rng, first_row)
            for index, (first_row, _) in enumerate(self._micro_batches)
        ]
        due = {
            name: step % turn.phase.penalty_every == 0
            for name, turn in self._turns.items()
            if step % turn.phase.every == 0
        }
        if self._graphs and lap is None:
            return self._graphs.run(tuple(due.items()), micro_batches, lambda batches: self._take_turns(batches, due))
        lap = lap or no_lap
        lap("data")
        return self._take_turns(micro_batches, due, lap)

    def _take_turns(self, micro_batches: list[Batch], due: Due, lap: Lap = no_lap) -> dict[str, Tensor]:
        """All that a step does once it has its images. What tells one step from the next stands in tensors by now,
        wherever this may be recorded."""
        logs: dict[str, Tensor] = {}
        for name, penalized in due.items():
            turn = self._turns[name]
            micro_batches = [batch._replace(penalized=penalized) for batch in micro_batches]
            turn_logs, carried = turn.take(micro_batches, self._numbers.learning_rate, _lap_of_phase(lap, name))
            micro_batches = [
                batch._replace(carried={**batch.carried, **more})
                for batch, more in zip(micro_batches, carried, strict=True)
            ]
            prefix = f"{name}/" if len(self._turns) > 1 else ""
            logs |= {prefix + key: value for key, value in turn_logs.items()}
        if self._average:
            self._average.move(self._numbers.newest_weight)
            lap("moving average")
        return logs

    def average_logs(self, logs: list[dict[str, Tensor]]) -> list[dict[str, float | list[float]]]:
        """The logs of some steps over all ranks, as numbers. Waits for the device.

        Of values for single images it gives the shares in the bins of SCORE_EDGES.
        """
        if not logs:
            return []
        rows = _with_histograms(logs)
        flat = torch.cat([value.float().reshape(-1) for row in rows for value in row.values()]).double().cpu()
        if self.processes.world_size > 1:
            moved = flat.to(self.processes.device)
            flat = (sum_over_processes(moved * self._share) / self.processes.world_size).cpu()
        numbers = iter(flat.tolist())
        return [
            {
                key: [next(numbers) for _ in range(len(value))] if value.ndim else next(numbers)
                for key, value in row.items()
            }
            for row in rows
        ]

    def evaluate(self, split: Split, decoded_per_batch: int = 1000) -> dict[str, float]:
        """Mean metrics of the best objective over a split, each image counted once over all ranks.

        Noise is keyed by the image's place in the split: two evaluations of one model give the same figures.

        Args:
            split: images and labels.
            decoded_per_batch: latents decoded at once; of K importance samples an image has K.
        """
        images_per_batch = max(1, decoded_per_batch // self.objective.evaluation_samples)
        rank, world_size = self.processes.rank, self.processes.world_size
        count = len(split.images)
        first, last = -(-count * rank // world_size), -(-count * (rank + 1) // world_size)
        rng = torch.tensor([self.config.seed, 0], dtype=torch.int64, device=self.processes.device)
        # Statistics of normalization layers differ over the ranks; those of rank 0 are the run's, as it saves them.
        copy_from_main(list(self.best_objective.buffers()), self.processes)
        sums: dict[str, Tensor] = {}
        with evaluating(self.best_objective) as objective, autocast(self.processes.device, self.dtype):
            for start in range(first, last, images_per_batch):
                chosen = slice(start, min(start + images_per_batch, last))
                images = torch.from_numpy(split.images[chosen]).to(self.processes.device)
                labels = torch.from_numpy(split.labels[chosen]).to(self.processes.device)
                for key, value in objective.evaluate(Batch(images, labels, rng, start)).items():
                    sums[key] = sums.get(key, torch.zeros((), dtype=torch.float64)) + value.double().sum().cpu()
        names = from_main(list(sums), self.processes)
        if not names:
            return {}
        totals = torch.stack([sums.get(name, torch.zeros((), dtype=torch.float64)) for name in names])
        totals = sum_over_processes(totals.to(self.processes.device)).cpu() / count
        return dict(zip(names, totals.tolist(), strict=True))

    def broken_networks(self) -> list[str]:
        """Names of the networks with a weight, or an averaged weight, that is NaN or infinite. Waits for the device."""
        return [
            name
            for name, network in self.objective.networks.items()
            for tensors in ([*network.parameters(), *self.best_objective.networks[name].parameters()],)
            if not all(bool(tensor.isfinite().all()) for tensor in tensors)
        ]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All state of the run that is tensors, by group; `load` takes it back."""
        groups = {"networks": dict(self.objective.networks.state_dict())}
        if self.averaged is not None:
            groups["averaged"] = dict(self.averaged.networks.state_dict())
        return groups | {f"optimizer-{name}": turn.optimizer_tensors() for name, turn in self._turns.items()}

    def loss_scales(self) -> dict[str, dict[str, float]]:
        """State of the gradient scalers, by phase; empty entries where there is none."""
        return {name: turn.scaler.state_dict() for name, turn in self._turns.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the state of a checkpoint.

        Raises:
            CheckpointError: it is of other networks or another data set.
        """
        if checkpoint.facts["data_digest"] != self.dataset.digest:
            raise CheckpointError(
                f"the data of {self.config.data} are not those that the checkpoint of step {checkpoint.step} was "
                "trained on (another digest); put the old data back, or start over with --fresh"
            )
        try:
            self.objective.networks.load_state_dict(dict(checkpoint.tensors["networks"]))
            if self.averaged is not None:
                self.averaged.networks.load_state_dict(dict(checkpoint.tensors["averaged"]))
            if self._graphs:
                self._graphs.forget()
            for name, turn in self._turns.items():
                turn.load(checkpoint.tensors[f"optimizer-{name}"], checkpoint.facts["loss_scales"][name])
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint of step {checkpoint.step} is of other networks: {reason}") from None

    def close(self) -> None:
        """Stop the thread that gathers batches."""
        self._batches.close()


def _can_be_recorded(config: TrainConfig, processes: Processes, dtype: torch.dtype) -> bool:
    """Whether steps are CUDA graphs. Scaled gradients are looked at by the host; those of several processes travel."""
    on_one_gpu = processes.device.type == "cuda" and processes.world_size == 1
    return config.cuda_graphs and on_one_gpu and dtype != torch.float16


def _lap_of_phase(lap: Lap, phase: str) -> Lap:
    return lap if lap is no_lap else lambda part: lap(f"{phase}/{part}")


def _mean_image(split: Split) -> Tensor:
    """Mean of about 10,000 images spread over a split: float32 [C, H, W] in 0..1."""
    spread = split.images[:: max(1, len(split.images) // 10_000)]
    # A few at a time: as float32 the sample takes four times its size.
    total = sum(
        torch.from_numpy(spread[i : i + 256]).sum(dim=0, dtype=torch.float64) for i in range(0, len(spread), 256)
    )
    assert isinstance(total, Tensor)
    return (total / (255.0 * len(spread))).float()


def _rows_of_rank(config: TrainConfig, processes: Processes) -> list[tuple[int, int]]:
    """First global row and number of rows of each of this rank's micro-batches; the numbers differ by one at most."""
    size, shares = config.global_batch_size, processes.world_size * config.accumulation
    if size < shares:
        raise ConfigError(
            f"global_batch_size {size} is less than {processes.world_size} processes x accumulation "
            f"{config.accumulation}: some would have no image; use at least {shares}, or fewer of them"
        )
    first = processes.rank * config.accumulation
    edges = [size * share // shares for share in range(first, first + config.accumulation + 1)]
    return [(start, end - start) for start, end in itertools.pairwise(edges)]


def _with_histograms(logs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same logs, with shares [bins] where they have one value for each image."""
    rows = [dict(row) for row in logs]
    for name in {name for row in rows for name, value in row.items() if value.ndim}:
        having = [row for row in rows if name in row]
        values = torch.stack([row[name] for row in having]).float()
        inner_edges = torch.tensor(SCORE_EDGES[1:-1], device=values.device)
        counts = torch.zeros(len(values), len(inner_edges) + 1, device=values.device)
        counts.scatter_add_(1, torch.bucketize(values, inner_edges, right=True), torch.ones_like(values))
        for row, shares in zip(having, counts / values.shape[1], strict=True):
            row[name] = shares
    return rows
