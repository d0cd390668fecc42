"""Sweeps: the searched space, early stopping, the output; and a whole sweep on Ray."""

import csv
import dataclasses
import io
import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gen_dist.cli import NoOptions, parse_train
from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, UserError
from gen_dist.evaluation.sample_checks import SampleChecks
from gen_dist.launch.sweep.halving import Halving, grace_period_of
from gen_dist.launch.sweep.plan import SweepOptions, best_command, command_source, conclude, plan_sweep
from gen_dist.launch.sweep.plot import save_plot
from gen_dist.launch.sweep.progress import SweepProgress
from gen_dist.launch.sweep.results import Metric, Sweep, choose_metric, make_trials
from gen_dist.launch.sweep.space import as_typed, draw_trials, parse_space, train_command, trial_configs, with_values
from gen_dist.presets import get_preset, presets
from gen_dist.records.metrics_file import read_metrics
from tests.conftest import REPOSITORY
from tests.support.runs import make_trainer, small_config, write_config
from tests.support.warm_python import warm_python

VAE = get_preset("vae-mnist")


def _values(word: str, config: TrainConfig = VAE, count: int = 200) -> list[Any]:
    (searched,) = parse_space([word], config)
    return [searched.draw(np.random.default_rng(seed)) for seed in range(count)]


def test_ranges_are_uniform_on_their_scale_up_to_their_ends() -> None:
    rates = _values("learning_rate=log:1e-4:1e-2")
    assert all(1e-4 <= rate <= 1e-2 and rate == float(f"{rate:.4g}") for rate in rates)
    assert 0.4 < np.mean(np.array(rates) < 1e-3) < 0.6
    betas = _values("objective.beta=uniform:0.5:4")
    assert all(0.5 <= beta <= 4 for beta in betas) and 2 < np.mean(betas) < 2.5
    sizes = _values("latent_dim=int:2:5", count=1000)
    assert {type(size) for size in sizes} == {int}
    assert all(200 < sizes.count(size) < 300 for size in (2, 3, 4, 5))
    counts = _values("network.latent_dim=log:1:64", count=1000)
    assert set(counts) > {1, 64} and max(counts) == 64 and 0.4 < np.mean(np.array(counts) <= 8) < 0.65


@pytest.mark.parametrize(
    ("word", "preset", "choices"),
    [
        ("optimization.optimizer=adam,adamw", "vae-mnist", ("adam", "adamw")),
        ("--global-batch-size=64,128", "vae-mnist", (64, 128)),
        ("hidden-sizes=400+200,200+400,200", "vae-mnist", ((400, 200), (200, 400), (200,))),
        ("betas=0.9+0.98,5e-1+0.999", "vae-mnist", ((0.9, 0.98), (0.5, 0.999))),
        ("clip_norm=none,1,1e+3", "vae-mnist", (None, 1.0, 1000.0)),
        ("spectral_norm=true,false", "dcgan-mnist", (True, False)),
        ("augmentation=none,colour,colour+cutout", "gan-mnist", ((), ("colour",), ("colour", "cutout"))),
    ],
)
def test_choices_are_values_of_the_fields_type(word: str, preset: str, choices: tuple[Any, ...]) -> None:
    (searched,) = parse_space([word], get_preset(preset))
    assert searched.choices == choices
    assert ",".join(map(as_typed, choices)).replace(".0", "") == searched.text.replace("1e+3", "1000").replace(
        "5e-1", "0.5"
    )


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        ([], "nothing to search"),
        (["learning_rate"], "write NAME=VALUES"),
        (["lerning_rate=log:1:2"], "perhaps you meant learning_rate"),
        (["penalty_weight=1,2"], "not a field of this config"),
        (["kind=vae,gan"], "network.kind or objective.kind"),
        (["network.kind=mlp,conv"], "a run has one kind;"),
        (["run_dir=a,b"], "it names the runs"),
        (["steps=1,2"], "the same number of steps in all"),
        (["log_every=1,2"], "what is recorded"),
        (["image_size=28,32"], "different images do not compare"),
        (["likelihood=bernoulli,gaussian"], "different likelihoods do not compare"),
        (["beta=uniform:1"], "write uniform:LOW:HIGH"),
        (["beta=uniform:one:two"], "write uniform:LOW:HIGH"),
        (["beta=uniform:2:1"], "less than HIGH"),
        (["beta=uniform:0:inf"], "less than HIGH"),
        (["beta=log:0:1"], "starts above 0"),
        (["beta=int:1:4"], "takes fractions"),
        (["latent_dim=uniform:2:4"], "is an integer; use int"),
        (["latent_dim=int:2:4.5"], "so must be LOW and HIGH"),
        (["optimizer=log:1:2"], "is not a number"),
        (["optimizer=adam,lion"], "adam, adamw, sgd"),
        (["latent_dim=4,many"], "'many' is not a value of it; it takes an integer"),
        (["betas=0.9,0.5"], "a number and a number, joined by +"),
        (["beta=1,1.0"], "names a value twice"),
        (["beta=1,2", "objective.beta=3,4"], "names objective.beta twice"),
    ],
    ids=" ".join,
)
def test_a_space_that_cannot_be_is_one_line(words: list[str], mentioned: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]{1,800}$") as raised:
        parse_space(words, VAE)
    assert mentioned in str(raised.value)


def test_draws_depend_on_seed_trial_and_field_alone() -> None:
    space = parse_space(["learning_rate=log:1e-4:1e-2", "latent_dim=int:2:64"], VAE)
    trials = draw_trials(space, 0, 8)
    assert draw_trials(space, 0, 8) == trials
    assert draw_trials(space[::-1], 0, 12)[:8] == trials
    assert [trial["learning_rate"] for trial in draw_trials(space[:1], 0, 8)] == [
        trial["learning_rate"] for trial in trials
    ]
    assert draw_trials(space, 1, 8) != trials


def test_trials_differ_and_are_no_more_than_the_space_has() -> None:
    space = parse_space(["optimizer=adam,adamw", "latent_dim=int:1:30"], VAE)
    assert len({tuple(trial.values()) for trial in draw_trials(space, 0, 60)}) == 60
    with pytest.raises(ConfigError, match="use --trials 60"):
        draw_trials(space, 0, 61)


def test_values_get_to_their_fields_together() -> None:
    config = with_values(VAE, {"objective.beta": 2.0, "network.hidden_sizes": (8, 4), "learning_rate": 0.5})
    assert config.objective == dataclasses.replace(VAE.objective, beta=2.0)  # type: ignore[call-arg]
    assert config.network == dataclasses.replace(VAE.network, hidden_sizes=(8, 4))  # type: ignore[call-arg]
    assert config.learning_rate == 0.5
    assert dataclasses.replace(config, objective=VAE.objective, network=VAE.network, learning_rate=1e-2) == VAE
    # With beta 4 as it was, so many samples could not be.
    values = {"objective.beta": 1.0, "objective.importance_samples": 5}
    found = with_values(with_values(VAE, {"objective.beta": 4.0}), values).objective
    assert found == dataclasses.replace(VAE.objective, importance_samples=5)  # type: ignore[call-arg]


def test_a_trial_that_cannot_be_is_named_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"^trial 1 \(beta 2.0\) is invalid: importance_samples 5 trains one bound"):
        config = with_values(VAE, {"objective.importance_samples": 5})
        trial_configs(config, [{"objective.beta": 1.0}, {"objective.beta": 2.0}])


CHANGES: dict[str, dict[str, Any]] = {
    "vae-mnist": {"learning_rate": 2.345e-05, "network.hidden_sizes": (400, 200), "optimization.betas": (0.5, 0.9)},
    "vae-conv-mnist": {"network.feature_maps": (4,), "network.activation": "silu", "optimization.clip_norm": 0.5},
    "iwae-mnist": {"optimization.ema_decay": None, "sync_batch_norm": True, "objective.importance_samples": 3},
    "gan-mnist": {"objective.augmentation": ("colour", "cutout"), "objective.loss": "hinge"},
    "sngan-cifar10": {"network.spectral_norm": False, "network.latent_dim": 7},
    "r3gan-mnist": {"objective.penalty_weight": 0.1, "optimization.optimizer": "adamw", "packing.image_size": 32},
}


@pytest.mark.parametrize("preset", CHANGES)
def test_a_config_comes_back_equal_from_its_command(preset: str, tmp_path: Path) -> None:
    config = with_values(get_preset(preset), {**CHANGES[preset], "run_dir": str(tmp_path / "of mine")})
    file = write_config(tmp_path / "config.json", get_preset(preset))
    for source in ([preset], ["--config", str(file)], [f"--config={file}"]):
        words = shlex.split(train_command(source, get_preset(preset), config))
        assert words[:2] == ["gen-dist", "train"]
        assert parse_train(words[2:], words[1], NoOptions())[0] == config


ROLES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "another kind for all": (["--network", "conv"], {"network.feature_maps": (4, 4)}),
    "a kind of its own": (["--encoder", "conv"], {"learning_rate": 0.5}),
    "options of its own": (["--encoder", "conv"], {"encoder.feature_maps": (4, 4), "hidden_sizes": (8,)}),
    "options of the shared kind": ([], {"encoder.hidden_sizes": (8, 4)}),
    "both kinds": (["--network", "conv", "--decoder", "dcgan"], {"decoder.feature_maps": 4}),
    "another kind, shared": (["--network", "conv"], {"encoder.feature_maps": (4, 4)}),
    "a flag": (["--encoder", "resnet", "--encoder.spectral-norm"], {"encoder.spectral_norm": False}),
    "the shared one, said again": (["--encoder", "mlp"], {"learning_rate": 0.5}),
}
"""Words of a command line, and values that a sweep draws."""


@pytest.mark.parametrize("case", ROLES)
def test_networks_of_roles_come_back_from_their_command(case: str) -> None:
    words, values = ROLES[case]
    given = parse_train(["vae-mnist", *words], "train", NoOptions())[0]
    space = parse_space([f"{name}={as_typed(value)}" for name, value in values.items()], given)
    config = with_values(given, {one.name: one.draw(np.random.default_rng(0)) for one in space})
    typed = shlex.split(train_command(["vae-mnist"], VAE, config))
    assert parse_train(typed[2:], typed[1], NoOptions())[0] == config
    assert config != VAE


def test_a_command_can_empty_a_tuple_and_unset_a_flag() -> None:
    for preset in presets():
        base = with_values(get_preset(preset), {"compile": True})
        if hasattr(base.objective, "augmentation"):
            base = with_values(base, {"objective.augmentation": ("colour",)})
        words = shlex.split(train_command([preset], base, get_preset(preset)))
        assert ("--no-compile" in words) and ("--augmentation" in words) == hasattr(base.objective, "augmentation")


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
    with pytest.raises(ConfigError, match="evaluation/kid_1k is none of --evaluate-metrics fid precision"):
        choose_metric(config, "evaluation/kid_1k", None)


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


def _sweep(path: Path, words: Sequence[str], count: int, preset: str = "vae-mnist", metric: str | None = None) -> Sweep:
    """A sweep that has ended: trials that finished, were stopped, and one that failed."""
    config = get_preset(preset)
    space = parse_space(words, config)
    draws = draw_trials(space, 0, count)
    trials = make_trials(path, draws, trial_configs(config, draws))
    sweep = Sweep(path, space, choose_metric(config, metric, None), 900, 100, trials)
    for trial in trials:
        badness = 10 * abs(math.log10(trial.config.learning_rate / 3e-3)) + trial.index / 10
        steps = range(100, 1000 if badness < 8 else 200 if badness > 12 else 400, 100)
        sign = 1 if sweep.metric.mode == "min" else -1
        trial.history = [(step, 100 + sign * (badness + 3000 / step)) for step in steps]
        trial.step, trial.status = steps[-1], "finished" if steps[-1] == 900 else "stopped"
    trials[1].status, trials[1].reason, trials[1].history = "failed", "loss is nan at step 7; lower --lr", []
    return sweep


SPACES = [
    ["learning_rate=log:1e-4:1e-1"],
    ["learning_rate=log:1e-4:1e-1", "optimizer=adam,adamw,sgd"],
    ["learning_rate=log:1e-4:1e-1", "hidden_sizes=400+200,200+400,200", "latent_dim=log:2:64"],
    ["learning_rate=log:1e-4:1e-1", "latent_dim=int:2:64", "betas=0.9+0.98,0.5+0.9", "clip_norm=none,1"],
]


@pytest.mark.parametrize("words", SPACES, ids=len)
def test_a_sweep_is_drawn_with_a_panel_for_each_field(words: list[str], tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, words, 12)
    save_plot(tmp_path / "sweep.png", sweep)
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.size[0] > 900 and image.size[1] > 400
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x9A, 0x9A, 0x9A)} <= colours, "best, finished, stopped"


def test_pictures_of_one_trial_and_of_a_maximum_are_drawn(tmp_path: Path) -> None:
    alone = _sweep(tmp_path, SPACES[0], 2)
    save_plot(tmp_path / "alone.png", alone)
    more = _sweep(tmp_path, SPACES[0], 8, "gan-mnist", "samples/diversity_ratio")
    more.trials[2].history[-1] = (more.trials[2].step, -1e30)
    save_plot(tmp_path / "more.png", more)
    for trial in alone.trials:
        trial.history = []
    with pytest.raises(ValueError, match="no trial has been evaluated"):
        save_plot(tmp_path / "none.png", alone)


def test_the_table_has_the_best_first_and_reasons_of_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = _sweep(tmp_path, SPACES[3], 8)
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
    sweep = _sweep(tmp_path, SPACES[0], 8)
    stopped = next(trial for trial in sweep.trials if trial.status == "stopped")
    stopped.history.append((stopped.step, 1.0))
    assert sweep.ranked[0] is stopped and sweep.best is sweep.ranked[1]
    for trial in sweep.trials:
        if trial.status == "finished":
            trial.status = "stopped"
    assert best_command(sweep, VAE, ["vae-mnist"]) is None
    with pytest.raises(UserError, match=r"^no trial finished; loss is nan at step 7$"):
        conclude(sweep, VAE, ["vae-mnist"])


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal  # type: ignore[method-assign]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_has_a_line_for_each_event_and_a_summary(terminal: bool, tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, SPACES[1], 4)
    first = sweep.trials[0]
    first.status, first.step = "running", 0
    screen = Screen(terminal)
    progress = SweepProgress(sweep, screen)
    progress.started(first)
    progress.evaluated()
    first.status, first.step = "stopped", 300
    progress.ended(first)
    progress.ended(sweep.trials[1])
    progress.close()
    text = screen.getvalue()
    assert f"trial 0 starts: learning_rate {first.values['learning_rate']}, optimizer " in text
    assert "trial 0 stopped at step 300 of 900: test/negative_elbo 1" in text
    assert "trial 1 failed: loss is nan at step 7\n" in text
    assert "4/4 done, best 1" in text
    assert ("3/4 done, 1 running" in text) == terminal and ("\r" in text) == terminal


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


def _run(words: Sequence[object], directory: Path, limit: float = 240) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HOME": str(directory / "home"),
        "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
        "GEN_DIST_CACHE": str(directory / "packed"),
    }
    command = [*warm_python(), str(REPOSITORY / "launch/ray_sweep.py"), *map(str, words)]
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


def test_the_source_of_a_command_is_its_preset_or_file() -> None:
    assert command_source(["vae-mnist", "--steps", "3"]) == ["vae-mnist"]
    assert command_source(["--config", "file", "--steps", "3"]) == ["--config", "file"]
    assert command_source(["--config=file", "--steps", "3"]) == ["--config=file"]
