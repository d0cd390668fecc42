"""The optimizer of a phase, from its config, and its step in a turn, with or without a loss scale."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gen_dist.config import OptimizerConfig, TrainConfig

_Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""For each parameter: itself, the averages of its gradients and of their squares, and its number of updates."""


def build_optimizer(
    parameters: list[nn.Parameter], config: OptimizerConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Build an optimizer of these parameters with fused kernels."""
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
    """torch's Adam on its fused kernel, without the overhead of `Optimizer.step`. On CPUs its bits are the same.

    Collecting parameters and state into lists, hooks and profiler marks cost as much at each step as the update of a
    small network. Here the lists are made once; `load_state_dict` makes new state, and so new lists.

    torch guards the other methods against its compiler, and imports the compiler for that. The import takes more of the
    start of a run than anything but torch itself. So the methods are called unguarded; nothing here is ever compiled.
    """

    def __init__(self, parameters: list[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, fused=True, **options)
        self._of_all: tuple[_Lists, list[Tensor], int] | None = None
        """Lists for an update of all parameters, in pieces; the numbers of updates; and the size of a piece, see
        piece_size. On a CPU the numbers of updates are one vector, so that one operation increments them all."""

    def update(self) -> None:
        """Take one step with the gradients that exist, then remove them."""
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
            decoupled = group["decoupled_weight_decay"]
            numbers = {"lr": group["lr"], "beta1": beta1, "weight_decay": group["weight_decay"], "eps": group["eps"]}
            if isinstance(beta2, Tensor):  # the kernels take numbers alone, which a recorded step cannot change
                update_with_tensor_beta2(lists, gradients, beta2=beta2, decoupled=decoupled, **numbers)
            else:
                kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
                kernel(
                    updated, gradients, first, second, [], steps, beta2=beta2, amsgrad=False, maximize=False, **numbers
                )
        for parameter in parameters:
            parameter.grad = None

    def _collect(self) -> _Lists:
        """Collect the parameters that have gradients and their state. Missing state is made."""
        lists: _Lists = ([], [], [], [])
        updated, first, second, steps = lists
        self._init_group(self.param_groups[0], updated, [], first, second, [], steps)
        return lists

    def _collect_all(self) -> tuple[_Lists, list[Tensor], int]:
        """Collect the value of `_of_all`."""
        updated, first, second, steps = self._collect()
        counts = steps
        # Not on a GPU: recorded updates of fewer parameters would keep using the old tensors of these numbers.
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
        """See torch.optim.Optimizer."""
        _unguarded(torch.optim.Optimizer.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """See torch.optim.Optimizer."""
        state: dict[str, Any] = _unguarded(torch.optim.Optimizer.state_dict)(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch.optim.Optimizer."""
        _unguarded(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        self._of_all = None


@torch.no_grad()
def update_with_tensor_beta2(
    lists: _Lists,
    gradients: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: Tensor,
    weight_decay: float,
    eps: float,
    decoupled: bool,
) -> None:
    """Update parameters as torch's fused kernels of Adam do, with the decay rate of second moments in a tensor []."""
    updated, first, second, steps = lists
    if weight_decay and decoupled:
        torch._foreach_mul_(updated, 1.0 - lr * weight_decay)
    elif weight_decay:
        gradients = torch._foreach_add(list(gradients), updated, alpha=weight_decay)
    torch._foreach_lerp_(first, list(gradients), 1.0 - beta1)
    squares = torch._foreach_mul(list(gradients), list(gradients))
    torch._foreach_mul_(squares, 1.0 - beta2)
    torch._foreach_mul_(second, beta2)
    torch._foreach_add_(second, squares)
    counts = torch.stack(steps)
    sizes = lr / (1.0 - beta1**counts)
    roots = torch._foreach_sqrt(second)
    torch._foreach_div_(roots, list((1.0 - beta2**counts).sqrt().unbind()))
    torch._foreach_add_(roots, eps)
    moves = torch._foreach_div(first, roots)
    torch._foreach_mul_(moves, list(sizes.unbind()))
    torch._foreach_sub_(updated, moves)


LARGEST_PIECE = 2**16
SMALLEST_PIECE = 2**13
PIECES = 256
"""About twice the multiprocessors of a large GPU."""


def piece_size(parameters: Sequence[Tensor]) -> int:
    """Number of elements in a piece of a parameter, as updates take them; 0 if parameters are not cut.

    On GPUs torch's kernel gives 2^16 elements to each block. A small network has few such blocks, so most of the device
    is idle: an update of `vae-mnist` took a third of the step's time on an H200, and 0.4 times as long in pieces.
    """
    if parameters[0].device.type != "cuda" or not all(parameter.is_contiguous() for parameter in parameters):
        return 0
    wanted = sum(parameter.numel() for parameter in parameters) // PIECES
    size = max(SMALLEST_PIECE, 1 << (wanted - 1).bit_length() if wanted else 0)
    return size if size < LARGEST_PIECE else 0


def _pieces(tensor: Tensor, size: int) -> Sequence[Tensor]:
    """Cut a contiguous tensor into pieces of a size, the last of which may be smaller. Size 0 does not cut."""
    return tensor.view(-1).split(size) if 0 < size < tensor.numel() else (tensor,)


def _unguarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch's optimizers without the guard that imports torch's compiler."""
    return inspect.unwrap(method)


class Update:
    """Update of parameters by their gradients, which it removes."""

    scaled = False
    """True if losses are scaled. Gradients may then overflow while the scale adapts."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig) -> None:
        self.optimizer = build_optimizer(list(parameters), config.optimization, config.learning_rate)

    @property
    def has_state(self) -> bool:
        """True if the optimizer keeps numbers for each weight: all but SGD without momentum do."""
        return bool(self.optimizer.defaults.get("momentum", True))

    def scale(self, loss: Tensor) -> Tensor:
        """Scale the loss for its backward pass."""
        return loss

    def unscale(self) -> None:
        """Divide the loss scale out of the gradients."""

    def step(self, learning_rate: float | Tensor, beta2: float | Tensor | None = None) -> None:
        """Take one step of the optimizer, with Adam's second decay rate if it is scheduled."""
        self._set(learning_rate, beta2)
        if isinstance(self.optimizer, LightAdam):
            self.optimizer.update()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _set(self, learning_rate: float | Tensor, beta2: float | Tensor | None) -> None:
        group = self.optimizer.param_groups[0]
        group["lr"] = learning_rate
        if beta2 is not None:
            group["betas"] = (group["betas"][0], beta2)

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

    def step(self, learning_rate: float | Tensor, beta2: float | Tensor | None = None) -> None:
        """See Update."""
        self._set(learning_rate, beta2)
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
