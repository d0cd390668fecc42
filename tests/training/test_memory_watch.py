"""Memory that is nearly used up is reported before the system ends the process."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from gen_dist.config import TrainConfig
from gen_dist.parallel.processes import Processes
from gen_dist.presets import get_preset
from gen_dist.records.display import Display
from gen_dist.records.metrics_file import read_metrics
from gen_dist.training import memory_watch
from gen_dist.training.memory_advice import StepFacts, untried_ways_out
from gen_dist.training.memory_watch import Looks, MemoryWatch, memory_line
from gen_dist.training.run import train
from tests.support.runs import SMALL_STYLEGAN2, make_trainer, small_config

MIB, GIB = 2**20, 2**30
ALONE = Processes(0, 0, 1, torch.device("cpu"))
FACTS = StepFacts("vae", 1, 1, has_batch_statistics=False, keeps_whole_state=True)


@dataclass
class Machine:
    """A machine whose processes take memory at a rate between two looks."""

    free: int
    own: int
    rate: int = 0
    """Bytes that the process takes."""
    others: int = 0
    """Bytes that others take."""
    looked_at: int = 0
    """Times that free memory was looked at."""

    def resident(self) -> int:
        self.own += self.rate
        self.free -= self.rate + self.others
        return self.own

    def free_bytes(self) -> int:
        self.looked_at += 1
        return max(0, self.free)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], Machine]:
    """Have looks see a machine."""

    def set_it(machine: Machine) -> Machine:
        monkeypatch.setattr(memory_watch, "resident_bytes", machine.resident)
        monkeypatch.setattr(memory_watch, "free_memory_bytes", machine.free_bytes)
        monkeypatch.setattr(memory_watch, "_SECONDS", 0.001)
        return machine

    return set_it


@pytest.mark.parametrize("free", [2 * GIB, 8 * GIB, 64 * GIB])
@pytest.mark.parametrize("rate", [5 * MIB, 15 * MIB, 110 * MIB, 200 * MIB, 600 * MIB])
def test_a_process_that_grows_is_seen_before_memory_ends(
    free: int, rate: int, on: Callable[[Machine], Machine]
) -> None:
    machine, looks = on(Machine(free, own=300 * MIB)), Looks()
    looks.look()
    machine.rate = rate
    while not looks.look():
        assert machine.free > 0
    assert 0 < machine.free <= max(machine.own // 10, 2 * rate)


def test_memory_that_others_take_is_seen(on: Callable[[Machine], Machine]) -> None:
    machine, looks = on(Machine(4 * GIB, own=GIB)), Looks()
    looks.look()
    machine.others = 20 * MIB
    while not looks.look():
        assert machine.free > 0
    assert machine.free > 0


def test_a_process_with_enough_is_looked_at_rarely_and_says_nothing(on: Callable[[Machine], Machine]) -> None:
    machine, looks = on(Machine(4 * GIB, own=30 * GIB)), Looks()
    assert not any(looks.look() for _ in range(100))
    assert machine.looked_at == 10


def test_without_numbers_of_the_system_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_watch, "free_memory_bytes", lambda: None)
    looks = Looks()
    assert looks.look() is None and looks.ended
    monkeypatch.setattr(memory_watch, "resident_bytes", lambda: None)
    looks = Looks()
    assert looks.look() is None and looks.ended


def test_looks_take_little_time() -> None:
    begun = time.thread_time()
    looks = Looks()
    for _ in range(100):
        looks.look()
    assert time.thread_time() - begun < 0.1 * 100 * memory_watch._SECONDS


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_says_so_once_on_standard_error(
    rank: int, on: Callable[[Machine], Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    on(Machine(100 * MIB, own=2 * GIB))
    screen = io.StringIO()
    watch = MemoryWatch(Processes(rank, rank, 2, torch.device("cpu")), screen)
    watch.ways_out = "a smaller network"
    with watch:
        assert watch._thread
        watch._thread.join(30)
        assert not watch._thread.is_alive()
    told, others = screen.getvalue(), capsys.readouterr().err
    line = (
        f"warning: rank {rank} has 2.0 GiB of memory and 0.1 GiB is left; if it needs more, the system ends it without "
        "a word (signal 9): use a smaller network\n"
    )
    assert (told, others) == ((line, "") if rank == 0 else ("", line))


def test_the_line_is_above_the_bar_of_a_terminal(on: Callable[[Machine], Machine]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            raise OSError

    on(Machine(0, own=GIB))
    screen = Terminal()
    display = Display(screen, 10)
    display.start(0)
    with MemoryWatch(ALONE, screen) as watch:
        assert watch._thread
        watch._thread.join(30)
    before, _, after = screen.getvalue().partition("warning: this process")
    assert before.endswith("\r") and "\n" not in before and "step 0/10" in before
    assert "(signal 9)\n" in after and "step 0/10" in after.partition("\n")[2]
    display.close()


def test_a_screen_that_is_gone_ends_nothing(
    on: Callable[[Machine], Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    on(Machine(0, own=GIB))
    screen = io.StringIO()
    screen.close()
    with MemoryWatch(ALONE, screen) as watch:
        assert watch._thread
        watch._thread.join(30)
    assert capsys.readouterr().err == ""


def test_a_run_beside_its_limit_says_so_and_is_the_same_run(
    on: Callable[[Machine], Machine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packing is watched, too, and what a caller does with lines is not called from another thread."""
    threads: set[int] = set()
    images = torch.randint(0, 256, (64, 8, 8), dtype=torch.uint8).numpy()
    losses = []
    for name, free in (("enough", 64 * GIB), ("little", 0)):
        on(Machine(free, own=GIB))
        config = small_config("vae", run_dir=str(tmp_path / name))
        config = replace(config, packing=replace(config.packing, cache_dir=str(tmp_path / "cache")))
        assert train(config, data=images, say=lambda _: threads.add(threading.get_ident())).finished
        told = capsys.readouterr().err
        assert told.count("if it needs more, the system ends it without a word (signal 9)") == (free == 0)
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([record["train/loss"] for record in records if "train/loss" in record])
    assert threads == {threading.get_ident()} and losses[0] == losses[1] != []
    assert not any(thread.name == "gen_dist-memory" for thread in threading.enumerate())


def test_on_a_gpu_nothing_is_watched() -> None:
    with MemoryWatch(Processes(0, 0, 1, torch.device("cuda", 0)), None) as watch:
        assert watch._thread is None


def test_the_line_names_what_is_known() -> None:
    assert memory_line("this process", 20 * GIB, GIB, "") == (
        "warning: this process has 20.0 GiB of memory and 1.0 GiB is left; if it needs more, the system ends it "
        "without a word (signal 9)"
    )


def test_options_are_those_that_the_run_can_take() -> None:
    same = "the same run up to rounding"
    other = "another run: batch normalization takes the statistics of a micro-batch"
    batch = "a smaller --global-batch-size"

    def of(config: object, processes: Processes = ALONE, facts: StepFacts = FACTS) -> str:
        return untried_ways_out(facts, config, processes)  # type: ignore[arg-type]

    assert of(get_preset("kl-f8")) == (
        f"--accumulation 2 or more ({same}), --checkpointing (the same run, a step takes longer), {batch}, "
        "or a smaller network"
    )
    small = small_config("vae", global_batch_size=4)
    assert of(small) == f"--accumulation 2 or more ({same}), {batch}, or a smaller network"
    assert of(replace(small, accumulation=2)) == f"--accumulation 4 ({same}), {batch}, or a smaller network"
    assert of(replace(small, accumulation=3)).startswith(f"--accumulation 4 ({same})")
    assert of(replace(small, accumulation=4)) == "a smaller network"
    assert f"({other})" in of(small, facts=replace(FACTS, has_batch_statistics=True))
    # Several processes have a part of the batch each.
    two = Processes(0, 0, 2, torch.device("cpu"))
    assert of(small, two).startswith(f"--accumulation 2 ({same}), --split-state (the same run; each process keeps 1/2")
    assert "--split-state" not in of(replace(small, split_state=True), two)
    # Layers that take images together.
    assert of(small, facts=replace(FACTS, rows_together=2)).startswith(f"--accumulation 2 ({same}), {batch}")
    assert of(small, facts=replace(FACTS, rows_together=4)) == f"{batch} or a smaller network"
    # Shards.
    more = "more --shards, which is another run in its last digits"
    assert of(replace(small, shards=2)) == f"{more}, {batch}, or a smaller network"
    assert of(replace(small, shards=4)) == "a smaller network"


def test_a_trainer_knows_its_options() -> None:
    def ways_out(config: TrainConfig) -> str:
        trainer = make_trainer(config)
        return untried_ways_out(trainer.facts_of_step(config.global_batch_size), config, trainer.processes)

    assert "batch normalization" not in ways_out(small_config("vae"))
    config = small_config("gan", global_batch_size=8, network=replace(SMALL_STYLEGAN2, minibatch_group=4))
    assert ways_out(config).startswith("--accumulation 2 (the same run up to rounding)")
