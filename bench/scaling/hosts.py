"""Steps over several hosts beside the cost model's forecast: `python bench/scaling/hosts.py --help`.

It needs root on Linux. Hosts are network namespaces of this machine, joined by links of one rate and latency. Each has
one process, on one core that it may share with others, and no memory in common. In turns they do blocks of steps

- at once: each trains a model of its own, which gives the model its local step. Between the places where a joint step
  sends gradients the slowest host counts, and gradients are copied into the memory from which they would be sent;
- joined: all train one model, and send gradients after backward, as processes on CPUs do;
- overlapped: the same with buckets that are sent during backward, as processes with GPUs do.

All-reduces between the hosts give the two constants of the network.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.network_hosts import Link, NetworkError, linked_hosts
from bench.measuring.out_file import check_out, print_and_write
from bench.measuring.spread import spread
from bench.measuring.temporary import temporary_directory
from bench.scaling.cost_model import (
    Bucket,
    Network,
    all_reduce_seconds,
    exposed_seconds,
    fit_network,
    seconds_of_slowest,
)
from bench.scaling.processes import Handle, Mode, Place, by_all, joined_processes
from gen_dist.cli import run_command
from gen_dist.errors import MachineError

ROWS: dict[str, tuple[int, ...]] = {
    "vae-mnist": (512, 192, 96),
    "dcgan-mnist": (64, 32, 16),
    "iwae-mnist": (100, 50, 25),
}
"""Images per host and step, by preset."""
LINKS = {"fast": Link(1e9 / 8, 2e-4), "slow": Link(1e8 / 8, 2e-3)}
REDUCED_FLOATS = (2**15, 2**17, 2**18, 2**19, 2**20)
"""Sizes as gradients have them. A few numbers are sent by one host after the other, which tells nothing of hosts that
all send at once."""
REDUCTIONS = 8
MODES: tuple[Mode, ...] = ("at once", "joined", "overlapped")

Seconds = dict[str, dict[int, dict[Mode, list[float]]]]
"""Seconds of a step by preset, images of a host, and mode; one value a round."""


def main(
    hosts: int = 2,
    link: Literal["fast", "slow"] = "fast",
    rounds: int = 5,
    steps: int = 17,
    rows: dict[str, tuple[int, ...]] = ROWS,
    data: str = "mnist5k",
    out: Path | None = None,
) -> None:
    """Measure and forecast; print a table and, as the last line, all figures in JSON.

    Args:
        hosts: number of hosts.
        link: fast, 1 Gbit/s with 0.2 ms, or slow, 100 Mbit/s with 2 ms.
        rounds: blocks of each mode.
        steps: steps of a block, at most 17.
        rows: numbers of images per host and step, by preset.
        data: source of images.
        out: file for the JSON as well.
    """
    check_out(out)
    before = conditions()
    cores = sorted(os.sched_getaffinity(0))
    with temporary_directory() as cache, processes_on_hosts(hosts, LINKS[link]) as members:
        options = {"data": data, "seed": 0, "device": "cpu"}
        by_all(members, "prepare", options, str(cache), rows, True)
        facts = members[0].call("facts")
        leads = {
            preset: {of: by_all(members, "leads", preset, of)[0] for of in of_preset}
            for preset, of_preset in rows.items()
        }
        times, reduced = measure(members, rows, rounds, steps)
    network = fit_network({4 * floats: float(np.median(seconds)) for floats, seconds in reduced.items()}, hosts)
    found = forecast(times, facts["reductions"], leads, network, hosts)
    print_table(found, network, hosts, LINKS[link])
    results = {
        "conditions": before | {"hosts": hosts, "cores": len(cores), "link": asdict(LINKS[link])},
        "network": asdict(network),
        "steps": found,
        "step_seconds": times,
        "all_reduce_seconds": reduced,
    }
    print_and_write(json.dumps(results), out)


@contextlib.contextmanager
def processes_on_hosts(count: int, link: Link) -> Iterator[list[Handle]]:
    """A process on each of some hosts. They take the cores of this machine in turns.

    Raises:
        MachineError: this machine does not allow network namespaces.
    """
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(linked_hosts(count, link))
        except NetworkError as error:
            raise MachineError(f"no hosts on this machine: {error}") from None
        places = [Place(host, cores[index % len(cores)]) for index, host in enumerate(hosts)]
        yield stack.enter_context(joined_processes(places))


def measure(
    members: Sequence[Handle], rows: Mapping[str, Sequence[int]], rounds: int, steps: int
) -> tuple[Seconds, dict[int, list[float]]]:
    """Seconds of steps and of all-reduces (by their floats), all in turns. The slowest host's count."""
    times: Seconds = {preset: {of: {mode: [] for mode in MODES} for of in rows[preset]} for preset in rows}
    reduced: dict[int, list[float]] = {floats: [] for floats in REDUCED_FLOATS}
    for turn in range(rounds):
        modes = MODES[turn % 3 :] + MODES[: turn % 3]  # none always follows the same other one
        for preset, by_rows in times.items():
            for of, by_mode in by_rows.items():
                for mode in modes:
                    if mode == "at once":
                        stretches = by_all(members, "stretches", preset, of, steps)
                        by_mode[mode].append(seconds_of_slowest(stretches) / steps)
                    else:
                        by_mode[mode].append(max(by_all(members, "block", preset, of, mode, True, steps)))
        for floats, seconds in reduced.items():
            seconds.append(max(by_all(members, "reduce", floats, REDUCTIONS)))
    return times, reduced


def forecast(
    times: Seconds,
    reductions: Mapping[str, Sequence[tuple[int, float]]],
    leads: Mapping[str, Mapping[int, Mapping[str, Sequence[Bucket]]]],
    network: Network,
    hosts: int,
) -> list[dict[str, Any]]:
    """Measured and forecast seconds of a step, joined and overlapped: a row for each preset and number of images."""

    def all_reduce(count: int) -> float:
        return all_reduce_seconds(count, hosts, network)

    found = []
    for preset, by_rows in times.items():
        for rows, by_mode in by_rows.items():
            local = float(np.median(by_mode["at once"]))
            row: dict[str, Any] = {"preset": preset, "rows": rows, "at once": spread(by_mode["at once"])}
            sent: dict[Mode, list[float]] = {
                "joined": [exposed_seconds([Bucket(count)], all_reduce) for count, _ in reductions[preset]],
                "overlapped": [exposed_seconds(buckets, all_reduce) for buckets in leads[preset][rows].values()],
            }
            shares = [per_step for _, per_step in reductions[preset]]
            for mode, seconds in sent.items():
                wanted = local + sum(share * one for share, one in zip(shares, seconds, strict=True))
                measured = spread(by_mode[mode])
                row[mode] = measured | {"forecast": wanted, "error": wanted / measured["median"] - 1}
            found.append(row)
    return found


def print_table(found: Sequence[Mapping[str, Any]], network: Network, hosts: int, link: Link) -> None:
    """Print the rows and the constants."""
    print(
        f"{hosts} hosts, {link}; all-reduces between them: {1e6 * network.latency_seconds:.0f} us a message, "
        f"{8e-6 * network.bytes_per_second:.0f} Mbit/s"
    )
    print("ms a step                    at once | joined  forecast | overlapped  forecast")
    for row in found:
        columns = [f"{row['preset']:12} {row['rows']:4} images {1e3 * row['at once']['median']:10.1f}"]
        for mode in ("joined", "overlapped"):
            figure = row[mode]
            columns.append(f"{1e3 * figure['median']:8.1f} {1e3 * figure['forecast']:8.1f} ({figure['error']:+.1%})")
        print(" | ".join(columns))


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
