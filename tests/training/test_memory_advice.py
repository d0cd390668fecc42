"""A step that lacks memory ends with the number of micro-batches with which it fits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from gen_dist.config import OptimizerConfig, ScheduleConfig
from gen_dist.errors import MachineError
from gen_dist.objectives import Batch
from gen_dist.parallel.processes import Processes
from gen_dist.training.memory_advice import StepFacts, memory_advice
from tests.support.limited_memory import LimitedMemory
from tests.support.runs import make_trainer, run_steps, small_config

AVERAGED = OptimizerConfig(ema_decay=0.9)
SCHEDULED_AVERAGE = {"optimization": OptimizerConfig(), "schedule": ScheduleConfig(final_ema_images=100)}
ONE = Processes(0, 0, 1, torch.device("cpu"))
IMAGES = 256
STEPS = 6
TOO_LITTLE = 400_000
"""Bytes for the images of a step, but not for the state of an optimizer beside them."""


def _peak(objective: str, accumulation: int) -> int:
    trainer = make_trainer(_config(objective, accumulation))
    with LimitedMemory() as memory:
        run_steps(trainer, 0, STEPS)
    return memory.peak


def _config(objective: str, accumulation: int = 1, **changes: Any) -> Any:
    return small_config(objective, global_batch_size=IMAGES, accumulation=accumulation, **changes)


@pytest.mark.parametrize(
    "objective",
    ["vae", "gan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("iwae", "latent autoencoder"))],
)
def test_the_advised_accumulation_fits_and_is_the_same_run(objective: str) -> None:
    peaks = {accumulation: _peak(objective, accumulation) for accumulation in (2, 4)}
    assert peaks[4] < 0.8 * peaks[2]
    limit = (peaks[2] + peaks[4]) // 2
    trainer = make_trainer(_config(objective))
    with LimitedMemory(limit), pytest.raises(MachineError, match=f"in phase .* with {IMAGES} images at once") as raised:
        trainer.run_step(0)
    advised = re.search(r"--accumulation (\d+), which fits", str(raised.value))
    assert advised and advised[1] == "4"
    assert "\n" not in str(raised.value)
    fitting = make_trainer(_config(objective, int(advised[1])))
    with LimitedMemory(limit):
        losses = run_steps(fitting, 0, STEPS)
    assert losses == pytest.approx(run_steps(make_trainer(_config(objective)), 0, STEPS), rel=1e-6)


def test_the_phase_that_lacks_memory_is_named() -> None:
    trainer = make_trainer(_config("gan"))
    peaks: list[int] = []
    names = list(trainer._turns)
    with LimitedMemory() as memory:
        trainer.run_step(0, lambda part: peaks.append(memory.peak) if part == f"{names[0]}/optimizer" else None)
    assert peaks[0] < memory.peak
    again = make_trainer(_config("gan"))
    with LimitedMemory(peaks[0]), pytest.raises(MachineError, match=f"out of memory in phase {names[1]} "):
        again.run_step(0)


@pytest.mark.slow
def test_a_network_that_does_not_fit_with_one_image_is_told() -> None:
    trainer = make_trainer(_config("vae"))
    with LimitedMemory(TOO_LITTLE), pytest.raises(MachineError, match="not even one image fits: use a smaller network"):
        trainer.run_step(0)


def test_shards_are_not_advised_away() -> None:
    trainer = make_trainer(_config("vae", shards=2))
    with LimitedMemory(TOO_LITTLE), pytest.raises(MachineError, match="more --shards, which is another run"):
        trainer.run_step(0)


def test_other_errors_pass() -> None:
    trainer = make_trainer(_config("vae"))

    def failing(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    trainer._turns["vae"].take = failing  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.run_step(0)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("rows", "least", "tried"),
    [(1024, 1, [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]), (3, 1, [2, 1]), (24, 6, [12, 6]), (1, 1, [])],
)
def test_all_sizes_down_to_one_image_are_tried(rows: int, least: int, tried: list[int]) -> None:
    sizes: list[int] = []

    def fits(size: int) -> bool:
        sizes.append(size)
        return size <= least

    advice = _advice(rows, fits)
    assert sizes == tried
    advised = re.search(r"--accumulation (\d+), which fits", str(advice))
    assert (int(advised[1]) if advised else None) == (-(-rows // least) if tried else None)
    assert ("not even one image" in str(advice)) == (not tried)


@pytest.mark.parametrize(
    ("processes", "advised"), [(1, "--accumulation 6, which fits"), (2, "--accumulation 3 or more")]
)
def test_advised_micro_batches_keep_groups_together(processes: int, advised: str) -> None:
    """24 images in groups of 4 are tried 12 and 4 at once, but not 6 or 3."""
    sizes: list[int] = []
    ranks = dataclasses.replace(ONE, world_size=processes)

    def fits(size: int) -> bool:
        sizes.append(size)
        return size <= 5

    advice = _advice(24, fits, ranks, rows_together=4)
    assert advised in advice
    assert sizes == ([12, 4] if processes == 1 else [])
    assert "not even the 4 images fit that a layer takes together" in _advice(24, lambda _: False, rows_together=4)


@pytest.mark.parametrize("changes", [{}, {"shards": 8}, {"global_batch_size": 4}, SCHEDULED_AVERAGE])
def test_split_state_is_advised_where_it_helps(changes: dict[str, Any]) -> None:
    option = "--split-state (the same run; each process keeps 1/4 of the optimizer's state and the moving average)"
    ranks = dataclasses.replace(ONE, world_size=4)
    assert option in _advice(24, lambda _: False, ranks, keeps_whole_state=True, **changes)
    assert "--split-state" not in _advice(24, lambda _: False, ranks, **changes)


def test_advice_for_split_state_can_be_followed() -> None:
    """A run with both options is refused."""
    ranks = dataclasses.replace(ONE, world_size=4)
    assert "--auto-accumulation" in _advice(24, lambda _: False, ranks)
    assert "--auto-accumulation" not in _advice(24, lambda _: False, ranks, split_state=True)
    tried = _advice(24, lambda _: False, ranks, keeps_whole_state=True, auto_accumulation=True)
    assert "--split-state in place of --auto-accumulation (" in tried and "to find it at the start" not in tried


def _advice(
    rows: int,
    fits: Callable[[int], bool],
    processes: Processes = ONE,
    rows_together: int = 1,
    keeps_whole_state: bool = False,
    **changes: Any,
) -> str:
    config = small_config("vae", **{"global_batch_size": rows, "optimization": AVERAGED} | changes)
    facts = StepFacts("vae", rows, rows_together, has_batch_statistics=False, keeps_whole_state=keeps_whole_state)
    return str(memory_advice(torch.OutOfMemoryError("CUDA out of memory"), facts, config, processes, fits))


@pytest.mark.parametrize(("objective", "promised"), [("gan", "same"), ("dcgan", "another")])
def test_advice_for_batch_normalization_promises_no_equal_run(objective: str, promised: str) -> None:
    trainer = make_trainer(small_config(objective))

    def lacking(batches: Sequence[Batch], *_: object) -> dict[str, torch.Tensor]:
        if len(batches) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {}

    trainer._take_turns = lacking  # type: ignore[method-assign, assignment]
    with pytest.raises(MachineError, match=rf"--accumulation 2, which fits .*{promised} run"):
        trainer.run_step(0)


def test_another_error_of_a_trial_does_not_hide_the_lack_of_memory() -> None:
    trainer = make_trainer(_config("vae"))

    def failing(batches: Sequence[Batch], *_: object) -> dict[str, torch.Tensor]:
        if len(batches[0].images) < IMAGES // 2:
            raise ValueError("Expected more than 64 values")
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer._take_turns = failing  # type: ignore[method-assign, assignment]
    line = rf"out of memory in phase .*; {IMAGES // 4} images at once .*\(Expected more than 64 values\): use a smaller"
    with pytest.raises(MachineError, match=line):
        trainer.run_step(0)
