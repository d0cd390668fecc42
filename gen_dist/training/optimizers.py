"""The optimizer of a phase, from its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gen_dist.config import OptimizerConfig

_Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""Parameters, and of each the average of its gradients, of their squares, and the number of updates."""


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
    """torch's Adam on its fused kernel, on CPUs the same to the bit, without what `Optimizer.step` does around it.

    Collecting parameters and state into lists, hooks and profiler marks cost as much at each step as the update of a
    small net. Here the lists are made once; `load_state_dict` makes new state, and so new lists.

    torch keeps its compiler away from the other methods, and imports it for that, which takes more of the start of a
    run than anything but torch itself. So they are called without that guard; nothing here is ever compiled.
    """

    def __init__(self, parameters: list[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, fused=True, **options)
        self._of_all: tuple[_Lists, list[Tensor], int] | None = None
        """The lists where every parameter has a gradient, in pieces of a size, see piece_size; and the numbers of
        updates in them, on a CPU as one vector, so that one operation counts an update of them all."""

    def update(self) -> None:
        """One step with the gradients that there are, which are gone afterwards."""
        group = self.param_groups[0]
        parameters = group["params"]
        gradients = [parameter.grad for parameter in parameters]
        if any(gradient is None for gradient in gradients):
            gradients = [gradient for gradient in gradients if gradient is not None]
            lists = self._collect()
            if gradients:
                torch._foreach_add_(lists[3], 1.0)
        else:
            lists, counts, size = self._of_all = self._of_all or self._collect_all()
            torch._foreach_add_(counts, 1.0)
            gradients = [piece for gradient in gradients for piece in _pieces(gradient, size)]
        updated, first, second, steps = lists
        if updated:
            beta1, beta2 = group["betas"]
            kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            kernel(
                updated,
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

    def _collect(self) -> _Lists:
        """The parameters that have gradients and their state, which is made where there is none yet."""
        lists: _Lists = ([], [], [], [])
        updated, first, second, steps = lists
        self._init_group(self.param_groups[0], updated, [], first, second, [], steps)
        return lists

    def _collect_all(self) -> tuple[_Lists, list[Tensor], int]:
        """What `_of_all` keeps."""
        updated, first, second, steps = self._collect()
        counts = steps
        # Not on a GPU: recorded updates of fewer parameters would go on with the numbers that these were moved from.
        if updated[0].device.type == "cpu":
            vector = torch.stack(steps)
            counts, steps = [vector], list(vector.unbind())
            for parameter, count in zip(updated, steps, strict=True):
                self.state[parameter]["step"] = count
        size = piece_size(updated)
        steps = [step for step, of in zip(steps, updated, strict=True) for _ in _pieces(of, size)]
        updated, first, second = (
            [piece for of in tensors for piece in _pieces(of.detach(), size)] for tensors in (updated, first, second)
        )
        return (updated, first, second, steps), counts, size

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        _unguarded(torch.optim.Optimizer.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        state: dict[str, Any] = _unguarded(torch.optim.Optimizer.state_dict)(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of another; as torch's."""
        _unguarded(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        self._of_all = None


LARGEST_PIECE = 2**16
SMALLEST_PIECE = 2**13
PIECES = 256
"""About twice the multiprocessors of a large GPU."""


def piece_size(parameters: Sequence[Tensor]) -> int:
    """Elements of the pieces that an update takes parameters in; 0 where it takes them whole.

    On GPUs torch's kernel gives 2^16 elements to each block. Small nets are few such blocks, and most of the device has
    nothing to do: an update of `vae-mnist` took a third of the step's time on an H200, and 0.4 times as long in pieces.
    """
    if parameters[0].device.type != "cuda" or not all(parameter.is_contiguous() for parameter in parameters):
        return 0
    wanted = sum(parameter.numel() for parameter in parameters) // PIECES
    size = max(SMALLEST_PIECE, 1 << (wanted - 1).bit_length() if wanted else 0)
    return size if size < LARGEST_PIECE else 0


def _pieces(tensor: Tensor, size: int) -> Sequence[Tensor]:
    """A contiguous tensor in pieces of a size, the last of them smaller; itself, if it is no larger, or for size 0."""
    return tensor.view(-1).split(size) if 0 < size < tensor.numel() else (tensor,)


def _unguarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch's optimizers without the guard that imports torch's compiler."""
    return inspect.unwrap(method)
