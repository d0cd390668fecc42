"""Fixtures of the tests of pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gen_dist import presets
from gen_dist.training.run import train
from tests.reports.reported_runs import BATCH, NOT_OF_GAN, OF_GAN, OF_VAE, STEPS, evaluate_as, make_unfinished, quiet
from tests.support.runs import small_config


@pytest.fixture(scope="module")
def short_presets() -> Iterator[None]:
    """Presets of as few steps as the runs of this module, so that they count as trained."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("vae-mnist", "gan-mnist"):
            short = replace(presets._PRESETS.parts[name].config, steps=STEPS, global_batch_size=BATCH)
            patch.setitem(presets._PRESETS.parts, name, replace(presets._PRESETS.parts[name], config=short))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, short_presets: None) -> dict[str, Path]:
    """Real runs on the embedded digits: two VAEs of one config, a GAN, and a VAE that is not finished."""
    root = tmp_path_factory.mktemp("runs")
    paths = {name: root / name for name in ("vae", "vae-seed-1", "gan", "half")}
    of_all: dict[str, Any] = {
        **{
            "data": "mnist5k",
            "steps": STEPS,
            "sample_every": 8,
            "evaluate_every": 8,
            "checkpoint_every": 8,
            "log_every": 2,
        }
    }
    configs = {
        "vae": small_config("vae", **of_all, preset="vae-mnist"),
        "vae-seed-1": small_config("vae", **of_all, preset="vae-mnist", seed=1),
        "gan": small_config("gan", **of_all, preset="gan-mnist"),
        "half": small_config("vae", **of_all, preset="vae-mnist"),
    }
    for name, config in configs.items():
        train(replace(config, run_dir=str(paths[name])), say=quiet)
    make_unfinished(paths["half"])
    evaluate_as(paths["vae"], OF_VAE, {})
    evaluate_as(paths["vae-seed-1"], OF_VAE | {"fid_10k": 21.0, "negative_elbo": 112.0}, {})
    evaluate_as(paths["gan"], OF_GAN, NOT_OF_GAN)
    return paths
