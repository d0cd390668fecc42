"""Names of the files in a run directory. Every writer and reader takes them from here."""

from __future__ import annotations

from pathlib import Path


class RunPaths:
    """Every file and directory of one run.

    A new file of a run needs one line in the constructor: `--fresh` then removes it as well.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        # Both outlive --fresh: they say which process trains here.
        self.lock = root / ".lock"
        self.holder = root / ".holder"
        # Checkpoints come before all else: the remainder of an interrupted removal must not be resumed from.
        self.checkpoints = root / "checkpoints"
        # Written when training starts.
        self.config = root / "config.json"
        self.environment = root / "environment.json"
        self.wandb_id = root / "wandb-id"
        self.wandb = root / "wandb"
        # Written while it trains.
        self.metrics = root / "metrics.jsonl"
        self.picture_series = {name: root / name for name in ("samples", "reconstructions")}
        """Directories with one picture a step."""
        # Written when it has finished.
        self.summary = root / "summary.json"
        self.final_pictures = {
            name: root / f"{name}.png"
            for name in ("curves", "class_shares", "scores", "interpolations", "latent_scatter", "latent_manifold")
        }
        # Written by `gen-dist evaluate` and `gen-dist report`.
        self.evaluation = root / "evaluation.json"
        self.report = root / "report.html"

    def checkpoint(self, step: int) -> Path:
        """Directory of the checkpoint of a step."""
        return self.checkpoints / f"step_{step:08d}"

    def picture(self, series: str, step: int) -> Path:
        """Picture of a step in one of the `picture_series`."""
        return self.picture_series[series] / f"step_{step:08d}.png"

    def written(self) -> list[Path]:
        """Everything that a run writes, in the order in which to remove it."""
        groups = [place for name, place in vars(self).items() if name not in ("root", "lock", "holder")]
        return [path for group in groups for path in (group.values() if isinstance(group, dict) else [group])]
