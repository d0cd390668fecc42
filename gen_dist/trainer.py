"""The training step: for each phase freeze, forward, backward, average gradients, step; then move the average."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from gen_dist import parallel
from gen_dist.checkpoint import Checkpoint
from gen_dist.config import TrainConfig
from gen_dist.data import Dataset, Split, TrainBatches
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.networks import iterate_spectral_norms, spectrally_normalized
from gen_dist.objectives import Batch, Objective, Phase, TurnResult, build_objective
from gen_dist.optimizers import LightAdam, build_optimizer
from gen_dist.parallel import Processes
from gen_dist.score_bins import SCORE_EDGES
from gen_dist.step_graphs import CudaRecorder, StepGraphs
from gen_dist.sync_batch_norm import synchronize
from gen_dist.whole_phase import WholePhase, gradients_can_be_traced

Lap = Callable[[str], None]
"""Takes the name of a part of a step when that part is done; a stopwatch, in step_times.py."""
Due = dict[str, bool]
"""The phases whose turn it is, in their order, each with whether its penalty is due."""


def _no_lap(_part: str) -> None:
    pass


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
        self.dtype = parallel.resolve_precision(config.precision, processes.device)
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
        self.averaged = _frozen_copy(self.objective) if config.optimization.ema_decay is not None else None
        phases = self.objective.phases()
        trained = [
            p for phase in phases.values() for name in phase.trains for p in phase.objective.networks[name].parameters()
        ]
        # Weights have one place: those that two phases train, or two networks have, cannot be moved by each.
        shareable = len(set(map(id, trained))) == len(trained) and self.dtype != torch.float16
        shares = [self._share * count / sum(rows) for count in rows]
        self._turns = {
            name: _Turn(phase, config, processes, self.dtype, shares, shareable) for name, phase in phases.items()
        }
        hands_on_graphs = all(turn.hands_on_graphs for turn in self._turns.values())
        for phase in phases.values():
            phase.hands_on_graphs = hands_on_graphs
        self._numbers = StepNumbers(config, processes.device, in_tensors=processes.device.type == "cuda")
        recordable = _can_be_recorded(config, processes, self.dtype)
        self._graphs = StepGraphs(functools.partial(CudaRecorder, processes.device)) if recordable else None
        self._batches = TrainBatches(
            dataset.train,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            micro_batches=self._micro_batches,
            device=processes.device,
            resident_budget_bytes=config.packing.resident_budget_mib * 2**20,
        )

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
        lap = lap or _no_lap
        lap("data")
        return self._take_turns(micro_batches, due, lap)

    def _take_turns(self, micro_batches: list[Batch], due: Due, lap: Lap = _no_lap) -> dict[str, Tensor]:
        """All that a step does once it has its images. What tells one step from the next stands in tensors by now,
        wherever this may be recorded."""
        logs: dict[str, Tensor] = {}
        for name, penalized in due.items():
            turn = self._turns[name]
            micro_batches = [batch._replace(penalized=penalized) for batch in micro_batches]
            turn_logs, handed_on = turn.take(micro_batches, self._numbers.learning_rate, _lap_of_phase(lap, name))
            micro_batches = [
                batch._replace(handed_on={**batch.handed_on, **more})
                for batch, more in zip(micro_batches, handed_on, strict=True)
            ]
            prefix = f"{name}/" if len(self._turns) > 1 else ""
            logs |= {prefix + key: value for key, value in turn_logs.items()}
        if self.averaged is not None:
            _move_average(self.averaged, self.objective, self._numbers.newest_weight)
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
            flat = (parallel.sum_over_processes(moved * self._share) / self.processes.world_size).cpu()
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
        parallel.copy_from_main(list(self.best_objective.buffers()), self.processes)
        sums: dict[str, Tensor] = {}
        with evaluating(self.best_objective) as objective, autocast(self.processes.device, self.dtype):
            for start in range(first, last, images_per_batch):
                chosen = slice(start, min(start + images_per_batch, last))
                images = torch.from_numpy(split.images[chosen]).to(self.processes.device)
                labels = torch.from_numpy(split.labels[chosen]).to(self.processes.device)
                for key, value in objective.evaluate(Batch(images, labels, rng, start)).items():
                    sums[key] = sums.get(key, torch.zeros((), dtype=torch.float64)) + value.double().sum().cpu()
        names = parallel.from_main(list(sums), self.processes)
        if not names:
            return {}
        totals = torch.stack([sums.get(name, torch.zeros((), dtype=torch.float64)) for name in names])
        totals = parallel.sum_over_processes(totals.to(self.processes.device)).cpu() / count
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


class StepNumbers:
    """What a step has of its number: the key of its noise, the learning rate, and how far the average moves.

    On a GPU all are tensors, recorded or not: so there is one arithmetic of a step, and its bits are the same.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, in_tensors: bool) -> None:
        self._config = config
        self.rng = torch.tensor([config.seed, 0], dtype=torch.int64, device=device)
        self._step = self.rng[1]  # a view: assigning to an item copies from the host, and waits for the device
        self.learning_rate: float | Tensor = torch.zeros((), device=device) if in_tensors else 0.0
        self.newest_weight: float | Tensor = torch.zeros((), device=device) if in_tensors else 0.0

    def write(self, step: int) -> None:
        """Make them those of a step, counted from 0."""
        self._step.fill_(step)
        self.learning_rate = _written(self.learning_rate, learning_rate_at(self._config, step))
        if self._config.optimization.ema_decay is not None:
            self.newest_weight = _written(
                self.newest_weight, newest_weight_at(self._config.optimization.ema_decay, step)
            )


def _written(number: float | Tensor, value: float) -> float | Tensor:
    """The value; in the same tensor, where it stands in one."""
    return number.fill_(value) if isinstance(number, Tensor) else value


def _can_be_recorded(config: TrainConfig, processes: Processes, dtype: torch.dtype) -> bool:
    """Whether steps are CUDA graphs. Scaled gradients are looked at by the host; those of several processes travel."""
    on_one_gpu = processes.device.type == "cuda" and processes.world_size == 1
    return config.cuda_graphs and on_one_gpu and dtype != torch.float16


class _Turn:
    """What one phase needs for its turn: the wrapped phase, its optimizer, its gradient scaler."""

    def __init__(
        self,
        phase: Phase,
        config: TrainConfig,
        processes: Processes,
        dtype: torch.dtype,
        shares: list[float],
        shareable: bool,
    ) -> None:
        """Wrap the phase, and make its optimizer.

        `shares` weigh the micro-batches' losses, so that gradients averaged over the ranks are of the mean image.
        `shareable` weights may be moved to memory that processes have in common.
        """
        self.phase = phase
        self._shares = shares
        self._clip_norm = config.optimization.clip_norm
        self._autocast = functools.partial(autocast, processes.device, dtype)
        networks = phase.objective.networks
        trained = {
            name: parameter
            for network in phase.trains
            for name, parameter in networks[network].named_parameters(prefix=network)
            if parameter.requires_grad
        }
        self._names = list(trained)
        self._parameters = list(trained.values())
        self._frozen = [
            p for p in networks.parameters() if p.requires_grad and all(p is not q for q in self._parameters)
        ]
        self._common = parallel.weights_in_common(self._parameters, processes) if shareable else None
        self._updated = self._parameters if self._common is None else [self._common.part]
        """What this process's optimizer updates: everything, or its part of what is in common."""
        self._optimizer = build_optimizer(self._updated, config.optimization, config.learning_rate)
        # One scaler per optimizer: a shared one would grow twice as fast and skip steps for the other's overflow.
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype == torch.float16)
        phase.train()
        self._spectrally_normalized = spectrally_normalized(phase)
        self._whole = None
        own_gradients = bool(self._common or processes.world_size == 1) and not self.scaler.is_enabled()
        self.hands_on_graphs = own_gradients and not config.compile and shares == [1.0]
        """Whether its backward is autograd's own, unscaled and unweighted, of all images at once. (Graphs of many
        micro-batches would all have to be kept until the next turn.)"""
        if config.compile and own_gradients and gradients_can_be_traced():
            self._whole = WholePhase(phase, self._parameters)
        with self._freezing():
            if config.compile and self._whole is None:
                phase.compile()
            self._module = phase if self._common else parallel.averaging_gradients(phase, processes)

    def take(
        self, micro_batches: list[Batch], learning_rate: float | Tensor, lap: Lap
    ) -> tuple[dict[str, Tensor], list[Mapping[str, Tensor]]]:
        """Gradients over all micro-batches, then one optimizer step.

        Returns the mean of the logs, and what the phase hands on of each micro-batch.
        """
        logs: list[dict[str, Tensor]] = []
        handed_on: list[Mapping[str, Tensor]] = []
        iterate_spectral_norms(self._spectrally_normalized)
        with self._freezing():
            for index, (batch, share) in enumerate(zip(micro_batches, self._shares, strict=True)):
                log, more = self._add_gradients(batch, share, lap, last=index == len(micro_batches) - 1)
                logs.append(log)
                handed_on.append(more)
        if self._common:
            self._common.average_gradients()
        self.scaler.unscale_(self._optimizer)
        if self._clip_norm is not None or self.phase.logs_gradient_norm:
            if self._common:
                norm = self._common.gradient_norm()
            else:
                norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            if self._clip_norm is not None:
                nn.utils.clip_grads_with_norm_(self._updated, self._clip_norm, norm)
            if not self.scaler.is_enabled():  # there it is infinite now and then, as the scale is found by overflows
                for log in logs:
                    log["gradient_norm"] = norm.detach()
        self._optimizer.param_groups[0]["lr"] = learning_rate
        if isinstance(self._optimizer, LightAdam) and not self.scaler.is_enabled():
            self._optimizer.update()
        else:
            self.scaler.step(self._optimizer)
            self.scaler.update()
            self._optimizer.zero_grad(set_to_none=True)
        if self._common:
            self._common.meet()  # before anyone reads the weights, all parts of them are updated
        lap("optimizer")
        if len(logs) == 1:
            return logs[0], handed_on
        together: dict[str, Tensor] = {}
        for key, value in logs[0].items():
            values = [log[key] for log in logs]
            if value.ndim:
                together[key] = torch.cat(values)
            else:
                weighted = [one * share for one, share in zip(values, self._shares, strict=True)]
                together[key] = torch.stack(weighted).sum() / sum(self._shares)
        return together, handed_on

    def _add_gradients(
        self, batch: Batch, share: float, lap: Lap, *, last: bool
    ) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        """Add the gradients of a micro-batch to those of the turn; its logs, and what it hands on."""
        if self._whole:
            with self._computing():
                log, handed_on = self._whole.add_gradients(batch, share)
            lap("gradients")
            return log, handed_on
        with parallel.local_gradients(self._module, only=not last):
            with self._computing():
                loss, log, handed_on = TurnResult(*self._module(batch))
            lap("forward")
            # A graph that was handed on leads to more than this turn trains; to say so costs a little.
            has_graphs = any(value.requires_grad for value in batch.handed_on.values())
            wanted = self._parameters if has_graphs else None
            self.scaler.scale(loss if share == 1.0 else loss * share).backward(inputs=wanted)
            lap("backward")
        return log, handed_on

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Within it, autocast to the configured precision; what cannot be compiled is the user's to mend."""
        try:
            with self._autocast():
                yield
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"torch.compile failed: {reason}; mend that, or leave out --compile") from error

    @contextlib.contextmanager
    def _freezing(self) -> Iterator[None]:
        """Within it, nothing but what this phase trains requires gradients."""
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._frozen:
                parameter.requires_grad_(True)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """State of the optimizer as `parameter name:state name` -> tensor. All processes have to call it together."""
        known = self._optimizer.state
        if self._common:
            state = self._common.state_of_all(known.get(self._common.part, {}))
        else:
            state = [
                (index, key, value)
                for index, parameter in enumerate(self._parameters)
                for key, value in known.get(parameter, {}).items()
                if value is not None
            ]
        return {f"{self._names[index]}:{key}": value for index, key, value in state}

    def load(self, tensors: Mapping[str, Tensor], scaler: Mapping[str, float]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for full_name, value in tensors.items():
            name, key = full_name.rsplit(":", 1)
            state.setdefault(self._names.index(name), {})[key] = value
        if self._common and state:
            state = {0: self._common.state_of_part(state)}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        if scaler:  # a run may have begun in a precision without a scale
            self.scaler.load_state_dict(dict(scaler))


def _lap_of_phase(lap: Lap, phase: str) -> Lap:
    return lap if lap is _no_lap else lambda part: lap(f"{phase}/{part}")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Autocast to a dtype; nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then constant, or linear or cosine decay to 0."""
    optimization = config.optimization
    if step < optimization.warmup_steps:
        return config.learning_rate * (step + 1) / optimization.warmup_steps
    progress = (step - optimization.warmup_steps) / max(1, config.steps - optimization.warmup_steps)
    match optimization.decay:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1.0 - progress)
        case "cosine":
            return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def newest_weight_at(ema_decay: float, step: int) -> float:
    """How far a step, counted from 0, moves the average of the weights towards the newest ones.

    The decay starts low and rises to the configured one, so that the random initial weights do not linger.
    """
    return 1.0 - min(ema_decay, (1 + step) / (10 + step))


@contextlib.contextmanager
def evaluating(objective: Objective) -> Iterator[Objective]:
    """Within it, the objective is in eval mode and draws no graph."""
    was_training = objective.training
    objective.eval()
    try:
        with torch.no_grad():
            yield objective
    finally:
        objective.train(was_training)


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


def _frozen_copy(objective: Objective) -> Objective:
    averaged = copy.deepcopy(objective)
    return averaged.requires_grad_(False).eval()


def _move_average(averaged: Objective, objective: Objective, newest_weight: float | Tensor) -> None:
    """averaged += newest_weight * (objective - averaged), of weights and of the statistics of batch normalization.

    Averaged weights give other activations than the newest ones, so their statistics are averaged as well. Other
    buffers are copied: the singular vectors of a spectral norm are not to be averaged.
    """
    mine: list[Tensor] = list(averaged.networks.parameters())
    theirs: list[Tensor] = list(objective.networks.parameters())
    for (name, buffer), newest in zip(averaged.networks.named_buffers(), objective.networks.buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            mine.append(buffer)
            theirs.append(newest)
        else:
            buffer.copy_(newest)
    with torch.no_grad():
        if isinstance(newest_weight, Tensor):
            differences = list(torch._foreach_sub(theirs, mine))
            torch._foreach_mul_(differences, newest_weight)
            torch._foreach_add_(mine, differences)
        else:
            torch._foreach_lerp_(mine, theirs, newest_weight)
