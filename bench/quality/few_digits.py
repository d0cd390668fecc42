"""A GAN of a few hundred digits, with and without adaptive discriminator augmentation.

`python bench/quality/few_digits.py` trains the preset `dcgan-mnist` on digits of the embedded set, with the same data,
noise, seeds and number of steps. It prints the distance of the samples from held-out digits (KID in digit features) as
it trains and in the end, and the mean scores of training, held-out and generated images. A discriminator that knows its
training images by heart gives held-out ones the scores of generated ones (Karras et al. 2020a, figure 1). Overfitting
is the share of the distance from training to generated images at which held-out ones are (eq. 1).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

# From a checkout, for python bench/quality/few_digits.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import gen_dist
from bench.measuring.conditions import conditions
from bench.measuring.finished import train_to_the_end
from bench.measuring.temporary import temporary_directory
from gen_dist.config import DataConfig, RandomAugmentation, TrainConfig
from gen_dist.data import open_dataset
from gen_dist.data.subsets import evenly_spaced
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.objectives.adversarial import signed_unit
from gen_dist.pictures.grids import save_grid
from gen_dist.presets import get_preset
from gen_dist.records.checkpoint import load_newest
from gen_dist.records.metrics_file import metrics_of_run

KINDS: dict[str, tuple[RandomAugmentation, ...]] = {
    "no augmentation": (),
    "adaptive": ("shift", "scale", "stretch", "drift"),
}
"""Augmentations by the names of the table's rows. A mirrored or turned digit is another one or none."""
BATCH = 32
SAMPLES = 5000
WATCHED_SAMPLES = 2000
TARGET = 0.3
"""Mean sign of the scores of training images. That of the paper, 0.6, is of discriminators without noise: with that of
the preset it is 0.25 where there are enough images."""
COLUMNS = (
    "augmentation",
    "KID, 5,000 samples (95 % interval)",
    "score of training images",
    "of held-out ones",
    "of generated ones",
    "overfitting",
    "probability",
    "mean sign",
)


def config_of(kinds: tuple[RandomAugmentation, ...], steps: int, ada_images: int, seed: int, run: Path) -> TrainConfig:
    """Config of a run: the preset with half its batch, evaluated five times."""
    config = get_preset("dcgan-mnist")
    adapting = {"ada": kinds, "ada_images": ada_images, "ada_target": TARGET} if kinds else {}
    return replace(
        config,
        objective=replace(config.objective, **adapting),  # type: ignore[arg-type]
        steps=steps,
        global_batch_size=BATCH,
        checkpoint_every=steps,
        sample_every=steps,
        evaluate_every=max(1, steps // 5),
        evaluate_metrics=("kid",),
        evaluate_samples=WATCHED_SAMPLES,
        seed=seed,
        run_dir=str(run),
    )


def scores(run: Path, *sets: NDArray[np.uint8]) -> list[float]:
    """Mean scores of sets of images, and of 1,000 generated ones, by the newest networks of a run, without noise."""
    model = gen_dist.load(run)
    newest = load_newest(run, lambda _line: None)
    assert newest is not None
    model.objective.networks.load_state_dict(dict(newest[0].tensors["networks"]))
    tensors = [*map(torch.from_numpy, sets), model.sample(1000)]
    discriminator = model.objective.networks["discriminator"]
    with torch.no_grad():
        return [float(discriminator(signed_unit(torch.as_tensor(images)), None).mean()) for images in tensors]


def digits(count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """So many of the embedded digits to train on, uint8 [N, 1, 28, 28], and all others."""
    dataset = open_dataset("mnist5k", "data", DataConfig(), lambda _line: None)
    train = np.asarray(dataset.train.images)
    if not 0 < count < len(train):
        sys.exit(f"images {count}: there are {len(train):,} to train on; use 1 to {len(train) - 1}")
    rows = evenly_spaced(count, len(train))
    return train[rows], np.concatenate([np.delete(train, rows, axis=0), np.asarray(dataset.test.images)])


def main(
    images: int = 500,
    steps: int = 4000,
    ada_images: int = 10_000,
    seeds: int = 3,
    folder: Path | None = None,
    pictures: Path | None = None,
) -> None:
    """Train each kind with each seed, and print a table in Markdown.

    Args:
        images: Training digits.
        steps: Steps of each run, of 32 digits.
        ada_images: Images over which the probability can rise from 0 to 1.
        seeds: Runs of each kind.
        folder: Directory that keeps the runs; runs that are there are not trained again.
        pictures: Directory that takes 100 samples of each run.
    """
    before = conditions()
    train, held_out = digits(images)
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|", flush=True)
    watched: dict[str, dict[int, float]] = {}
    with temporary_directory() as temporary:
        for seed in range(seeds):
            for name, kinds in KINDS.items():
                run = (folder or temporary) / f"{name.split()[0]}-{seed}"
                config = config_of(kinds, steps, ada_images, seed, run)
                train_to_the_end(config, data=train, test_data=held_out, say=lambda _line: None)
                row = f"{name}, seed {seed}"
                print(f"| {row} | {' | '.join(_cells(run, train, held_out))} |", flush=True)
                watched[row] = {
                    line["step"]: line[kid]
                    for line in metrics_of_run(run)
                    for kid in line
                    if kid == f"evaluation/kid_{WATCHED_SAMPLES // 1000}k"
                }
                if pictures:
                    pictures.mkdir(parents=True, exist_ok=True)
                    save_grid(pictures / f"{run.name}.png", gen_dist.load(run).sample(100).numpy(), columns=10)
    print(f"\nKID of {WATCHED_SAMPLES:,} samples as they train:\n")
    at = list(next(iter(watched.values())))
    print(f"| augmentation | {' | '.join(f'step {step:,}' for step in at)} |")
    print("|---" * (len(at) + 1) + "|")
    for row, kids in watched.items():
        print(f"| {row} | {' | '.join(f'{kids[step]:.3f}' for step in at)} |")
    print(f"\n{images} digits, {steps:,} steps of {BATCH}, {len(held_out):,} digits held out.")
    print(before)


def _cells(run: Path, train: NDArray[np.uint8], held_out: NDArray[np.uint8]) -> list[str]:
    """Cells of a finished run."""
    found = evaluate(run, ["kid"], samples=SAMPLES, announce=lambda _line: None)
    low, high = found.intervals["kid_5k"]
    last = metrics_of_run(run)[-1]
    own = [last.get(f"train/discriminator/{key}") for key in ("augmentation_probability", "real_sign")]
    of_train, of_held_out, of_generated = scores(run, train, held_out)
    overfitting = (of_train - of_held_out) / (of_train - of_generated)
    numbers = [of_train, of_held_out, of_generated, overfitting, *own]
    texts = ["" if number is None else f"{number:.2f}" for number in numbers]
    return [f"{found.metrics['kid_5k']:.3f} ({low:.3f} to {high:.3f})", *texts]


if __name__ == "__main__":
    tyro.cli(main)
