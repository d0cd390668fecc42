"""Runs for reports, with figures that nothing measured, and the page of some of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gen_dist.reports import write_report
from gen_dist.reports.comparison import read_runs
from gen_dist.reports.run_record import read_run
from gen_dist.training.step_times import measure_step_times

STEPS, BATCH = 24, 24
OF_SAMPLES = {"fid_10k": 20.0, "sharpness_10k": 0.08, "sharpness_data": 0.13, "path_length_10k": 1.3}

OF_VAE = {**OF_SAMPLES, "negative_elbo": 111.0, "nll_k500": 98.0, "reconstruction_error": 86.0}

OF_GAN = {**OF_SAMPLES, "fid_10k": 12.0, "sharpness_10k": 0.14, "path_length_10k": 2.6}

NOT_OF_GAN = {
    "negative_elbo": "a GAN gives no likelihood",
    "nll_k30": "a GAN gives no likelihood",
    "reconstruction_error": "a GAN has no encoder",
}


def quiet(_line: str) -> None:
    pass


def make_unfinished(path: Path) -> None:
    """A run that was killed between step 16 and its end."""
    shutil.rmtree(path / "checkpoints" / "step_00000024")
    for file in ("summary.json", *(picture.name for picture in path.glob("*.png"))):
        (path / file).unlink()


def evaluate_as(path: Path, metrics: dict[str, float], unavailable: dict[str, str], digest: str = "d1") -> None:
    run = read_run(path)
    found = {
        **{"format": 1, "checkpoint_step": run.step, "preset": run.config.preset, "data": run.config.data},
        **{"data_digest": run.state["data_digest"], "split": "test", "features": {"name": "digits", "digest": digest}},
        **{"metrics": metrics, "unavailable": unavailable, "pixels": {}, "seconds": {}, "environment": {}},
    }
    (path / "evaluation.json").write_text(json.dumps(found))


def report_of(path: Path, *names: str, runs: dict[str, Path], step_times: bool = False) -> str:
    read = read_runs([runs[name] for name in names])
    write_report(path, read, [measure_step_times(run.path, quiet) if step_times else None for run in read])
    return path.read_text()
