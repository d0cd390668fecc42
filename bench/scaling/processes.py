"""The two processes of the scaling benchmark, which do blocks of steps on command, and their start."""

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

import numpy as np
import torch

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

Mode = Literal["alone", "at once", "joined"]
MODES: tuple[Mode, ...] = ("alone", "at once", "joined")


class Member:
    """One of the two processes: its trainers and its commands."""

    def __init__(self) -> None:
        self._joined: dict[tuple[str, int], Trainer] = {}
        self._alone: dict[tuple[str, int], Trainer] = {}
        self._next_step: dict[int, int] = {}
        self._reductions: dict[str, list[tuple[int, float]]] = {}

    def prepare(self, options: dict[str, Any], cache: str, rows_of_presets: Mapping[str, Sequence[int]] = ROWS) -> None:
        """Make a trainer for each preset and number of images, of this process alone and of both, and warm them up.

        They have different seeds, for noise that one trainer drew is kept and would serve another.
        """
        for preset, rows_of_process in rows_of_presets.items():
            for rows in rows_of_process:
                # The schedule must not end while measuring: past its end the learning rate is negative.
                config = replace(get_preset(preset), **options, global_batch_size=rows, steps=10**6)
                config = replace(config, packing=replace(config.packing, cache_dir=cache))
                processes = start_processes(config)
                dataset = open_dataset(config.data, config.data_root, config.packing)
                by_itself = Processes(0, 0, 1, processes.device)
                self._alone[preset, rows] = Trainer(config, dataset, by_itself)
                config = replace(config, global_batch_size=2 * rows, seed=config.seed + 1)
                self._joined[preset, rows] = Trainer(config, dataset, processes)
                self._reductions[preset] = reductions_of(self._joined[preset, rows])
                for joined in (False, True):
                    self.block(preset, rows, joined, together=True)

    def facts(self) -> dict[str, Any]:
        """Threads of this process, and bytes and frequency of each preset's all-reduces."""
        return {"threads": torch.get_num_threads(), "reductions": self._reductions}

    def block(self, preset: str, rows: int, joined: bool, together: bool) -> float:
        """Seconds of a step, from a block of them; where both do one `together`, they begin at the same time."""
        trainer = (self._joined if joined else self._alone)[preset, rows]
        first = self._next_step.get(id(trainer), 0)
        # One number is left out, so that each block draws its own noise anew.
        self._next_step[id(trainer)] = first + BLOCK_STEPS + 1
        if together:
            sum_over_processes(torch.zeros(1))
        start = time.perf_counter()
        logs = [trainer.run_step(step) for step in range(first, first + BLOCK_STEPS)]
        seconds = time.perf_counter() - start
        assert all(bool(value.isfinite().all()) for log in logs for value in log.values())
        return seconds / BLOCK_STEPS

    def reduce(self, floats: int) -> float:
        """Seconds of an all-reduce of so many float32 over both processes: the median of some."""
        values = torch.zeros(floats)
        seconds = []
        for _ in range(REDUCTIONS_OF_A_BLOCK + 1):
            start = time.perf_counter()
            sum_over_processes(values)
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[1:]))  # in the first one waits for the other's command


def reductions_of(trainer: Trainer) -> list[tuple[int, float]]:
    """Bytes, and times a step, of the all-reduces that average gradients: one for what each phase trains."""
    networks = trainer.objective.networks
    reductions: list[tuple[int, float]] = []
    for phase in trainer.objective.phases().values():
        trained = [p for name in phase.trains for p in networks[name].parameters() if p.requires_grad]
        reductions.append((sum(p.numel() * p.element_size() for p in trained), 1 / phase.every))
    return reductions


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


def both(members: Sequence[Handle], method: str, *arguments: object) -> list[Any]:
    """Results of a call that all members make at once."""
    for member in members:
        member.start(method, *arguments)
    return [member.result() for member in members]


@contextlib.contextmanager
def two_processes() -> Iterator[list[Handle]]:
    """Two new interpreters, to be joined by their first command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    members: list[Handle] = []
    # Threads are counted when torch is imported, which a new interpreter does before its first line of ours.
    launched = {"OMP_NUM_THREADS": "1", "GEN_DIST_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(launched)
    try:
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank), daemon=True)
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


def serve(connection: Connection, rank: int) -> None:
    """Serve commands from the connection until None arrives."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    member = Member()
    while (command := connection.recv()) is not None:
        method, arguments = command
        connection.send(getattr(member, method)(*arguments))
    end_process(0)


def seconds_of_step(members: Sequence[Handle], turn: int, preset: str, rows: int, mode: Mode) -> float:
    """Seconds in which a process does a step on `rows` images."""
    if mode == "alone":
        seconds: float = members[turn % 2].call("block", preset, rows, False, False)
        return seconds
    each = both(members, "block", preset, rows, mode == "joined", True)
    # Rates of two that do not wait for each other add up; joined processes are as fast as the slower one.
    return max(each) if mode == "joined" else 2 / sum(1 / seconds for seconds in each)


def seconds_of_reduction(members: Sequence[Handle], floats: int) -> float:
    """Seconds of an all-reduce of so many float32 between the two."""
    seconds: float = max(both(members, "reduce", floats))
    return seconds
