"""bench/peers/autoencoder_speed.py: both learn the same from the same start, and who does not is not timed."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from bench.peers import autoencoder_speed as speed
from bench.peers.autoencoder_trainers import Learned, Loop, Ours
from gen_dist.config import AutoencoderKlConfig, PatchganConfig, TrainConfig
from tests.conftest import REPOSITORY
from tests.support.warm_python import warm_python

STEPS = 2


def small(tmp_path: Path, *, adversarial: bool) -> TrainConfig:
    config = speed.config_of("synthetic", "", 0, str(tmp_path), adversarial=adversarial)
    network = AutoencoderKlConfig(feature_maps=(8, 16), blocks=1, groups=4, latent_dim=2)
    discriminator = PatchganConfig(feature_maps=4, layers=1)
    packing = replace(config.packing, image_size=16)
    return replace(config, network=network, discriminator=discriminator, packing=packing, global_batch_size=4)


@pytest.fixture(autouse=True)
def _need_diffusers() -> None:
    pytest.importorskip("diffusers", reason="needs `pip install -e '.[diffusers]'`")


@pytest.mark.parametrize("adversarial", [True, False])
def test_the_diffusers_loop_and_ours_take_the_same_steps(adversarial: bool, tmp_path: Path) -> None:
    config = small(tmp_path, adversarial=adversarial)
    ours = Ours(config)
    ours.write_weights(tmp_path / "weights")
    loop = Loop(config, tmp_path / "weights", checkpointing=adversarial, wasteful=not adversarial)
    for step in range(STEPS):
        mine, theirs = ours.step(step), loop.step(step)
        names = set(mine) & set(theirs)
        assert ("discriminator/loss" in names) == adversarial and len(names) > 2
        for name in names:
            # Means of scores of both signs may be near zero, where float32 of other sums differs by 3e-7.
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (step, name)
    ours.trainer.close()


def test_both_move_their_weights_alike(tmp_path: Path) -> None:
    config = small(tmp_path, adversarial=True)
    ours = Ours(config)
    ours.write_weights(tmp_path / "weights")
    loop = Loop(config, tmp_path / "weights")
    ours.step(0)
    loop.step(0)
    networks = ours.trainer.objective.networks
    ours.write_weights(tmp_path / "moved")
    ours.trainer.close()
    moved = load_file(tmp_path / "moved")
    # Adam's first step is the rate times the sign of each gradient, except near zero.
    for name, value in loop.loop.vae.state_dict().items():
        if name.endswith("to_k.bias"):
            continue  # it has no gradient: softmax of scores that are all shifted by one number is the same
        far = (moved[f"autoencoder.{name}"] - value).abs() > 1e-5
        assert far.float().mean() < 0.05, name
    averaged = ours.trainer.averaged
    assert averaged is not None
    first = next(averaged.networks["encoder"].parameters())
    # Theirs takes the weights of the first step whole, ours nine tenths of them.
    assert loop.loop.average.shadow_params[0].sub(first).abs().mean() < 0.11 * config.learning_rate * 4
    for mine, theirs in zip(networks["discriminator"].parameters(), loop.loop.discriminator.parameters(), strict=True):
        assert ((mine - theirs).abs() > 1e-5).float().mean() < 0.05


def learned(**changes: Any) -> Learned:
    losses = [{"autoencoder/loss": 100.0, "discriminator/loss": 1.0}]
    return Learned(losses, psnr=20.0, first_step_seconds=1.0)._replace(**changes)


def test_an_autoencoder_that_learns_something_else_is_refused() -> None:
    good = learned()
    more = [good.losses[0] | {"autoencoder/gradient_norm": 1.0}]  # a log of ours alone
    speed.refuse_differences({"ours": learned(psnr=20.05, losses=more), "loop": good})
    other = [{"autoencoder/loss": 100.0, "discriminator/loss": 1.1}]
    speed.refuse_differences({"script": learned(losses=other), "loop": good})  # its discriminator sees other images
    for wrong in (learned(losses=other), learned(psnr=20.2), learned(psnr=float("nan"))):
        with pytest.raises(SystemExit, match="does not learn the same"):
            speed.refuse_differences({"ours": wrong, "loop": good})


def test_speed_and_memory_are_compared_with_the_loop() -> None:
    """A machine that is slower by half in one round leaves the ratios unchanged."""
    ours = [{"seconds": value, "cpu_seconds": 1.0, "process_mib": 60.0, "training_mib": None} for value in (1.0, 2.0)]
    loop = [{"seconds": value, "cpu_seconds": 2.0, "process_mib": 100.0, "training_mib": 50.0} for value in (1.5, 3.0)]
    figures = speed.summarize({"ours": ours, "loop": loop}, images=96)
    assert figures["ours"]["ratio"] == {"p20": 1.5, "median": 1.5, "p80": 1.5, "n": 2}
    assert figures["ours"]["images_per_second"]["median"] == 72.0
    assert figures["ours"]["cpu_ratio"]["median"] == 2.0
    assert figures["ours"]["process_ratio"] == 0.6 and figures["ours"]["training_ratio"] is None


@pytest.mark.slow
def test_autoencoders_are_measured_beside_the_loop(tmp_path: Path) -> None:
    words = ["--learn-steps", "2", "--rounds", "1", "--steps", "1", "--adversarial"]
    command = [*warm_python(), "bench/peers/autoencoder_speed.py", *words, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert set(result["figures"]) == {"ours", "ours-checkpointing", "loop", "script"}
    assert result["figures"]["ours-checkpointing"]["training_ratio"] < result["figures"]["ours"]["training_ratio"]
