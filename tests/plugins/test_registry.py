"""The registry: parts are found by their files, and wrong ones are named in one line."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from gen_dist.config import NetworkConfig, ObjectiveConfig, networks, objectives
from gen_dist.errors import ConfigError
from gen_dist.plugins.registry import Registry, load
from gen_dist.presets import presets

PART = """
from dataclasses import dataclass
from typing import ClassVar, Literal

from gen_dist.config import NetworkConfig
from parts_of_a_test import networks

@networks.register
@dataclass(frozen=True)
class FoundConfig(NetworkConfig):
    kind: Literal["found"] = "found"
"""


def test_a_module_that_registers_is_found_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "parts_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("networks = None\n")
    (folder / "found.py").write_text(PART)
    (folder / "unrelated.py").write_text("raise SystemExit('imported without need')\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("network", NetworkConfig, "parts_of_a_test")
    monkeypatch.setattr(importlib.import_module("parts_of_a_test"), "networks", registry)
    assert [config.__name__ for config in registry.configs()] == ["FoundConfig"]
    assert registry["found"].__name__ == "FoundConfig"


def test_an_unknown_kind_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown objective 'no'; there are autoencoder, vae, gan"):
        objectives["no"]
    with pytest.raises(ConfigError, match="unknown network 'no'; there are mlp, conv"):
        networks["no"]


def test_a_config_that_cannot_be_registered_is_one_line() -> None:
    registry = Registry("network", NetworkConfig, "gen_dist.networks")

    @dataclass(frozen=True)
    class Mine(NetworkConfig):
        kind: Literal["mine"] = "mine"

    @dataclass(frozen=True)
    class Taken(NetworkConfig):
        kind: Literal["mine"] = "mine"

    @dataclass(frozen=True)
    class Nameless(NetworkConfig):
        pass

    class Other:
        kind = "other"

    registry.register(Mine)
    for config, complaint in (
        (Taken, "registered already"),
        (Nameless, "has no kind"),
        (Other, "not a dataclass derived"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            registry.register(config)


@pytest.mark.parametrize("kind", [config.kind for config in objectives.configs()])
def test_an_objective_states_the_facts_that_readers_need(kind: str) -> None:
    config: type[ObjectiveConfig] = objectives[kind]
    assert config.family and config.family_name and load(config.implementation).phases
    assert all(reason and "." not in reason for reason in config.lacks.values())
    assert all(period >= 1 for period in config().periods)


def test_help_and_presets_need_no_torch() -> None:
    code = "import sys; from gen_dist.presets import presets; presets(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert all(preset.description and not preset.description.endswith(".") for preset in presets().values())
