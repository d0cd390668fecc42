"""Two processes against one, and a cost model's forecast for more: `python bench/scaling/scaling.py --help`.

Two processes of one thread each, joined by gloo as launchers join them, do blocks of steps on command and in turns:

- alone: one of them trains by itself while the other waits;
- at once: both train separately. That is what the machine allows two processes, which share caches, memory and power;
- joined: both train one model, each on as many images as when alone.

From the times of single processes and of all-reduces between the two, the constants of cost_model.py are fitted. Its
forecast for two processes stands beside what was measured; for more it is a forecast.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.spread import spread
from bench.measuring.temporary import temporary_directory
from bench.scaling.cost_model import Network, Reduction, fit_network
from bench.scaling.processes import (
    BLOCK_STEPS,
    MODES,
    ROWS,
    Handle,
    Mode,
    by_all,
    seconds_of_reduction,
    seconds_of_step,
    two_processes,
)
from bench.scaling.report import draw, forecast, print_forecast, print_network, print_report, report

REDUCED_FLOATS = (1, 2**12, 2**14, 2**16, 2**18, 2**19, 2**20)
ATTEMPTS = 20
"""Attempts at a quiet block. The last one counts even if it is not quiet."""

Times = dict[str, dict[int, dict[Mode, list[float]]]]
"""Seconds of a step by preset, images of a process, and mode; one value a round."""


def main(
    data: str = "mnist5k",
    data_root: Path | None = None,
    rounds: int = 20,
    seed: int = 0,
    latency_us: float | None = None,
    bandwidth_gbit: float | None = None,
    least_gain: float = 1.2,
    quiet_cores: float | None = None,
    picture: Path | None = None,
    out: Path | None = None,
) -> None:
    """Measure, fit, forecast; print the figures and, as the last line, all of them in JSON.

    Args:
        data: source of images.
        data_root: directory with torchvision's MNIST, which is then the data. None: what `data` says.
        rounds: turns that each preset takes with each number of images in each of the three ways.
        seed: key of weights, images and noise.
        latency_us: of the network to forecast for, microseconds a message. None: as fitted between the two processes.
        bandwidth_gbit: of that network, Gbit/s. None: as fitted.
        least_gain: data parallelism is said to pay as long as twice the workers do this many times the images.
        quiet_cores: blocks during which other programs used more cores than this are done again, up to 20 times. None
            takes them as they are.
        picture: PNG file for the speed-ups, forecast and measured. None draws none.
        out: file for the JSON. None prints it alone.
    """
    before = conditions()
    if data_root is not None:
        data = "mnist"
    with temporary_directory() as cache, two_processes() as members:
        options = {"data": data, "data_root": str(data_root or "data"), "seed": seed, "device": "cpu"}
        by_all(members, "prepare", options, str(cache))
        facts = members[0].call("facts")
        times, reduced, others = measure(members, rounds, quiet_cores)
    network = fit_network({4 * floats: float(np.median(seconds)) for floats, seconds in reduced.items()}, workers=2)
    wanted = Network(
        network.latency_seconds if latency_us is None else latency_us * 1e-6,
        network.bytes_per_second if bandwidth_gbit is None else bandwidth_gbit * 1e9 / 8,
    )
    reports = {
        preset: report(preset, times[preset], [Reduction(*each) for each in facts["reductions"][preset]], network)
        for preset in ROWS
    }
    forecasts = {
        preset: forecast(found["compute"]["alone"], found["reductions"], wanted, preset, least_gain)
        for preset, found in reports.items()
    }
    for preset in ROWS:
        print_report(preset, reports[preset])
    used = spread(others)
    print(f"\ncores used by other programs meanwhile: {used['median']:.2f} ({used['p20']:.2f} to {used['p80']:.2f})")
    print_network(network, reduced)
    for preset in ROWS:
        print_forecast(preset, forecasts[preset], wanted, least_gain)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(picture, reports, forecasts, wanted)
    results = {
        "conditions": before | {"threads": facts["threads"], "processes": 2},
        "data": data,
        "block_steps": BLOCK_STEPS,
        "network": asdict(network),
        "network_of_forecast": asdict(wanted),
        "presets": reports,
        "forecasts": forecasts,
        "step_seconds": times,
        "cores_of_others": others,
        "all_reduce_seconds": reduced,
    }
    text = json.dumps(results, default=asdict)
    if out is not None:
        out.write_text(text + "\n")
    print(text)


def measure(
    members: Sequence[Handle], rounds: int, quiet_cores: float | None
) -> tuple[Times, dict[int, list[float]], list[float]]:
    """Seconds of steps and of all-reduces (by their floats), all in turns, and cores that others used in each block."""
    times: Times = {preset: {rows: {mode: [] for mode in MODES} for rows in ROWS[preset]} for preset in ROWS}
    reduced: dict[int, list[float]] = {floats: [] for floats in REDUCED_FLOATS}
    others: list[float] = []

    def quiet(block: Callable[[], float]) -> float:
        for _ in range(1 if quiet_cores is None else ATTEMPTS):
            watch = OtherPrograms(members)
            seconds = block()
            used = watch.cores()
            if quiet_cores is None or used <= quiet_cores:
                break
        others.append(used)
        return seconds

    for turn in range(rounds):
        modes = MODES[turn % 3 :] + MODES[: turn % 3]  # none always follows the same other one
        for preset, by_rows in times.items():
            for rows, by_mode in by_rows.items():
                for mode in modes:
                    block = functools.partial(seconds_of_step, members, turn, preset, rows, mode)
                    by_mode[mode].append(quiet(block))
        for floats, of_turns in reduced.items():
            of_turns.append(quiet(functools.partial(seconds_of_reduction, members, floats)))
    return times, reduced, others


class OtherPrograms:
    """CPU use of all other programs from now on, including time that a hypervisor takes away."""

    def __init__(self, members: Sequence[Handle]) -> None:
        self._ours = [psutil.Process(), *(psutil.Process(member.process.pid) for member in members)]
        self._start = time.perf_counter()
        self._used_before = self._used()

    def cores(self) -> float:
        """Cores in use since the beginning, on average; the system counts in ticks, so it can be a little below 0."""
        return (self._used() - self._used_before) / (time.perf_counter() - self._start)

    def _used(self) -> float:
        """CPU seconds until now."""
        machine = psutil.cpu_times()._asdict()
        idle = ("idle", "iowait", "guest", "guest_nice")  # guests' time is in that of users already
        everyone: float = sum(seconds for kind, seconds in machine.items() if kind not in idle)
        return everyone - sum(process.cpu_times().user + process.cpu_times().system for process in self._ours)


if __name__ == "__main__":
    tyro.cli(main)
