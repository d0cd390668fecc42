"""The space of a sweep: ranges and choices, the trials drawn from it, and their commands."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gen_dist.cli import NoOptions, parse_train
from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.launch.sweep.plan import command_source
from gen_dist.launch.sweep.space import (
    all_as_typed,
    as_typed,
    draw_trials,
    lines_about_roles,
    parse_space,
    train_command,
    trial_configs,
    with_values,
)
from gen_dist.presets import get_preset, presets
from tests.launch.sweeps import VAE
from tests.support.runs import write_config


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


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["discriminator_norm=batch,none"], ["discriminator.discriminator_norm"]),
        (["latent_dim=4,8", "generator_norm=batch,none"], ["network.latent_dim", "network.generator_norm"]),
        (
            ["network.hidden_size=4,8", "discriminator.hidden_size=4,8"],
            ["network.hidden_size", "discriminator.hidden_size"],
        ),
    ],
    ids=str,
)
def test_a_short_name_is_the_field_that_changes_a_network(words: list[str], found: list[str]) -> None:
    preset = get_preset("r3gan-mnist")
    space = parse_space(words, preset)
    assert [one.name for one in space] == found and lines_about_roles(space, preset) == []
    shown = all_as_typed(draw_trials(space, 0, 1)[0])
    assert shown.count("network.hidden_size") == shown.count("discriminator.hidden_size") == shown.count("size") / 2


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "network.discriminator_norm=batch,none",
            "changes nothing here.*, or search discriminator.discriminator_norm$",
        ),
        (
            "discriminator.latent_dim=4,8",
            "the network of the discriminator does not depend on latent_dim; leave it out",
        ),
    ],
)
def test_a_searched_option_that_changes_nothing_is_one_line(word: str, line: str) -> None:
    preset = get_preset("r3gan-mnist")
    with pytest.raises(ConfigError, match=line):
        lines_about_roles(parse_space([word], preset), preset)


def test_latents_of_two_networks_are_not_searched_one_by_one() -> None:
    config = get_preset("vae-mnist").with_options(encoder="conv", decoder="conv")
    for field, way_out in (
        ("activation", "search encoder.activation and decoder.activation"),
        ("latent_dim", "start from a config in which these roles share one network"),
    ):
        values = "relu,silu" if field == "activation" else "4,8"
        space = parse_space([f"network.{field}={values}"], config)
        with pytest.raises(ConfigError, match=f"changes nothing here.*; leave it out, or {way_out}$"):
            lines_about_roles(space, config)


def test_a_searched_option_that_does_not_reach_all_roles_says_so() -> None:
    words = ["discriminator.hidden_size=none,256", "feature_maps=32,64", "latent_dim=4,8"]
    preset = get_preset("wgan-gp-mnist")
    space = parse_space(words, preset)
    (trial,) = trial_configs(preset, draw_trials(space, 0, 1))
    (line,) = lines_about_roles(space, trial)
    assert line == (
        "--space network.feature_maps is the generator's alone here; the discriminator's is discriminator.feature_maps"
    )


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
    with pytest.raises(ConfigError, match=r"use --generator\.generator-norm batch or --generator\.no-centred-hidden$"):
        trial_configs(get_preset("r3gan-mnist"), [{"generator.generator_norm": "none"}])


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


def test_the_source_of_a_command_is_its_preset_or_file() -> None:
    assert command_source(["vae-mnist", "--steps", "3"]) == ["vae-mnist"]
    assert command_source(["--config", "file", "--steps", "3"]) == ["--config", "file"]
    assert command_source(["--config=file", "--steps", "3"]) == ["--config=file"]
