"""A phase's turn in a step: freeze the rest, forward, backward, average gradients, update the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.networks.spectral_norm import iterate_spectral_norms, spectrally_normalized
from gen_dist.objectives.phase import Batch, Phase, TurnResult
from gen_dist.parallel.gradients import Reduction, choose_reduction
from gen_dist.parallel.processes import Processes
from gen_dist.training.compiled_phase import CompiledPhase, gradients_can_be_traced
from gen_dist.training.optimizers import ScaledUpdate, Update

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
            shareable: False if the phase's weights may not be moved to shared memory.
        """
        self.phase = phase
        self._batch_weights = list(batch_weights)
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
        self._reduction = choose_reduction(parameters, processes, shareable=shareable)
        updated = self._reduction.updated
        half = dtype == torch.float16
        self._update = ScaledUpdate(updated, config, processes.device) if half else Update(updated, config)
        with self._freezing():
            self._backward = choose_backward(
                phase, parameters, self._reduction, self._update, dtype, compiled=config.compile
            )
        self.carries_graphs = not self._update.scaled and not config.compile and self._batch_weights == [1.0]
        """True if backward is plain: one micro-batch, no loss scale, no weight, no compiled graph. (The graphs of many
        micro-batches would all have to be kept until the next turn.)"""

    def take(
        self, micro_batches: Sequence[Batch], learning_rate: float | Tensor, lap: Lap
    ) -> tuple[dict[str, Tensor], list[Mapping[str, Tensor]]]:
        """Add up the gradients of all micro-batches, then take one optimizer step.

        Returns:
            The mean logs, and the tensors that the phase carries to later phases, for each micro-batch.
        """
        if self._spectrally_normalized:
            iterate_spectral_norms(self._spectrally_normalized)
        with self._freezing():
            micro_batches = self._prepared(micro_batches)
            computed = [
                self._backward.add(batch, weight, lap, last=batch is micro_batches[-1])
                for batch, weight in zip(micro_batches, self._batch_weights, strict=True)
            ]
        self._reduction.average()
        self._update.unscale()
        norm = self._clip() if self._clip_norm is not None or self.phase.logs_gradient_norm else None
        self._update.step(learning_rate)
        self._reduction.publish()
        carried = [one.carried for one in computed]
        with torch.no_grad():
            self.phase.finish(micro_batches, carried)
        lap("optimizer")
        logs = self._mean_logs(computed)
        if norm is not None and not self._update.scaled:
            logs["gradient_norm"] = norm
        return logs, carried

    def _prepared(self, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
        """Add what the phase prepares to the micro-batches."""
        with torch.no_grad(), autocast(micro_batches[0].images.device, self._dtype):
            prepared = self.phase.prepare(micro_batches)
        if not prepared:
            return micro_batches
        return [batch._replace(carried={**batch.carried, **prepared}) for batch in micro_batches]

    def _clip(self) -> Tensor:
        """Clip the gradients to `clip_norm` if that is set. Return their norm before that."""
        norm = self._reduction.norm().detach()
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._reduction.updated, self._clip_norm, norm)
        return norm

    def _mean_logs(self, computed: Sequence[Computed]) -> dict[str, Tensor]:
        """Average the logs of the micro-batches; values per image are concatenated."""
        if len(computed) == 1:
            return computed[0].logs
        means: dict[str, Tensor] = {}
        for name, value in computed[0].logs.items():
            values = [one.logs[name] for one in computed]
            if value.ndim:
                means[name] = torch.cat(values)
            else:
                weighted = [one * weight for one, weight in zip(values, self._batch_weights, strict=True)]
                means[name] = torch.stack(weighted).sum() / sum(self._batch_weights)
        return means

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

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Collect the optimizer's state as `parameter name:state name` -> tensor. A collective call."""
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

    logs: dict[str, Tensor]
    carried: Mapping[str, Tensor]


class Backward(Protocol):
    """Gradients of a micro-batch, added to the `grad` of a phase's parameters."""

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
        ...


class EagerBackward:
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
            loss, logs, carried = TurnResult(*self._phase(batch))
        lap("forward")
        if not loss.requires_grad:
            raise ConfigError(
                f"{type(self._phase).__name__} trains nothing: no gradient leads from its loss to what it trains; is "
                "the loss detached, or computed under torch.no_grad?"
            )
        # A carried graph leads to weights that this turn does not train, so `backward` takes named inputs. They have a
        # cost, so they are named only then.
        has_graphs = any(value.requires_grad for value in batch.carried.values())
        weighted = loss if weight == 1.0 else loss * weight
        with self._reduction.last_backward() if last else contextlib.nullcontext():
            self._update.scale(weighted).backward(inputs=self._parameters if has_graphs else None)
        lap("backward")
        return Computed(logs, carried)


class CompiledBackward:
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
    if compiled and not update.scaled and gradients_can_be_traced():
        return CompiledBackward(phase, parameters, dtype)
    if compiled:
        phase.compile()
    return EagerBackward(phase, parameters, reduction, update, dtype)


@contextlib.contextmanager
def computing(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Context manager that autocasts to a dtype, and turns a failure of the compiler into a ConfigError of one line."""
    try:
        with autocast(device, dtype):
            yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"torch.compile failed: {reason}; fix that, or leave out --compile") from error


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Context manager that autocasts to a dtype; it does nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
