"""Quality of GANs of digits, measured by a classifier: `python bench/quality/gan_quality.py --help`.

Each preset is trained on full MNIST with each seed, each in a new process. The classes of 10,000 samples of each run
are counted. The table has the distance of their shares from uniform (total variation, 0..1), the least share, and for a
conditional model the share of samples of the requested class. The first row is that of training images, which are not
uniform either.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

# Packages import from the repository root wherever this runs, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import gen_dist
from bench.measuring.conditions import conditions
from gen_dist.config import DataConfig
from gen_dist.data import open_dataset
from gen_dist.evaluation.features import FeatureNetwork, feature_network
from gen_dist.pictures.grids import save_grid

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SAMPLES = 10_000
SAMPLE_SEED = 1  # not that of the pictures in the run


def main(
    data_root: Path,
    presets: tuple[str, ...] = ("dcgan-mnist", "r3gan-mnist", "cgan-mnist"),
    seeds: tuple[int, ...] = (0, 1, 2),
    runs: Path = Path("runs/gan-quality"),
    options: str = "",
    pictures: Path | None = None,
) -> None:
    """Train, sample, classify; print a table in Markdown and write a picture of each run's samples by class.

    Args:
        data_root: directory with torchvision's MNIST; a missing one is downloaded to there.
        presets: which to run.
        seeds: seeds of each.
        runs: directory that takes the runs; finished ones in it are not trained again.
        options: further options of launch/train.py, as one text.
        pictures: directory that takes the picture of the first seed of each preset. None keeps none.
    """
    dataset = open_dataset("mnist", str(data_root), DataConfig())
    network = feature_network("digits", torch.device("cpu"))
    right = _classes_of(network, torch.from_numpy(dataset.test.images)) == torch.from_numpy(dataset.test.labels)
    before = conditions()
    print(f"classifier: {right.double().mean():.2%} of the test images; {SAMPLES:,} samples of each run\n")
    print("| run | training, s | images/s | total variation | least share | labels right | shares of 0 to 9, % |")
    print("|---|---|---|---|---|---|---|", flush=True)
    spread = dataset.train.images[:: len(dataset.train.images) // SAMPLES][:SAMPLES]
    _print_row("training images", "", "", _classes_of(network, torch.from_numpy(spread)), "")
    for preset in presets:
        for seed in seeds:
            run = runs / f"{preset}-{seed}"
            _train(preset, seed, data_root, run, options)
            summary = json.loads((run / "summary.json").read_text())
            model = gen_dist.load(run)
            labels = torch.arange(SAMPLES) % 10
            images = model.sample(SAMPLES, labels if model.conditional else None, seed=SAMPLE_SEED)
            found = _classes_of(network, images)
            save_grid(run / "by_class.png", _some_of_each(images, found).numpy(), columns=20)
            if pictures and seed == seeds[0]:
                pictures.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run / "by_class.png", pictures / f"{preset}.png")
            obeyed = f"{float((found == labels).double().mean()):.1%}" if model.conditional else ""
            seconds, rate = f"{summary['training_seconds']:.0f}", f"{summary['images_per_second']:,.0f}"
            _print_row(f"`{preset}`, seed {seed}", seconds, rate, found, obeyed)
    print("\n" + json.dumps(before))


def _classes_of(network: FeatureNetwork, images: torch.Tensor) -> torch.Tensor:
    """Class of each image uint8 [N, 1, 28, 28]: int64 [N]."""
    found = [network.of_images(chunk)[1] for chunk in images.split(500)]
    return torch.cat([classes for classes in found if classes is not None])


def _print_row(name: str, seconds: str, rate: str, found: torch.Tensor, right: str) -> None:
    shares = np.bincount(found.numpy(), minlength=10) / len(found)
    distance, least = f"{np.abs(shares - 0.1).sum() / 2:.3f}", f"{shares.min():.1%}"
    each = " ".join(f"{100 * share:.1f}" for share in shares)
    print(f"| {' | '.join([name, seconds, rate, distance, least, right, each])} |", flush=True)


def _train(preset: str, seed: int, data_root: Path, run: Path, options: str) -> None:
    words = ["--data", "mnist", "--data-root", data_root, "--seed", seed, "--run-dir", run, *options.split()]
    command = [sys.executable, REPOSITORY / "launch/train.py", preset, *words]
    done = subprocess.run([str(word) for word in command], stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(f"{preset} with seed {seed} failed")


def _some_of_each(images: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Up to twenty samples of each class that was found, class by class."""
    return torch.cat([images[found == label][:20] for label in range(10)])


if __name__ == "__main__":
    tyro.cli(main)
