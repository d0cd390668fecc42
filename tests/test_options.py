"""Options of a config given from Python."""

from pathlib import Path

import numpy as np
import pytest

from gen_dist.config import ConvConfig, DcganConfig, GanConfig, TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.presets import get_preset, presets


@pytest.mark.parametrize("name", presets())
def test_no_options_change_nothing(name: str) -> None:
    assert get_preset(name).with_options() == get_preset(name)


def test_options_are_flat_and_lists_become_tuples() -> None:
    changed = get_preset("vae-mnist").with_options(steps=np.int64(7), hidden_sizes=[32], beta=2, run_dir=Path("runs/a"))
    assert (changed.steps, changed.network.hidden_sizes, changed.run_dir) == (7, (32,), "runs/a")  # type: ignore[attr-defined]
    assert changed.objective.beta == 2.0  # type: ignore[attr-defined]
    assert changed.preset == "vae-mnist"


def test_options_follow_the_chosen_part() -> None:
    changed = TrainConfig().with_options(feature_maps=8, network="dcgan", objective=GanConfig(loss="hinge"))
    assert changed.network == DcganConfig(feature_maps=8)
    assert changed.objective == GanConfig(loss="hinge")


def test_a_role_is_chosen_by_its_kind() -> None:
    assert get_preset("gan-mnist").with_options(discriminator="conv").discriminator == ConvConfig()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": 3}, ["'step'", "steps"]),
        ({"feature_maps": 3}, ["'feature_maps'", "network mlp"]),
        ({"steps": 0}, ["steps 0"]),
        ({"steps": "many"}, ["steps", "integer"]),
        ({"steps": object()}, ["object", "no value"]),
        ({"hidden_sizes": 3}, ["hidden_sizes", "array"]),
        ({"network": "perceptron"}, ["perceptron", "mlp", "dcgan"]),
        ({"network": 3}, ["network"]),
        ({"precision": "double"}, ["precision", "bf16"]),
    ],
)
def test_wrong_options_are_told_in_one_line(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        get_preset("vae-mnist").with_options(**options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_an_option_that_changes_nothing_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"'discriminator_norm' changes nothing here.*; give the whole discriminator"):
        get_preset("r3gan-mnist").with_options(discriminator_norm="batch")
    changed = get_preset("r3gan-mnist").with_options(generator_norm="group", centred_hidden=False)
    assert changed.network.generator_norm == "group"  # type: ignore[attr-defined]
