"""Parts that register but cannot train: one line in words of the user's own names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import gen_dist
from gen_dist.cli import NoOptions, parse_train
from gen_dist.errors import ConfigError

pytestmark = pytest.mark.usefixtures("forget")

PLUGIN = """
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn
from tyro.conf import Suppress

from gen_dist.config import NetworkConfig, VaeConfig, networks, objectives
from gen_dist.networks.mlp import MlpDecoder, MlpEncoder
from gen_dist.objectives.phase import Phase, TurnResult
from gen_dist.objectives.vae import Vae
from gen_dist.presets import add_preset, get_preset


@networks.register
@dataclass(frozen=True)
class MyNetworkConfig(NetworkConfig):
    encoder: ClassVar[str] = f"{__name__}:MyEncoder"
    decoder: ClassVar[str] = f"{__name__}:MyDecoder"
    kind: Suppress[Literal["my-network"]] = "my-network"
    hidden_sizes: tuple[int, ...] = (8,)
    activation: Literal["relu"] = "relu"


class MyEncoder(MlpEncoder):
    def forward(self, images):
        return super().forward(images)


class MyDecoder(MlpDecoder):
    def forward(self, latents):
        return super().forward(latents)


class MyVae(Vae):
    def phases(self):
        return super().phases()


class Still(Phase):
    def forward(self, batch):
        return TurnResult(torch.zeros(()), {})


add_preset("mine", replace(get_preset("vae-mnist"), network=MyNetworkConfig()), "mine")
"""
OBJECTIVE = """

@objectives.register
@dataclass(frozen=True)
class MyVaeConfig(VaeConfig):
    implementation: ClassVar[str] = f"{__name__}:MyVae"
    kind: Suppress[Literal["my-vae"]] = "my-vae"


add_preset("mine-too", replace(get_preset("mine"), objective=MyVaeConfig()), "mine too")
"""
ENCODER, DECODER, PHASES = "super().forward(images)", "super().forward(latents)", "return super().phases()"
WRONG = {
    "more outputs": (ENCODER, f"{ENCODER}.repeat(1, 2)", r"network my-network: MyEncoder gives \[B, 80\] for inputs"),
    "flat images": (DECODER, f"{DECODER}.flatten(1)", r"MyDecoder gives \[B, 784\] .* and \[B, 1, 28, 28\] is needed"),
    "no tensor": (DECODER, f"[{DECODER}]", "network my-network: MyDecoder gives list, not a tensor"),
    "no phase": (PHASES, "return {}", r"MyVae trains nothing: its phases\(\) is empty"),
    "still": (PHASES, "return {'still': Still(self)}", "Still trains nothing: no gradient leads from its loss"),
    "twice": (
        PHASES,
        "return {'first': Still(self), 'second': Still(self)}",
        "phases first and second of MyVae both train the network encoder, each with an optimizer of its own",
    ),
    "unknown": (
        PHASES,
        "one = Still(self); one.trains = ('no',); return {'one': one}",
        "phase one of MyVae trains 'no', but the networks are encoder, decoder",
    ),
    "nothing": (
        PHASES,
        "one = Still(self); one.trains = (); return {'one': one}",
        "phase one of MyVae trains nothing: no network in its `trains` has weights",
    ),
}
WORDS = ["mine-too", "--data", "synthetic", "--synthetic-images", "64", "--steps", "1", "--global-batch-size", "16"]


def _train(tmp_path: Path, content: str) -> None:
    path = tmp_path / "my_parts.py"
    path.write_text(content)
    words = [f"--plugin={path}", *WORDS, "--run-dir", str(tmp_path / "run")]
    gen_dist.train(parse_train(words, "train", NoOptions())[0], say=lambda _line: None)


def test_the_part_itself_trains(tmp_path: Path) -> None:
    _train(tmp_path, PLUGIN + OBJECTIVE)


@pytest.mark.parametrize("case", WRONG)
def test_a_part_that_cannot_train_is_one_line(case: str, tmp_path: Path, forget: Callable[[], None]) -> None:
    right, wrong, expected = WRONG[case]
    with pytest.raises(ConfigError, match=expected) as caught:
        _train(tmp_path, (PLUGIN + OBJECTIVE).replace(right, wrong, 1))
    assert "\n" not in str(caught.value)
