"""Scripts that make the guides' tables: their configs are ones that a run takes."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.measuring.finished import train_to_the_end
from bench.quality import few_digits, few_images, photographs
from gen_dist.config import AdversarialConfig, LatentAutoencoderConfig
from gen_dist.errors import UserError
from gen_dist.presets import get_preset
from gen_dist.records.checkpoint import checkpoint_paths
from tests.support.runs import small_config


@pytest.mark.parametrize("name", few_digits.KINDS)
def test_each_augmentation_of_few_digits_has_a_config(name: str, tmp_path: Path) -> None:
    kinds = few_digits.KINDS[name]
    objective = few_digits.config_of(kinds, 3, 100, 0, tmp_path).objective
    assert isinstance(objective, AdversarialConfig)
    assert objective.ada == kinds and objective.adapts_augmentation == bool(kinds)


@pytest.mark.parametrize("terms", photographs.TERMS)
def test_each_loss_of_photographs_has_a_config(terms: str, tmp_path: Path) -> None:
    config = photographs.config_of(terms, 30, 4, 0, tmp_path, tmp_path / "first")
    assert config.start_from == f"diffusers:{tmp_path / 'first'}"
    objective = config.objective
    assert isinstance(objective, LatentAutoencoderConfig)
    assert {name: getattr(objective, name) for name in photographs.TERMS[terms]} == photographs.TERMS[terms]


def test_the_runs_of_few_digits_differ_in_augmentation_alone(tmp_path: Path) -> None:
    plain, adaptive = (few_digits.config_of(kinds, 3, 100, 0, tmp_path) for kinds in few_digits.KINDS.values())
    preset = get_preset("dcgan-mnist")
    assert replace(adaptive, objective=plain.objective) == plain
    assert plain.objective == preset.objective and plain.network == preset.network
    train, held_out = few_digits.digits(40)
    assert len(train) == 40 and len(held_out) == 4960
    assert not set(map(bytes, np.ascontiguousarray(train))) & set(map(bytes, np.ascontiguousarray(held_out)))


def test_few_images_are_of_one_class_and_none_is_trained_on_and_held_out() -> None:
    found = few_images.images_of("3", 50, "mnist5k", Path("data"))
    assert len(found.train) == 50 and len(found.held_out) == 450
    assert not set(map(bytes, found.train)) & set(map(bytes, found.held_out))
    with pytest.raises(UserError, match="mnist5k has no class 'horse'; there are 0, 1"):
        few_images.images_of("horse", 50, "mnist5k", Path("data"))
    with pytest.raises(UserError, match="images 400: mnist5k has 400 of class 3; use 1 to 399"):
        few_images.images_of("3", 400, "mnist5k", Path("data"))


def test_presets_of_few_images_are_trained_at_one_rate_and_saved_at_the_end(tmp_path: Path) -> None:
    """So that a run of few steps is the beginning of a longer one."""
    for preset in ("few-images-64", "dcgan-64"):
        config = few_images.of_steps(few_images.config_of(preset, "learning_rate=0.001"), 7, tmp_path, seed=3)
        assert config.optimization.decay == "constant" and config.learning_rate == 0.001
        assert config.augment == ("flip",) and config.packing.size is None
        assert (config.steps, config.checkpoint_every, config.evaluate_every, config.seed) == (7, 7, 7, 3)


def test_a_signal_ends_the_program_and_not_its_run_alone(tmp_path: Path) -> None:
    config = small_config("vae", steps=10**6, checkpoint_every=10**6, log_every=1, run_dir=str(tmp_path))

    def stop() -> None:
        while not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit, match=r"^stopped at step [\d,]+ of "):
        train_to_the_end(config, say=lambda _line: None)
    assert checkpoint_paths(tmp_path)
