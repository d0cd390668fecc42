"""Options of a config given from Python."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gen_dist.config import ConvConfig, DcganConfig, GanConfig, MlpConfig, TrainConfig
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
    with pytest.raises(
        ConfigError, match=r"'discriminator_norm' changes nothing here.*; leave it out, or give the whole disc"
    ):
        get_preset("r3gan-mnist").with_options(discriminator_norm="batch")
    changed = get_preset("r3gan-mnist").with_options(generator_norm="group", centred_hidden=False)
    assert changed.network.generator_norm == "group"  # type: ignore[attr-defined]


def test_a_network_of_all_roles_that_no_role_takes_is_refused() -> None:
    config = get_preset("gan-mnist").with_options(generator="conv", discriminator="conv")
    with pytest.raises(
        ConfigError, match=r"^option 'network' changes nothing here: all .*; leave it out, or give the w"
    ):
        config.with_options(network=MlpConfig())
    with pytest.raises(
        ConfigError, match=r"^option 'network' changes nothing here: .* networks of their own; leave it out$"
    ):
        get_preset("gan-mnist").with_options(network=MlpConfig(), generator="conv", discriminator="conv")


@pytest.mark.parametrize("options", [{"feature_maps": 8}, {"network": DcganConfig(feature_maps=8)}])
def test_an_option_that_reaches_some_roles_alone_warns(options: dict[str, Any]) -> None:
    preset = get_preset("r3gan-mnist")
    (name,) = options
    line = f"^option '{name}' is the generator's alone here; the discriminator's is in the option 'discriminator'$"
    with pytest.warns(UserWarning, match=line) as warned:
        preset.with_options(**options)
    assert warned[0].filename == __file__
    preset.with_options(**options, discriminator=DcganConfig(feature_maps=8))  # a further warning would be an error
