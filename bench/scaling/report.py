"""Report on two processes against one: figures, forecasts for more processes, tables and a picture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.measuring.spread import spread, spread_of_ratios
from bench.scaling.cost_model import (
    Compute,
    Network,
    Reduction,
    fit_compute,
    last_worth_doubling,
    step_seconds,
    strong_speedup,
    weak_speedup,
)
from bench.scaling.processes import BLOCK_STEPS, MODES, ROWS, Mode
from gen_dist.config import TrainConfig
from gen_dist.pictures.figures import figure_of, save_figure
from gen_dist.presets import get_preset

BAR = 1.8
"""Least acceptable ratio of two processes' images per second to one's."""
WORKERS = (1, 2, 4, 8, 16, 32, 64)


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
            "joined_to_alone": spread_of_ratios(by_mode["alone"], by_mode["joined"], 2.0),
            "at_once_to_alone": spread_of_ratios(by_mode["alone"], by_mode["at once"], 2.0),
            "joined_to_at_once": spread_of_ratios(by_mode["at once"], by_mode["joined"]),
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
        "images_per_second": {mode: spread([images[mode] / seconds for seconds in main_times[mode]]) for mode in MODES},
        "by_rows": by_rows,
        "strong_on_two": spread_of_ratios(times[whole]["alone"], times[whole // 2]["joined"]),
        "compute": compute,
        "reductions": reductions,
    }


def forecast(
    compute: Compute, reductions: Sequence[Reduction], network: Network, preset: str, least_gain: float
) -> dict[str, Any]:
    """Speed-ups over one worker by number of workers, and the greatest number to which doubling pays."""
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
    """Print the measurements of one preset."""
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
    columns = "".join(f"{figure[key]:9.{digits}f}" for key in ("p20", "median", "p80"))
    print(f"{label:40}{columns}{figure['n']:5}")


def print_network(network: Network, reduced: Mapping[int, Sequence[float]]) -> None:
    """Print the fitted constants and their all-reduces."""
    print(
        f"\nbetween the two processes: latency {1e6 * network.latency_seconds:.0f} us a message, "
        f"{8e-9 * network.bytes_per_second:.2f} Gbit/s"
    )
    for floats, seconds in reduced.items():
        low, middle, high = np.percentile(seconds, (20, 50, 80)) * 1e6
        fitted = 1e6 * (2 * network.latency_seconds + 4 * floats / network.bytes_per_second)
        print(f"all-reduce of {4 * floats:9,} bytes: {middle:8.0f} us ({low:.0f} to {high:.0f}), the fit {fitted:.0f}")


def print_forecast(preset: str, found: Mapping[str, Any], network: Network, least_gain: float) -> None:
    """Print the forecast for larger clusters."""
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
    """Draw speed-ups over the number of workers: forecasts as lines, measurements as marks."""
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
                    yerr=bars,
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
