"""Options, fixtures and the table of the benchmarks: `python -m pytest bench/suite --help`."""

import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measuring.measured import Measurement
from gen_dist.config import DataConfig
from gen_dist.data import Dataset, open_dataset
from gen_dist.parallel.processes import start_processes
from gen_dist.presets import get_preset

COLUMNS = ("images/s", "ms p20", "p50", "p80", "n", "peak MiB", "of limit")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of ours, beside those of pytest-benchmark."""
    group = parser.getgroup("gen_dist")
    group.addoption("--compiled", action="store_true", help="also what torch.compile makes: minutes of compiling")
    group.addoption(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run; auto: a GPU if any"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Show our table in place of pytest-benchmark's, unless that one compares with earlier results."""
    if not config.option.benchmark_compare:
        config.option.benchmark_quiet = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out compiled variants unless they are asked for."""
    if config.getoption("--compiled"):
        return
    compiled = [item for item in items if "compiled" in getattr(item, "callspec", _NoParameters).params.values()]
    if compiled:
        config.hook.pytest_deselected(items=compiled)
        items[:] = [item for item in items if item not in compiled]


class _NoParameters:
    params: Mapping[str, object] = {}


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device of networks and kernels, with as many threads as a run has."""
    config = replace(get_preset("vae-mnist"), device=request.config.getoption("--device"))
    return start_processes(config).device


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Packs into a directory of the session."""
    return DataConfig(cache_dir=str(tmp_path_factory.mktemp("packed")))


@pytest.fixture(scope="session")
def digits(cache: DataConfig) -> Dataset:
    """The embedded digits, packed once for all benchmarks."""
    return open_dataset("mnist5k", "data", cache, lambda _line: None)


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    """Leave what is imported out of every later garbage collection: each would look through it for 0.2 s."""
    gc.freeze()


@pytest.fixture
def measurement(benchmark: BenchmarkFixture, device: torch.device, digits: Dataset) -> Iterator[Measurement]:
    """Measurement of a benchmark. Name it first, so that the memory of other fixtures counts; `digits` does not."""
    yield Measurement(benchmark, device)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A row for each benchmark, and under it where the time of a step went."""
    benchmarks = [each for each in config._benchmarksession.benchmarks if "p50_ms" in each.extra_info]  # type: ignore[attr-defined]
    if not benchmarks:
        return
    terminalreporter.section("benchmarks")
    width = max(len(each.name) for each in benchmarks)
    heads = "".join(f"{column:>11}" for column in COLUMNS)
    file = None
    for each in benchmarks:
        if (found := each.fullname.partition("::")[0]) != file:
            file = found
            terminalreporter.write_line(f"{file:{width}}{heads}")
        terminalreporter.write_line(f"{each.name:{width}}{''.join(f'{cell:>11}' for cell in cells(each.extra_info))}")
        for part, times in each.extra_info.get("parts_ms", {}).items():
            figures = "".join(f"{times[key]:>11.3f}" for key in ("p20_ms", "p50_ms", "p80_ms"))
            terminalreporter.write_line(f"  {part:{width - 2}}{'':11}{figures}")
    conditions = benchmarks[-1].extra_info
    shown = ("cpu", "device", "threads", "torch", "numpy", "python", "git_commit", "load_average")
    terminalreporter.write_line(", ".join(f"{key} {conditions[key]}" for key in shown))


def cells(facts: Mapping[str, Any]) -> list[str]:
    """One benchmark's row of the table; what is not there leaves its cell empty."""
    rate, peak, fraction = (facts.get(key) for key in ("images_per_second", "peak_memory_bytes", "fraction_of_limit"))
    return [
        "" if rate is None else f"{rate:,.0f}",
        *(f"{facts[key]:.3f}" for key in ("p20_ms", "p50_ms", "p80_ms")),
        str(facts["n"]),
        "" if peak is None else f"{peak / 2**20:,.1f}",
        "" if fraction is None else f"{fraction:.2f}",
    ]
