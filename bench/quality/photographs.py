"""Photographs through latent autoencoders with and without perceptual and adversarial terms.

`python bench/quality/photographs.py` trains a small latent autoencoder on 64 x 64 crops of scikit-image's photographs
by absolute errors. From its weights, by way of the directory that is exported for diffusers, it goes on three times
for each seed, with the same data and number of steps: with absolute errors alone, with the perceptual term, and with
the discriminator as well, at the weight of the code of Rombach et al. 2022. Test crops are of the right quarter of
each photograph, which no training crop reaches.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image

# From a checkout, for python bench/quality/photographs.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import gen_dist
from bench.measuring.conditions import conditions
from bench.measuring.finished import train_to_the_end
from bench.measuring.temporary import temporary_directory
from gen_dist.config import AutoencoderKlConfig, LatentAutoencoderConfig, OptimizerConfig, PatchganConfig, TrainConfig
from gen_dist.evaluation.evaluator import evaluate
from gen_dist.evaluation.guide import base_name
from gen_dist.inference.export import export
from gen_dist.pictures.grids import save_strips

SIDE = 64
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
TEST_SHARE = 0.25
METRICS = ("psnr", "ssim", "perceptual_distance", "reconstruction_sharpness")
SHOWN = 8
TERMS: dict[str, dict[str, float]] = {
    "absolute error": {},
    "and perceptual": {"perceptual_weight": 0.2},
    "and adversarial": {"perceptual_weight": 0.2, "adversarial_weight": 0.5},
}
"""Options of the objective by the terms of its loss."""


def photographs() -> Iterator[NDArray[np.uint8]]:
    """Colour photographs uint8 [H, W, 3] that come with scikit-image."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the photographs come with scikit-image; run `pip install -c constraints.txt -e '.[bench]'`")
    for name in PHOTOGRAPHS:
        with Image.open(Path(found.submodule_search_locations[0]) / "data" / name) as picture:
            yield np.asarray(picture.convert("RGB"))


def crops(picture: NDArray[np.uint8], first: int, last: int, count: int, seed: int) -> NDArray[np.uint8]:
    """Random crops uint8 [count, 3, 64, 64] of the columns first to last of a picture [H, W, 3]."""
    generator = np.random.default_rng(seed)
    tops = generator.integers(0, picture.shape[0] - SIDE + 1, count)
    lefts = generator.integers(first, last - SIDE + 1, count)
    cut = [picture[top : top + SIDE, left : left + SIDE] for top, left in zip(tops, lefts, strict=True)]
    return np.stack(cut).transpose(0, 3, 1, 2)


def train_and_test(train_crops: int, test_crops: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Crops of all photographs for training and for tests, so many of each."""
    parts: tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]] = ([], [])
    for picture in photographs():
        width = picture.shape[1]
        border = round(width * (1 - TEST_SHARE))
        parts[0].append(crops(picture, 0, border, train_crops, 0))
        parts[1].append(crops(picture, border, width, test_crops, 1))
    return np.concatenate(parts[0]), np.concatenate(parts[1])


def config_of(terms: str, steps: int, batch: int, seed: int, folder: Path, start: Path | None = None) -> TrainConfig:
    """Config of a run: of the first steps without `start`, else from the weights of that directory of diffusers on."""
    name = "first" if start is None else str(list(TERMS).index(terms))
    config = TrainConfig(
        network=AutoencoderKlConfig(feature_maps=(16, 32, 64), blocks=1, latent_dim=4, groups=8),
        discriminator=PatchganConfig(feature_maps=32, layers=2),
        objective=LatentAutoencoderConfig(),
        optimization=OptimizerConfig(
            betas=(0.9, 0.98) if start is None else (0.5, 0.9), warmup_steps=steps // 20, decay="linear"
        ),
        learning_rate=2e-3 if start is None else 1e-3,
        steps=steps,
        global_batch_size=batch,
        checkpoint_every=steps,
        sample_every=steps,
        evaluate_every=steps,
        seed=seed,
        start_from=None if start is None else f"diffusers:{start}",
        run_dir=str(folder / f"{name}-{seed}"),
    )
    return config.with_options(**TERMS[terms], cache_dir=str(folder / "cache"))


def main(
    first_steps: int = 1200,
    steps: int = 240,
    batch: int = 4,
    seeds: int = 1,
    picture: Path | None = None,
    folder: Path | None = None,
) -> None:
    """Train each loss, print a table in Markdown, and draw test crops above their reconstructions.

    Args:
        first_steps: Steps by absolute errors, of one run from whose weights every loss and seed goes on.
        steps: Steps of each loss.
        batch: Crops a step.
        seeds: Runs of each loss.
        picture: PNG file of the first seed: originals, then a row for each loss.
        folder: Directory that keeps the runs; runs that are there are not trained again.
    """
    before = conditions()
    with temporary_directory() as temporary:
        root = folder or temporary
        train, test = train_and_test(400, 8)
        rows = [test[:: len(test) // SHOWN][:SHOWN]]
        found: dict[str, dict[str, list[float]]] = {terms: {} for terms in TERMS}
        first = _trained(config_of(next(iter(TERMS)), first_steps, batch, 0, root), train, test)
        start = export(first, "diffusers", announce=lambda _line: None)
        for seed in range(seeds):
            for terms, values in found.items():
                run = _trained(config_of(terms, steps, batch, seed, root, start), train, test)
                metrics = evaluate(run, METRICS, announce=lambda _line: None).metrics
                for name, value in metrics.items():
                    assert isinstance(value, float)
                    values.setdefault(name if name.endswith("_data") else base_name(name), []).append(value)
                if seed == 0:
                    rows.append(gen_dist.load(run).reconstruct(torch.from_numpy(rows[0])).numpy())
        print(f"| loss | {' | '.join(METRICS)} |")
        print("|---" * (len(METRICS) + 1) + "|")
        for terms, values in found.items():
            print(f"| {terms} | {' | '.join(_spread(values[name]) for name in METRICS)} |")
        sharpness = values["reconstruction_sharpness_data"][0]
        print(f"\nSharpness of the test crops: {sharpness:.4g}. {first_steps} and {steps} steps of {batch}.")
        print(before)
        if picture is not None:
            save_strips(picture, np.concatenate(rows), SHOWN, captions=["originals", *TERMS])


def _trained(config: TrainConfig, train: NDArray[np.uint8], test: NDArray[np.uint8]) -> Path:
    """Directory of the run of a config, trained to its end."""
    return train_to_the_end(config, data=train, test_data=test, say=lambda _line: None).run_path


def _spread(values: list[float]) -> str:
    texts = [f"{value:.4g}" for value in (sum(values) / len(values), min(values), max(values))]
    return texts[0] if len(values) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


if __name__ == "__main__":
    tyro.cli(main)
