"""The presets for few images beside a plain GAN, in equal time: `python bench/quality/few_images.py --help`.

Both train on 1,000 CIFAR-10 images of one class, with mirrored images, the same seed and threads. Each has as many
steps as fit into the given minutes, by its images a second in a brief run. Distances are in features of
EfficientNet-Lite0, from the class's images that were held out and from those that were trained on.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray

# From a checkout, for python bench/quality/few_images.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import gen_dist
from bench.measuring.conditions import conditions
from bench.measuring.finished import train_to_the_end
from bench.measuring.temporary import temporary_directory
from gen_dist.config import DataConfig, TrainConfig
from gen_dist.data import open_dataset
from gen_dist.data.subsets import evenly_spaced
from gen_dist.errors import UserError
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.features import FeatureName
from gen_dist.evaluation.record import Evaluation
from gen_dist.pictures.grids import save_grid
from gen_dist.presets import get_preset
from gen_dist.records.metrics_file import metrics_of_run

FEATURES: FeatureName = "efficientnet-lite0"
SAMPLES = 5000
COLUMNS = ("preset", "images/s", "steps", "minutes", "KID, held-out images", "KID, training images", "`memorization`")


class Images(NamedTuple):
    """Images of one class, uint8 [N, 3, 32, 32]."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]


def images_of(name: str, count: int, data: str, data_root: Path) -> Images:
    """So many training images of a class, and all others of it, those of the test split included.

    Raises:
        UserError: there is no such class, or it has no image left to hold out.
    """
    dataset = open_dataset(data, str(data_root), DataConfig(), _mute)
    if name not in dataset.class_names:
        raise UserError(f"{data} has no class {name!r}; there are {', '.join(dataset.class_names)}")
    label = dataset.class_names.index(name)
    train, test = (
        np.asarray(split.images)[np.asarray(split.labels) == label] for split in (dataset.train, dataset.test)
    )
    if not 0 < count < len(train):
        raise UserError(f"images {count}: {data} has {len(train):,} of class {name}; use 1 to {len(train) - 1}")
    rows = evenly_spaced(count, len(train))
    return Images(train[rows], np.concatenate([np.delete(train, rows, axis=0), test]))


def config_of(preset: str, options: str = "") -> TrainConfig:
    """A preset at the images' own size, mirrored, at one rate throughout and with a moving average of the weights."""
    config = get_preset(preset)
    optimization = replace(config.optimization, decay="constant", ema_decay=0.999)
    config = replace(config, packing=DataConfig(), augment=("flip",), optimization=optimization)
    words = [word.split("=", 1) for word in options.split()]
    return config.with_options(**{name: json.loads(value) for name, value in words})


def of_steps(config: TrainConfig, steps: int, run: Path, seed: int = 0) -> TrainConfig:
    """The config with so many steps, of which the last alone is evaluated and saved."""
    return replace(
        config,
        steps=steps,
        checkpoint_every=steps,
        sample_every=steps,
        evaluate_every=steps,
        log_every=min(config.log_every, max(1, steps // 10)),
        seed=seed,
        run_dir=str(run),
    )


def trained(config: TrainConfig, images: Images) -> float:
    """Train, and give the images a second of the middle one of the logged spans, so that pauses do not count."""
    outcome = train_to_the_end(config, data=images.train, test_data=images.held_out, say=_mute)
    rates = [line["images_per_second"] for line in metrics_of_run(outcome.run_path) if "images_per_second" in line]
    return float(np.median(rates[1:] or rates))


def main(
    data_root: Path = Path("data"),
    data: str = "cifar10",
    presets: tuple[str, ...] = ("few-images-64", "dcgan-64"),
    class_name: str = "horse",
    images: int = 1000,
    minutes: float = 12.0,
    steps: tuple[int, ...] = (),
    seeds: tuple[int, ...] = (0,),
    options: str = "",
    folder: Path | None = None,
    pictures: Path | None = None,
) -> None:
    """Train each preset for the same time, and print a table in Markdown.

    Args:
        data_root: Directory with torchvision's CIFAR-10; a missing one is downloaded to there.
        data: Source of the images with names of classes, such as parquet:PATH of CIFAR-10 in the Hugging Face layout.
        presets: Which to train.
        class_name: Class of the images.
        images: Training images.
        minutes: Time of the steps of each run. 0 measures images a second alone.
        steps: Steps of each preset, in place of as many as fit into the minutes.
        seeds: Seeds of each preset.
        options: Changes of the configs, as one text: learning_rate=0.001 global_batch_size=32.
        folder: Directory that keeps the runs; runs that are there are not trained again.
        pictures: Directory that takes samples and nearest training images of each preset's first seed.
    """
    if steps and len(steps) != len(presets):
        sys.exit(f"steps {' '.join(map(str, steps))} for the presets {' '.join(presets)}; give one number for each")
    before = conditions()
    with temporary_directory() as temporary:
        try:
            found = images_of(class_name, images, data, data_root)
            configs = {preset: config_of(preset, options) for preset in presets}
        except UserError as error:
            sys.exit(str(error))
        counts = dict(zip(presets, steps, strict=True)) if steps else {}
        if not counts:
            for preset, config in configs.items():
                rate = trained(of_steps(config, 100, temporary / f"{preset}-brief"), found)
                print(f"{preset}: {rate:.0f} images/s in steps of {config.global_batch_size}", flush=True)
                counts[preset] = round(60.0 * minutes * rate / config.global_batch_size)
            print()
        if not any(counts.values()):
            return
        print(f"| {' | '.join(COLUMNS)} |")
        print("|---" * len(COLUMNS) + "|", flush=True)
        for preset, config in configs.items():
            for seed in seeds:
                run = (folder or temporary) / f"{preset}-{seed}"
                rate = trained(of_steps(config, counts[preset], run, seed), found)
                of_train = evaluate(run, ["kid"], samples=SAMPLES, features=FEATURES, reference="train", announce=_mute)
                of_test = evaluate(run, ["kid", "memorization"], samples=SAMPLES, features=FEATURES, announce=_mute)
                cells = [
                    f"`{preset}`, seed {seed}",
                    f"{rate:.0f}",
                    f"{counts[preset]:,} of {config.global_batch_size}",
                    f"{counts[preset] * config.global_batch_size / rate / 60:.1f}",
                    _with_interval(of_test, f"kid_{FEATURES}_5k"),
                    _with_interval(of_train, f"kid_{FEATURES}_5k_train"),
                    _with_interval(of_test, f"memorization_{FEATURES}"),
                ]
                print(f"| {' | '.join(cells)} |", flush=True)
                if pictures and seed == seeds[0]:
                    pictures.mkdir(parents=True, exist_ok=True)
                    samples = gen_dist.load(run).sample(100, seed=1).numpy()
                    save_grid(pictures / f"{preset}-samples.png", samples, columns=10)
                    shutil.copyfile(run / "nearest_training_images.png", pictures / f"{preset}-nearest.png")
    print(
        f"\n{len(found.train):,} {class_name} images trained on, {len(found.held_out):,} held out, {SAMPLES:,} samples."
    )
    print(before)


def _with_interval(evaluation: Evaluation, name: str) -> str:
    low, high = evaluation.intervals[name]
    return f"{evaluation.metrics[name]:.3g} ({low:.3g} to {high:.3g})"


def _mute(_line: str) -> None:
    pass


if __name__ == "__main__":
    tyro.cli(main)
