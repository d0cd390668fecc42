"""Two processes against one, and what a cost model says of more: `python bench/scaling.py --help`.

Two processes of one thread each, joined by gloo as launchers join them, do blocks of steps on command and in turns:

- alone: one of them trains by itself while the other waits;
- at once: both train by themselves, each as if alone: what the machine allows two processes, for they share its caches,
  its memory and its power;
- joined: both train one model, each on as many images as when alone.

From the times of single processes and of all-reduces between the two, the constants of bench/cost_model.py are fitted.
Its forecast for two processes stands beside what was measured; for more it is a forecast.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.conditions import conditions
from bench.cost_model import (
    Compute,
    Network,
    Reduction,
    fit_compute,
    fit_network,
    last_worth_doubling,
    step_seconds,
    strong_speedup,
    weak_speedup,
)
from gen_dist import parallel
from gen_dist.charts import figure_of, save_figure
from gen_dist.config import TrainConfig
from gen_dist.data import open_dataset
from gen_dist.presets import get_preset
from gen_dist.trainer import Trainer

BAR = 1.8
"""Images per second of two processes to those of one, at least."""
ROWS = {"vae-mnist": (512, 192, 96, 12), "dcgan-mnist": (64, 32, 16, 4)}
"""Images of one process in a step, by preset: the first is what is compared. The preset's batch and half of it are
there, so that strong scaling is measured too."""
BLOCK_STEPS = 17
"""Noise is drawn for the first step of a block, then for sixteen steps at once: a block draws for its own steps."""
WORKERS = (1, 2, 4, 8, 16, 32, 64)
REDUCED_FLOATS = (1, 2**12, 2**14, 2**16, 2**18, 2**19, 2**20)
REDUCTIONS_OF_A_BLOCK = 32
ATTEMPTS = 20
"""Of a block that is to be quiet; the last one counts however loud it is."""

Mode = Literal["alone", "at once", "joined"]
MODES: tuple[Mode, ...] = ("alone", "at once", "joined")
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
        quiet_cores: blocks during which other programs used more cores than this are done again, up to 40 times. None
            takes them as they are.
        picture: PNG file for the speed-ups, forecast and measured. None draws none.
        out: file for the JSON. None prints it alone.
    """
    before = conditions()
    if data_root is not None:
        data = "mnist"
    with tempfile.TemporaryDirectory() as cache, two_processes() as members:
        options = {"data": data, "data_root": str(data_root or "data"), "seed": seed, "device": "cpu"}
        both(members, "prepare", options, cache)
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
    used = summary(others)
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


class Member:
    """One of the two processes: its trainers, and what it does on command."""

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
                # The schedule of the learning rate must not come to its end: past it the rate is negative.
                config = replace(get_preset(preset), **options, global_batch_size=rows, steps=10**6)
                config = replace(config, packing=replace(config.packing, cache_dir=cache))
                processes = parallel.start_processes(config)
                dataset = open_dataset(config.data, config.data_root, config.packing)
                by_itself = parallel.Processes(0, 0, 1, processes.device)
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
            parallel.sum_over_processes(torch.zeros(1))
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
            parallel.sum_over_processes(values)
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
    """A member as the process that commands it sees it."""

    process: multiprocessing.process.BaseProcess
    connection: Connection

    def start(self, method: str, *arguments: object) -> None:
        """Have the member begin with a call of one of its methods."""
        self.connection.send((method, arguments))

    def result(self) -> Any:
        """What the call that was started returned."""
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
    """Do what comes over the connection, until None comes."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    member = Member()
    while (command := connection.recv()) is not None:
        method, arguments = command
        connection.send(getattr(member, method)(*arguments))
    parallel.end_process(0)


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
    """What all but our processes use of the machine from now on; what a hypervisor takes away counts as theirs."""

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


def seconds_of_step(members: Sequence[Handle], turn: int, preset: str, rows: int, mode: Mode) -> float:
    """Seconds in which a process does a step on `rows` images."""
    if mode == "alone":
        seconds: float = members[turn % 2].call("block", preset, rows, False, False)
        return seconds
    each = both(members, "block", preset, rows, mode == "joined", True)
    # Of two that do not wait for each other the rates add up; the joined are as fast as the slower one.
    return max(each) if mode == "joined" else 2 / sum(1 / seconds for seconds in each)


def seconds_of_reduction(members: Sequence[Handle], floats: int) -> float:
    """Seconds of an all-reduce of so many float32 between the two."""
    seconds: float = max(both(members, "reduce", floats))
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, and number."""
    low, middle, high = np.percentile(values, (20, 50, 80)).tolist()
    return {"p20": low, "median": middle, "p80": high, "n": len(values)}


def ratio(above: Sequence[float], below: Sequence[float], factor: float) -> dict[str, float]:
    """Of the medians of two measurements in the same rounds; its percentiles are of the rounds' ratios."""
    rounds = [factor * up / down for up, down in zip(above, below, strict=True)]
    return summary(rounds) | {"median": factor * float(np.median(above) / np.median(below))}


def report(
    preset: str, times: dict[int, dict[Mode, list[float]]], reductions: list[Reduction], network: Network
) -> dict[str, Any]:
    """Figures of one preset: images per second, ratios, constants of the model, and its forecast for two processes."""
    compute: dict[Mode, Compute] = {
        mode: fit_compute({rows: float(np.median(by_mode[mode])) for rows, by_mode in times.items()})
        for mode in MODES[:2]
    }
    main_rows = ROWS[preset][0]
    main_times = times[main_rows]
    images = {"alone": main_rows, "at once": 2 * main_rows, "joined": 2 * main_rows}
    by_rows: dict[int, dict[str, Any]] = {}
    for rows, by_mode in times.items():
        measured = float(np.median(by_mode["joined"]))
        by_rows[rows] = {
            "joined_to_alone": ratio(by_mode["alone"], by_mode["joined"], 2.0),
            "at_once_to_alone": ratio(by_mode["alone"], by_mode["at once"], 2.0),
            "joined_to_at_once": ratio(by_mode["at once"], by_mode["joined"], 1.0),
            "joined_step_seconds": measured,
        }
        for mode, constants in compute.items():
            forecast_seconds = step_seconds(constants, reductions, network, 2, rows)
            name = mode.replace(" ", "_")
            by_rows[rows][f"forecast_from_{name}"] = forecast_seconds
            by_rows[rows][f"error_from_{name}"] = forecast_seconds / measured - 1
            by_rows[rows][f"fit_error_{name}"] = constants.seconds(rows) / float(np.median(times[rows][mode])) - 1
    whole = get_preset(preset).global_batch_size
    return {
        "rows": main_rows,
        "images_per_second": {
            mode: summary([images[mode] / seconds for seconds in main_times[mode]]) for mode in MODES
        },
        "by_rows": by_rows,
        "strong_on_two": ratio(times[whole]["alone"], times[whole // 2]["joined"], 1.0),
        "compute": compute,
        "reductions": reductions,
    }


def forecast(
    compute: Compute, reductions: Sequence[Reduction], network: Network, preset: str, least_gain: float
) -> dict[str, Any]:
    """Speed-ups over one worker by number of workers, and up to how many of them another doubling pays."""
    config: TrainConfig = get_preset(preset)
    kinds: Mapping[str, tuple[Callable[..., float], int]] = {
        "weak": (weak_speedup, ROWS[preset][0]),
        "strong": (strong_speedup, config.global_batch_size),
    }
    found: dict[str, Any] = {}
    for kind, (speedup, rows) in kinds.items():
        by_workers = {workers: speedup(compute, reductions, network, workers, rows) for workers in WORKERS}
        pays = last_worth_doubling(by_workers, least_gain)
        found[kind] = {"rows": rows, "speedups": by_workers, "pays_to": pays}
    return found


def print_report(preset: str, found: Mapping[str, Any]) -> None:
    """What was measured of one preset, for people."""
    rows = found["rows"]
    print(f"\n{preset}, {rows} images a process and step")
    print(f"{'images per second':40}{'p20':>9}{'median':>9}{'p80':>9}{'n':>5}   (n: blocks of {BLOCK_STEPS} steps)")
    labels = {"alone": "one process", "at once": "two, not joined", "joined": "two, joined"}
    for mode, label in labels.items():
        print_figure(label, found["images_per_second"][mode], 0)
    ratios = {
        "joined_to_alone": f"two joined to one (bar: {BAR})",
        "at_once_to_alone": "two not joined to one: the ceiling",
        "joined_to_at_once": "fraction of the ceiling",
    }
    for name, label in ratios.items():
        print_figure(label, found["by_rows"][rows][name], 3)
    print_figure("strong: two joined on the preset's batch", found["strong_on_two"], 3)
    sizes = ", ".join(f"{each.bytes:,}" for each in found["reductions"])
    print(f"all-reduces of a step, bytes: {sizes}")
    for mode, constants in found["compute"].items():
        fixed, per_row = 1e3 * constants.fixed_seconds, 1e6 * constants.seconds_per_row
        print(f"compute, {mode}: {fixed:.3f} ms + {per_row:.2f} us an image")
    print("two joined, ms a step      measured   forecast (error) from processes at once   from one alone   their fits")
    for count, figure in found["by_rows"].items():
        parts = [f"{count:5} images a process{1e3 * figure['joined_step_seconds']:11.3f}"]
        for name, width in (("at_once", 20), ("alone", 21)):
            parts.append(f"{1e3 * figure[f'forecast_from_{name}']:{width}.3f} ({figure[f'error_from_{name}']:+.1%})")
        parts.append(f"   {figure['fit_error_at_once']:+.1%}, {figure['fit_error_alone']:+.1%}")
        print("".join(parts))


def print_figure(label: str, figure: Mapping[str, float], digits: int) -> None:
    """One line of a table."""
    spread = "".join(f"{figure[key]:9.{digits}f}" for key in ("p20", "median", "p80"))
    print(f"{label:40}{spread}{figure['n']:5}")


def print_network(network: Network, reduced: Mapping[int, Sequence[float]]) -> None:
    """The fitted constants, and the all-reduces they were fitted to."""
    print(
        f"\nbetween the two processes: latency {1e6 * network.latency_seconds:.0f} us a message, "
        f"{8e-9 * network.bytes_per_second:.2f} Gbit/s"
    )
    for floats, seconds in reduced.items():
        low, middle, high = np.percentile(seconds, (20, 50, 80)) * 1e6
        fitted = 1e6 * (2 * network.latency_seconds + 4 * floats / network.bytes_per_second)
        print(f"all-reduce of {4 * floats:9,} bytes: {middle:8.0f} us ({low:.0f} to {high:.0f}), the fit {fitted:.0f}")


def print_forecast(preset: str, found: Mapping[str, Any], network: Network, least_gain: float) -> None:
    """The forecast for larger clusters, for people."""
    print(
        f"\n{preset}, forecast for a latency of {1e6 * network.latency_seconds:.0f} us and "
        f"{8e-9 * network.bytes_per_second:.2f} Gbit/s: speed-up over one worker of one thread"
    )
    numbers = "".join(f"{workers:8}" for workers in WORKERS)
    print(f"{'workers':44}{numbers}   pays up to (a doubling >= {least_gain:g}x)")
    labels = {"weak": "images a worker", "strong": "images of all workers"}
    for kind, label in labels.items():
        figures = "".join(f"{value:8.2f}" for value in found[kind]["speedups"].values())
        title = f"{kind}: {found[kind]['rows']} {label}"
        print(f"{title:44}{figures}{found[kind]['pays_to']:6}")


def draw(path: Path, reports: Mapping[str, Any], forecasts: Mapping[str, Any], network: Network) -> None:
    """Speed-ups over the number of workers: forecasts as lines, measurements as marks."""
    colours = {"weak": "#0072b2", "strong": "#d55e00"}  # Okabe and Ito
    with figure_of(4.6 * len(reports), 4.2) as figure:
        panels = figure.subplots(1, len(reports), squeeze=False)[0]
        for axes, (preset, found) in zip(panels, reports.items(), strict=True):
            axes.plot(WORKERS, WORKERS, color="#b0b0b0", linewidth=1, linestyle=":", label="linear")
            labels = {"weak": "images a worker", "strong": "images in all"}
            for kind, colour in colours.items():
                ahead = forecasts[preset][kind]
                label = f"{kind}, {ahead['rows']} {labels[kind]}: forecast"
                axes.plot(list(ahead["speedups"]), list(ahead["speedups"].values()), color=colour, label=label)
            measured = {"weak": found["by_rows"][found["rows"]]["joined_to_alone"], "strong": found["strong_on_two"]}
            for kind, value in measured.items():
                bars = [[value["median"] - value["p20"]], [value["p80"] - value["median"]]]
                axes.errorbar(
                    [2],
                    [value["median"]],
                    yerr=np.maximum(bars, 0),
                    color=colours[kind],
                    marker="o" if kind == "weak" else "s",
                    linestyle="none",
                    capsize=3,
                    label=f"{kind}: measured",
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(WORKERS, [str(workers) for workers in WORKERS])
            axes.set_yticks(WORKERS, [str(workers) for workers in WORKERS])
            axes.set_ylim(0.4, 1.3 * max(WORKERS))
            axes.set_xlabel("workers of one thread")
            axes.set_ylabel("images per second to those of one worker")
            axes.set_title(preset, loc="left")
            axes.grid(True)
            axes.legend(loc="upper left")
        figure.suptitle(
            f"network of the forecast: latency {1e6 * network.latency_seconds:.0f} us, "
            f"{8e-9 * network.bytes_per_second:.1f} Gbit/s",
            fontsize=9,
        )
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.13, top=0.86, wspace=0.22)
        save_figure(path, figure)


if __name__ == "__main__":
    tyro.cli(main)
