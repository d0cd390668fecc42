"""GANs on a few hundred digits, with and without adaptive discriminator augmentation.

`python bench/quality/few_digits.py` trains a small GAN on digits of the embedded set, with the same data,
seeds and number of steps. It prints the distance of the samples from held-out digits (KID in digit features), and the
mean scores of training, held-out and generated images. A discriminator that knows its training images by heart gives
held-out ones the scores of generated ones (Karras et al. 2020a, figure 1). Overfitting is the share of the distance
from training to generated images at which held-out ones are (eq. 1).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

# From a checkout, for python bench/quality/few_digits.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import gen_dist
from bench.measuring.conditions import conditions
from gen_dist.config import DataConfig, DcganConfig, GanConfig, OptimizerConfig, RandomAugmentation, TrainConfig
from gen_dist.data import open_dataset
from gen_dist.data.subsets import evenly_spaced
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.objectives.adversarial import signed_unit
from gen_dist.pictures.grids import save_grid
from gen_dist.records.checkpoint import load_newest
from gen_dist.records.metrics_file import metrics_of_run

KINDS: dict[str, tuple[RandomAugmentation, ...]] = {
    "no augmentation": (),
    "adaptive": ("blit", "geometric", "colour"),
}
"""Augmentations by the names of the table's rows."""
SAMPLES = 5000
TARGET = 0.25
"""Mean sign of the scores of training images. That of the paper, 0.6, is of larger networks: here it is 0.2 before the
discriminator knows its images by heart."""
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
    """Config of a run: a DCGAN whose discriminator normalizes groups of channels, with R1 at every 8th step."""
    adapting = {"ada": kinds, "ada_images": ada_images, "ada_target": TARGET} if kinds else {}
    return TrainConfig(
        network=DcganConfig(feature_maps=16, latent_dim=64, generator_norm="batch", discriminator_norm="group"),
        objective=GanConfig(penalty_weight=0.02, penalty_every=8, **adapting),  # type: ignore[arg-type]
        optimization=OptimizerConfig(betas=(0.0, 0.99), ema_decay=0.998),
        learning_rate=1e-3,
        steps=steps,
        global_batch_size=64,
        checkpoint_every=steps,
        sample_every=steps,
        evaluate_every=steps,
        seed=seed,
        run_dir=str(run),
    )


def scores(run: Path, *sets: NDArray[np.uint8]) -> list[float]:
    """Mean scores of sets of images, and of 1,000 generated ones, by the newest networks of a run."""
    model = gen_dist.load(run)
    newest = load_newest(run, lambda _line: None)
    assert newest is not None
    model.objective.networks.load_state_dict(dict(newest[0].tensors["networks"]))
    tensors = [*map(torch.from_numpy, sets), model.sample(1000)]
    discriminator = model.objective.networks["discriminator"]
    with torch.no_grad():
        return [float(discriminator(signed_unit(torch.as_tensor(images)), None).mean()) for images in tensors]


def main(
    images: int = 500,
    steps: int = 1500,
    ada_images: int = 20_000,
    seeds: int = 3,
    folder: Path | None = None,
    pictures: Path | None = None,
) -> None:
    """Train each kind with each seed, and print a table in Markdown.

    Args:
        images: Training digits.
        steps: Steps of each run, of 64 digits.
        ada_images: Images over which the probability can rise from 0 to 1.
        seeds: Runs of each kind.
        folder: Directory that keeps the runs; runs that are there are not trained again.
        pictures: Directory that takes 100 samples of each run.
    """
    before = conditions()
    dataset = open_dataset("mnist5k", "data", DataConfig(), lambda _line: None)
    train, held_out = (np.asarray(split.images) for split in (dataset.train, dataset.test))
    train = train[evenly_spaced(images, len(train))]
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name, kinds in KINDS.items():
            for seed in range(seeds):
                run = (folder or Path(temporary)) / f"{name.split()[0]}-{seed}"
                config = config_of(kinds, steps, ada_images, seed, run)
                outcome = gen_dist.train(config, data=train, test_data=held_out, say=lambda _line: None)
                if not outcome.finished:
                    sys.exit(f"stopped at step {outcome.step:,} of {run.name}")
                found = evaluate(run, ["kid"], samples=SAMPLES, announce=lambda _line: None)
                low, high = found.intervals["kid_5k"]
                last = metrics_of_run(run)[-1]
                own = [last.get(f"train/discriminator/{key}") for key in ("augmentation_probability", "real_sign")]
                of_train, of_held_out, of_generated = scores(run, train, held_out)
                overfitting = (of_train - of_held_out) / (of_train - of_generated)
                numbers = [of_train, of_held_out, of_generated, overfitting, *own]
                cells = [f"{name}, seed {seed}", f"{found.metrics['kid_5k']:.3f} ({low:.3f} to {high:.3f})"]
                cells += ["" if number is None else f"{number:.2f}" for number in numbers]
                print(f"| {' | '.join(cells)} |", flush=True)
                if pictures:
                    pictures.mkdir(parents=True, exist_ok=True)
                    save_grid(pictures / f"{run.name}.png", gen_dist.load(run).sample(100).numpy(), columns=10)
    print(f"\n{images} digits, {steps} steps of 64, {len(held_out):,} digits held out, {SAMPLES:,} samples.")
    print(before)


if __name__ == "__main__":
    tyro.cli(main)
