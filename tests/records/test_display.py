"""Progress fits the terminal or the log, and showing it cannot stop the run."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence

import pytest

from gen_dist.config import GanConfig, TrainConfig
from gen_dist.records.display import brief_checks, brief_losses
from gen_dist.records.metrics_file import read_metrics
from gen_dist.records.readable import readable_number
from gen_dist.records.tracker import Tracker
from tests.conftest import REPOSITORY
from tests.support.trackers import make_tracker


def test_a_pipe_gets_plain_lines_with_first_last_and_tests(tmp_path):
    stream = io.StringIO()
    with make_tracker(tmp_path, steps=100, stream=stream) as run:
        for step in range(1, 101):
            scalars = {"train/loss": 107.931, "train/nll": 83.1, "train/kl": 24.8, "train/learning_rate": 1e-3}
            run.log(step, scalars | ({"test/loss": 104.5, "test/kl": 25.0} if step == 50 else {}))
        run.note("a note")
    first, test, last, note = stream.getvalue().splitlines()
    assert re.fullmatch(r"step 1/100  [\d,]+ images/s  loss 107\.93  reconstruction 83\.10  KL 24\.80", first)
    assert test == "step 50/100  test  loss 104.50  KL 25.00"
    assert re.fullmatch(
        r"step 100/100  [\d,]+ images/s  ETA 0:00  loss 107\.93  reconstruction 83\.10  KL 24\.80", last
    )
    assert note == "a note"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


GAN_METRICS: dict[str, float | Sequence[float]] = {
    "train/discriminator/loss": 1.3204,
    "train/discriminator/accuracy_real": 0.714,
    "train/discriminator/accuracy_fake": 0.8,
    "train/discriminator/penalty": 0.02,
    "train/discriminator/gradient_norm": 3.0,
    "train/generator/loss": 0.851,
    "train/generator/gradient_norm": 0.5,
    "train/learning_rate": 2e-4,
}
CHECKS: dict[str, float | Sequence[float]] = {
    "samples/diversity": 0.35,
    "samples/diversity_ratio": 0.9678,
    "samples/class_shares": [0.1] * 10,
    "samples/classes_found": 10.0,
    "samples/sure_ratio": 0.71,
    "samples/class_variation": 0.05,
}


def test_a_gan_shows_losses_accuracies_and_the_last_checks(tmp_path):
    stream = io.StringIO()
    with make_tracker(tmp_path, steps=3, stream=stream, objective=GanConfig()) as run:
        run.log(1, GAN_METRICS)
        run.log(2, CHECKS | {"samples/label_accuracy": 0.93, "scores/real": [0.05] * 20, "scores/fake": [0.05] * 20})
        run.log(3, GAN_METRICS)
    first, checks, last = stream.getvalue().splitlines()
    losses = r"D 1\.32  G 0\.8510  real 71%  fake 80%"
    assert re.fullmatch(r"step 1/3  [\d,]+ images/s  " + losses, first)
    assert checks == "step 2/3  samples  diversity 0.97  classes 10/10 (sure 0.71)  labels 93%"
    assert re.fullmatch(
        r"step 3/3  [\d,]+ images/s  ETA 0:00  "
        + losses
        + r"  diversity 0\.97  classes 10/10 \(sure 0\.71\)  labels 93%",
        last,
    )


def test_a_vae_shows_sample_checks_beside_its_test_metrics(tmp_path):
    stream = io.StringIO()
    with make_tracker(tmp_path, steps=100, stream=stream) as run:
        run.log(100, {"train/loss": 107.9, "test/negative_elbo": 104.5, "test/kl": 25.0} | CHECKS)
    progress, test = stream.getvalue().splitlines()
    checks = "diversity 0.97  classes 10/10 (sure 0.71)"
    assert progress.endswith(f"ETA 0:00  loss 107.90  {checks}")
    assert test == "step 100/100  test  negative ELBO 104.50  KL 25.00  samples  " + checks


def test_missing_and_infinite_checks_are_shown_or_left_out():
    assert brief_checks({"samples/diversity_ratio": 0.5}) == ["diversity 0.50"]
    assert brief_checks({"samples/diversity": 0.5, "train/loss": 1.0}) == []
    assert brief_checks({"samples/diversity_ratio": float("nan"), "samples/label_accuracy": float("nan")}) == [
        "diversity nan",
        "labels nan",
    ]


@pytest.mark.parametrize("sure", [{"samples/sure_ratio": 0.19}, {"samples/sure_ratio": float("nan")}, {}])
def test_classes_are_not_counted_where_hardly_any_is_sure(sure: dict[str, float]) -> None:
    checks = {name: value for name, value in CHECKS.items() if name != "samples/sure_ratio"}
    assert brief_checks(checks | sure) == ["diversity 0.97", "classes unsure"]


def test_phases_of_other_names_show_their_loss_and_no_more():
    values: dict[str, float | Sequence[float]] = {
        "train/encoder/loss": 90.0,
        "train/encoder/kl": 20.0,
        "train/critic/loss": -3.0,
        "scores/real": [1.0],
    }
    assert brief_losses(values, "train/", GanConfig()) == ["encoder 90.00", "critic -3.00"]


def test_plain_lines_come_about_once_a_second(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    with make_tracker(tmp_path, steps=10_000, stream=stream) as run:
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
    with make_tracker(tmp_path, steps=2000, start_step=1000, stream=stream) as run:
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
from gen_dist.records.tracker import Tracker
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
    """Output of a Python process to a terminal of this width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code, argument], cwd=REPOSITORY, stderr=follower)
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
def test_a_terminal_gets_one_live_bar_that_fits(tmp_path, columns):
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
            r"100%\|█+\| step 40/40  [\d,]+ images/s  ETA 0:00  loss 107\.90  reconstruction 83\.10  KL 24\.80",
            frames[-1],
        )
    if columns == 60:
        assert "images/s" in frames[-1] and "KL" not in frames[-1]


GAN_ON_A_TERMINAL = f"""
import sys, pathlib, time
from gen_dist.config import GanConfig, TrainConfig
from gen_dist.records.tracker import Tracker
config = TrainConfig(steps=20, objective=GanConfig())
with Tracker(pathlib.Path(sys.argv[1]), config, start_step=0, images_per_step=128, wandb_id="a") as run:
    run.advance(1)
    run.log(10, {CHECKS})
    time.sleep(0.1)
    run.log(20, {GAN_METRICS})
"""


@pytest.mark.parametrize(
    ("columns", "last_part"),
    [(142, "classes 10/10 (sure 0.71)"), (110, "diversity 0.97"), (90, "real 71%"), (60, "ETA 0:00")],
)
def test_a_narrow_bar_drops_checks_before_losses(tmp_path, columns, last_part):
    received = on_a_terminal(GAN_ON_A_TERMINAL, str(tmp_path), columns)
    frames = [frame.strip() for frame in re.split(r"[\r\n]+", received) if "%|" in frame]
    assert all(len(frame) <= columns for frame in frames)
    assert frames[-1].endswith(last_part)


def test_a_terminal_that_hangs_up_does_not_stop_the_run(tmp_path):
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL, str(tmp_path)], cwd=REPOSITORY, stderr=follower)
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
    assert readable_number(value) == shown


def test_numbers_that_are_not_finite_are_shown_as_such():
    assert [readable_number(float(text)) for text in ("nan", "inf", "-inf")] == ["nan", "inf", "-inf"]
