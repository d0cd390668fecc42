"""The performance regression gate: its words and exit codes, and one real comparison in a clone."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.gate import gate
from bench.gate import processes as gate_processes
from bench.gate import worker as gate_worker
from bench.gate.measure import (
    Effort,
    Measured,
    alike,
    differences_of,
    operations_of_block,
    prepare,
    turns_of,
    turns_of_process,
)
from bench.gate.processes import BenchmarkError, DiedError, LackError
from bench.gate.verdicts import (
    LOOKS,
    Interval,
    Verdict,
)
from bench.gate.worker import CONTROL, RefusedError, is_lack
from bench.measuring import temporary
from bench.measuring.conditions import fingerprint
from gen_dist.cli import run_subcommand
from gen_dist.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.support.children import end_with_parent

THRESHOLD = 5.0


def test_numbers_may_differ_by_a_tolerance_digests_may_not() -> None:
    assert alike(208.0, 208.001)
    assert not alike(208.0, 208.01)
    assert alike(math.nan, math.nan)
    assert not alike(math.nan, 1.0)
    assert not alike("a1", "a2")
    assert differences_of({"loss": 2.0, "kl": 1.0}, {"loss": 2.5, "nll": 1.0}) == [
        "kl is only in A",
        "nll is only in B",
        "loss was 2.0, is 2.5",
    ]


def test_a_block_is_of_whole_rounds() -> None:
    assert operations_of_block(1e-3, 16, 0.15) == 144
    assert operations_of_block(1.0, 4, 0.15) == 4


def test_long_blocks_have_fewer_turns() -> None:
    effort = Effort(turns=8, block_seconds=0.15, looks=LOOKS)
    assert [turns_of_process(effort, seconds) for seconds in (0.1, 0.15, 0.3, 5.0)] == [8, 8, 4, 2]
    assert turns_of_process(Effort(1, 0.15, LOOKS), 0.1) == 1


def measured(name: str, verdict: Verdict | None, **more: Any) -> Measured:
    one = Measured(name, verdict=verdict, **more)
    if verdict is not None:
        one.interval = Interval(1.0, 0.9, 1.1, 4)
    one.seconds = {"A": [[1.0, 2.0]], "B": [[1.0, 2.0]]}
    return one


@pytest.mark.parametrize(
    ("found", "options", "code"),
    [
        ([measured("a", "no slower"), measured("b", "faster"), measured("c", "at the threshold")], {}, 0),
        ([measured("a", "no slower"), measured("b", None, incomparable="no such preset")], {}, 0),
        ([measured("a", "slower"), measured("b", "too noisy")], {}, 1),
        ([measured("a", "too noisy"), measured("b", "no slower")], {}, 3),
        ([measured("a", "too noisy")], {"allow_noisy": True}, 0),
        ([measured("a", "no slower", differences=["loss was 1.0, is 2.0"])], {}, 1),
        ([measured("a", "no slower", differences=["loss was 1.0, is 2.0"])], {"outputs_may_differ": True}, 0),
        ([measured("a", "slower", differences=["loss was 1.0, is 2.0"])], {"outputs_may_differ": True}, 1),
        ([measured("a", "no slower"), measured("b", None, broken_in_base="RuntimeError: x")], {}, 1),
        ([measured("a", None, broken="KeyError: 'x'")], {"allow_noisy": True, "outputs_may_differ": True}, 1),
    ],
)
def test_exit_codes(
    found: list[Measured], options: dict[str, bool], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"outputs_may_differ": False, "allow_noisy": False} | options
    gate.report(found, THRESHOLD, flags["outputs_may_differ"])
    try:
        gate.finish(found, {}, THRESHOLD, **flags, out=None)
        ended = 0
    except SystemExit as stop:
        ended = int(stop.code or 0)
    assert ended == code
    output = capsys.readouterr().out
    assert all(one.incomparable in output for one in found if one.incomparable)
    assert all(difference in output for one in found for difference in one.differences)


@pytest.mark.parametrize("others", [[], [measured(CONTROL, "no slower")]])
def test_nothing_compared_is_an_error(others: list[Measured]) -> None:
    found = [measured("a", None, incomparable="no such preset"), *others]
    with pytest.raises(ConfigError, match="nothing could be compared"):
        gate.finish(found, {}, THRESHOLD, outputs_may_differ=False, allow_noisy=True, out=None)


class FailingWorker:
    """A worker whose blocks take a second each, and that raises an error at a given call, or never."""

    def __init__(self, error: BenchmarkError | None, call: int) -> None:
        self._error, self._calls = error, call

    def call(self, method: str, *_arguments: object) -> Any:
        self._calls -= 1
        if self._error is not None and self._calls < 0:
            raise self._error
        return {"images": 1, "outputs": {}} if method == "prepare" else 1.0


@pytest.mark.parametrize("call", [0, 1, 5], ids=["prepare", "warm-up", "turns"])
@pytest.mark.parametrize(
    ("tree", "error", "noted"),
    [
        ("A", LackError("x"), "incomparable"),
        ("A", BenchmarkError("x"), "broken_in_base"),
        ("B", LackError("x"), "broken"),
        ("B", BenchmarkError("x"), "broken"),
        ("A", DiedError("x"), None),
        ("B", DiedError("x"), None),
    ],
)
def test_a_failure_is_of_the_tree_whose_it_is(tree: str, error: BenchmarkError, noted: str | None, call: int) -> None:
    one = measured("step-vae-mnist", "too noisy")
    both: Any = {name: FailingWorker(error if name == tree else None, call) for name in "AB"}

    def do() -> None:
        prepare(one, both)
        if one.is_open:
            turns_of(one, both, 0, Effort(8, 0.15, LOOKS))

    if noted is None:
        with pytest.raises(DiedError, match=f"step-vae-mnist in {tree}: x"):
            do()
        return
    do()
    reasons = {name: getattr(one, name) for name in ("incomparable", "broken", "broken_in_base")}
    assert reasons == dict.fromkeys(reasons) | {noted: "x"}
    assert (one.verdict, one.interval) == (None, None)


def test_an_old_tree_lacks_names_and_words_and_nothing_else() -> None:
    lacks = [ModuleNotFoundError(), AttributeError(), TypeError(), KeyError("x"), ConfigError(), RefusedError()]
    assert all(map(is_lack, lacks))
    assert not any(map(is_lack, [RuntimeError(), AssertionError(), ValueError(), MemoryError(), PermissionError()]))


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["compare", "--base", "no-such-branch"], "no-such-branch is not a commit"),
        (["compare", "--base=--all"], "is not a commit"),
        (["compare", "--base", "HEAD", "--only", "sorting"], "no benchmark is called sorting"),
        (["compare", "--base", "HEAD", "--threshold", "0"], "threshold 0.0"),
        (["compare", "--base", "HEAD", "--turns", "0"], "turns 0"),
        (["compare", "--base", "HEAD", "--most-pairs", "2"], "at least 3"),
        (["compare"], "--base"),
        (["prove", "--slowed", "0", "--unchanged", "0"], "prove nothing"),
        (["prove", "--slowdown", "nan"], "slowdown nan"),
        (["compare", "--base", "HEAD", "--out", "missing/found.json"], "its directory is missing"),
        (["prove", "--out", "."], "it is a directory"),
        (["store", "missing/figures.json"], "its directory is missing"),
        (["against", "missing.json"], "missing.json cannot be read"),
        (["against", "README.md"], "is not what"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(words: list[str], mentioned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ConfigError) as error:
        run_subcommand([gate.compare, gate.store, gate.against, gate.prove], words, "bench/gate/gate.py")
    assert mentioned in str(error.value)
    assert "\n" not in str(error.value)


def test_against_refuses_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps({"conditions": {"cpu": "Here", "git_commit": None}, "benchmarks": {}}))
    with pytest.raises(ConfigError, match="it is a directory"):
        gate.against(stored, out=tmp_path)


def test_figures_are_printed_though_they_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        gate.finish([measured("a", "no slower")], {}, THRESHOLD, False, False, out=tmp_path / "missing/found.json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratios"]["a"]["ratio"] == 1.0


def test_the_report_says_what_passing_means(capsys: pytest.CaptureFixture[str]) -> None:
    gate.report([measured("a", "no slower")], THRESHOLD, outputs_may_differ=False)
    assert "less than 5 % slower" in capsys.readouterr().out


def test_stored_figures_of_another_machine_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"cpu": "Here", "physical_cores": 2, "torch": "2.14.1", "python": "3.11.7", "git_commit": "a" * 40}
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps({"conditions": here | {"cpu": "There", "threads": 2}, "benchmarks": {}}))
    monkeypatch.setattr(gate, "conditions", lambda: here)
    monkeypatch.setattr(gate, "threads_here", lambda _directory: 2)
    with pytest.raises(ConfigError, match=r"There, 2 cores, 2 threads.*here: Here, 2 cores, 2 threads"):
        gate.against(stored)


@pytest.mark.parametrize(
    ("low", "high", "doubted"), [(0.97, 1.03, False), (1.06, 1.2, True), (0.8, 0.9, True), (0.9, 1.1, True)]
)
def test_stored_figures_of_a_changed_machine_are_doubted(low: float, high: float, doubted: bool) -> None:
    one, control = measured("a", "slower"), measured(CONTROL, "no slower")
    control.interval = Interval(math.sqrt(low * high), low, high, 6)
    gate.doubt_if_machine_changed([one, control], THRESHOLD)
    assert one.verdict == ("too noisy" if doubted else "slower")


def test_load_and_commit_are_no_part_of_a_fingerprint() -> None:
    found = {"cpu": "Here", "physical_cores": 2, "threads": 1, "torch": "2.14.1"}
    assert fingerprint(found | {"load_average": 3.0, "git_commit": "a"}) == fingerprint(found)
    assert fingerprint(found) != fingerprint(found | {"threads": 2})
    assert fingerprint(found) == "Here, 2 cores, 1 threads, torch 2.14.1"


BEFORE_ROOMS = "61fab5470196a16a834221f7bc681abea72c69c8"
"""A commit with other module names is compared under the old names."""


def test_modules_are_found_in_both_layouts() -> None:
    """A wrong old name would go unnoticed: the gate only says that the base lacks the module."""
    calls = re.findall(r'module_of\("(.+?)", "(.+?)"\)', Path(gate_worker.__file__).read_text())
    assert len(calls) >= 4
    assert all(importlib.util.find_spec(today) for today, _ in calls)
    try:
        old = set(git(REPOSITORY, "ls-tree", "-r", "--name-only", BEFORE_ROOMS).splitlines())
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this checkout lacks that commit")
    for path in (before.replace(".", "/") for _, before in calls):
        assert old & {f"{path}.py", f"{path}/__init__.py"}, path


def git(clone: Path, *words: str) -> str:
    names = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    done = subprocess.run(["git", *names, "-C", str(clone), *words], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of this repository with the present bench/. Its branch `old` has other outputs and benchmarks."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is not a git checkout")
    path = tmp_path_factory.mktemp("clone") / "tree"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(path)], check=True)
    shutil.copytree(REPOSITORY / "bench", path / "bench", dirs_exist_ok=True)
    kernels, data = path / "kernels/__init__.py", path / "gen_dist/data/__init__.py"
    present = {file: file.read_text() for file in (kernels, data)}
    kernels.write_text(present[kernels] + "\n\n_normal = normal\n\n\ndef normal(*a):\n    return _normal(*a) + 1\n")
    data.write_text(present[data] + "\n\ndel TrainBatches\n")
    git(path, "checkout", "--quiet", "-b", "old")
    git(path, "commit", "--quiet", "--all", "--allow-empty", "--message", "old")
    git(path, "checkout", "--quiet", "-b", "present")
    for file, text in present.items():
        file.write_text(text)
    return path


def start_gate(clone: Path, temporary: Path, *words: str) -> subprocess.Popen[str]:
    temporary.mkdir()
    variables = {**os.environ, "PYTHONPATH": str(clone), "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "bench/gate/gate.py", *words],
        cwd=clone,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_as_in_a_terminal,
    )


def _as_in_a_terminal() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # processes in the background of a shell ignore it


LITTLE = ["--turns", "1", "--block-seconds", "0.02", "--most-pairs", "3", "--allow-noisy", "--threshold", "1000"]


def assert_nothing_is_left(clone: Path, temporary: Path) -> None:
    assert len(git(clone, "worktree", "list").splitlines()) == 1
    assert list(temporary.glob("gen_dist-gate-*")) == []


@pytest.mark.slow
def test_other_outputs_than_the_base_commits_fail(clone: Path, tmp_path: Path) -> None:
    process = start_gate(clone, tmp_path / "tmp", "compare", "--base", "old", "--only", "keyed-noise", *LITTLE)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 1, output + errors
    assert "outputs differ: normals digest was " in output
    last = json.loads(output.splitlines()[-1])
    assert last["conditions"]["git_commit"].endswith("+")
    assert last["conditions"]["base_commit"] == git(clone, "rev-parse", "old").strip()
    assert last["ratios"]["keyed-noise"]["pairs"] == 3
    assert_nothing_is_left(clone, tmp_path / "tmp")


@pytest.mark.slow
def test_an_old_tree_that_lacks_something_is_no_failure(clone: Path, tmp_path: Path) -> None:
    words = ["--only", "keyed-noise", "gather-batch", "--outputs-may-differ", *LITTLE]
    process = start_gate(clone, tmp_path / "tmp", "compare", "--base", "old", *words)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert "gather-batch         cannot be compared: ImportError: cannot import name 'TrainBatches'" in output
    assert "normals digest was " in output
    assert "pixels digest" not in output


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_nothing_is_left_when_it_is_stopped(number: int, code: int, clone: Path, tmp_path: Path) -> None:
    process = start_gate(clone, tmp_path / "tmp", "compare", "--base", "HEAD", "--only", "keyed-noise")
    workers: list[psutil.Process] = []

    def has_workers() -> bool:
        workers[:] = [child for child in psutil.Process(process.pid).children() if "gate/worker.py" in _words(child)]
        return len(workers) == 2

    wait_until(has_workers)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not any(worker.is_running() for worker in workers)
    assert_nothing_is_left(clone, tmp_path / "tmp")


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not begun"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_worker_ends_with_a_gate_stopped_at_its_start(
    number: int, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Stopped(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, as in the background
    monkeypatch.setattr(subprocess, "Popen", Stopped)
    trees = {"A": REPOSITORY, "B": REPOSITORY}
    with (
        temporary.temporary_directory(),
        pytest.raises(error),
        gate_processes.workers(trees, tmp_path / "gate", {}),
    ):
        pytest.fail("it was not stopped")
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler
    assert [process.returncode for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize("half_made", [False, True])
def test_a_checkout_that_is_stopped_leaves_nothing(
    half_made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, tree, run = tmp_path / "repository", tmp_path / "tree", gate_processes._git
    subprocess.run(["git", "init", "--quiet", str(repository)], check=True)
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "first")
    monkeypatch.setattr(gate_processes, "REPOSITORY", repository)

    def stopped(*words: str) -> str:
        done = run(*words)
        if words[1] == "add":
            if half_made:  # as a killed git leaves it
                (tree / ".git").unlink()
                (repository / ".git/worktrees/tree/locked").write_text("initializing")
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(gate_processes, "_git", stopped)
    with pytest.raises(KeyboardInterrupt), gate_processes.checked_out("HEAD", tree):
        pass
    assert not tree.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert not (repository / ".git/worktrees/tree").exists()


def test_a_worker_that_runs_other_code_is_found(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    worker = gate_processes.Worker(tmp_path / "tree", tmp_path / "worker", {})
    try:
        worker.begin("facts")
        with pytest.raises(gate_processes.BenchmarkError, match=r"which is not of|No module named"):
            worker.facts()
    finally:
        worker.close()


def test_a_worker_that_was_killed_is_known_to_be_dead(tmp_path: Path) -> None:
    worker = gate_processes.Worker(REPOSITORY, tmp_path / "worker", {})
    try:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(DiedError, match="its process died: it said nothing"):
            worker.call("prepare", "keyed-noise", False)
    finally:
        worker.close()
