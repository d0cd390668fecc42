"""Kill commands at random moments, and judge what the same command then makes of it: one line of JSON for each kill.

    LD_PRELOAD=failing_calls.so python -m tests.faults.kill WORK SCENARIO[,SCENARIO ...] KILLS SEED

A kill is right if every checkpoint is whole after it, and neither the newest one of before nor a figure of an
evaluation is lost. The end is right if the same command ends with exit code 0 and the files of an undisturbed one and
no others, and if nothing is left in shared memory.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import sys
import time
from pathlib import Path

from tests.faults.commands import Commands, print_json
from tests.faults.inject import differences, losses, result_of, started_again, undisturbed
from tests.faults.steady import get_ready

SHARED_MEMORY = Path("/dev/shm")


def shared_memory() -> set[str]:
    """Names of what is in shared memory."""
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def left_in_shared_memory(before: set[str]) -> set[str]:
    """Names of what is in shared memory, was not there before, and is no other program's: no living process has it."""
    left = shared_memory() - before
    for process in Path("/proc").glob("[0-9]*") if left else ():
        used: set[str] = set()
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            used |= set(re.findall(rf"{SHARED_MEMORY}/.*", (process / "maps").read_text(errors="replace")))
            for descriptor in os.listdir(process / "fd"):
                with contextlib.suppress(FileNotFoundError):
                    used.add(os.readlink(process / "fd" / descriptor))
        left -= {Path(path).name for path in used if path.startswith(f"{SHARED_MEMORY}/")}
    return left


def main(work: str, scenarios: str, kills: str, seed: str) -> None:
    """Kill each scenario's command so many times, at most three times in a row."""
    get_ready()
    commands, chance = Commands(Path(work)), random.Random(int(seed))
    for scenario in scenarios.split(","):
        words, state, prints = commands.scenarios[scenario]
        commands.prepare(state)
        expected = undisturbed(commands, scenario).twice
        commands.restore(state)
        began = time.monotonic()
        commands.run(words)
        seconds = time.monotonic() - began
        killed = 0
        while killed < int(kills):
            commands.restore(state)
            before = shared_memory()
            moments, problems = [], []
            for _ in range(min(chance.randrange(1, 4), int(kills) - killed)):
                moment, kept = chance.uniform(0, seconds), commands.kept()
                if commands.run(words, kill_after=moment).code is None:
                    moments.append(round(moment, 3))
                problems += losses(kept, commands.kept(), scenario)
            if not moments:  # it ended before the kill
                continue
            killed += len(moments)
            again = commands.run(started_again(words))
            if again.code == 0:
                problems += differences(expected, result_of(commands, again, prints))
            else:
                problems.append(f"exit code {again.code}: {again.err[-600:]}")
            if left := left_in_shared_memory(before):
                problems.append(f"left in shared memory: {sorted(left)}")
            print_json({"scenario": scenario, "killed after": moments, "problems": problems})


if __name__ == "__main__":
    main(*sys.argv[1:])
