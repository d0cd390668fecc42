"""The optimizer of a phase, from its config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gen_dist.config import OptimizerConfig


def build_optimizer(
    parameters: list[nn.Parameter], config: OptimizerConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """An optimizer of these parameters with fused kernels."""
    beta1, beta2 = config.betas
    match config.optimizer:
        case "adam" | "adamw":
            return LightAdam(
                parameters,
                lr=learning_rate,
                betas=(beta1, beta2),
                eps=config.epsilon,
                weight_decay=config.weight_decay,
                decoupled_weight_decay=config.optimizer == "adamw",
            )
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=learning_rate, momentum=beta1, weight_decay=config.weight_decay, fused=True
            )


class LightAdam(torch.optim.Adam):
    """torch's Adam on its fused kernel, the same to the bit, without what `Optimizer.step` does around it.

    Collecting parameters and state into lists, hooks and profiler marks cost as much at each step as the update of a
    small net. Here the lists are made once; `load_state_dict` makes new state, and so new lists.
    """

    def __init__(self, parameters: list[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, fused=True, **options)
        self._lists: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None

    def update(self) -> None:
        """One step with the gradients that there are, which are gone afterwards."""
        group = self.param_groups[0]
        parameters = group["params"]
        gradients = [parameter.grad for parameter in parameters]
        if self._lists is None or any(gradient is None for gradient in gradients):
            self.step()  # makes the state, and passes over parameters without a gradient
            if all(parameter in self.state for parameter in parameters):
                states = [self.state[parameter] for parameter in parameters]
                first, second, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
                self._lists = first, second, steps
        else:
            first, second, steps = self._lists
            beta1, beta2 = group["betas"]
            torch._foreach_add_(steps, 1.0)
            kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            kernel(
                parameters,
                gradients,
                first,
                second,
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
        for parameter in parameters:
            parameter.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of another; as torch's."""
        super().load_state_dict(state_dict)
        self._lists = None
