"""Training from Python in a process that goes on: data as an argument, and nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gen_dist
from gen_dist.config import TrainConfig
from gen_dist.errors import CheckpointError, DataError
from gen_dist.plugins import float32_precision
from gen_dist.records.metrics_file import metrics_of_run
from gen_dist.training.outcome import Outcome

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)


def _config(path: Path, **options: Any) -> TrainConfig:
    small = {
        "steps": 4,
        "global_batch_size": 16,
        "hidden_sizes": (8,),
        "latent_dim": 3,
        "device": "cpu",
        "log_every": 2,
    }
    cache = {"run_dir": path / "run", "cache_dir": path / "cache"}
    return gen_dist.preset("vae-mnist").with_options(**(small | cache | options))


def _train(config: TrainConfig, **more: Any) -> Outcome:
    return gen_dist.train(config, say=lambda _line: None, **more)


def _state() -> dict[str, Any]:
    """State of the process on which its other work depends."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return {
        "handlers": [signal.getsignal(number) for number in signals],
        "threads of torch": torch.get_num_threads(),
        "random": [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()],
        "dtype": torch.get_default_dtype(),
        "cudnn": torch.backends.cudnn.deterministic,
        "float32": float32_precision.read(),
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "warnings": list(warnings.filters),
        "running": sorted(thread.name for thread in threading.enumerate() if not thread.daemon),
    }


def test_an_array_is_trained_resumed_and_evaluated(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert _train(config.with_options(optimizer="adam", decay="constant"), data=IMAGES).step == 4
    longer = config.with_options(decay="constant", steps=6)
    outcome = _train(longer, data=IMAGES)
    assert outcome.step == 6
    assert [record["step"] for record in metrics_of_run(tmp_path / "run")][-1] == 6
    stored = TrainConfig.from_json((tmp_path / "run" / "config.json").read_text(), "run")
    assert stored.data.startswith("array:")
    assert _train(stored.with_options(steps=7)).step == 7  # the digest in the config finds the packed images


def test_other_images_are_refused_when_a_run_resumes(tmp_path: Path) -> None:
    config = _config(tmp_path, decay="constant")
    _train(config, data=IMAGES)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="other data"):
        _train(config.with_options(steps=6), data=IMAGES[::-1])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("threads", "precision"), [(1, "none"), (3, "tf32")])
def test_training_leaves_the_process_as_it_was(tmp_path: Path, threads: int, precision: str) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    products: Any = torch.backends.cuda.matmul
    products.fp32_precision = precision
    try:
        _train(_config(tmp_path / "warm"), data=IMAGES)  # imports have effects of their own, once
        before = _state()
        _train(_config(tmp_path), data=IMAGES)
        with pytest.raises(DataError):
            _train(_config(tmp_path), data=IMAGES.astype(np.complex64))
        with pytest.raises(CheckpointError):
            _train(_config(tmp_path), data=IMAGES[::-1])
        after = _state()
    finally:
        torch.set_num_threads(usual)
        products.fp32_precision = "none"
    assert after == before


def test_a_thread_trains_as_the_main_one_does(tmp_path: Path) -> None:
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(_train(_config(tmp_path), data=IMAGES)))
    thread.start()
    thread.join()
    again = _train(_config(tmp_path / "again"), data=IMAGES)
    assert outcomes[0].metrics == again.metrics
