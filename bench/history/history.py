"""The history of speed: `make bench-history`, or `python bench/history/history.py --help`.

`check` refuses a checkout whose figures `add` would refuse. `add` appends the results of `pytest bench/suite
--benchmark-json FILE` to bench/history/history.jsonl, a line for each benchmark with its commit and conditions. `page`
plots all lines over the commits into one HTML file.

Lines of different days were not measured in turns, so they contain the machine's slow and fast hours. The gate decides
if a change made something slower (`make bench-compare`); the history shows the trend.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.history.record import Record
from gen_dist.cli import run_command, run_subcommand
from gen_dist.errors import ConfigError
from gen_dist.files import write_atomically

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HISTORY_NAME = "bench/history/history.jsonl"
HISTORY = REPOSITORY / HISTORY_NAME
_FIGURES = ("images_per_second", "peak_memory_bytes", "p20_ms", "p50_ms", "p80_ms", "n")
"""Figures among a benchmark's extra_info; its other fields are conditions."""


def check() -> None:
    """Refuse a checkout with uncommitted changes before minutes of measuring. The history itself may have some."""
    if git("rev-parse", "--verify", "HEAD") is None:
        raise ConfigError(f"{REPOSITORY} is not a git checkout with a commit; measure in one")
    changes = [file for file in changed_files() if file != HISTORY_NAME]
    if changes:
        raise ConfigError(
            f"{len(changes)} changes are in no commit ({changes[0]}): commit them, so that figures have a commit"
        )


def add(file: tyro.conf.Positional[Path], /, history: Path = HISTORY, dirty: bool = False) -> None:
    """Append the results in a file of pytest-benchmark's to the history.

    Args:
        file: JSON file of `pytest bench/suite --benchmark-json FILE`.
        history: The file to append to, a JSON object a line.
        dirty: Accept figures of uncommitted code; their commits end in +.
    """
    new = records_of(read_results(file), str(file))
    changed = sorted({record.commit for record in new if record.commit.endswith("+")})
    if changed and not dirty:
        raise ConfigError(
            f"{file} was measured with changes that are in no commit ({changed[0][:12]}+): commit them and measure "
            "again, or add it with --dirty"
        )
    known = {record.key for record in read_history(history)} if history.exists() else set()
    fresh = [record for record in new if record.key not in known]
    try:
        before = history.read_text(encoding="utf-8") if history.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        if fresh:
            write_atomically(history, before + "".join(json.dumps(asdict(record)) + "\n" for record in fresh))
    except OSError as error:
        raise ConfigError(f"{history} cannot be written: {error.strerror}") from None
    again = f", {len(new) - len(fresh)} were there already" if len(fresh) < len(new) else ""
    print(f"{history}: {len(fresh)} lines more{again}")


def page(history: Path = HISTORY, out: Path = REPOSITORY / "bench/history/history.html") -> None:
    """Plot every benchmark over the commits, into one HTML file that loads nothing from elsewhere.

    Args:
        history: The file that `add` appends to.
        out: HTML file to write.
    """
    from bench.history.draw import history_html

    records = read_history(history)
    if not records:
        raise ConfigError(f"{history} has no lines yet; `python bench/history/history.py add FILE` appends some")
    try:
        write_atomically(out, history_html(records))
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from None
    print(out)


def read_results(file: Path) -> dict[str, Any]:
    """pytest-benchmark's JSON."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; `make bench-history` makes one") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{file} is not JSON") from None
    if not isinstance(results, dict) or not isinstance(results.get("benchmarks"), list):
        raise ConfigError(f"{file} has no list of benchmarks: it is not of `pytest bench/suite --benchmark-json`")
    if not results["benchmarks"]:
        raise ConfigError(f"{file} has no benchmark in it")
    return results


def records_of(results: Mapping[str, Any], file: str) -> list[Record]:
    """A record for each benchmark of pytest-benchmark's JSON."""
    whole = table(results.get("commit_info"))
    described: dict[str, tuple[str, str]] = {}
    records = []
    for each in results["benchmarks"]:
        result = table(each)
        told = table(result.get("extra_info"))
        commit = told.get("git_commit") or whole.get("id")
        if not isinstance(commit, str):
            raise ConfigError(f"{file} does not tell of which commit it is; measure in a git checkout")
        if whole.get("dirty") and not commit.endswith("+"):
            commit += "+"
        if commit.endswith("+") and commit[:-1] == only_the_history_differs_from():
            commit = commit[:-1]
        if commit not in described:
            described[commit] = described_commit(commit.rstrip("+")) or ("", str(whole.get("time") or ""))
        subject, date = described[commit]
        try:
            name = result["fullname"].removeprefix("bench/").removeprefix("suite/")
            figures = figures_of(told, table(result.get("stats")))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise ConfigError(f"{file} has a benchmark without a name or times: {str(each)[:80]}") from None
        conditions = {
            key: value for key, value in told.items() if key not in (*_FIGURES, "git_commit") and is_plain(value)
        }
        measured = str(results.get("datetime") or "")
        record = Record(name, commit, subject, date, measured, **figures, conditions=conditions)
        if not is_sound(record):
            raise ConfigError(f"{file} has a benchmark whose times are none: {name[:80]}, {record.p50_ms} ms")
        records.append(record)
    return records


def table(value: Any) -> Mapping[str, Any]:
    """A JSON object, or an empty one in place of any other value."""
    return value if isinstance(value, dict) else {}


def figures_of(told: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    """Percentiles in ms, rounds, rate and memory: from the benchmark itself, else from pytest-benchmark's times."""
    data = [1e3 * float(seconds) for seconds in stats.get("data") or []]
    with np.errstate(over="ignore", invalid="ignore"):  # times at the end of the range give no number
        percentiles = np.percentile(data, (20, 50, 80)) if data else ()
    from_data = dict(zip(("p20_ms", "p50_ms", "p80_ms"), percentiles, strict=False))
    found: dict[str, Any] = {name: number(told.get(name, from_data.get(name))) for name in _FIGURES}
    if found["p50_ms"] is None:
        found["p50_ms"] = 1e3 * float(stats["median"])
    rounds = told.get("n", stats.get("rounds", len(data) or None))
    return found | {"n": None if rounds is None else int(rounds)}


def number(value: Any) -> float | None:
    """A finite number, or None in place of any other value. JSON's integers have any size."""
    if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) >= 2**63):
        return None
    return float(value) if math.isfinite(value) else None


def is_plain(value: Any) -> bool:
    """True if a value is one word or number, as conditions are."""
    return value is None or isinstance(value, str | int | float)


def git(*words: str) -> str | None:
    """Output of a git command on this checkout, or None if it fails."""
    try:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True
        ).stdout.removesuffix("\n")
    except (OSError, subprocess.CalledProcessError):
        return None


def changed_files() -> list[str]:
    """Tracked files of this checkout that differ from the commit it stands on."""
    return (git("diff", "--name-only", "--no-renames", "HEAD", "--") or "").splitlines()


def only_the_history_differs_from() -> str | None:
    """The present commit if the history is the only changed file: `add` changed it."""
    return git("rev-parse", "HEAD") if changed_files() == [HISTORY_NAME] else None


def described_commit(commit: str) -> tuple[str, str] | None:
    """Subject and date of a commit, or None if this checkout lacks it."""
    told = git("show", "--no-patch", "--format=%cI%n%s", commit, "--")
    if told is None:
        return None
    date, _, subject = told.partition("\n")
    return subject, date


def read_history(history: Path) -> list[Record]:
    """Records of all lines of a history."""
    try:
        lines = history.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{history} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{history} cannot be read: it is not UTF-8 text") from None
    records = []
    for place, line in enumerate(lines, start=1):
        try:
            record = Record(**json.loads(line))
            assert is_sound(record)
        except (ValueError, TypeError, RecursionError, AssertionError):
            raise ConfigError(f"{history}, line {place}: not a line of the history") from None
        records.append(record)
    return records


def is_sound(record: Record) -> bool:
    """True if the fields of a record have the right types."""
    words: Sequence[Any] = (record.benchmark, record.commit, record.subject, record.commit_date, record.measured)
    numbers: Sequence[Any] = (
        *(record.p20_ms, record.p80_ms, record.n),
        *(record.images_per_second, record.peak_memory_bytes),
    )
    return (
        all(isinstance(word, str) for word in words)
        and number(record.p50_ms) is not None
        and record.p50_ms > 0
        and all(value is None or number(value) is not None for value in numbers)
        and isinstance(record.conditions, dict)
    )


def main() -> None:
    """Run the command that the command line names."""
    run_command(lambda: run_subcommand([check, add, page], sys.argv[1:], "bench/history/history.py"))


if __name__ == "__main__":
    main()
