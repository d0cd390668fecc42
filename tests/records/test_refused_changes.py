"""A run is resumed only with the config that it began with, whichever part of the config differs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.training.run import train
from tests.support.runs import small_config


def _quiet(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("begun") / "run"
    train(_begun(path), say=_quiet)
    return path


def _begun(run_dir: Path) -> TrainConfig:
    return small_config("vae", run_dir=str(run_dir), steps=2)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("objective", {"beta": 2.0}, "beta=2.0"),
        ("objective", {"kl_warmup_steps": 9}, "kl_warmup_steps=9"),
        ("network", {"hidden_sizes": (48,)}, "hidden_sizes=(48,)"),
        ("network", {"activation": "tanh"}, "activation='tanh'"),
        ("optimization", {"betas": (0.5, 0.999)}, "betas=(0.5, 0.999)"),
        ("optimization", {"ema_decay": None}, "ema_decay=None"),
    ],
)
def test_another_objective_network_or_optimizer_is_refused(
    part: str, change: dict[str, Any], says: str, begun: Path
) -> None:
    config = _begun(begun)
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds a run of another config") as error:
        train(dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **change)}), say=_quiet)
    assert f"{part} " in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before
    assert train(config, say=_quiet).step == 2
