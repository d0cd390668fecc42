"""Results of a sweep: the metric that ranks trials, who is stopped, the table and the pictures."""

import csv
import errno
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen_dist.cli import NoOptions, parse_train
from gen_dist.errors import ConfigError, DamagedError, UnreadableError, UserError
from gen_dist.evaluation.sample_checks import SampleChecks
from gen_dist.launch.sweep import results
from gen_dist.launch.sweep.halving import Halving, grace_period_of
from gen_dist.launch.sweep.plan import best_command, conclude, tell_stopped
from gen_dist.launch.sweep.plot import limits_at_end, limits_over_steps, outliers, save_plot
from gen_dist.launch.sweep.results import Metric, choose_metric
from gen_dist.launch.sweep.space import with_values
from gen_dist.records import reading
from tests.launch.sweeps import SPACES, VAE, sweep_of
from tests.support.runs import make_trainer, small_config


@pytest.mark.parametrize("objective", ["autoencoder", "vae", "iwae", "gan", "vae-gan"])
def test_choosable_metrics_are_those_of_an_evaluation(objective: str) -> None:
    config = small_config(objective)
    trainer = make_trainer(config)
    tested = [f"test/{name}" for name in trainer.evaluate(trainer.dataset.test)]
    if tested:
        default = choose_metric(config, None, None)
        assert default == Metric(tested[0], "min")
        assert choose_metric(config, tested[-1], "max").mode == "max"
    else:
        with pytest.raises(ConfigError, match="gan has no test metric; name one with --metric, as in"):
            choose_metric(config, None, None)
    with pytest.raises(ConfigError) as raised:
        choose_metric(config, "xyz", None)
    named = str(raised.value).partition("there are ")[2].split(", ")
    assert [name for name in named if name.startswith("test/")] == tested
    assert bool(set(named) - set(tested)) == (objective != "autoencoder")


def test_the_checks_that_may_be_chosen_are_those_of_samples() -> None:
    documented = SampleChecks.measure.__doc__ or ""
    with pytest.raises(ConfigError) as raised:
        choose_metric(small_config("gan"), "xyz", None)
    for name in str(raised.value).partition("there are ")[2].split(", "):
        assert f"`{name.removeprefix('samples/')}`" in documented
    assert choose_metric(small_config("gan"), "samples/class_variation", None).mode == "min"
    assert choose_metric(small_config("gan"), "samples/label_accuracy", None).mode == "max"
    with pytest.raises(ConfigError, match="perhaps you meant test/nll"):
        choose_metric(VAE, "test/nl", None)
    with pytest.raises(ConfigError, match="train/loss is none that an evaluation of vae gives"):
        choose_metric(VAE, "train/loss", None)


def test_trials_are_ranked_by_a_measured_metric_too() -> None:
    config = small_config("gan", evaluate_metrics=("fid", "precision"))
    assert choose_metric(config, "evaluation/fid_1k", None).mode == "min"
    assert choose_metric(config, "evaluation/precision_1k", None).mode == "max"
    with pytest.raises(ConfigError, match=r"evaluation/kid_1k is none of .*fid precision; name kid there, too"):
        choose_metric(config, "evaluation/kid_1k", None)
    with pytest.raises(ConfigError, match=r"^--metric fid is measured only where .*; add --evaluate-metrics fid$"):
        choose_metric(small_config("gan"), "fid", None)


@pytest.mark.parametrize(
    ("name", "asked", "line"),
    [
        ("evaluation/xyz", (), r"is none that an evaluation of gan gives; there are evaluation/fid, evaluation/kid, "),
        ("evaluation/fud", (), r"perhaps you meant evaluation/fid"),
        ("nll", (), r"is none that an evaluation of gan gives; there are [^;]*samples/diversity"),
        ("evaluation/rfid_1k", ("fid",), r"is none that an evaluation of gan gives"),
        (
            "fid",
            ("fid_5k",),
            r"--evaluate-metrics fid_5k has a number or a network in its name; name fid, and set --ev",
        ),
        ("fid_5k", ("fid_5k",), r"--evaluate-metrics fid_5k has a number or a network in its name; name fid, and set"),
        ("fid_5k", ("fid",), r"fid_5k is not what trials measure with --evaluate-samples 1000; name fid, or set"),
        ("evaluation/fid_1k_train", ("fid",), r"fid_1k_train is not what trials measure with --evaluate-samples 1000"),
    ],
)
def test_a_metric_that_no_trial_would_have_is_refused_before_the_first(
    name: str, asked: tuple[str, ...], line: str
) -> None:
    with pytest.raises(ConfigError, match=line) as raised:
        choose_metric(small_config("gan", evaluate_metrics=asked), name, None)
    assert "\n" not in str(raised.value) and ("add --eval" in str(raised.value)) is False


def test_a_metric_is_found_by_its_name_without_prefix_and_counts() -> None:
    config = small_config("gan", evaluate_metrics=("fid", "precision"), evaluate_samples=5000)
    assert choose_metric(VAE, "kl", None) == choose_metric(VAE, "test/kl", None)
    assert choose_metric(config, "class_variation", None).name == "samples/class_variation"
    record = {"samples/diversity": 0.3, "evaluation/fid_5k": 2.5, "evaluation/precision_5k": 0.8}
    for name in ("fid", "evaluation/fid", "evaluation/fid_5k"):
        assert choose_metric(config, name, None).value_in(record) == 2.5
    assert choose_metric(config, "precision", None) == Metric("evaluation/precision", "max")
    with pytest.raises(ConfigError, match="no evaluation/fid_1k: they have evaluation/fid_5k, evaluation/precision_5k"):
        Metric("evaluation/fid_1k", "min").value_in(record)


def test_other_measured_metrics_stand_beside_the_one_that_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(tmp_path, SPACES[0], 3, "gan-mnist", "samples/class_variation")
    trial = sweep.trials[0]
    trial.path.mkdir()
    evaluations = [
        {"step": step, "samples/class_variation": 0.1, "evaluation/fid_1k": step / 100, "evaluation/recall_1k": 0.5}
        for step in (300, 900)
    ]
    lines = [json.dumps(record) for record in (evaluations[0], evaluations[1], {"step": 900, "train/loss": 1.0})]
    (trial.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    trial.read(sweep.metric)
    assert trial.others == {"evaluation/fid_1k": 9.0, "evaluation/recall_1k": 0.5}
    heads, *rows = (line.split() for line in sweep.table())
    assert heads[3:] == ["samples/class_variation", "fid_1k", "recall_1k", "steps", "status"]
    (row,) = [row for row in rows if row[1] == "0"]
    assert [float(value) for value in row[4:6]] == [9.0, 0.5]
    sweep.save()
    sweep.save_table()
    with open(tmp_path / "sweep.csv") as file:
        table = {row["trial"]: row for row in csv.DictReader(file)}
    assert float(table["0"]["evaluation/fid_1k"]) == 9.0 and table["2"]["evaluation/fid_1k"] == ""
    assert json.loads((tmp_path / "sweep.json").read_text())["trials"][0]["others"]["evaluation/recall_1k"] == 0.5


def test_a_nan_metric_ranks_last_and_a_missing_one_is_named() -> None:
    metric = Metric("samples/diversity", "max")
    assert metric.value_in({"train/loss": 1.0}) is None
    assert metric.value_in({"samples/diversity": 0.5}) == 0.5
    assert (metric.value_in({"samples/diversity": None}) or 0.0) < -1e20
    with pytest.raises(ConfigError, match="evaluations have no samples/diversity"):
        metric.value_in({"test/nll": 1.0})


def test_the_best_third_continues_at_each_rung_in_any_order() -> None:
    halving = Halving(900, 100, 3.0, less_is_better=True)
    assert halving.continues(0, 100, 9.0)  # the only trial at its rung
    assert halving.continues(1, 100, 5.0)
    assert not halving.continues(2, 100, 7.0)
    assert not halving.continues(0, 200, 1.0), "its value at the rung counts"
    assert halving.continues(3, 100, 6.0), "of four, two go on"
    assert halving.continues(1, 300, 5.0)
    assert not halving.continues(3, 300, 5.5)
    assert halving.continues(1, 800, 9.0)
    more = Halving(900, 100, 3.0, less_is_better=False)
    assert more.continues(0, 100, 0.5) and more.continues(1, 150, 0.6) and not more.continues(2, 100, 0.4)


def test_neither_the_best_nor_a_trial_in_grace_is_stopped() -> None:
    values = np.random.default_rng(0).uniform(size=40)
    for order in (np.argsort(values), np.argsort(-values)):
        halving = Halving(1000, 50, 2.0, less_is_better=True)
        stopped = [
            trial for step in (49, 50, 60, 999) for trial in order if not halving.continues(trial, step, values[trial])
        ]
        assert int(values.argmin()) not in stopped and len(set(stopped)) >= 20, "early trials are ranked again"
    assert all(Halving(10, 10, 3.0, True).continues(trial, 10, trial) for trial in range(9)), (
        "a run has no rung at its end"
    )


def test_the_grace_period_leaves_rungs_and_covers_the_warm_up() -> None:
    assert grace_period_of(VAE, None) == 104 > VAE.optimization.warmup_steps
    assert grace_period_of(with_values(VAE, {"optimization.warmup_steps": 150}), None) == 150
    assert grace_period_of(with_values(VAE, {"evaluate_every": 60}), None) == 60
    assert grace_period_of(with_values(VAE, {"steps": 2}), None) == 2
    assert grace_period_of(VAE, 300) == 300
    with pytest.raises(ConfigError, match="grace_period 941 is more than steps 940"):
        grace_period_of(VAE, 941)


@pytest.mark.parametrize("words", SPACES, ids=len)
def test_a_sweep_is_drawn_with_a_panel_for_each_field(words: list[str], tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, words, 12)
    save_plot(tmp_path / "sweep.png", sweep)
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.size[0] > 900 and image.size[1] > 400
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x9A, 0x9A, 0x9A)} <= colours, "best, finished, stopped"


def test_pictures_of_one_trial_and_of_a_maximum_are_drawn(tmp_path: Path) -> None:
    alone = sweep_of(tmp_path, SPACES[0], 2)
    save_plot(tmp_path / "alone.png", alone)
    more = sweep_of(tmp_path, SPACES[0], 8, "gan-mnist", "samples/diversity_ratio")
    more.trials[2].history[-1] = (more.trials[2].step, -1e30)
    save_plot(tmp_path / "more.png", more)
    for trial in alone.trials:
        trial.history = []
    with pytest.raises(ValueError, match="no trial has been evaluated"):
        save_plot(tmp_path / "none.png", alone)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_axis_over_the_steps_holds_all_ends_but_far_ones_which_are_named(mode: str, tmp_path: Path) -> None:
    sweep, sign = sweep_of(tmp_path, SPACES[0], 3), 1 if mode == "min" else -1
    sweep.metric = Metric("test/nll", "min" if mode == "min" else "max")
    for trial, values in zip(sweep.trials, [(218.0, 171.7), (238.4, 228.6), (270.0, 266.5)], strict=True):
        trial.history, trial.status = (
            [(step, sign * value) for step, value in zip((30, 60), values, strict=True)],
            "finished",
        )
    low, high = limits_over_steps(sweep.metric, sweep.trials, sweep.best)
    assert all(low < (trial.value or 0.0) < high for trial in sweep.trials)
    assert outliers(sweep.metric, sweep.trials, (low, high)) == []
    save_plot(tmp_path / "near.png", sweep)
    sweep.trials[1].history[-1] = (60, sign * 1e30)
    sweep.trials[2].history[-1] = (60, sign * 5e4)
    limits = limits_over_steps(sweep.metric, sweep.trials, sweep.best)
    beyond = ["trial 1 (not finite)", f"trial 2 ({results.readable_metric(sign * 5e4)})"]
    assert max(map(abs, limits)) < 300, "the near trials fill the axis"
    assert outliers(sweep.metric, sweep.trials, limits) == beyond
    assert max(map(abs, limits_at_end(sweep.metric, sweep.trials))) < 1e6, "a trial that is not finite"
    save_plot(tmp_path / "far.png", sweep)
    assert (tmp_path / "far.png").read_bytes() != (tmp_path / "near.png").read_bytes()


def test_the_table_has_the_best_first_and_reasons_of_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(tmp_path, SPACES[3], 8)
    conclude(sweep, VAE, ["vae-mnist"])
    lines = capsys.readouterr().out.splitlines()
    heads, *rows = (line.split() for line in lines[:9])
    assert heads[:6] == ["rank", "trial", "learning_rate", "latent_dim", "betas", "clip_norm"]
    assert heads[6:] == ["test/negative_elbo", "steps", "status"]
    values = [float(row[6]) for row in rows[:-1]]
    assert values == sorted(values) and rows[0][-1] == "finished"
    assert lines[8].endswith("failed: loss is nan at step 7"), "the way out of a single run is none of a sweep's"
    assert sweep.best and rows[0][1] == str(sweep.best.index)
    saved = sum(900 - trial.step for trial in sweep.trials if trial.status == "stopped")
    assert f"{saved:,} of 7,200 steps saved" in lines[9]
    command = next(line for line in lines if "gen-dist train" in line).split()
    found, _, _ = parse_train(command[2:], "launch/train.py", NoOptions())
    assert found == with_values(VAE, {**sweep.best.values, "run_dir": "runs/vae-mnist-best"})
    with open(tmp_path / "sweep.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["rank"] for row in table] == [str(rank) for rank in range(1, 9)]
    assert table[0]["network.latent_dim"] == str(sweep.best.values["network.latent_dim"])
    assert json.loads((tmp_path / "sweep.json").read_text())["best"] == sweep.best.index
    assert (tmp_path / "sweep.png").exists()


def test_the_best_trial_has_finished_and_none_is_an_error(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, SPACES[0], 8)
    stopped = next(trial for trial in sweep.trials if trial.status == "stopped")
    stopped.history.append((stopped.step, 1.0))
    assert sweep.ranked[0] is stopped and sweep.best is sweep.ranked[1]
    for trial in sweep.trials:
        if trial.status == "finished":
            trial.status = "stopped"
    assert best_command(sweep, VAE, ["vae-mnist"]) is None
    with pytest.raises(UserError, match=r"^no trial finished; loss is nan at step 7$"):
        conclude(sweep, VAE, ["vae-mnist"])


@pytest.mark.parametrize("value", [[1.0], "1", True, 10**400], ids=["list", "text", "flag", "huge"])
def test_a_metric_that_is_no_number_is_one_line(value: object) -> None:
    with pytest.raises(ConfigError, match="a test/nll that is no number; choose another --metric"):
        Metric("test/nll", "min").value_in({"step": 1, "test/nll": value})


@pytest.mark.parametrize(
    "row",
    [{"trial": 0, "status": "stopped"}, {"trial": 0, "status": "over", "reason": None, "diverged": True}, [], None],
    ids=str,
)
def test_a_state_of_another_shape_is_one_line(row: object, tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, SPACES[0], 4)
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": [row]}))
    with pytest.raises(
        DamagedError, match=r"is damaged: trials is not a list, .*; remove it, .* to rank the trials again$"
    ):
        sweep.read()


def test_a_state_that_cannot_be_read_just_now_is_not_to_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    sweep = sweep_of(tmp_path, SPACES[0], 4)
    sweep.save()
    monkeypatch.setattr(reading, "read_regular", refused)
    with pytest.raises(UnreadableError) as raised:
        sweep.read()
    assert "remove" not in str(raised.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("name", ["sweep.json", "sweep.csv"])
def test_a_full_disk_does_not_hide_that_a_sweep_was_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_text(text)

    monkeypatch.setattr(results, "write_atomically", full)
    sweep = sweep_of(tmp_path, SPACES[0], 4)
    tell_stopped(sweep)
    shown = capsys.readouterr().err
    assert shown.startswith("warning: the trials cannot be shown: ") and "No space left on device" in shown
    assert shown.count("\n") == 1 and str(tmp_path) in shown
