"""The history of benchmarks: its records of pytest-benchmark's figures, and its page, also in a browser."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench.history import history
from bench.history.draw import HEIGHT, band_of, commits_of, history_html, limits_of, machines_of, panel_of
from bench.history.record import Record
from gen_dist.cli import run_subcommand
from gen_dist.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.support.browser import chromium, opening

CONDITIONS = {"cpu": "Some CPU", "physical_cores": 2, "threads": 2, "load_average": 0.3, "torch": "2.14.1"}
COMMIT = "c" * 40


def result(name: str = "test_whole_step[vae-mnist]", **told: Any) -> dict[str, Any]:
    return {
        "name": name,
        "fullname": f"bench/suite/test_step.py::{name}",
        "extra_info": CONDITIONS | {"git_commit": COMMIT, "images_per_second": 25000} | told,
        "stats": {"median": 0.008, "rounds": 3, "data": [0.007, 0.008, 0.010]},
    }


def results(*benchmarks: dict[str, Any], dirty: bool = False) -> dict[str, Any]:
    commit = {"id": COMMIT, "time": "2026-01-02T03:04:05+00:00", "dirty": dirty}
    return {"commit_info": commit, "datetime": "2026-01-03T00:00:00+00:00", "benchmarks": list(benchmarks)}


def record(commit: str = COMMIT, p50_ms: float = 8.0, **more: Any) -> Record:
    given: dict[str, Any] = {
        **{"benchmark": "test_step.py::test_whole_step[vae-mnist]", "subject": "A subject", "n": 13},
        **{"commit_date": "2026-01-02T03:04:05+00:00", "measured": "2026-01-03T00:00:00+00:00"},
        **{"p20_ms": 0.95 * p50_ms, "p80_ms": 1.1 * p50_ms, "images_per_second": 192e3 / p50_ms},
        **{"peak_memory_bytes": 2.0**29, "conditions": CONDITIONS},
    }
    return Record(**given | {"commit": commit, "p50_ms": p50_ms} | more)


def some_records() -> list[Record]:
    """Records of nine commits on one machine, some of them also on another, two measured twice."""
    other = CONDITIONS | {"cpu": "Another CPU", "threads": 8}
    found = []
    for place in range(9):
        commit = f"{place}{place + 1}abcde" + "0" * 33
        date = f"2026-02-{place + 1:02}T10:00:00+00:00"
        of_commit: dict[str, Any] = {"commit": commit, "commit_date": date, "subject": f"Change <number> & {place}"}
        for name, scale in (("vae-mnist", 1.0), ("dcgan-mnist", 7.0), ("r3gan-mnist", 60.0)):
            benchmark = f"test_step.py::test_whole_step[{name}]"
            milliseconds = scale * (9 - 0.4 * place)
            found.append(record(p50_ms=milliseconds, benchmark=benchmark, **of_commit))
            if place % 3 == 0:
                again: dict[str, Any] = {"measured": "2026-03-01T00:00:00+00:00", "p50_ms": milliseconds * 1.04}
                found.append(record(benchmark=benchmark, **of_commit, **again))
            if place in (4, 7):
                found.append(record(p50_ms=milliseconds / 2, benchmark=benchmark, **of_commit, conditions=other))
        found.append(record(p50_ms=0.02, benchmark="test_data.py::test_gathering_a_batch", **of_commit, p20_ms=None))
    return found


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_percentiles_are_told_or_worked_out() -> None:
    (from_data,) = history.records_of(results(result()), "b.json")
    assert (from_data.p20_ms, from_data.p50_ms, from_data.p80_ms) == pytest.approx((7.4, 8.0, 9.2))
    assert (from_data.n, from_data.images_per_second, from_data.peak_memory_bytes) == (3, 25000, None)
    (told,) = history.records_of(results(result(p20_ms=1, p50_ms=2, p80_ms=3, peak_memory_bytes=5)), "b.json")
    assert (told.p20_ms, told.p50_ms, told.p80_ms, told.peak_memory_bytes) == (1, 2, 3, 5)
    without = result()
    del without["stats"]["data"]
    (least,) = history.records_of(results(without), "b.json")
    assert (least.p20_ms, least.p50_ms, least.p80_ms) == (None, 8.0, None)


def test_conditions_are_all_that_is_no_figure() -> None:
    (found,) = history.records_of(results(result(device="Some GPU", profile={"gemm": 0.5})), "b.json")
    assert found.conditions == CONDITIONS | {"device": "Some GPU"}
    assert found.machine == "Some CPU, 2 cores, 2 threads, Some GPU, torch 2.14.1"
    assert found.benchmark == "test_step.py::test_whole_step[vae-mnist]"


def test_a_curve_goes_on_though_the_suite_moved() -> None:
    """Figures are known by the file and name of their benchmark."""
    moved = result() | {"fullname": result()["fullname"].replace("bench/suite/", "bench/")}
    names = {each.benchmark for each in history.records_of(results(result(), moved), "file")}
    assert names == {"test_step.py::test_whole_step[vae-mnist]"}
    newest = history.read_history(history.HISTORY)[-1].commit
    for each in history.read_history(history.HISTORY):
        if each.commit == newest:
            file, function = re.fullmatch(r"(test_\w+\.py)::(\w+)(?:\[.*\])?", each.benchmark).groups()  # type: ignore[union-attr]
            assert f"def {function}(" in (REPOSITORY / "bench/suite" / file).read_text()


def test_a_commit_of_this_checkout_has_its_subject() -> None:
    try:
        told = subprocess.run(
            ["git", "-C", str(REPOSITORY), "log", "-1", "--format=%H%n%s"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is not a git checkout")
    commit, subject = told.stdout.strip().split("\n")
    (found,) = history.records_of(results(result(git_commit=commit)), "b.json")
    assert (found.commit, found.subject) == (commit, subject)
    (unknown,) = history.records_of(results(result()), "b.json")
    assert (unknown.subject, unknown.commit_date) == ("", "2026-01-02T03:04:05+00:00")


def test_what_is_added_comes_back_and_is_added_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "b.json", results(result(), result("test_binarizing")))
    lines = tmp_path / "history.jsonl"
    history.add(file, history=lines)
    before = lines.read_text()
    history.add(file, history=lines)
    assert lines.read_text() == before
    assert "0 lines more, 2 were there already" in capsys.readouterr().out
    found = history.read_history(lines)
    assert [one.benchmark for one in found] == [
        "test_step.py::test_whole_step[vae-mnist]",
        "test_step.py::test_binarizing",
    ]
    assert found == history.records_of(results(result(), result("test_binarizing")), "b.json")


@pytest.mark.parametrize("told_by", ["pytest-benchmark", "conditions"])
def test_figures_of_no_commit_are_taken_only_when_told(told_by: str, tmp_path: Path) -> None:
    one = result(git_commit=COMMIT + "+") if told_by == "conditions" else result()
    file = write(tmp_path / "b.json", results(one, dirty=told_by == "pytest-benchmark"))
    lines = tmp_path / "history.jsonl"
    with pytest.raises(ConfigError, match="changes that are in no commit"):
        history.add(file, history=lines)
    assert not lines.exists()
    history.add(file, history=lines, dirty=True)
    assert history.read_history(lines)[0].commit == COMMIT + "+"


@pytest.mark.parametrize(
    ("content", "mentioned"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "has no list of benchmarks"),
        ('{"benchmarks": []}', "has no benchmark in it"),
        ('{"benchmarks": [{"fullname": "a"}]}', "does not tell of which commit"),
        (json.dumps(results({"fullname": "a"})), "without a name or times"),
        ('{"benchmarks": [1]}', "does not tell of which commit"),
        (json.dumps(results(result()) | {"benchmarks": [1]}), "without a name or times: 1"),
        (json.dumps(results({"extra_info": [1]}) | {"commit_info": "abc"}), "does not tell of which commit"),
        (json.dumps(results({"fullname": "a", "stats": [1]})), "without a name or times"),
        (json.dumps(results(result(p50_ms=0))), "whose times are none"),
        (json.dumps(results(result(n=float("inf")))), "without a name or times"),
    ],
)
def test_results_that_are_none_are_one_line(content: str | None, mentioned: str, tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    if content is not None:
        file.write_text(content)
    words = ["add", str(file), "--history", str(tmp_path / "history.jsonl")]
    with pytest.raises(ConfigError) as error:
        run_subcommand([history.add, history.page], words, "bench/history/history.py")
    assert mentioned in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "mentioned"),
    [
        ("", "has no lines yet"),
        ("{}\n", "line 1"),
        (json.dumps(asdict(record()) | {"p50_ms": "fast"}) + "\n", "line 1"),
        (json.dumps(asdict(record()) | {"conditions": 3}) + "\n", "line 1"),
    ],
)
def test_a_damaged_history_is_one_line(line: str, mentioned: str, tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=mentioned):
        history.page(tmp_path / "history.jsonl", tmp_path / "history.html")
    assert not (tmp_path / "history.html").exists()


def test_a_history_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        history.read_history(tmp_path / "history.jsonl")


def test_what_is_added_is_a_line_of_its_own_and_comes_back(tmp_path: Path) -> None:
    lines = tmp_path / "history.jsonl"
    lines.write_text(json.dumps(asdict(record("a" * 40))))  # without a newline, as some editors leave it
    odd = results(result()) | {"datetime": 3, "commit_info": {"time": 5}}
    history.add(write(tmp_path / "b.json", odd), history=lines)
    assert [one.commit for one in history.read_history(lines)] == ["a" * 40, COMMIT]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.json", "history.jsonl"]


def checkout(path: Path, subject: str = "first") -> Path:
    """A repository of one commit, with a history and code."""
    (path / history.HISTORY_NAME).parent.mkdir(parents=True)
    for name in (history.HISTORY_NAME, "code.py"):
        (path / name).write_text("")
    names = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    message = ["--quiet", "--allow-empty-message", "--message", subject]
    for words in (["init", "--quiet"], ["add", "."], [*names, "commit", *message]):
        subprocess.run(["git", "-C", str(path), *words], check=True)
    return path


def test_a_commit_without_a_subject_has_its_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "REPOSITORY", checkout(tmp_path / "here", subject=""))
    subject, date = history.described_commit("HEAD") or (None, "")
    assert subject == ""
    assert re.match(r"\d{4}-\d\d-\d\dT", date)


def test_a_tree_that_is_no_checkout_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "REPOSITORY", tmp_path)
    with pytest.raises(ConfigError, match="is not a git checkout"):
        history.check()


def test_changes_are_refused_first_but_for_the_historys_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = checkout(tmp_path / "here")
    monkeypatch.setattr(history, "REPOSITORY", here)
    head = history.git("rev-parse", "HEAD")
    measured = results(result(git_commit=f"{head}+"), dirty=True)
    history.check()
    assert history.records_of(measured, "b.json")[0].commit == f"{head}+"  # a failure that has no explanation here
    (here / history.HISTORY_NAME).write_text("a line\n")
    history.check()
    assert history.records_of(measured, "b.json")[0].commit == head
    (here / "code.py").write_text("pass\n")
    with pytest.raises(ConfigError, match=r"1 changes are in no commit \(code\.py\)"):
        history.check()
    assert history.records_of(measured, "b.json")[0].commit == f"{head}+"


def test_machines_are_never_joined_by_a_line() -> None:
    records = [one for one in some_records() if "vae" in one.benchmark]
    panel = panel_of(records[0].benchmark, records, commits_of(records), machines_of(records))
    assert [len(series.points) for series in panel.series] == [12, 2]
    assert all(
        series.line.count("M") == 1 and series.line.count("L") == len(series.points) - 1 for series in panel.series
    )
    assert panel.series[0].machine != panel.series[1].machine
    assert all(0 <= point.y <= HEIGHT for point in panel.points)


def test_a_dirty_commit_comes_after_the_one_it_stands_on() -> None:
    dates = ["2026-02-02T00:00:00+00:00", "2026-02-01T00:00:00+00:00"]
    records = [record("b", commit_date=dates[0]), record("a+", commit_date=dates[1]), record("a", commit_date=dates[1])]
    assert commits_of(records) == ["a", "a+", "b"]


def test_commits_of_several_time_zones_are_in_the_order_of_time() -> None:
    dates = {"b": "2026-02-01T09:00:00-05:00", "a": "2026-02-01T12:00:00Z", "c": "2026-02-01T23:00:00+02:00", "": ""}
    assert commits_of([record(commit, commit_date=date) for commit, date in dates.items()]) == ["", "a", "b", "c"]


def test_noise_does_not_fill_a_drawing() -> None:
    steady = [record(p50_ms=8.0, p20_ms=7.99, p80_ms=8.01)]
    low, high = limits_of(steady)
    assert low <= 7.2
    assert high >= 8.8
    assert limits_of([*steady, record(p50_ms=80.0)])[1] >= 80


def test_a_single_figure_has_a_bar_and_several_have_a_band() -> None:
    assert band_of([(100.0, 50.0, 40.0)]) == "M97.0 40.0H103.0V50.0H97.0Z"
    assert band_of([(1.0, 5.0, 4.0), (2.0, 6.0, 3.0)]) == "M1.0 4.0L2.0 3.0L2.0 6.0L1.0 5.0Z"


def test_the_page_asks_for_nothing_and_escapes_subjects() -> None:
    html = history_html(some_records())
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|<link[^>]*stylesheet|\bsrc=", html)
    assert "Change <number>" not in html
    assert "Change &lt;number&gt; &amp; 8" in html
    assert html.count('class="chart"') == 4
    assert html.count("<tbody>") == 1 + 4


def test_the_page_is_made_of_a_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "history.jsonl"
    lines.write_text("".join(json.dumps(asdict(one)) + "\n" for one in some_records()))
    words = ["page", "--history", str(lines), "--out", str(tmp_path / "history.html")]
    run_subcommand([history.add, history.page], words, "bench/history/history.py")
    assert capsys.readouterr().out.strip() == str(tmp_path / "history.html")
    assert "Whole step [dcgan-mnist]" in (tmp_path / "history.html").read_text()


def test_one_figure_alone_is_a_page() -> None:
    assert "8.00 ms" in history_html([replace(record(), conditions={}, subject="")])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    file = tmp_path / "history.html"
    file.write_text(history_html(some_records()))
    with opening(browser, file) as open_at:
        yield open_at


def test_figures_are_read_at_the_pointer_and_by_arrow_keys(opened: Any) -> None:
    chart = opened().locator(".chart").first
    reading = chart.locator("[data-reading]")
    latest = reading.inner_text()
    assert "88 & 8" not in latest
    assert "Change <number> & 8" in latest
    chart.press("ArrowRight")
    assert "Change <number> & 0" in reading.inner_text()
    assert "8.55 to 9.90" in reading.inner_text()
    assert chart.locator(".chosen").count() == 1
    chart.locator(":scope > svg").hover()
    assert re.search(r"Change <number> & [345]", reading.inner_text())
    assert re.search(r"machine [12]", reading.inner_text())
    chart.page.mouse.move(0, 0)
    assert reading.inner_text() == latest


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_its_window(width: int, opened: Any) -> None:
    page = opened(width)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("td", has_text="Change <number> & 3").count() > 4


def test_a_dark_scheme_is_followed(opened: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = (
        sum(map(int, re.findall(r"\d+", opened(scheme=one).evaluate(background)))) for one in ("light", "dark")
    )
    assert dark < 3 * 64 < 3 * 192 < light


@pytest.mark.filterwarnings("error")
def test_times_at_the_end_of_the_range_give_no_percentile() -> None:
    strange = result()
    strange["stats"] = {"median": 1.0, "rounds": 3, "data": [1e305, -1.7e305, 1e305]}
    (found,) = history.records_of(results(strange), "a.json")
    assert found.p20_ms is None
