"""A phase: one optimizer's turn within a step, its input and its result."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from gen_dist.errors import ConfigError
from gen_dist.kernels import Key
from gen_dist.randomness import Stream

T = TypeVar("T")


class Batch(NamedTuple):
    """One micro-batch of one rank."""

    images: Tensor
    """[B, C, H, W] in 0..255: uint8, or float32 for values other than 8-bit ones."""
    labels: Tensor
    """int64 [B] of classes; int64 [B, A] of attributes, float32 [B, A] of numbers."""
    rng: Tensor
    """int64 [2], (seed, step), on the device of the images: the key of all noise."""
    first_row: int
    """Global row of images[0]: its index in the global batch, on any rank."""
    penalized: bool = True
    """True at steps where a penalty is due that is computed lazily, or a term that begins later."""
    carried: Mapping[str, Tensor] = {}
    """Tensors that earlier phases of the same step computed from this micro-batch, by name."""
    scheduled: Mapping[str, Tensor] = {}
    """Options of the objective that the run changes from step to step, float32 [] each, by name."""

    def value(self, name: str, constant: float) -> float | Tensor:
        """Scheduled value of an option of the objective, or its constant."""
        return self.scheduled.get(name, constant)

    def key(self, stream: Stream) -> Key:
        """Key of the draws of one stream for the rows of this micro-batch."""
        return Key(self.rng, stream, self.first_row)


class SumOverBatch(Protocol):
    """Sum of a statistic over all micro-batches of a step; see `Objective.sum_over_batch`."""

    def __call__(self, statistic: Callable[[Sequence[T]], Tensor], items: Sequence[T], /) -> Tensor:
        """Sum `statistic`, a function from some of the items to a tensor, over the items of all processes."""
        ...


class TurnResult(NamedTuple):
    """Result of a phase on a micro-batch."""

    loss: Tensor
    """float32 []: the mean over the images, to be minimized."""
    logs: dict[str, Tensor]
    """Detached values to log: means [] over the images, or one value per image [B], logged as a histogram."""
    carried: Mapping[str, Tensor] = {}  # nothing writes to the default of a named tuple
    """Tensors for later phases of the same step. Detached, unless the objective `carries_graphs`."""


class WithNetworks(Protocol):
    """The part of an objective that a phase uses; see `gen_dist.objectives.base.Objective`."""

    networks: nn.ModuleDict


class Phase(nn.Module):
    """One optimizer's turn within a step: `forward(batch)` is the whole computation of that turn.

    A phase holds the objective with all its networks and names those that it trains, by default all of them. The
    trainer freezes the others, so a phase can be compiled as one module.

    On a GPU, Python runs only in the first steps of each kind; later steps replay the recorded device work. Values that
    change from step to step must therefore come from `batch.rng`, (seed, step), or from other tensors. The host must
    not wait for results, as with `item` and boolean masks, and must not copy to the device.
    """

    objective: WithNetworks
    trains: Sequence[str]
    """Names of the networks that this phase trains."""
    every: int = 1
    """The phase takes its turn at steps divisible by this."""
    penalty_every: int = 1
    """Batches are `penalized` at steps divisible by this (lazy regularization: Karras et al. 2020, appendix B)."""
    first_step: int = 0
    """Step of the first turn."""
    first_penalized_step: int = 0
    """Step from which batches may be `penalized`."""
    logs_gradient_norm: bool = False
    """True if the norm of the phase's gradients is logged, with and without clipping."""
    stops_gradients: str = ""
    """Reason why a part of the loss has no gradient on purpose, as a clause; `gen_dist.testing` then lets it pass."""

    def __init__(self, objective: WithNetworks) -> None:
        super().__init__()
        self.objective = objective
        self.trains = tuple(objective.networks)

    def forward(self, batch: Batch) -> TurnResult:
        """Compute the loss, the logs and tensors for later phases of the step."""
        raise NotImplementedError

    def prepare(self, micro_batches: Sequence[Batch]) -> Mapping[str, Tensor]:
        """Compute tensors that depend on all micro-batches of a turn, which `forward` then finds in `carried`.

        Not compiled, and without gradients.
        """
        return {}

    def finish(self, micro_batches: Sequence[Batch], carried: Sequence[Mapping[str, Tensor]]) -> None:
        """Update buffers after the optimizer's step, from what `forward` carried for each micro-batch; as `prepare`."""

    @property
    def turns_per_penalty(self) -> int:
        """Number of the phase's turns in which one has the penalty."""
        return math.lcm(self.every, self.penalty_every) // self.every

    def due_at(self, step: int) -> bool:
        """True at steps at which the phase takes its turn."""
        return step >= self.first_step and step % self.every == 0

    def penalized_at(self, step: int) -> bool:
        """True at steps whose batches are `penalized`."""
        return step >= self.first_penalized_step and step % self.penalty_every == 0


def refuse_bad_phases(phases: Mapping[str, Phase], objective: WithNetworks) -> None:
    """Raise ConfigError if phases are none, train nothing, what the objective does not have, or one network twice."""
    owner = type(objective).__name__
    given: Any = phases
    if not isinstance(given, Mapping) or not all(isinstance(phase, Phase) for phase in given.values()):
        raise ConfigError(f"{owner}.phases() gives no dict of phases by name")
    if not phases:
        raise ConfigError(f"{owner} trains nothing: its phases() is empty")
    trained: dict[str, str] = {}
    for phase_name, phase in phases.items():
        for name in phase.trains:
            if name not in objective.networks:
                there = ", ".join(objective.networks)
                raise ConfigError(f"phase {phase_name} of {owner} trains {name!r}, but the networks are {there}")
            if name in trained:
                raise ConfigError(
                    f"phases {trained[name]} and {phase_name} of {owner} both train the network {name}, each with an "
                    "optimizer of its own; name it in `trains` of one of them"
                )
            trained[name] = phase_name
        if not any(True for name in phase.trains for _ in objective.networks[name].parameters()):
            raise ConfigError(f"phase {phase_name} of {owner} trains nothing: no network in its `trains` has weights")


def result_of(found: Any, phase: str) -> TurnResult:
    """Result of a phase's `forward`, which compilers give as a plain tuple.

    Raises:
        ConfigError: it is no TurnResult of tensors.
    """
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        raise ConfigError(f"{phase}.forward gives {type(found).__name__}, not TurnResult(loss, logs)")
    loss: Any = found[0]
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ConfigError(f"{phase}.forward gives a loss of {_shape_of(loss)}, not a tensor []: the mean over images")
    logs: Any = found[1]
    if not isinstance(logs, Mapping):
        raise ConfigError(f"{phase}.forward gives logs of {_shape_of(logs)}, not a dict of tensors by name")
    for name, value in logs.items():
        if not isinstance(value, Tensor) or value.ndim > 1:
            raise ConfigError(f"{phase}.forward logs {name} as {_shape_of(value)}, not as a tensor [] or [B]")
    return TurnResult(*found)


def _shape_of(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"


def unit_interval(images: Tensor) -> Tensor:
    """Images in 0..255, as `Batch` has them, as float32 0..1."""
    return images * (1.0 / 255.0)
