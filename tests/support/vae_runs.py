"""Small runs of a VAE, to be interrupted and compared with one that was not."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from gen_dist.config import TrainConfig
from gen_dist.records import checkpoint as checkpoints
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import MACHINE_USE, read_metrics
from tests.support.runs import assert_same_bits, small_config


def quiet(_line: str) -> None:
    pass


def config_of(run_dir: Path, **changes: object) -> TrainConfig:
    defaults = {"steps": 40, "checkpoint_every": 2, "sample_every": 10, "evaluate_every": 10, "log_every": 3}
    return small_config("vae", **{**defaults, "run_dir": str(run_dir), **changes})


def state_of(run_dir: Path) -> tuple[int, dict[str, torch.Tensor]]:
    checkpoint, _ = checkpoints.load(checkpoint_paths(run_dir)[0])
    named = {f"{group}/{name}": value for group, values in checkpoint.tensors.items() for name, value in values.items()}
    return checkpoint.step, named


def records_of(run_dir: Path) -> list[dict[str, object]]:
    return [
        {key: value for key, value in record.items() if key not in MACHINE_USE}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


def assert_equals_uninterrupted(run_dir: Path, uninterrupted: Path) -> None:
    step, state = state_of(run_dir)
    expected_step, expected = state_of(uninterrupted)
    assert step == expected_step == 40
    assert_same_bits(state, expected)
    assert records_of(run_dir) == records_of(uninterrupted)
    for picture in ("samples/step_00000040.png", "reconstructions/step_00000040.png", "latent_manifold.png"):
        assert (run_dir / picture).read_bytes() == (uninterrupted / picture).read_bytes()


def in_child(action: Callable[[], None], wait_to_kill: Callable[[], None] | None = None) -> int:
    """Run an action in a forked process and return its wait status. Kill it after `wait_to_kill`, if given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child does not use the other threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 2)
            action()
            code = 0
        finally:
            os._exit(code)
    if wait_to_kill is not None:
        wait_to_kill()
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]
