"""Options of the command line that choose networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest

from gen_dist.cli import NoOptions, parse_train
from gen_dist.config import ConvConfig, DcganConfig, MlpConfig, NetworkConfig, RoleName, TrainConfig, networks
from gen_dist.config.networks import USUAL_SIDES
from gen_dist.config.options import roles_reached
from gen_dist.errors import ConfigError
from gen_dist.network_options import help_lines
from gen_dist.objectives import build_objective
from gen_dist.presets import get_preset


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


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("r3gan-mnist --feature-maps 8", "--feature-maps is the generator's alone here; the discriminator's is --d.f"),
        ("r3gan-mnist --feature-maps=8", "--feature-maps is the generator's alone here; the discriminator's is --d.f"),
        ("few-images-64 --feature_maps 8", "--feature_maps is the generator's alone here; the discriminator's is"),
        ("kl-f8 --feature-maps 32 32", "--feature-maps is the encoder's and the decoder's alone here; the d"),
        ("r3gan-mnist --network mlp", "--network is the generator's alone here; the discriminator's is --d KIND"),
        ("wgan-gp-mnist --discriminator.hidden-size 8 --feature-maps 8", "--feature-maps is the generator's alone"),
        ("r3gan-mnist --feature-maps 8 --discriminator.feature-maps 8", ""),
        ("r3gan-mnist --latent-dim 8 --generator-norm batch --hidden-size 8", "--hidden-size is the generator's"),
        ("r3gan-mnist --latent-dim 8 --generator-norm group --no-centred-hidden", ""),
        ("r3gan-mnist --network mlp --discriminator mlp", ""),
        ("r3gan-mnist --discriminator.discriminator-norm batch --discriminator.no-spectral-norm", ""),
        ("wgan-gp-mnist --discriminator.hidden-size 8 --latent-dim 8 --steps 3", ""),
        ("wgan-gp-mnist --discriminator-norm batch --feature-maps 8", ""),
        ("gan-mnist --discriminator dcgan --hidden-sizes 8", ""),
        ("vae-gan-mnist --feature-maps 8 --discriminator-norm batch", ""),
    ],
    ids=lambda text: text.partition(";")[0],
)
def test_an_option_that_does_not_reach_all_roles_says_so(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed(*words.split())
    shown = capsys.readouterr().err
    expected = line.replace("--d.f", "--discriminator.feature-maps").replace("--d ", "--discriminator ")
    assert shown.startswith(expected) and shown.count("\n") == bool(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("r3gan-mnist --discriminator-norm batch", "write --discriminator.discriminator-norm"),
        ("r3gan-mnist --discriminator_norm=batch", "write --discriminator.discriminator_norm"),
        ("r3gan-mnist --no-spectral-norm", "write --discriminator.no-spectral-norm"),
        ("few-images-64 --discriminator-norm batch", "write --discriminator.discriminator-norm"),
        ("wgan-gp-mnist --discriminator.hidden-size 8 --discriminator-norm batch", "write --discriminator.disc"),
        ("r3gan-mnist --generator.hidden-size 8 --generator-norm none", "write --generator.generator-norm"),
        (
            "r3gan-mnist --generator mlp --feature-maps 8",
            "the discriminator has a network of its own; leave it out, or write --disc",
        ),
        ("gan-mnist --generator mlp --discriminator conv --hidden-sizes 8", "write --generator.hidden-sizes"),
        ("r3gan-mnist --generator conv --network mlp", "own; leave it out, or write --discriminator KIND"),
        ("gan-mnist --generator conv --discriminator conv --network mlp", "networks of their own; leave it out"),
        (
            "vae-mnist --encoder conv --decoder conv --latent-dim 8",
            "own; leave it out, or write --encoder.latent-dim and --decoder.latent-dim",
        ),
        ("gan-mnist --generator conv --discriminator conv --hidden-sizes 8", "have networks of their own without it"),
    ],
)
def test_an_option_that_changes_nothing_is_refused_with_the_role_that_has_it(words: str, line: str) -> None:
    with pytest.raises(ConfigError, match=r"^--[a-z_-]+ changes nothing here: [^\n]+$") as error:
        parsed(*words.split())
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "r3gan-mnist --generator.generator-norm none",
            "use --generator.generator-norm batch or --generator.no-centred-hidden; see",
        ),
        (
            "gan-mnist --generator dcgan --generator.centred-hidden",
            "add --generator.hidden-size 512 or --generator.no-centred-hidden; see",
        ),
        (
            "gan-mnist --generator.fancy --generator.fancy-2 3",
            "options: --generator.fancy, --generator.fancy-2, 3; see",
        ),
    ],
)
def test_an_error_of_a_roles_network_names_the_options_of_the_role(words: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(*words.split())
    assert line in str(error.value) and str(error.value).endswith(f"see gen-dist train {words.split()[0]} --help")


@pytest.mark.parametrize(
    "words",
    [
        "r3gan-mnist --discriminator.centred-hidden",
        "r3gan-mnist --discriminator.no-centred-hidden",
        "r3gan-mnist --discriminator.generator-norm none",
        "r3gan-mnist --discriminator.latent-dim=3",
        "r3gan-mnist --generator.discriminator_norm none",
        "vae-conv-mnist --network dcgan --decoder.no-spectral-norm",
    ],
)
def test_an_option_that_its_role_does_not_depend_on_is_refused(words: str) -> None:
    option, role = re.search(r"--((\w+)\.[\w-]+)", words).groups()  # type: ignore[union-attr]
    line = rf"^--{option} changes nothing: the network of the {role} does not depend on [a-z_]+; leave it out$"
    with pytest.raises(ConfigError, match=line):
        parsed(*words.split())


@dataclass(frozen=True)
class WideConfig(NetworkConfig):
    """Network of a plug-in that declares no sides: its discriminator may be as wide as the latents."""

    kind: Literal["wide"] = "wide"
    generator_norm: Literal["batch", "none"] = "none"


@dataclass(frozen=True)
class DeclaredConfig(WideConfig):
    """The same, with one option that its generator alone depends on."""

    one_sided: ClassVar[Mapping[str, tuple[RoleName, ...]]] = {"generator_norm": ("decoder", "generator")}


def test_an_option_of_a_plug_in_reaches_all_roles_unless_it_says_otherwise() -> None:
    config = get_preset("gan-mnist").with_options(generator="dcgan")
    of_plug_in = replace(config, network=WideConfig())
    for name in ("latent_dim", "generator_norm"):
        assert roles_reached(of_plug_in, name) == (["discriminator"], ["generator"])
    declared = replace(config, network=DeclaredConfig())
    assert roles_reached(declared, "latent_dim") == (["discriminator"], ["generator"])
    assert roles_reached(declared, "generator_norm") == ([], ["generator"])


@pytest.mark.parametrize("kind", [one.kind for one in networks.configs() if one.__module__.startswith("gen_dist.")])
def test_each_network_here_names_the_sides_of_its_options(kind: str) -> None:
    config = networks[kind]()
    assert all(config.one_sided.get(name) == sides for name, sides in USUAL_SIDES.items() if hasattr(config, name))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_of_several_processes_alone_tells_of_roles(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    parsed("r3gan-mnist", "--feature-maps", "8")
    assert bool(capsys.readouterr().err) == (rank == "0")


def test_help_lists_the_kinds_of_networks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("gan-mnist", "--help")
    kinds = "mlp, conv, dcgan, resnet, stylegan2, autoencoder-kl, patchgan, fastgan, projected"
    shown = " ".join(capsys.readouterr().out.split())
    assert f"--network KIND network of all roles: {kinds} (default: mlp)" in shown


def test_an_error_of_the_objective_names_the_options_of_a_role_with_a_network_of_its_own() -> None:
    own = parsed("r3gan-mnist", "--discriminator.discriminator-norm", "batch")
    with pytest.raises(ConfigError, match=r"use --discriminator.discriminator-norm group or none$"):
        build_objective(own, (1, 28, 28), 1)
    build_objective(parsed("r3gan-mnist", "--discriminator.discriminator-norm", "group"), (1, 28, 28), 1)
    shared = parsed("wgan-gp-mnist", "--discriminator-norm", "batch")
    with pytest.raises(ConfigError, match=r"use --discriminator-norm group or none$"):
        build_objective(shared, (1, 28, 28), 1)
    with pytest.raises(ConfigError, match="use --encoder with another one, such as conv, or for a GAN --discriminator"):
        build_objective(parsed("vae-mnist", "--network", "fastgan"), (1, 64, 64), 1)


def test_help_says_which_role_has_a_network_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("r3gan-mnist", "--help")
    head = capsys.readouterr().out.partition("usage:")[0]
    assert "Here --network and options of networks without a role reach the generator alone." in head
    line = next(line for line in head.splitlines() if "The discriminator has --discriminator.OPTION instead: " in line)
    values = line.partition("instead: ")[2].replace(",", "").split()
    found, own = parsed("gan-mnist", "--discriminator", "dcgan", *values), get_preset("r3gan-mnist").discriminator
    assert isinstance(own, DcganConfig) and found.discriminator == replace(own, latent_dim=DcganConfig().latent_dim)
    assert "Here --network" not in "".join(help_lines(get_preset("dcgan-mnist")))
