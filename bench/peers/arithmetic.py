"""The matrix products of one step over and over, without training: the limit of all peers (bench/costs/limit.py)."""

from pathlib import Path

from bench.costs.limit import limit_of, trainer_of
from bench.peers.gen_dist_run import config_of
from bench.peers.turnstile import Turnstile


def train(data_root: Path, directory: Path, seed: int, turnstile: Turnstile) -> None:
    """Multiply until the turnstile ends the process."""
    with trainer_of(config_of(data_root, directory, seed)) as trainer:
        limit = limit_of(trainer)
        while True:
            limit.seconds(1)
            turnstile.passed(float("nan"), lambda: float("nan"))
