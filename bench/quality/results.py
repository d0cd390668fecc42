"""The results in gen_dist/README.md: presets on full MNIST, and the pictures: `python bench/quality/results.py --help`.

Each run is one command as a user types it, in a new process, one after another.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.measuring.conditions import conditions
from bench.measuring.temporary import temporary_directory
from gen_dist.config import AutoencoderConfig, VaeConfig
from gen_dist.presets import presets

REPOSITORY = Path(__file__).resolve().parent.parent.parent
EXPLICIT = tuple(
    name for name, one in presets().items() if isinstance(one.config.objective, AutoencoderConfig | VaeConfig)
)
"""Presets that are judged by a likelihood or a reconstruction error; of GANs bench/quality/gan_quality.py tells."""
PICTURES = {
    "samples": ("vae-mnist", "samples"),
    "reconstructions": ("vae-mnist", "reconstructions"),
    "latent_manifold": ("vae-2d-mnist", "latent_manifold"),
    "latent_scatter": ("vae-2d-mnist", "latent_scatter"),
}
"""Preset and name in its summary of each picture that is kept, from the run of the first seed."""


def main(data_root: Path, repeats: int = 3, presets: tuple[str, ...] = EXPLICIT, pictures: Path | None = None) -> None:
    """Train presets on full MNIST and print their results as a table in Markdown; its last line is the conditions.

    Args:
        data_root: directory with torchvision's MNIST; a missing one is downloaded to there.
        repeats: runs of each preset, with seeds 0, 1, ...
        presets: which to run.
        pictures: directory that takes the pictures. None keeps none.
    """
    before = conditions()
    summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in presets}
    turns = [(name, seed) for seed in range(repeats) for name in presets]
    with temporary_directory() as directory:
        for name, seed in tqdm(turns, desc="runs", unit="run"):
            run = directory / f"{name}-{seed}"
            summaries[name].append(summary_of_run(name, seed, data_root, run))
            for kept, (preset, picture) in PICTURES.items():
                if pictures and seed == 0 and preset == name:
                    pictures.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(run / summaries[name][0]["pictures"][picture], pictures / f"{kept}.png")
    print("| preset | test negative ELBO, nats | epochs | training, s | images/s |")
    print("|---|---|---|---|---|")
    for name, runs in summaries.items():
        print(row(name, runs))
    print(
        "\nOne latent sample an image; of real-valued pixels, but for `iwae-mnist`, whose pixels are binarized anew at "
        "each use: the two kinds do not compare. Medians, and in brackets extremes.\n"
    )
    print(json.dumps(before | {"threads": summaries[presets[0]][0]["threads"], "n": repeats}))


def summary_of_run(preset: str, seed: int, data_root: Path, run: Path) -> dict[str, Any]:
    """Train one preset in a new process; its summary.json, and the number of its threads."""
    words = ["--data", "mnist", "--data-root", data_root, "--seed", seed, "--run-dir", run, "--device", "cpu"]
    command = [sys.executable, REPOSITORY / "launch/train.py", preset, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{preset} with seed {seed} failed: {done.stderr}")
    threads = json.loads((run / "environment.json").read_text())["torch_threads"]
    return {**json.loads((run / "summary.json").read_text()), "threads": threads}


def row(preset: str, runs: list[dict[str, Any]]) -> str:
    """Median and extremes over the runs of one preset."""
    elbos = [run["final"].get("test/negative_elbo") for run in runs]
    if None in elbos:
        errors = [run["final"]["test/reconstruction_error"] for run in runs]
        quality = f"(reconstruction error {spread(errors, 1)})"
    else:
        quality = spread(elbos, 1)
    seconds = spread([run["training_seconds"] for run in runs], 1)
    images_per_second = f"{np.median([run['images_per_second'] for run in runs]):,.0f}"
    return f"| `{preset}` | {quality} | {runs[0]['epochs']:.1f} | {seconds} | {images_per_second} |"


def spread(values: list[float], digits: int) -> str:
    """Median, and the extremes behind it."""
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    tyro.cli(main)
