"""The loop that PyTorch's own examples have: torchvision's images one by one through a loader, torch's defaults."""

from pathlib import Path

from bench.peers.recipe import Recipe
from bench.peers.turnstile import Turnstile


def train(data_root: Path, directory: Path, seed: int, turnstile: Turnstile) -> None:
    """Train until the turnstile ends the process."""
    recipe = Recipe(data_root, seed)

    def after_step(loss: float) -> None:
        turnstile.passed(loss, test)

    def test() -> float:
        negative_elbo = recipe.test()
        recipe.model.train()
        return negative_elbo

    while True:
        recipe.train_epoch(after_step)
