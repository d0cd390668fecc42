"""A phase's turn in a step: freeze the rest, forward, backward, average gradients, update the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.networks.spectral_norm import iterate_spectral_norms, spectrally_normalized
from gen_dist.objectives.phase import Batch, Phase, result_of
from gen_dist.parallel.batch_sums import BatchSums
from gen_dist.parallel.choice import choose_reduction
from gen_dist.parallel.gradients import Reduction
from gen_dist.parallel.part_gradients import PartReduction
from gen_dist.parallel.processes import Processes
from gen_dist.training.compiled_phase import CompiledPhase, gradients_can_be_traced
from gen_dist.training.log_averages import Logs, stacked_logs
from gen_dist.training.optimizers import ScaledUpdate, Update

T = TypeVar("T")
R = TypeVar("R")
Lap = Callable[[str], None]
"""Callback at the end of each part of a step, with the name of the part. step_times.py has a stopwatch."""


def no_lap(_part: str) -> None:
    """Measure nothing."""


class Turn:
    """One phase with its optimizer, its backward pass, and the averaging of its gradients over the processes."""

    def __init__(
        self,
        phase: Phase,
        config: TrainConfig,
        processes: Processes,
        dtype: torch.dtype,
        batch_weights: Sequence[float],
        sums: BatchSums,
        *,
        shareable: bool,
    ) -> None:
        """Make the optimizer, and choose how gradients are computed and averaged. A collective call.

        Args:
            phase: the phase.
            config: config of the run.
            processes: the processes that train together.
            dtype: dtype of the networks' arithmetic.
            batch_weights: weights of the micro-batches' mean losses. Gradients averaged over the processes are then
                those of the mean over all images.
            sums: sums over the batch.
            shareable: False if the phase's weights may not be moved to shared memory.
        """
        self.phase = phase
        self.batch_weights = list(batch_weights)
        """Weights of the micro-batches' mean losses."""
        self._dtype = dtype
        self._clip_norm = config.optimization.clip_norm
        networks = phase.objective.networks
        trained = {
            name: parameter
            for network in phase.trains
            for name, parameter in networks[network].named_parameters(prefix=network)
            if parameter.requires_grad
        }
        self._names, parameters = list(trained), list(trained.values())
        ours = set(map(id, parameters))
        self._frozen = [p for p in networks.parameters() if p.requires_grad and id(p) not in ours]
        phase.train()
        self._spectrally_normalized = spectrally_normalized(phase)
        self._reduction = choose_reduction(
            parameters, processes, sums, dtype, shareable=shareable, split=config.split_state
        )
        updated = self._reduction.updated
        every = phase.turns_per_penalty if config.optimization.lazy_scaling else 1
        self._lazy = every / (every + 1) if every > 1 else 1.0
        """Factor of the learning rate, and exponent of the betas, for penalties that are not in each turn."""
        discriminates = "discriminator" in phase.trains
        self._rate = self._lazy * (config.optimization.discriminator_rate_factor if discriminates else 1.0)
        """Factor of the learning rate."""
        if self._lazy != 1.0:
            beta1, beta2 = (beta**self._lazy for beta in config.optimization.betas)
            config = replace(config, optimization=replace(config.optimization, betas=(beta1, beta2)))
        half = dtype == torch.float16
        self._update = ScaledUpdate(updated, config, processes.device) if half else Update(updated, config)
        with self._freezing():
            self._backward = choose_backward(
                phase, parameters, self._reduction, self._update, dtype, compiled=config.compile
            )
        alters_backward = self._update.scaled or config.compile or config.shards
        self.carries_graphs = not alters_backward and self.batch_weights == [1.0]
        """True if backward is plain: one micro-batch, no loss scale, no weight, no compiled graph. (The graphs of many
        micro-batches would all have to be kept until the next turn.)"""

    def take(
        self, micro_batches: Sequence[Batch], learning_rate: float | Tensor, beta2: float | Tensor | None, lap: Lap
    ) -> tuple[Logs, list[Mapping[str, Tensor]]]:
        """Add up the gradients of all micro-batches, then take one optimizer step.

        Args:
            micro_batches: the images of this process.
            learning_rate: learning rate of the step.
            beta2: Adam's second decay rate, if it is scheduled.
            lap: stopwatch.

        Returns:
            The mean logs, and the tensors that the phase carries to later phases, for each micro-batch.
        """
        if self._spectrally_normalized:
            iterate_spectral_norms(self._spectrally_normalized)
        with self._freezing():
            weighted = list(zip(micro_batches, self.batch_weights, strict=True))
            computed = self._backward.each(lambda some: self._computed(some, lap), weighted)
        self._refuse_unused()
        self._reduction.average()
        self._update.unscale()
        norm = self._clip() if self._clip_norm is not None or self.phase.logs_gradient_norm else None
        if self._rate != 1.0:
            learning_rate = learning_rate * self._rate
        if self._lazy != 1.0 and beta2 is not None:
            beta2 = beta2**self._lazy
        self._update.step(learning_rate, beta2)
        self._reduction.publish()
        carried = [one.carried for _, one in computed]
        with torch.no_grad():
            self.phase.finish([batch for batch, _ in computed], carried)
        lap("optimizer")
        logs = self._backward.mean_logs([one.logs for _, one in computed], self.batch_weights)
        if norm is not None and not self._update.scaled:
            logs["gradient_norm"] = norm
        return logs, carried

    def _computed(self, weighted: Sequence[tuple[Batch, float]], lap: Lap) -> list[tuple[Batch, Computed]]:
        """Add the gradients of some micro-batches. They are returned as prepared, with what was computed from each."""
        batches = self._prepared([batch for batch, _ in weighted])
        weights = [weight for _, weight in weighted]
        return [
            (batch, self._backward.add(batch, weight, lap, last=batch is batches[-1]))
            for batch, weight in zip(batches, weights, strict=True)
        ]

    def _prepared(self, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
        """Add what the phase prepares to the micro-batches."""
        with torch.no_grad(), autocast(micro_batches[0].images.device, self._dtype):
            prepared = self.phase.prepare(micro_batches)
        if not prepared:
            return micro_batches
        return [batch._replace(carried={**batch.carried, **prepared}) for batch in micro_batches]

    def _refuse_unused(self) -> None:
        """Raise ConfigError if this process has no gradient of a weight, and the average needs one of each process."""
        if not self._reduction.needs_all:
            return
        unused = [name for name, one in zip(self._names, self._reduction.parameters, strict=True) if one.grad is None]
        if unused:
            more = f" (nor on {len(unused) - 1} more)" if len(unused) > 1 else ""
            error = ConfigError(
                f"{type(self.phase).__name__} trains {unused[0]}, on which its loss does not depend in this process"
                f"{more}, and several processes would part there; use it for all images, set its requires_grad to "
                "False, or train with --shards"
            )
            error.shared = False  # the loss may depend on it in other processes
            raise error

    def _clip(self) -> Tensor:
        """Clip the gradients to `clip_norm` if that is set. Return their norm before that."""
        norm = self._reduction.norm().detach()
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._reduction.updated, self._clip_norm, norm)
        return norm

    @contextlib.contextmanager
    def _freezing(self) -> Iterator[None]:
        """Context manager in which only the parameters that this phase trains require gradients."""
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._frozen:
                parameter.requires_grad_(True)

    def discard_gradients(self) -> None:
        """Discard the gradients of a turn that has failed."""
        for parameter in (*self._reduction.parameters, *self._reduction.updated):
            parameter.grad = None

    @property
    def keeps_whole_state(self) -> bool:
        """True if this process keeps the optimizer's state, if it has any, for all weights of the phase."""
        count = sum(parameter.numel() for parameter in self._reduction.parameters)
        kept = sum(parameter.numel() for parameter in self._reduction.updated)
        return self._update.has_state and kept >= count

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Collect the optimizer's state as `parameter name:state name` -> tensor. A collective call.

        Other processes than the main one may get none of it.
        """
        state = self._reduction.full_state(self._update.optimizer.state)
        return {f"{self._names[index]}:{name}": value for index, name, value in state}

    def loss_scale(self) -> dict[str, Any]:
        """State of the loss scale; empty without one."""
        return self._update.scaler_state()

    def load(self, tensors: Mapping[str, Tensor], loss_scale: Mapping[str, float]) -> None:
        """Load the state of the optimizer, as from `optimizer_tensors`, and that of the loss scale."""
        states: dict[int, dict[str, Tensor]] = {}
        for full_name, value in tensors.items():
            parameter, name = full_name.rsplit(":", 1)
            states.setdefault(self._names.index(parameter), {})[name] = value
        self._update.load(self._reduction.own_state(states), loss_scale)


class Computed(NamedTuple):
    """Logs and carried tensors of a pass over one micro-batch."""

    logs: Logs
    carried: Mapping[str, Tensor]


class Backward:
    """Gradients of micro-batches, added to the `grad` of a phase's parameters."""

    def each(self, work: Callable[[Sequence[T]], list[R]], micro_batches: Sequence[T]) -> list[R]:
        """Return `work(micro_batches)`, one result for each micro-batch."""
        return work(micro_batches)

    def mean_logs(self, of_micro_batches: Sequence[Logs], weights: Sequence[float]) -> Logs:
        """Average the logs of the micro-batches; values per image are concatenated."""
        if len(of_micro_batches) == 1:
            return of_micro_batches[0]
        means: Logs = {}
        for name, value in of_micro_batches[0].items():
            values = [one[name] for one in of_micro_batches]
            if value.ndim:
                means[name] = torch.cat(values)
            else:
                weighted = [one * weight for one, weight in zip(values, weights, strict=True)]
                means[name] = torch.stack(weighted).sum() / sum(weights)
        return means

    def add(self, batch: Batch, weight: float, lap: Lap, *, last: bool) -> Computed:
        """Add the gradients of `weight` times the mean loss.

        Args:
            batch: the micro-batch.
            weight: weight of its mean loss in the gradients.
            lap: stopwatch.
            last: True for the last micro-batch of the turn.

        Raises:
            ConfigError: torch.compile failed.
        """
        raise NotImplementedError


class EagerBackward(Backward):
    """Forward pass of the phase, which may be compiled, then `backward`."""

    def __init__(
        self,
        phase: Phase,
        parameters: Sequence[nn.Parameter],
        reduction: Reduction,
        update: Update,
        dtype: torch.dtype,
    ) -> None:
        self._phase = phase
        self._parameters = list(parameters)
        self._reduction = reduction
        self._update = update
        self._dtype = dtype

    def add(self, batch: Batch, weight: float, lap: Lap, *, last: bool) -> Computed:
        """See Backward."""
        with computing(batch.images.device, self._dtype):
            loss, logs, carried = result_of(self._phase(batch), type(self._phase).__name__)
        lap("forward")
        refuse_without_gradients(loss, self._phase)
        # A carried graph leads to weights that this turn does not train, so `backward` takes named inputs. They have a
        # cost, so they are named only then.
        has_graphs = any(value.requires_grad for value in batch.carried.values())
        weighted = loss if weight == 1.0 else loss * weight
        with self._reduction.last_backward() if last else contextlib.nullcontext():
            self._update.scale(weighted).backward(inputs=self._parameters if has_graphs else None)
        lap("backward")
        return Computed(logs, carried)


class PartBackward(Backward):
    """Forward pass of the phase, and the gradients of its loss, for each part of the batch by itself."""

    def __init__(self, phase: Phase, reduction: PartReduction, update: Update, dtype: torch.dtype) -> None:
        self._phase = phase
        self._reduction = reduction
        self._update = update
        self._dtype = dtype

    def each(self, work: Callable[[Sequence[T]], list[R]], micro_batches: Sequence[T]) -> list[R]:
        """See Backward."""
        return self._reduction.sums.each(work, micro_batches)

    def mean_logs(self, of_micro_batches: Sequence[Logs], weights: Sequence[float]) -> Logs:
        """See Backward. Only `average_logs_of_parts` sums over the parts."""
        return stacked_logs(of_micro_batches)

    def add(self, batch: Batch, weight: float, lap: Lap, *, last: bool) -> Computed:
        """See Backward. Not by `backward`: parts that wait for each other would add to one `grad` in turns."""
        with computing(batch.images.device, self._dtype):
            loss, logs, carried = result_of(self._phase(batch), type(self._phase).__name__)
        lap("forward")
        refuse_without_gradients(loss, self._phase)
        scaled = self._update.scale(loss if weight == 1.0 else loss * weight)
        self._reduction.add_part(torch.autograd.grad(scaled, self._reduction.parameters, allow_unused=True))
        lap("backward")
        return Computed(logs, carried)


class CompiledBackward(Backward):
    """Forward and backward pass as one compiled graph."""

    def __init__(self, phase: Phase, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self._phase = CompiledPhase(phase, parameters)
        self._dtype = dtype

    def add(self, batch: Batch, weight: float, lap: Lap, *, last: bool) -> Computed:
        """See Backward."""
        with computing(batch.images.device, self._dtype):
            computed = Computed(*self._phase.add_gradients(batch, weight))
        lap("gradients")
        return computed


def choose_backward(
    phase: Phase,
    parameters: Sequence[nn.Parameter],
    reduction: Reduction,
    update: Update,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> Backward:
    """Choose the forward and backward pass of a phase, while everything that the phase does not train is frozen.

    One graph of both passes is possible only without a loss scale, which hooks into `backward`. With it, compiling
    makes one graph of the forward pass and one of the backward pass.
    """
    if isinstance(reduction, PartReduction):
        return PartBackward(phase, reduction, update, dtype)
    if compiled and not update.scaled and gradients_can_be_traced():
        return CompiledBackward(phase, parameters, dtype)
    if compiled:
        phase.compile()
    return EagerBackward(phase, parameters, reduction, update, dtype)


def refuse_without_gradients(loss: Tensor, phase: Phase) -> None:
    """Raise ConfigError if no gradient leads from a loss to what its phase trains."""
    if not loss.requires_grad:
        raise ConfigError(
            f"{type(phase).__name__} trains nothing: no gradient leads from its loss to what it trains; is the loss "
            "detached, or computed under torch.no_grad?"
        )


@contextlib.contextmanager
def computing(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Context manager that autocasts to a dtype, and turns a failure of the compiler into a ConfigError of one line."""
    try:
        with autocast(device, dtype):
            yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).splitlines()[0]
        remedy = "fix that"
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, ImportError) and inner.path:  # the compiler writes in place, and trusts what is there
            remedy = f"if a run was killed while it wrote {inner.path}, remove that file"
        raise ConfigError(f"torch.compile failed: {reason}; {remedy}, or leave out --compile") from error


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Context manager that autocasts to a dtype; it does nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
