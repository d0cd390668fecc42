"""The optimizer step of a turn, with or without a loss scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gen_dist.config import TrainConfig
from gen_dist.training.optimizers import LightAdam, build_optimizer


class Update:
    """Update of parameters by their gradients, which it removes."""

    scaled = False
    """True if losses are scaled. Gradients may then overflow while the scale adapts."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig) -> None:
        self.optimizer = build_optimizer(list(parameters), config.optimization, config.learning_rate)

    def scale(self, loss: Tensor) -> Tensor:
        """Scale the loss for its backward pass."""
        return loss

    def unscale(self) -> None:
        """Divide the loss scale out of the gradients."""

    def step(self, learning_rate: float | Tensor) -> None:
        """Take one step of the optimizer."""
        self.optimizer.param_groups[0]["lr"] = learning_rate
        if isinstance(self.optimizer, LightAdam):
            self.optimizer.update()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def scaler_state(self) -> dict[str, Any]:
        """State of the loss scale; empty without one."""
        return {}

    def load(self, state: dict[int, dict[str, Tensor]], scaler_state: Mapping[str, float]) -> None:
        """Load the optimizer's state by index of its parameters, and that of the loss scale.

        The latter is empty if the run began in a precision without a loss scale.
        """
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class ScaledUpdate(Update):
    """Update in float16 that skips steps with overflowing scaled gradients (Micikevicius et al. 2018).

    Each optimizer has its own scaler: a shared one would grow twice as fast, and skip steps when the other overflows.
    """

    scaled = True

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig, device: torch.device) -> None:
        super().__init__(parameters, config)
        self._scaler = torch.amp.GradScaler(device.type)

    def scale(self, loss: Tensor) -> Tensor:
        """See Update."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self) -> None:
        """See Update."""
        self._scaler.unscale_(self.optimizer)

    def step(self, learning_rate: float | Tensor) -> None:
        """See Update."""
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def scaler_state(self) -> dict[str, Any]:
        """See Update."""
        return self._scaler.state_dict()

    def load(self, state: dict[int, dict[str, Tensor]], scaler_state: Mapping[str, float]) -> None:
        """See Update."""
        super().load(state, scaler_state)
        if scaler_state:
            self._scaler.load_state_dict(dict(scaler_state))
