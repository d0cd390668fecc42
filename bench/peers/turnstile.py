"""Barrier at which a training waits between blocks of steps for the next command.

Commands and answers are lines of JSON. A command has the number of `steps` of the block and whether to `test` after it.
The answer has the block's `seconds`, those of the processor over all threads, the `loss` of its last steps, the memory
that the process had at most, and, if asked for, the test negative ELBO. Waiting is a blocking read: it takes no time of
the processor.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

LOSSES = 100
"""Steps at the end of a block whose mean loss is reported."""


class Turnstile:
    """Passed after every step of a training."""

    def __init__(self, commands: TextIO, answers: TextIO) -> None:
        self._commands = commands
        self._answers = answers
        self._steps_left = 1  # the first step is for what is made at first use
        self._test_is_due = False
        self._losses: deque[float | Tensor] = deque(maxlen=LOSSES)
        self._started, self._started_cpu = time.perf_counter(), time.process_time()

    def passed(self, loss: float | Tensor, test: Callable[[], float], **more: float) -> None:
        """A step is done, with this loss in nats an image. At the end of a block: answer, and wait for the next.

        `test` gives the negative ELBO of the test images; `more` goes into the answer. Ends the process when there are
        no more commands: of all these trainings none has another way out from within.
        """
        self._losses.append(loss)
        self._steps_left -= 1
        if self._steps_left:
            return
        answer = {
            "seconds": time.perf_counter() - self._started,
            "cpu_seconds": time.process_time() - self._started_cpu,
            "loss": sum(map(float, self._losses)) / len(self._losses),
            "peak_mib": peak_memory_mib(),
            "threads": torch.get_num_threads(),
            **more,
        }
        if self._test_is_due:
            answer["test_negative_elbo"] = test()
        print(json.dumps(answer), file=self._answers, flush=True)
        line = self._commands.readline()
        if not line:
            os._exit(0)
        command = json.loads(line)
        self._steps_left, self._test_is_due = command["steps"], command["test"]
        self._losses.clear()
        self._started, self._started_cpu = time.perf_counter(), time.process_time()


def peak_memory_mib() -> float | None:
    """The most resident memory that this process ever had; None where the system does not tell.

    Not of getrusage, whose figure a process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return round(int(lines["VmHWM"].split()[0]) / 1024, 1)
