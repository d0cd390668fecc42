"""A run's record is whole, valid and exact after any kill, and showing it can never stop the run."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from gen_dist import tracking
from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError, ConfigError
from gen_dist.tracking import Tracker, environment, read_metrics, write_atomically

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_wandb_from_outside(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc with a key


def tracker(
    path: Path, *, steps: int = 2000, start_step: int = 0, stream: io.StringIO | None = None, **options: Any
) -> Tracker:
    return Tracker(
        path,
        TrainConfig(steps=steps, **options),
        start_step=start_step,
        images_per_step=128,
        wandb_id="abc12345",
        stream=io.StringIO() if stream is None else stream,
    )


# What is recorded.


def test_each_log_is_one_line_that_is_on_disk_at_once(tmp_path):
    with tracker(tmp_path) as run:
        run.log(50, {"train/loss": 540.25, "train/kl": 1.5})
        run.log(100, {"train/loss": 220.0, "test/loss": 221.0})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert list(first) == ["step", "images_seen", "images_per_second", "train/loss", "train/kl"]
    assert (first["step"], first["images_seen"], first["train/loss"], first["train/kl"]) == (50, 6400, 540.25, 1.5)
    assert (second["step"], second["images_seen"], second["test/loss"]) == (100, 12_800, 221.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [first, second]


def test_floats_are_recorded_exactly(tmp_path):
    with tracker(tmp_path) as run:
        run.log(1, {"train/loss": 0.1 + 0.2})
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == 0.1 + 0.2


def test_what_is_not_finite_becomes_null_so_that_every_line_is_json(tmp_path):
    with tracker(tmp_path) as run:
        run.log(1, {"train/loss": float("nan"), "train/kl": float("inf"), "train/nll": -float("inf")})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [record[f"train/{name}"] for name in ("loss", "kl", "nll")] == [None, None, None]


def test_throughput_counts_neither_pauses_nor_the_first_step(tmp_path):
    with tracker(tmp_path) as run:
        time.sleep(0.2)  # stands for compiling
        run.advance(1)
        time.sleep(0.1)
        with run.pause(), run.pause():
            time.sleep(0.3)
            paused_at = run.training_seconds
        assert 0.3 <= paused_at < 0.4
        assert run.training_seconds - paused_at < 0.05
        run.log(11, {"train/loss": 1.0})
        run.log(11, {"test/loss": 1.0})
        run.log(21, {"train/loss": 1.0, "images_per_second": 7.0})
    timed, without_steps, given = read_metrics(tmp_path / "metrics.jsonl")
    assert 10 * 128 / 0.15 < timed["images_per_second"] <= 10 * 128 / 0.1
    assert "images_per_second" not in without_steps
    assert given["images_per_second"] == 7.0


def test_resuming_drops_lines_after_the_checkpoint_and_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with tracker(tmp_path) as run:
        for step in range(50, 301, 50):
            run.log(step, {"train/loss": float(step)})
    whole = path.read_text()
    path.write_text(whole + '{"step": 350, "images_se')
    with tracker(tmp_path, start_step=200) as run:
        assert path.read_text() == "".join(whole.splitlines(keepends=True)[:4])
        run.log(250, {"train/loss": -250.0})
    assert [record["step"] for record in read_metrics(path)] == [50, 100, 150, 200, 250]
    assert read_metrics(path)[-1]["train/loss"] == -250.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_starts_the_file_afresh(tmp_path):
    for loss in (1.0, 2.0):
        with tracker(tmp_path / "run") as run:
            run.log(50, {"train/loss": loss})
    assert [record["train/loss"] for record in read_metrics(tmp_path / "run/metrics.jsonl")] == [2.0]


def test_resuming_without_a_file_goes_on(tmp_path):
    with tracker(tmp_path, start_step=200) as run:
        run.log(250, {"train/loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [250]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_file_torn_anywhere_in_its_last_line_is_read_up_to_there(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.0 / step}) + "\n" for step in (1, 2, 3)]
    text = "".join(lines)
    path.write_text(text[:-cut])
    left = 3 if cut == 1 else 2  # the first cut takes the line end alone
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3][:left]
    with tracker(tmp_path, start_step=3) as run:
        run.log(4, {})
    assert [record["step"] for record in read_metrics(path)] == [*[1, 2, 3][:left], 4]


@pytest.mark.parametrize("line", ['{"step": 2, "tra', "[]", "{}", "", "\0\0\0"])
def test_a_damaged_line_before_the_last_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for read in (lambda: read_metrics(path), lambda: tracker(tmp_path, start_step=3)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 is no record") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*metrics\.jsonl: No such file or directory$"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_killed_process_loses_no_line_that_it_logged(tmp_path):
    code = (
        "import sys, io, pathlib; from gen_dist.tracking import Tracker; from gen_dist.config import TrainConfig\n"
        f"run = Tracker(pathlib.Path({str(tmp_path)!r}), TrainConfig(), start_step=0, images_per_step=1, wandb_id='a',"
        " stream=io.StringIO())\n"
        "for step in range(1, 10**9):\n"
        "    run.log(step, {'train/loss': 1.0 / step}); print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(200):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = process.stdout.read().split("\n")
    process.wait()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) >= 200 + len([line for line in said[:-1] if line])


def test_a_full_disk_is_one_line_that_says_how_to_go_on(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(CheckpointError, match="No space left on device; free some space"),
        tracker(tmp_path) as run,
    ):
        run.log(1, {"train/loss": 1.0})


def test_logging_costs_little(tmp_path):
    scalars = {f"train/{name}": 1.0 for name in ("loss", "nll", "kl", "learning_rate")}
    with tracker(tmp_path, steps=10**9) as run:
        seconds = []
        for step in range(1, 501):
            started = time.perf_counter()
            run.log(step, scalars)
            seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        for step in range(501, 10_501):
            run.advance(step)
        advance_seconds = (time.perf_counter() - started) / 10_000
    assert sorted(seconds)[250] < 200e-6
    assert advance_seconds < 5e-6


def test_writing_atomically_replaces_whole_files(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, "first ü\n")
    assert path.read_text(encoding="utf-8") == "first ü\n"
    write_atomically(path, b"\x89second")
    assert path.read_bytes() == b"\x89second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing/config.json", "")


# What is shown.


def test_a_pipe_gets_plain_lines_with_first_last_and_tests_always(tmp_path):
    stream = io.StringIO()
    with tracker(tmp_path, steps=100, stream=stream) as run:
        for step in range(1, 101):
            scalars = {"train/loss": 107.931, "train/nll": 83.1, "train/kl": 24.8, "train/learning_rate": 1e-3}
            run.log(step, scalars | ({"test/loss": 104.5, "test/kl": 25.0} if step == 50 else {}))
        run.note("a note")
    first, test, last, note = stream.getvalue().splitlines()
    assert re.fullmatch(r"step 1/100  [\d,]+ images/s  loss 107\.93  nll 83\.10  kl 24\.80", first)
    assert test == "step 50/100  test  loss 104.50  kl 25.00"
    assert re.fullmatch(r"step 100/100  [\d,]+ images/s  ETA 0:00  loss 107\.93  nll 83\.10  kl 24\.80", last)
    assert note == "a note"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_plain_lines_come_about_once_a_second(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    with tracker(tmp_path, steps=10_000, stream=stream) as run:
        for step in range(1, 10_001):
            now[0] += 0.01
            run.log(step, {"train/loss": 1.0})
    lines = stream.getvalue().splitlines()
    assert 95 <= len(lines) <= 102
    assert lines[50].startswith("step 5") and "12,800 images/s" in lines[50] and "ETA 0:" in lines[50]


def test_the_eta_of_a_resumed_run_is_that_of_the_steps_left(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    with tracker(tmp_path, steps=2000, start_step=1000, stream=stream) as run:
        for step in range(1001, 1102):
            now[0] += 10.0 if step == 1001 else 1.0  # the first step compiles
            run.advance(step)
        run.log(1101, {"train/loss": 1.0})
    assert stream.getvalue() == "step 1101/2000  128 images/s  ETA 14:59  loss 1.00\n"


class GoneStream(io.StringIO):
    """A pipe whose reader has left, or a terminal that hung up."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("kind", ["closed", "broken", "none"])
def test_a_stream_that_is_gone_does_not_stop_the_run(tmp_path, monkeypatch, kind):
    stream: io.StringIO | None = None if kind == "none" else GoneStream() if kind == "broken" else io.StringIO()
    if kind == "closed" and stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with Tracker(tmp_path, TrainConfig(), start_step=0, images_per_step=1, wandb_id="a") as run:
        run.note("unheard")
        for step in (1, 2000):
            run.advance(step)
            run.log(step, {"train/loss": 1.0, "test/loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


ON_A_TERMINAL = """
import sys, time, pathlib
from gen_dist.config import TrainConfig
from gen_dist.tracking import Tracker
with Tracker(pathlib.Path(sys.argv[1]), TrainConfig(steps=40), start_step=10, images_per_step=128, wandb_id="a") as run:
    for step in range(11, 41):
        time.sleep(0.03)
        run.advance(step)
        if step % 10 == 0:
            run.log(step, {"train/loss": 107.9, "train/nll": 83.1, "train/kl": 24.8})
        if step == 20:
            run.note("checkpoint of step 20 written")
            run.log(step, {"test/loss": 109.0})
"""


def on_a_terminal(code: str, argument: str, columns: int) -> str:
    """What a terminal of so many columns receives from a Python process."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code, argument], cwd=ROOT, stderr=follower)
    os.close(follower)
    received = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # Linux: EIO once the last writer is gone
            break
        if not piece:
            break
        received += piece
    os.close(leader)
    assert process.wait() == 0
    return received.decode()


@pytest.mark.parametrize("columns", [120, 60, 20, 0])
def test_a_terminal_gets_one_live_bar_that_moves_between_logs_and_fits(tmp_path, columns):
    received = on_a_terminal(ON_A_TERMINAL, str(tmp_path), columns)
    frames = [frame for frame in re.split(r"[\r\n]+", received) if frame.strip()]
    assert all(len(frame) <= (columns or 80) for frame in frames if "%|" in frame)
    percents = [int(match) for match in re.findall(r"(\d+)%\|", received)]
    assert percents[0] == 25 and percents[-1] == 100 and percents == sorted(percents)
    assert len(set(percents)) >= 5  # more than the three logs
    notes = [frame for frame in frames if "checkpoint of step 20 written" in frame or "test  loss 109.00" in frame]
    assert len(notes) == 2 and not any("%|" in note for note in notes)
    if columns == 120:
        assert re.search(
            r"100%\|█+\| step 40/40  [\d,]+ images/s  ETA 0:00  loss 107\.90  nll 83\.10  kl 24\.80", frames[-1]
        )
    if columns == 60:
        assert "images/s" in frames[-1] and "kl" not in frames[-1]


def test_a_terminal_that_hangs_up_does_not_stop_the_run(tmp_path):
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL, str(tmp_path)], cwd=ROOT, stderr=follower)
    os.close(follower)
    os.read(leader, 1)
    os.close(leader)
    assert process.wait() == 0
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [20, 20, 30, 40]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (24310.4, "24,310"),
        (107.931, "107.93"),
        (0.0, "0.00"),
        (-1.5, "-1.50"),
        (0.01234, "0.0123"),
        (9.1e-5, "9.1e-05"),
    ],
)
def test_numbers_are_shown_with_the_digits_that_matter(value, shown):
    assert tracking.readable_number(value) == shown


def test_numbers_that_are_not_finite_are_shown_as_such():
    assert [tracking.readable_number(float(text)) for text in ("nan", "inf", "-inf")] == ["nan", "inf", "-inf"]


# The environment.


def test_the_environment_names_versions_hardware_and_command_and_no_secret(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    found = environment()
    text = json.dumps(found)
    assert (
        found["versions"]["gen_dist"]
        and found["versions"]["torch"]
        and found["versions"]["numpy"]
        and found["versions"]["python"].startswith("3.")
    )
    assert set(found["versions"]) == {
        "python", "gen_dist", "torch", "torchvision", "accelerate", "triton", "numpy"
    }  # fmt: skip
    assert found["cpu"]["logical_cores"] >= 1 and found["cpu"]["memory_gib"] > 0.1
    assert found["torch_threads"] >= 1 and isinstance(found["gpus"], list)
    assert found["command"] == sys.argv
    assert "hunter2" not in text
    assert os.uname().nodename not in text.replace(json.dumps(sys.argv), "") or len(os.uname().nodename) < 6


def test_the_commit_is_that_of_the_checkout_and_changes_make_it_dirty(tmp_path, monkeypatch):
    module = tmp_path / "checkout/gen_dist/tracking.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(tracking, "__file__", str(module))
    assert tracking._git_state() is None

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, cwd=module.parents[1], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert tracking._git_state() is None  # an installed copy inside a repository that does not track it
    git("add", "gen_dist/tracking.py")
    git("commit", "-q", "-m", "a commit")
    (module.parent / "untracked").write_text("")
    assert tracking._git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    module.write_text("changed = True\n")
    assert tracking._git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tracking._git_state() is None


# wandb.


def test_disabled_wandb_is_not_imported(tmp_path):
    code = ON_A_TERMINAL.replace("0.03", "0") + "run.pictures(1, {})\nassert 'wandb' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_option_wins_over_the_environment_and_disabled_is_the_default(monkeypatch):
    assert tracking._wandb_mode(None) == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking._wandb_mode(None) == "offline"
    assert tracking._wandb_mode("disabled") == "disabled"
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(ConfigError, match="WANDB_MODE 'on' is not one of disabled, offline, online"):
        tracking._wandb_mode(None)


WANDB_RUN = """
import os, signal, sys, pathlib
import numpy as np
from gen_dist.config import TrainConfig
from gen_dist.errors import UserError
from gen_dist.pictures import save_grid
from gen_dist.tracking import Tracker
import gen_dist.tracking
gen_dist.tracking.WANDB_INIT_SECONDS = 2.0
path, mode, start = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
try:
    config = TrainConfig(steps=200, wandb=mode)
    with Tracker(path, config, start_step=start, images_per_step=128, wandb_id="abc12345") as run:
        run.log(start + 50, {"train/loss": 123.25, "train/kl": float("nan")})
        save_grid(path / "samples.png", np.zeros((4, 1, 8, 8), np.uint8))
        run.pictures(start + 50, {"samples": path / "samples.png"})
        if "kill" in sys.argv:
            import psutil, time
            children = psutil.Process().children(recursive=True)
            for child in children:
                child.kill()
            psutil.wait_procs(children, timeout=5)
            time.sleep(0.2)
        run.log(start + 100, {"train/loss": 119.5})
        run.log(200, {"train/loss": 118.75})
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


def wandb_run(
    path: Path, mode: str, start: int = 0, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WANDB_RUN, str(path), mode, str(start), *more]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **environment}
    )


def test_wandb_offline_keeps_scalars_pictures_and_config_under_one_id_without_a_word(tmp_path):
    for start in (0, 100):
        done = wandb_run(tmp_path, "offline", start)
        assert done.returncode == 0, done.stderr
        said = done.stderr.splitlines()
        assert [line for line in said if not line.startswith("step ")] == [
            f"wandb: offline run kept in {tmp_path / 'wandb'}; `wandb sync` uploads it"
        ]
        assert done.stdout == ""
        time.sleep(1.1 if start == 0 else 0)  # wandb names its directories by the second
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*/run-abc12345.wandb"))
    for kept, losses in ((first, (b"123.25", b"119.5", b"118.75")), (second, (b"123.25", b"118.75"))):
        stored = kept.read_bytes()  # records of protobuf, not compressed: names and JSON values stand as they are
        assert all(
            text in stored for text in (b"train/loss", b"images_seen", b"samples", b"global_batch_size", *losses)
        )
    assert list(first.parent.glob("files/media/images/samples_*.png"))


def test_wandb_online_without_a_key_is_one_line(tmp_path):
    done = wandb_run(tmp_path, "online", HOME=str(tmp_path))
    assert done.returncode == 2
    assert re.fullmatch(r"error: wandb online: No API key configured\..*use --wandb offline\n", done.stderr)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_wandb_without_a_network_costs_one_warning(tmp_path):
    done = wandb_run(tmp_path, "online", WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert len(said) == 1 and said[0].startswith("warning: wandb did not start, the run goes on without it: ")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_wandb_service_that_dies_costs_one_warning(tmp_path):
    done = wandb_run(tmp_path, "offline", 0, "kill")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert len(said) == 1 and said[0].startswith("warning: wandb failed, the run goes on without it: "), done.stderr
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb offline needs the wandb package; install it, or use --wandb disabled"):
        tracker(tmp_path, wandb="offline")
