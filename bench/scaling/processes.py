"""Processes of the scaling benchmarks, which do blocks of steps on command, and their start."""

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch

from bench.measuring.network_hosts import Host
from bench.scaling.cost_model import Bucket
from bench.scaling.overlap import bucket_leads, buckets_as_on_gpus, buckets_that_stay, trained_by
from gen_dist.data import open_dataset
from gen_dist.parallel.collectives import sum_over_processes
from gen_dist.parallel.processes import Processes, end_process, start_processes
from gen_dist.presets import get_preset
from gen_dist.training.trainer import Trainer

ROWS = {"vae-mnist": (512, 192, 96, 12), "dcgan-mnist": (64, 32, 16, 4)}
"""Images per process and step, by preset. The first is compared. The preset's batch and half of it are there, so that
strong scaling is measured too."""
BLOCK_STEPS = 17
"""Noise is drawn for the first step of a block, then for sixteen steps at once: a block draws for its own steps."""
REDUCTIONS_OF_A_BLOCK = 32

Mode = Literal["alone", "at once", "joined", "overlapped"]
MODES: tuple[Mode, ...] = ("alone", "at once", "joined")
"""Ways of the benchmark of two processes. A fourth is joined with buckets that are sent during backward."""


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    host: Host | None = None
    """Host of its own. None: on this machine, beside the others."""
    core: int | None = None
    """The only core that it uses. None: any."""


class Member:
    """One of the processes: its trainers and its commands."""

    def __init__(self) -> None:
        self._trainers: dict[tuple[str, int, Mode], Trainer] = {}
        self._next_step: dict[int, int] = {}
        self._reductions: dict[str, list[tuple[int, float]]] = {}

    def prepare(
        self,
        options: dict[str, Any],
        cache: str,
        rows_of_presets: Mapping[str, Sequence[int]] = ROWS,
        overlapped: bool = False,
    ) -> None:
        """Make a trainer for each preset and number of images, of this process alone and of all, and warm them up.

        They have different seeds, for noise that one trainer drew is kept and would serve another.

        Args:
            options: changes of the presets.
            cache: directory of packed data.
            rows_of_presets: images of a process in a step, by preset.
            overlapped: make one of all processes that sends buckets during backward, too, as on GPUs. The one of this
                process alone then has buckets as well.
        """
        for preset, rows_of_process in rows_of_presets.items():
            for rows in rows_of_process:
                # The schedule must not end while measuring: past its end the learning rate is negative.
                config = replace(get_preset(preset), **options, global_batch_size=rows, steps=10**6)
                config = replace(config, packing=replace(config.packing, cache_dir=cache))
                processes = start_processes(config)
                dataset = open_dataset(config.data, config.data_root, config.packing)
                by_itself = Processes(0, 0, 1, processes.device)
                with buckets_that_stay() if overlapped else contextlib.nullcontext():
                    self._trainers[preset, rows, "alone"] = Trainer(config, dataset, by_itself)
                config = replace(config, global_batch_size=processes.world_size * rows, seed=config.seed + 1)
                self._trainers[preset, rows, "joined"] = joined = Trainer(config, dataset, processes)
                self._reductions[preset] = reductions_of(joined)
                if overlapped:
                    config = replace(config, seed=config.seed + 1)
                    with buckets_as_on_gpus():
                        self._trainers[preset, rows, "overlapped"] = Trainer(config, dataset, processes)
                made: tuple[Mode, ...] = ("alone", "joined", "overlapped")
                for mode in made[: 3 if overlapped else 2]:
                    self.block(preset, rows, mode, together=True)

    def facts(self) -> dict[str, Any]:
        """Threads of this process, and bytes and frequency of each preset's all-reduces."""
        return {"threads": torch.get_num_threads(), "reductions": self._reductions}

    def block(self, preset: str, rows: int, mode: Mode, together: bool, steps: int = BLOCK_STEPS) -> float:
        """Seconds of a step, from a block of them; where all do one `together`, they begin at the same time."""
        trainer = self._trainers[preset, rows, "alone" if mode == "at once" else mode]
        first = self._next_step.get(id(trainer), 0)
        # One number is left out, so that each block draws its own noise anew.
        self._next_step[id(trainer)] = first + BLOCK_STEPS + 1
        if together:
            sum_over_processes(torch.zeros(1))
        start = time.perf_counter()
        logs = [trainer.run_step(step) for step in range(first, first + steps)]
        seconds = time.perf_counter() - start
        assert all(bool(value.isfinite().all()) for log in logs for value in log.values())
        return seconds / steps

    def stretches(self, preset: str, rows: int, steps: int) -> list[float]:
        """Seconds of a block by itself, cut where steps of all processes would average gradients."""
        trainer = self._trainers[preset, rows, "alone"]
        first = self._next_step[id(trainer)]
        self._next_step[id(trainer)] = first + BLOCK_STEPS + 1
        sum_over_processes(torch.zeros(1))  # all begin at the same time
        ends = [time.perf_counter()]

        def lap(part: str) -> None:
            if part.endswith(("/backward", "/gradients")):
                ends.append(time.perf_counter())

        for step in range(first, first + steps):
            trainer.run_step(step, lap)
        ends.append(time.perf_counter())
        return np.diff(ends).tolist()

    def leads(self, preset: str, rows: int) -> dict[str, list[Bucket]]:
        """Buckets of each phase with the seconds of backward that follow them. All processes do this together."""
        trainer = self._trainers[preset, rows, "joined"]
        first = self._next_step[id(trainer)]
        self._next_step[id(trainer)] = first + BLOCK_STEPS + 1
        return bucket_leads(trainer, first, BLOCK_STEPS)[0]

    def reduce(self, floats: int, times: int = REDUCTIONS_OF_A_BLOCK) -> float:
        """Seconds of an all-reduce of so many float32 over all processes: the median of some."""
        values = torch.zeros(floats)
        seconds = []
        for _ in range(times + 1):
            start = time.perf_counter()
            sum_over_processes(values)
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[1:]))  # in the first one waits for the other's command


def reductions_of(trainer: Trainer) -> list[tuple[int, float]]:
    """Bytes, and times a step, of the all-reduces that average gradients: one for what each phase trains."""
    return [
        (sum(p.nbytes for p in trained_by(phase)), 1 / phase.every) for phase in trainer.objective.phases().values()
    ]


@dataclass(frozen=True)
class Handle:
    """Handle of a member in the process that commands it."""

    process: multiprocessing.process.BaseProcess
    connection: Connection

    def start(self, method: str, *arguments: object) -> None:
        """Have the member begin with a call of one of its methods."""
        self.connection.send((method, arguments))

    def result(self) -> Any:
        """Result of the started call."""
        try:
            return self.connection.recv()
        except EOFError:
            sys.exit("one of the processes failed")

    def call(self, method: str, *arguments: object) -> Any:
        """Start a call and wait for its result."""
        self.start(method, *arguments)
        return self.result()


def by_all(members: Sequence[Handle], method: str, *arguments: object) -> list[Any]:
    """Results of a call that all members make at once."""
    for member in members:
        member.start(method, *arguments)
    return [member.result() for member in members]


@contextlib.contextmanager
def two_processes() -> Iterator[list[Handle]]:
    """Two new interpreters on this machine, to be joined by their first command."""
    with joined_processes([Place(), Place()]) as members:
        yield members


@contextlib.contextmanager
def joined_processes(places: Sequence[Place]) -> Iterator[list[Handle]]:
    """New interpreters in these places, to be joined by their first command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    members: list[Handle] = []
    main_host = places[0].host
    # Threads are counted when torch is imported, which a new interpreter does before its first line of ours.
    launched = {"OMP_NUM_THREADS": "1", "GEN_DIST_THREADS": "1", "MASTER_PORT": str(port)}
    os.environ.update(launched, MASTER_ADDR=main_host.address if main_host else "127.0.0.1")
    try:
        for rank, place in enumerate(places):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, len(places), place), daemon=True)
            process.start()
            theirs.close()
            members.append(Handle(process, ours))
        yield members
        for member in members:
            member.connection.send(None)
        for member in members:
            member.process.join()
    finally:
        for member in members:
            member.process.kill()


def serve(connection: Connection, rank: int, world_size: int, place: Place) -> None:
    """Serve commands from the connection until None arrives."""
    size, here = str(world_size), str(1 if place.host else world_size)
    local_rank = "0" if place.host else str(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=local_rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=here)
    if place.core is not None:
        os.sched_setaffinity(0, [place.core])
    if place.host:
        place.host.use_network()
        mock.patch("gen_dist.parallel.choice.share_weights", lambda _parameters: None).start()  # hosts share no memory
    member = Member()
    while (command := connection.recv()) is not None:
        method, arguments = command
        connection.send(getattr(member, method)(*arguments))
    end_process(0)


def seconds_of_step(members: Sequence[Handle], turn: int, preset: str, rows: int, mode: Mode) -> float:
    """Seconds in which a process does a step on `rows` images."""
    if mode == "alone":
        seconds: float = members[turn % 2].call("block", preset, rows, mode, False)
        return seconds
    each = by_all(members, "block", preset, rows, mode, True)
    # Rates of two that do not wait for each other add up; joined processes are as fast as the slower one.
    return max(each) if mode == "joined" else 2 / sum(1 / seconds for seconds in each)


def seconds_of_reduction(members: Sequence[Handle], floats: int) -> float:
    """Seconds of an all-reduce of so many float32 between the two."""
    seconds: float = max(by_all(members, "reduce", floats))
    return seconds
