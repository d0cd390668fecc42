"""Worker of test_flat_gradients.py in several processes without shared weights, with buckets sent during backward.

Arguments: where to write the results, and objectives. Of `swapped` results, the last process has exchanged two buckets
of equal size.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel

from gen_dist.config import MlpConfig, TrainConfig
from gen_dist.errors import UserError, as_user_error
from gen_dist.objectives import Batch
from gen_dist.parallel.gradients import FlatReduction, Reduction
from gen_dist.parallel.processes import end_process, start_processes
from gen_dist.testing.tape import TapeRecorder, device_noise_on_cpu
from gen_dist.training import auto_accumulation
from gen_dist.training.cuda_graphs import RecordedSteps
from gen_dist.training.schedule import Schedule
from gen_dist.training.trainer import Trainer
from gen_dist.training.turn import Computed, EagerBackward, Lap, Turn
from tests.parallel.rank_worker import config_of_ranks, parameter_spread, spread
from tests.support.runs import all_tensors, make_trainer, run_steps, small_config, small_dataset
from tests.support.two_players import two_players, without_shared_weights

T = TypeVar("T")
BUCKET_BYTES = 1000
TWIN_STEPS = 6
EQUAL_LAYERS = small_config("vae", network=MlpConfig(hidden_sizes=(16, 16, 16), latent_dim=5))


class _Watching(TapeRecorder):
    """A tape that lists the collectives of its recordings, each with the parameters of its bucket, or its size."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.collectives: list[str] = []
        self.unreduced: list[str] = []
        """Updates with a gradient that no process has sent, or that it does not wait for."""

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        result, replay = super().record(work)
        names = self._names_of_buckets()
        waited: set[int] = set()
        for func, args, _, _ in replay.__self__._calls:  # type: ignore[attr-defined]
            if func.namespace == "_c10d_functional":
                storage = args[0].untyped_storage().data_ptr()
                self.collectives.append(f"{func} {names.get(storage, args[0].numel())}")
                if "wait" in func.__name__ and storage in names:
                    waited.add(storage)
            if "_fused_adam" in func.__name__:
                found = {gradient.untyped_storage().data_ptr() for gradient in args[1]}
                self.unreduced += [str(func)] * (not found or not found <= waited)
                waited -= found
        return result, replay

    def _names_of_buckets(self) -> dict[int, str]:
        assert self.trainer is not None
        names: dict[int, str] = {}
        for turn in self.trainer._turns.values():
            of = {id(p): name for p, name in zip(turn._reduction.parameters, turn._names, strict=True)}
            for bucket in _buckets(turn):
                names[bucket.flat.untyped_storage().data_ptr()] = " ".join(of[id(p)] for p in bucket.parameters)
        return names


def _buckets(turn: Turn) -> list[Any]:
    assert isinstance(turn._reduction, FlatReduction)
    return turn._reduction._buckets


class _TwinBackward(EagerBackward):
    """The same turn through DistributedDataParallel."""

    def __init__(self, turn: Turn) -> None:
        before = turn._backward
        assert isinstance(before, EagerBackward)
        super().__init__(before._phase, before._parameters, Reduction([]), before._update, before._dtype)
        with turn._freezing():
            self._module = DistributedDataParallel(turn.phase, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._phase = self._module  # type: ignore[assignment]
        turn._reduction, turn._backward = Reduction(turn._reduction.parameters), self

    def add(self, batch: Batch, weight: float, lap: Lap, *, last: bool) -> Computed:
        self._module.require_backward_grad_sync = last
        return super().add(batch, weight, lap, last=last)


def _flat(parameters: list[torch.nn.Parameter], *_: object, **__: object) -> FlatReduction:
    return FlatReduction(parameters, BUCKET_BYTES)


def _trainer(config: TrainConfig, recorder: _Watching | None, *, swapped: bool = False) -> Trainer:
    with mock.patch("gen_dist.training.turn.choose_reduction", _flat):
        trainer = make_trainer(config)
    trainer._schedule = Schedule(config, torch.device("cpu"), in_tensors=True)
    if recorder:
        recorder.trainer = trainer
        trainer._recorded = RecordedSteps(lambda: recorder)
    for turn in trainer._turns.values() if swapped else ():
        _swap_equals(_buckets(turn))
    return trainer


def _swap_equals(buckets: list[Any]) -> None:
    """Exchange the places of two buckets of one size."""
    sizes = [bucket.flat.numel() for bucket in buckets]
    first, second = next((i, j) for j in range(len(sizes)) for i in range(j) if sizes[i] == sizes[j])
    buckets[first], buckets[second] = buckets[second], buckets[first]


def _recorded(name: str, *, swapped: bool = False) -> dict[str, Any]:
    """Compare recorded steps with launched ones."""
    config = EQUAL_LAYERS if name == "vae, two equal layers" else config_of_ranks(name)
    steps = 4 * int(np.lcm.reduce(config.objective.periods))
    swapped &= dist.get_rank() == dist.get_world_size() - 1
    recorder = _Watching()
    with device_noise_on_cpu():
        taped, plain = _trainer(config, recorder, swapped=swapped), _trainer(config, None, swapped=swapped)
        losses, wanted = run_steps(taped, 0, steps), run_steps(plain, 0, steps)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, recorder.collectives)
    return {
        "losses": losses == wanted and all(map(math.isfinite, losses)),
        "different": _different(all_tensors(taped), all_tensors(plain)),
        "buckets": [len(_buckets(turn)) for turn in taped._turns.values()],
        "unreduced": recorder.unreduced,
        "collectives": len(recorder.collectives),
        "one order": all(one == of_ranks[0] for one in of_ranks),
        "spread": parameter_spread(taped),
    }


def _twins(name: str, **changes: object) -> float:
    """Greatest difference of the states of flat gradients and of DistributedDataParallel after some steps."""
    config = config_of_ranks(name)
    config = type(config)(**{**vars(config), **changes})
    with without_shared_weights():
        default = make_trainer(config)
    flat, twin = _trainer(config, None), _trainer(config, None)
    for turn in twin._turns.values():
        _TwinBackward(turn)
    states = []
    for trainer in (flat, default, twin):
        # DistributedDataParallel prepares its reduction in `forward`, so graphs of another phase are not for it.
        trainer.objective.carries_graphs = False
        trainer._schedule = Schedule(config, torch.device("cpu"), in_tensors=False)
        run_steps(trainer, 0, TWIN_STEPS)
        states.append(all_tensors(trainer))
    assert states[0].keys() == states[1].keys() == states[2].keys()
    apart = [float((state[key].double() - states[-1][key].double()).abs().max()) for state in states for key in state]
    return max(apart)


def _spread_of_other_draws(name: str) -> float:
    """Spread of weights, averages and buffers over processes in which one seed gives other numbers."""
    seed = torch.manual_seed
    with without_shared_weights(), mock.patch("torch.manual_seed", lambda number: seed(number + dist.get_rank())):
        trainer = make_trainer(config_of_ranks(name))
    return parameter_spread(trainer) + spread(list(trainer.objective.buffers()), trainer.processes)


def _auto_accumulation() -> int:
    """Accumulation that is found where the last process needs more than the others, after trials of each by itself."""
    fits = auto_accumulation._fits

    def fits_here(number: int, *arguments: Any) -> bool:
        return fits(number, *arguments) and number >= 2 + (dist.get_rank() == dist.get_world_size() - 1)

    config = config_of_ranks("dcgan").with_options(auto_accumulation=True)
    processes = start_processes(config)
    with mock.patch.object(auto_accumulation, "_fits", fits_here):
        found = auto_accumulation.with_accumulation_that_fits(
            config, Path(), True, small_dataset(config), processes, lambda _line: None
        )
    return found.accumulation


class _WithoutBias(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight)


def _error_of_unused_weight() -> str:
    """Error of this process if the loss of the last process does not depend on one weight."""
    with without_shared_weights():
        trainer = two_players()
    if dist.get_rank() == dist.get_world_size() - 1:
        trainer.objective.networks["generator"].get_submodule("2").__class__ = _WithoutBias
    try:
        run_steps(trainer, 0, 1)
    except (RuntimeError, UserError) as error:
        return str(as_user_error(error))
    return "none"


def _different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    return [name for name in first if not torch.equal(first[name], second[name])]


def main(out: Path, names: list[str]) -> None:
    start_processes(TrainConfig(device="cpu"))
    results: dict[str, Any] = {name: _recorded(name) for name in names}
    results["swapped"] = _recorded("vae, two equal layers", swapped=True)
    results["other draws"] = _spread_of_other_draws("sngan")
    results["twins"] = {name: _twins(name) for name in names}
    results["twins"]["vae, accumulated"] = _twins("vae", accumulation=2)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _auto_accumulation())
    results["accumulations"] = found
    error = _error_of_unused_weight()  # comes last: processes that wait for the one that fails fail, too
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results | {"unused weight": error}))
    else:
        out.with_suffix(f".{dist.get_rank()}").write_text(error)
    end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
