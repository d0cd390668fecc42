"""Use of the machine by a run: arithmetic a second, its share of the device's peak, and the peak of memory.

The operations of a step follow from its kind. They are counted once, before the first step, on a copy of the networks
and a few images, so that no step of the run knows of it. Later figures need no operation on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gen_dist.objectives import Batch, Objective
from gen_dist.objectives.operations import OperationWatch
from gen_dist.objectives.phase import Phase, result_of
from gen_dist.parallel.batch_sums import OwnSums
from gen_dist.parallel.sync_batch_norm import SyncBatchNorm
from gen_dist.plugins.surroundings import watched
from gen_dist.training.device_peak import peak_flops
from gen_dist.training.memory_advice import peak_memory_bytes
from gen_dist.training.trainer import Due, Trainer
from gen_dist.training.turn import autocast, computing

MIB = 2**20
_MOST_IMAGES = 2
"""Images of the counted steps; operations are in proportion to images."""


class MachineUse:
    """Figures of a run's use of the machine, for lines of metrics.jsonl."""

    def __init__(self, trainer: Trainer, warn: Callable[[str], None], *, first_step: int) -> None:
        """Count the operations of steps of every kind, and find the device's peak.

        Args:
            trainer: the run's. Its networks get no new values.
            warn: takes a line with the first figures if an objective cannot be counted. An objective that cannot be
                trained either has ended the run before that.
            first_step: step from which the first figures are.
        """
        self._trainer = trainer
        self._device = trainer.processes.device
        self._step = first_step
        self._flops: dict[tuple[tuple[str, bool], ...], float] = {}
        self._warn = warn
        self._reason = ""
        try:
            with watched():  # what a plug-in changes here would count as the state before the run
                self._flops = flops_per_image(trainer)
        except Exception as error:  # an objective from outside, on which the run does not depend here
            self._reason = " ".join(str(error).split())[:200] or type(error).__name__
        peak = peak_flops(self._device, trainer.dtype)
        self._peak = None if peak is None else peak * trainer.processes.world_size
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def figures(self, step: int, images_per_second: float) -> dict[str, float]:
        """Figures of the steps since the last call.

        Args:
            step: steps done.
            images_per_second: of all processes.

        Returns:
            `tflops_per_second` of all processes, `fraction_of_peak` if the device's peak is known, and
            `peak_memory_mib` of this process: of tensors on a GPU, else of the whole process.
        """
        if self._reason:
            self._warn(f"warning: the arithmetic of a step is not counted: {self._reason}")
            self._reason = ""
        kinds = [self._flops.get(tuple(self._trainer.due_at(one).items())) for one in range(self._step, step)]
        known = [flops for flops in kinds if flops is not None]
        self._step = step
        found: dict[str, float] = {}
        if known and len(known) == len(kinds):
            rate = images_per_second * sum(known) / len(known)
            found["tflops_per_second"] = rate / 1e12
            if self._peak is not None:
                found["fraction_of_peak"] = rate / self._peak
        return found | {"peak_memory_mib": peak_memory_bytes(self._device) / MIB}


def flops_per_image(trainer: Trainer) -> dict[tuple[tuple[str, bool], ...], float]:
    """Floating-point operations of a step, per image, by the phases and penalties that are due.

    Matrix products, convolutions and attention count, as torch.utils.flop_counter has them.
    """
    device, train = trainer.processes.device, trainer.dataset.train.sample
    rows = min(_MOST_IMAGES, trainer.config.global_batch_size)
    images, labels = train.for_model(slice(rows)).to(device), torch.from_numpy(train.labels[:rows]).to(device)
    counted = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in trainer.kinds_of_steps():
            due = trainer.due_at(step)
            batch = Batch(images, labels, torch.tensor([trainer.config.seed, step], device=device), 0)
            counted[tuple(due.items())] = _count(_copied(trainer.objective), due, batch, trainer.dtype) / rows
    return counted


def _copied(objective: Objective) -> Objective:
    """A copy that sums over its own images alone: the other processes do not count."""
    copied, own = copy.deepcopy(objective), OwnSums()
    copied.sum_over_processes, copied.sum_over_batch = own.total, own.over
    for layer in copied.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.sums = own
    return copied


def _count(objective: Objective, due: Due, batch: Batch, dtype: torch.dtype) -> int:
    phases = objective.phases()
    with _Counter() as counter:
        for name, penalized in due.items():
            batch = _take_turn(objective, phases[name], batch._replace(penalized=penalized), dtype)
    return counter.flops


def _take_turn(objective: Objective, phase: Phase, batch: Batch, dtype: torch.dtype) -> Batch:
    """Compute the gradients of a phase; returns the batch with what the phase carries to later ones."""
    phase.train()
    trained = [p for name in phase.trains for p in objective.networks[name].parameters() if p.requires_grad]
    frozen = _without(objective.networks.parameters(), trained)
    for parameter in frozen:
        parameter.requires_grad_(False)
    with torch.no_grad(), autocast(batch.images.device, dtype):
        prepared = phase.prepare([batch])
    batch = batch._replace(carried={**batch.carried, **prepared})
    with computing(batch.images.device, dtype):
        loss, _, carried = result_of(phase(batch), type(phase).__name__)
    loss.backward(inputs=trained)
    for parameter in frozen:
        parameter.requires_grad_(True)
    return batch._replace(carried={**batch.carried, **carried})


def _without(parameters: Any, left_out: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    ours = set(map(id, left_out))
    return [one for one in parameters if one.requires_grad and id(one) not in ours]


class _Counter(OperationWatch):
    """Counter of the operations that torch.utils.flop_counter knows, and of oneDNN's product.

    torch's own FlopCounterMode also follows modules, by hooks that `autograd.grad` does not allow everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # imported late: it takes a tenth of a second

        self._formulas: Mapping[Any, Any] = flop_registry
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in self._formulas:
            self.flops += self._formulas[packet](*args, **kwargs, out_val=result)
        elif str(packet) == "mkldnn._linear_pointwise":
            self.flops += 2 * args[0].numel() * args[1].shape[0]
        return result
