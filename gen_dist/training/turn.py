"""A phase's turn in a step: freeze the rest, forward, backward, average gradients, update the weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.networks import iterate_spectral_norms, spectrally_normalized
from gen_dist.objectives import Batch, Phase, TurnResult
from gen_dist.parallel.gradients import averaging_gradients, local_gradients, weights_in_common
from gen_dist.parallel.processes import Processes
from gen_dist.training.compiled_phase import CompiledPhase, gradients_can_be_traced
from gen_dist.training.optimizers import LightAdam, build_optimizer
from gen_dist.training.precision import autocast

Lap = Callable[[str], None]
"""Takes the name of a part of a step when that part is done; a stopwatch, in step_times.py."""


def no_lap(_part: str) -> None:
    """Where no stopwatch runs."""


class Turn:
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
        self._common = weights_in_common(self._parameters, processes) if shareable else None
        self._updated = self._parameters if self._common is None else [self._common.part]
        """What this process's optimizer updates: everything, or its part of what is in common."""
        self._optimizer = build_optimizer(self._updated, config.optimization, config.learning_rate)
        # One scaler per optimizer: a shared one would grow twice as fast and skip steps for the other's overflow.
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype == torch.float16)
        phase.train()
        self._spectrally_normalized = spectrally_normalized(phase)
        self._whole = None
        own_gradients = bool(self._common or processes.world_size == 1) and not self.scaler.is_enabled()
        self.carries_graphs = own_gradients and not config.compile and shares == [1.0]
        """Whether its backward is autograd's own, unscaled and unweighted, of all images at once. (Graphs of many
        micro-batches would all have to be kept until the next turn.)"""
        if config.compile and own_gradients and gradients_can_be_traced():
            self._whole = CompiledPhase(phase, self._parameters)
        with self._freezing():
            if config.compile and self._whole is None:
                phase.compile()
            self._module = phase if self._common else averaging_gradients(phase, processes)

    def take(
        self, micro_batches: list[Batch], learning_rate: float | Tensor, lap: Lap
    ) -> tuple[dict[str, Tensor], list[Mapping[str, Tensor]]]:
        """Gradients over all micro-batches, then one optimizer step.

        Returns the mean of the logs, and what the phase hands on of each micro-batch.
        """
        logs: list[dict[str, Tensor]] = []
        carried: list[Mapping[str, Tensor]] = []
        iterate_spectral_norms(self._spectrally_normalized)
        with self._freezing():
            for index, (batch, share) in enumerate(zip(micro_batches, self._shares, strict=True)):
                log, more = self._add_gradients(batch, share, lap, last=index == len(micro_batches) - 1)
                logs.append(log)
                carried.append(more)
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
            return logs[0], carried
        together: dict[str, Tensor] = {}
        for key, value in logs[0].items():
            values = [log[key] for log in logs]
            if value.ndim:
                together[key] = torch.cat(values)
            else:
                weighted = [one * share for one, share in zip(values, self._shares, strict=True)]
                together[key] = torch.stack(weighted).sum() / sum(self._shares)
        return together, carried

    def _add_gradients(
        self, batch: Batch, share: float, lap: Lap, *, last: bool
    ) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        """Add the gradients of a micro-batch to those of the turn; its logs, and what it hands on."""
        if self._whole:
            with self._computing():
                log, carried = self._whole.add_gradients(batch, share)
            lap("gradients")
            return log, carried
        with local_gradients(self._module, only=not last):
            with self._computing():
                loss, log, carried = TurnResult(*self._module(batch))
            lap("forward")
            # A graph that was handed on leads to more than this turn trains; to say so costs a little.
            has_graphs = any(value.requires_grad for value in batch.carried.values())
            wanted = self._parameters if has_graphs else None
            self.scaler.scale(loss if share == 1.0 else loss * share).backward(inputs=wanted)
            lap("backward")
        return log, carried

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
        """Take the state of the optimizer, as `optimizer_tensors` gives it, and that of the gradient scaler."""
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
