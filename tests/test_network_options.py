"""Options of the command line that choose networks."""

from __future__ import annotations

import pytest

from gen_dist.cli import NoOptions, parse_train
from gen_dist.config import ConvConfig, DcganConfig, MlpConfig, TrainConfig
from gen_dist.errors import ConfigError


def parsed(*words: str) -> TrainConfig:
    return parse_train(words, "gen-dist train", NoOptions())[0]


def test_a_network_of_another_kind_has_its_own_defaults_and_options() -> None:
    config = parsed("vae-mnist", "--network", "conv", "--feature-maps", "8", "16", "--steps", "3")
    assert config.network == ConvConfig(feature_maps=(8, 16)) and config.steps == 3
    assert parsed("vae-mnist", "--network=mlp", "--latent-dim", "7").network == MlpConfig(latent_dim=7)


def test_a_role_has_a_network_of_its_own() -> None:
    config = parsed("gan-mnist", "--discriminator", "dcgan", "--discriminator.feature-maps", "8", "--latent-dim", "9")
    assert config.discriminator == DcganConfig(feature_maps=8) and config.generator is None
    assert (
        config.roles.generator
        == config.network
        == MlpConfig(hidden_sizes=(512, 256), activation="leaky_relu", latent_dim=9)
    )
    assert TrainConfig.from_json(config.to_json(), "config.json") == config


def test_options_of_a_role_start_from_the_network_of_all() -> None:
    config = parsed("vae-mnist", "--encoder.hidden-sizes", "30", "20", "--decoder.activation=tanh", "--seed", "1")
    assert config.encoder == MlpConfig(hidden_sizes=(30, 20)) and config.decoder == MlpConfig(activation="tanh")
    assert config.network == MlpConfig() and config.seed == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--discriminator", "fancy"], "unknown network 'fancy'; there are mlp, conv, dcgan, resnet"),
        (["--discriminator"], "--discriminator needs a kind of network: mlp, conv"),
        (["--discriminator", "--steps", "3"], "--discriminator needs a kind of network: mlp, conv"),
        (["--discriminator.fancy", "3"], "--discriminator.fancy"),
        (["--discriminator.hidden-sizes", "-3"], "hidden_sizes -3 is less than 1"),
        (["--encoder", "conv"], "objective gan has no encoder; its networks are generator and discriminator"),
    ],
)
def test_a_wrong_option_of_a_network_is_one_line(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed("gan-mnist", *words)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_help_lists_the_kinds_of_networks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("gan-mnist", "--help")
    kinds = "mlp, conv, dcgan, resnet, stylegan2, autoencoder-kl, patchgan, fastgan, projected"
    shown = " ".join(capsys.readouterr().out.split())
    assert f"--network KIND network of all roles: {kinds} (default: mlp)" in shown
