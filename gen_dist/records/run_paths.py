"""Names of the files in a run directory. Every writer and reader takes them from here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

WhichCheckpoint = Literal["newest", "best"]


class RunPaths:
    """Every file and directory of one run.

    A new file of a run needs one line in the constructor: `--fresh` then removes it as well, and a start in a directory
    that has a file of this name but no run is refused.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        # They outlive --fresh: they say whose the directory is, and which process trains here.
        self.mark = root / "run.json"
        self.lock = root / ".lock"
        self.holder = root / ".holder"
        self.evaluation_lock = root / ".evaluation.lock"
        self.checkpoints = root / "checkpoints"
        # Written when training starts.
        self.config = root / "config.json"
        self.environment = root / "environment.json"
        self.plugins = root / "plugins"
        """Copies of the single files among the plug-ins, so that the run can be read without the originals."""
        self.wandb_id = root / "wandb-id"
        self.wandb = root / "wandb"
        self.tensorboard = root / "tensorboard"
        self.mlflow = root / "mlflow"
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
        self.fitted_prior = root / "fitted_prior.safetensors"
        """Written by `gen-dist fit-prior`, for the weights of one checkpoint."""
        self.nearest_pairs = root / "nearest_training_images.png"
        self.nearest_pairs_best = root / "nearest_training_images_best.png"
        self.evaluation_best = root / "evaluation_best.json"
        self.report = root / "report.html"

    def evaluation_of(self, which: WhichCheckpoint) -> Path:
        """Figures of the newest checkpoint, or of the best that the run keeps."""
        return self.evaluation if which == "newest" else self.evaluation_best

    def nearest_pairs_of(self, which: WhichCheckpoint) -> Path:
        """Picture of the samples nearest to training images, of the newest checkpoint or of the best."""
        return self.nearest_pairs if which == "newest" else self.nearest_pairs_best

    def checkpoint(self, step: int) -> Path:
        """Directory of the checkpoint of a step."""
        return self.checkpoints / f"step_{step:08d}"

    def picture(self, series: str, step: int) -> Path:
        """Picture of a step in one of the `picture_series`."""
        return self.picture_series[series] / f"step_{step:08d}.png"

    def files(self) -> list[Path]:
        """Files that a run writes and --fresh removes, directories apart."""
        kept = (self.root, self.mark, self.lock, self.holder, self.evaluation_lock, *self.directories())
        single = [place for place in vars(self).values() if isinstance(place, Path) and place not in kept]
        return [*single, *self.final_pictures.values()]

    def directories(self) -> list[Path]:
        """Directories that a run writes to."""
        trackers = [self.wandb, self.tensorboard, self.mlflow]
        return [self.checkpoints, *self.picture_series.values(), self.plugins, *trackers]
