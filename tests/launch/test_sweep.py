"""Sweeps: plans, the output and what is refused; and a whole sweep on Ray."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gen_dist.cli import NoOptions, parse_train
from gen_dist.errors import ConfigError, DamagedError, UserError
from gen_dist.launch.sweep.plan import SweepOptions, plan_sweep
from gen_dist.launch.sweep.progress import SweepProgress
from gen_dist.records.metrics_file import read_metrics
from tests.conftest import REPOSITORY
from tests.launch.sweeps import SPACES, VAE, sweep_of
from tests.support.runs import make_trainer, small_config, write_config
from tests.support.warm_python import warm_python


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal  # type: ignore[method-assign]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_has_a_line_for_each_event_and_a_summary(terminal: bool, tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, SPACES[1], 4)
    first = sweep.trials[0]
    first.status, first.step = "running", 0
    screen = Screen(terminal)
    progress = SweepProgress(sweep, screen)
    progress.started(first)
    first.step = 200
    progress.evaluated(first)
    first.status, first.step = "stopped", 300
    progress.ended(first)
    progress.ended(sweep.trials[1])
    progress.close()
    text = screen.getvalue()
    assert f"trial 0 starts: learning_rate {first.values['learning_rate']}, optimizer " in text
    assert "trial 0 stopped at step 300 of 900: test/negative_elbo 1" in text
    assert "trial 1 failed: loss is nan at step 7\n" in text
    assert "4/4 done, best 1" in text
    assert ("3/4 done, 1 running (trial 0 at step 200)" in text) == terminal and ("\r" in text) == terminal
    assert ("trial 0 at step 200 of 900: test/negative_elbo 1" in text) != terminal, "a log has a line for it"


def _options(*words: str, **others: Any) -> SweepOptions:
    return SweepOptions(space=(words or ("learning_rate=log:1e-4:1e-1",),), **others)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["sweep.csv", "sweep.png", "sweep.json"])
def test_a_directory_that_is_no_sweep_is_left_alone(name: str, fresh: bool, tmp_path: Path) -> None:
    (tmp_path / "digits-sweep").mkdir()
    (tmp_path / "digits-sweep" / name).write_text("mine")
    with (
        pytest.raises(UserError, match=rf"{name}"),
        plan_sweep(dataclasses.replace(VAE, run_dir=str(tmp_path / "digits")), fresh, _options(trials=2)),
    ):
        pass
    assert (tmp_path / "digits-sweep" / name).read_text() == "mine"
    assert {path.name for path in (tmp_path / "digits-sweep").iterdir()} <= {name, ".lock"}


def test_a_plan_draws_checks_and_remembers(tmp_path: Path) -> None:
    config = dataclasses.replace(VAE, run_dir=str(tmp_path / "digits"))
    with plan_sweep(config, False, _options(trials=4)) as sweep:
        assert sweep.path == tmp_path / "digits-sweep"
        assert [trial.path for trial in sweep.trials] == [sweep.path / f"trial_{index:03}" for index in range(4)]
        assert {trial.config.evaluate_every for trial in sweep.trials} == {sweep.grace_period} == {104}
        with (
            pytest.raises(ConfigError, match="another sweep is running in"),
            plan_sweep(config, False, _options(trials=4)),
        ):
            pass
        for trial, status in zip(sweep.trials, ("finished", "stopped", "failed", "interrupted"), strict=True):
            trial.path.mkdir()
            write_config(trial.path / "config.json", trial.config)
            (trial.path / "metrics.jsonl").write_text('{"step": 104, "test/negative_elbo": 120.5}\n{"step": 150}\n')
            trial.status, trial.diverged = status, status == "failed"  # type: ignore[assignment]
        (sweep.trials[0].path / "summary.json").write_text('{"steps": 940}')
        sweep.save()
    with plan_sweep(config, False, _options(trials=5)) as again:
        found = [trial.status for trial in again.trials]
        assert found == ["finished", "stopped", "failed", "interrupted", "waiting"]
        assert [trial.is_settled for trial in again.trials] == [True, True, True, False, False]
        assert (again.trials[1].history, again.trials[1].step) == ([(104, 120.5)], 150)
    (tmp_path / "digits-sweep" / "mine.txt").write_text("kept")
    with plan_sweep(config, True, _options(trials=4)) as fresh:
        assert all(trial.status == "waiting" and not trial.history for trial in fresh.trials)
    assert (tmp_path / "digits-sweep" / "mine.txt").exists()


def test_the_way_out_of_a_damaged_state_leads_out(tmp_path: Path) -> None:
    config = dataclasses.replace(VAE, run_dir=str(tmp_path / "digits"))
    with plan_sweep(config, False, _options(trials=2)) as sweep:
        sweep.save_table()
    (sweep.path / "sweep.png").touch()
    (sweep.path / "sweep.json").write_text("[]")
    with (
        pytest.raises(DamagedError, match=r"; remove it, and sweep\.csv and sweep\.png where they are, to rank"),
        plan_sweep(config, False, _options(trials=2)),
    ):
        pass
    for name in ("json", "csv", "png"):
        (sweep.path / f"sweep.{name}").unlink()
    with plan_sweep(config, False, _options(trials=2)) as again:
        assert [trial.status for trial in again.trials] == ["waiting", "waiting"]


@pytest.mark.parametrize(
    ("options", "mentioned"),
    [
        (lambda: _options(trials=0), "trials 0 is less than 1"),
        (lambda: _options(reduction_factor=1.0), "reduction_factor 1.0 is not more than 1"),
        (lambda: _options(grace_period=5000), "use --grace-period 940"),
        (lambda: _options(storage="s3://bucket/runs"), "a sweep needs a directory"),
        (lambda: _options("optimizer=adam,sgd", trials=3), "use --trials 2"),
        (
            lambda: _options("learning_rate=-1,1", trials=2),
            "learning_rate -1.0) is invalid: learning_rate -1.0 is not a positive",
        ),
        (lambda: _options(metric="test/none"), "--metric test/none is none"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line_and_leaves_nothing(
    options: Any, mentioned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised, plan_sweep(VAE, False, options()):
        pass
    assert mentioned in str(raised.value)
    assert not list(tmp_path.iterdir())


def _command(words: Sequence[object], directory: Path) -> tuple[list[str], dict[str, str]]:
    """Words and environment of a sweep's command."""
    environment = os.environ | {
        "HOME": str(directory / "home"),
        "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
        "GEN_DIST_CACHE": str(directory / "packed"),
    }
    return [*warm_python(), str(REPOSITORY / "launch/ray_sweep.py"), *map(str, words)], environment


def _run(words: Sequence[object], directory: Path, limit: float = 240) -> subprocess.CompletedProcess[str]:
    command, environment = _command(words, directory)
    return subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=limit)


def test_a_mistake_in_the_command_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = _run(["vae-mnist", "--space", "latent_dims=int:2:64"], tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "error: --space latent_dims is not a field of this config; perhaps you meant network.latent_dim"
    ]


def test_help_tells_how_a_space_is_written(tmp_path: Path) -> None:
    result = _run(["vae-mnist", "--help"], tmp_path)
    assert result.returncode == 0
    shown = " ".join(result.stdout.replace("│", " ").split())
    for form in ("learning_rate=log:1e-4:1e-2", "objective.beta=uniform:0.5:4", "hidden_sizes=400+200,200"):
        assert form in shown


@pytest.mark.slow
def test_eight_trials_lose_bad_ones_and_are_trained_once(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    # The worst rate diverges: a trial that fails leaves the others to go on.
    config = small_config("vae", steps=90, log_every=10, checkpoint_every=30, sample_every=1000)
    file = write_config(tmp_path / "config.json", config)
    rates = "learning_rate=3e-3,1e-3,3e-4,1e-4,3e-5,1e-5,1e-6,1e30"
    words = ["--config", file, "--space", rates, "--trials", 8, "--storage", tmp_path / "store"]
    result = _run(words, tmp_path)
    assert result.returncode == 0, result.stderr
    store = tmp_path / "store" / "small-sweep"
    sweep = json.loads((store / "sweep.json").read_text())
    ended = [row["status"] for row in sweep["trials"]]
    assert set(ended) == {"finished", "stopped", "failed"}, result.stdout
    assert "failed: " in result.stdout and "Traceback" not in result.stderr
    best = sweep["trials"][sweep["best"]]
    assert best["values"] == {"learning_rate": 3e-3}
    for row in sweep["trials"]:
        assert row["step"] == (90 if row["status"] == "finished" else row["step"]) <= 90
        if row["status"] == "stopped":
            assert row["step"] < 90, "the steps of a trial that is stopped are saved"
    assert "8/8 done" in result.stderr and "starts: learning_rate 0.003" in result.stderr
    command = next(line for line in result.stdout.splitlines() if "gen-dist train" in line).split()
    found, _, _ = parse_train(command[2:], "launch/train.py", NoOptions())
    assert found == dataclasses.replace(config, learning_rate=3e-3, run_dir="runs/small-best")
    # What a trial found is what a run alone finds.
    records = read_metrics(store / f"trial_{sweep['best']:03}" / "metrics.jsonl")
    trainer = make_trainer(found)
    for step in range(90):
        trainer.run_step(step)
    assert trainer.evaluate(trainer.dataset.test)["negative_elbo"] == pytest.approx(
        records[-1]["test/negative_elbo"], rel=1e-6
    )
    left = sorted(path.name for path in store.iterdir() if not path.name.startswith("trial_"))
    assert left == [".lock", "sweep.csv", "sweep.json", "sweep.png"]
    assert not list((tmp_path / "home").rglob("ray_results"))
    written = {path: path.stat().st_mtime_ns for path in store.rglob("trial_*/**/*") if path.is_file()}
    again = _run(words, tmp_path)
    assert again.returncode == 0 and again.stderr == "", again.stderr
    assert again.stdout == result.stdout
    assert written == {path: path.stat().st_mtime_ns for path in store.rglob("trial_*/**/*") if path.is_file()}


@pytest.mark.slow
def test_a_stopped_sweep_shows_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    config = small_config("vae", steps=4000, log_every=10, checkpoint_every=4000, sample_every=4000)
    words = ["--config", write_config(tmp_path / "config.json", config), "--space", "learning_rate=3e-3,1e-3"]
    words += ["--trials", 2, "--concurrent", 1, "--grace-period", 20, "--storage", tmp_path]
    command, environment = _command(words, tmp_path)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, **streams) as process:
        assert process.stderr
        shown = next(line for line in process.stderr if " at step " in line)
        process.send_signal(signal.SIGINT)
        table, rest = process.communicate(timeout=120)
    assert re.fullmatch(r"trial 0 at step \d+ of 4000: test/negative_elbo [\d.]+\n", shown)
    assert process.returncode == 130 and "stopped with 0/2 done" in rest
    heads, first, second, place = (line.split() for line in table.splitlines())
    assert heads[:3] == ["rank", "trial", "learning_rate"] and first[-1] == "interrupted" and second[-1] == "waiting"
    assert place[2] == f"{tmp_path / 'small-sweep' / 'sweep.csv'}," and Path(place[-1]).exists()
    assert Path(place[2][:-1]).read_text().count("\n") == 3


FAULTY = """
import os, sys
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tyro.conf import Suppress

from gen_dist.config import VaeConfig, objectives
from gen_dist.objectives.vae import MaximizeElbo, Vae
from gen_dist.presets import add_preset, get_preset


@objectives.register
@dataclass(frozen=True)
class FaultyConfig(VaeConfig):
    implementation: ClassVar[str] = f"{__name__}:Faulty"
    kind: Suppress[Literal["faulty"]] = "faulty"
    fault: str = ""


class Faulty(Vae):
    def phases(self):
        return {"vae": Step(self)}

    def evaluate(self, batch):
        return super().evaluate({}["figure"] if self.config.fault == "figure" else batch)


class Step(MaximizeElbo):
    def forward(self, batch):
        match self.objective.config.fault:
            case "error":
                {}["weight"]
            case "end":
                raise SystemExit(0)
            case "module":
                sys.modules["json"] = None
                import json
            case "change":
                open(os.environ["FAULTY"], "a").write("#")
        return super().forward(batch)


small = replace(get_preset("vae-mnist"), data="synthetic", objective=FaultyConfig(), global_batch_size=16, steps=4)
add_preset("faulty", replace(small, evaluate_every=2, checkpoint_every=2), "faulty")
"""


@pytest.mark.slow
def test_a_fault_of_a_plugin_is_its_trials_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (plugin := tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("FAULTY", str(plugin))
    words = ["faulty", "--plugin", plugin, "--hidden-sizes", 8, "--storage", tmp_path / "store"]
    result = _run([*words, "--space", "fault=module,error,end,figure,change", "--trials", 5], tmp_path)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    trials = json.loads((tmp_path / "store/faulty-sweep/sweep.json").read_text())["trials"]
    reasons = {fault: row["reason"] for row in trials for fault in row["values"].values()}
    assert reasons.pop("change") is None
    kinds = {
        "module": "ModuleNotFoundError",
        "error": "KeyError: 'weight'",
        "end": "SystemExit: 0",
        "figure": "KeyError",
    }
    for fault, kind in kinds.items():
        assert re.match(rf"plug-in faulty.py, line \d+: {kind}", reasons[fault]), reasons
    assert "gen-dist train faulty --plugin" in result.stdout
    assert f"warning: plug-in {plugin} has changed since the sweep began" in result.stderr
