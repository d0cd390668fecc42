"""wandb gets the curves and pictures of a run on request, and no failure of wandb stops the run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.records.metrics_file import read_metrics
from gen_dist.records.run_directory import wandb_id_of
from gen_dist.records.trackers.wandb_run import WandbRun, _without_other_ids, wandb_mode
from tests.conftest import REPOSITORY
from tests.support.trackers import make_tracker
from tests.support.warm_python import warm_python


@pytest.fixture(autouse=True)
def no_wandb_from_outside(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc with a key


WITHOUT_WANDB = """
import sys, pathlib
from gen_dist.config import TrainConfig
from gen_dist.records.tracker import Tracker
with Tracker(pathlib.Path(sys.argv[1]), TrainConfig(), start_step=0, images_per_step=128, wandb_id="a") as run:
    run.advance(1)
    run.log(1, {"train/loss": 107.9, "test/loss": 109.0})
    run.note("a note")
    run.pictures(1, {})
assert "wandb" not in sys.modules
"""


def test_disabled_wandb_is_not_imported(tmp_path):
    command = [sys.executable, "-c", WITHOUT_WANDB, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_option_overrides_the_environment_variable(monkeypatch):
    assert wandb_mode(None) == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(None) == "offline"
    assert wandb_mode("disabled") == "disabled"
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(ConfigError, match="WANDB_MODE 'on' is not one of disabled, offline, online"):
        wandb_mode(None)


@pytest.mark.parametrize(
    ("agent", "kept", "taken", "left"),
    [
        ({"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "agents"}, None, "agents", ["WANDB_RUN_ID", "WANDB_SWEEP_ID"]),
        ({"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "agents"}, "before", "before", []),
        ({"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "agents"}, "agents", "agents", ["WANDB_RUN_ID", "WANDB_SWEEP_ID"]),
        ({"WANDB_RUN_ID": "exported once"}, "before", "before", ["WANDB_RUN_ID"]),
    ],
)
def test_a_run_has_one_id_on_wandb(agent, kept, taken, left, monkeypatch, tmp_path):
    """wandb itself takes an agent's id before the one that it is given."""
    for name, value in agent.items():
        monkeypatch.setenv(name, value)
    if kept:
        (tmp_path / "wandb-id").write_text(kept)
    assert wandb_id_of(tmp_path) == taken
    with _without_other_ids(taken):
        assert sorted(name for name in os.environ if name.startswith("WANDB_")) == left
    assert {name: os.environ[name] for name in agent} == agent


def test_a_variable_for_all_runs_is_no_id_of_a_run(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_RUN_ID", "exported once")
    assert wandb_id_of(tmp_path) not in ("exported once", wandb_id_of(tmp_path))


def test_wandb_refuses_a_path_that_it_would_wait_for(tmp_path):
    with pytest.raises(ConfigError, match="needs a run directory in UTF-8"):
        WandbRun("offline", tmp_path / "r\udce9un", TrainConfig(), "a", print)


WANDB_RUN = """
import os, signal, sys, pathlib
import numpy as np
from gen_dist.config import TrainConfig
from gen_dist.errors import UserError
from gen_dist.pictures.grids import save_grid
from gen_dist.records.tracker import Tracker
import gen_dist.records.trackers.wandb_run
path, mode, start = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if mode == "online":  # no server answers; offline, a busy machine may take longer
    gen_dist.records.trackers.wandb_run.WANDB_INIT_SECONDS = 2.0
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
        shares, scores = [0.375, float("nan"), 0.625], [0.03125] * 20
        run.log(start + 100, {"train/loss": 119.5, "samples/class_shares": shares, "scores/real": scores})
        run.log(200, {"train/loss": 118.75})
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


def wandb_run(
    path: Path, mode: str, start: int = 0, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [*warm_python(), "-c", WANDB_RUN, str(path), mode, str(start), *more]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def test_wandb_offline_silently_keeps_everything_under_one_id(tmp_path):
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
        stored = kept.read_bytes()  # protobuf records, not compressed: names and JSON values are readable
        assert all(
            text in stored for text in (b"train/loss", b"images_seen", b"samples", b"global_batch_size", *losses)
        )
        # In histograms, infinite numbers count as 0, each class has one bin, and scores keep their bins.
        assert all(text in stored for text in (b"[0.375,0,0.625]", b"[-0.5,0.5,1.5,2.5]", b"[-10,-9,-8,"))
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
        make_tracker(tmp_path, wandb="offline")
