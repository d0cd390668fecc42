"""Table of bad input: words of a training command, made in a directory, and what its line of error names."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gen_dist.records.checkpoint import checkpoint_paths
from tests.conftest import REPOSITORY
from tests.support.runs import small_config

ABSENT = "absent"


@dataclass(frozen=True)
class Place:
    """Directory of a case, and a finished run that it may damage."""

    path: Path
    run: Path

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def nested_config(self, part: str, **changes: object) -> list[object]:
        """Options with a config file in which some values of its network, objective or another part are replaced."""
        values = json.loads(small_config("vae, convolutional").to_json())[part] | changes
        return ["--config", self.config(**{part: {name: value for name, value in values.items() if value != ABSENT}})]

    def config(self, **changes: object) -> Path:
        """Config file with some values replaced, types unchecked."""
        values = json.loads(small_config("vae", run_dir=str(self.path / "run")).to_json())
        return self.file("config.json", json.dumps(values | changes))


Case = tuple[Callable[[Place], list[object]], str]


def _folder(place: Place, files: dict[str, bytes]) -> list[object]:
    (place.path / "images").mkdir()
    for name, content in files.items():
        place.file(f"images/{name}", content)
    return ["vae-mnist", "--data", f"folder:{place.path / 'images'}"]


def _png(place: Place) -> bytes:
    path = place.path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    return path.read_bytes()


def _truncated_png(place: Place) -> bytes:
    return _png(place)[:600]


def _without_labels(place: Place, preset: str, *options: object) -> list[object]:
    """Arguments for a preset on a folder of images without class folders."""
    return [preset, *_folder(place, {f"{i}.png": _png(place) for i in range(12)})[1:], *options]


def _parquet(place: Place, table: pa.Table) -> list[object]:
    pq.write_table(table, place.path / "train.parquet")
    return ["vae-mnist", "--data", f"parquet:{place.path / 'train.parquet'}"]


def _unlabelled(place: Place) -> Path:
    """A .npz file of images, the third of which has no label."""
    np.savez(place.path / "a.npz", x=np.zeros((8, 28, 28), np.uint8), labels=[0, 1, -1, 0, 1, 0, 1, 0])
    return place.path / "a.npz"


def _mnist(place: Place, images: bytes, labels: bytes) -> list[object]:
    raw = place.path / "MNIST/raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return ["vae-mnist", "--data", "mnist", "--data-root", place.path]


def _spoiled_run(place: Place, spoil: Callable[[Path], object]) -> list[object]:
    shutil.copytree(place.run, place.path / "run")
    for checkpoint in checkpoint_paths(place.path / "run"):
        spoil(checkpoint)
    return _again(place)


def _again(place: Place, **changes: object) -> list[object]:
    values = json.loads((place.run / "config.json").read_text()) | {"run_dir": str(place.path / "run")} | changes
    return ["--config", place.file("config.json", json.dumps(values))]


IDX_IMAGES = struct.pack(">IIII", 2051, 4, 28, 28) + bytes(4 * 784)

IDX_LABELS = struct.pack(">II", 2049, 4) + bytes([0, 1, 2, 3])

CASES: dict[str, Case] = {
    # the command line
    "no such preset": (lambda p: ["vae-minst"], "vae-mnist"),
    "no such option": (lambda p: ["vae-mnist", "--stpes", 3], "--stpes"),
    "an option of another objective": (lambda p: ["ae-mnist", "--beta", 2], "--beta"),
    "a value that is not a number": (lambda p: ["vae-mnist", "--steps", "many"], "--steps"),
    "a value that is missing": (lambda p: ["vae-mnist", "--seed"], "--seed"),
    "no such choice": (lambda p: ["vae-mnist", "--precision", "fp8"], "bf16"),
    "--config without a file": (lambda p: ["--config"], "config.json"),
    "--config= without a file": (lambda p: ["--config="], "config.json"),
    "an option before the preset": (
        lambda p: ["--steps", 5, "vae-mnist"],
        f"the preset comes first, as in python {REPOSITORY}/launch/train.py vae-mnist --steps 5",
    ),
    # values
    "more steps than 64 bits count": (lambda p: ["vae-mnist", "--steps", 10**26], f"steps {10**26} is not below 2^63"),
    "no steps": (lambda p: ["vae-mnist", "--steps", 0], "steps 0 is less than 1"),
    "a negative learning rate": (lambda p: ["vae-mnist", "--learning-rate", -1], "learning_rate -1.0"),
    "a learning rate that is nan": (lambda p: ["vae-mnist", "--learning-rate", "nan"], "learning_rate nan"),
    "a negative seed": (lambda p: ["vae-mnist", "--seed", -1], "seed -1"),
    "an empty batch": (lambda p: ["vae-mnist", "--global-batch-size", 0], "global_batch_size 0"),
    "a batch that cannot be shared": (
        lambda p: ["vae-mnist", "--accumulation", 500],
        "use --global-batch-size 500 or more, or ",
    ),
    "a decay rate of 1": (lambda p: ["vae-mnist", "--ema-decay", 1], "ema_decay 1.0"),
    "no hidden layer": (lambda p: ["vae-mnist", "--hidden-sizes"], "hidden_sizes is empty"),
    "no samples": (lambda p: ["vae-mnist", "--importance-samples", 0], "importance_samples 0"),
    "beta with importance samples": (lambda p: ["beta-vae-mnist", "--importance-samples", 5], "use beta 1"),
    "a scale of a Bernoulli": (lambda p: ["vae-mnist", "--gaussian-scale", 1], "likelihood gaussian"),
    "too many convolutions": (lambda p: ["vae-conv-mnist", "--feature-maps", *[4] * 6], "name at most 4"),
    "no turn of a generator": (lambda p: ["gan-mnist", "--generator-every", 0], "generator_every 0 is less than 1"),
    "negative noise": (lambda p: ["dcgan-mnist", "--instance-noise", -0.1], "instance_noise -0.1 is not a number"),
    "a negative penalty": (lambda p: ["wgan-gp-mnist", "--penalty-weight", -1], "penalty_weight -1.0 is not a number"),
    "a penalty that is nan": (lambda p: ["r3gan-mnist", "--penalty-weight", "nan"], "penalty_weight nan"),
    "a penalty that is never due": (lambda p: ["r3gan-mnist", "--penalty-every", 0], "penalty_every 0 is less than 1"),
    "a negative weight of reconstructions": (
        lambda p: ["vae-gan-mnist", "--reconstruction-weight", -1],
        "reconstruction_weight -1.0",
    ),
    "no such augmentation": (lambda p: ["gan-mnist", "--augmentation", "blur"], "colour"),
    "an adaptive augmentation twice": (
        lambda p: ["gan-mnist", "--ada", "blit", "colour", "blit"],
        "ada has blit twice; name it once",
    ),
    "no such loss": (lambda p: ["gan-mnist", "--loss", "wasserstein"], "least_squares"),
    "no such conditioning": (lambda p: ["gan-mnist", "--conditioning", "labels"], "projection"),
    "a penalty of an objective that has none": (lambda p: ["vae-mnist", "--penalty-weight", 1], "--penalty-weight"),
    "a penalty through batch normalization": (
        lambda p: ["wgan-gp-mnist", "--data", "synthetic", "--discriminator-norm", "batch"],
        "use --discriminator-norm group or none",
    ),
    "classes of images without labels": (
        lambda p: _without_labels(p, "cgan-mnist"),
        "conditioning concat needs labelled images",
    ),
    "a probability of values whose range is not whole": (
        lambda p: ["vae-mnist", "--likelihood", "discretized-logistic", "--value-range", "0.5:200"],
        "whose ends are none: give whole numbers to --value-range",
    ),
    "a best checkpoint by what is not recorded": (
        lambda p: ["vae-mnist", "--keep-best", "fid"],
        "keep_best 'fid' is not recorded while training; use one of test/negative_elbo, ",
    ),
    "an augmentation that there is not": (lambda p: ["vae-mnist", "--augment", "mirror"], "is none of flip, rotate90"),
    "an augmentation without its number": (lambda p: ["vae-mnist", "--augment", "shift"], "shift:PIXELS as shift:2"),
    "an augmentation twice": (lambda p: ["vae-mnist", "--augment", "crop:0.9", "crop:0.8"], "crop twice"),
    "a turn of images that are not square": (
        lambda p: ["vae-mnist", "--data", "synthetic", "--image-size", "32x28", "--augment", "rotate90"],
        "these are 32x28: leave it out, or give a square --image-size",
    ),
    "a shift out of the image": (lambda p: ["vae-mnist", "--augment", "shift:28"], "use at most shift:14"),
    "a conditional VAE of images without labels": (
        lambda p: _without_labels(p, "vae-mnist", "--conditioning", "concat"),
        "conditioning concat needs labelled images",
    ),
    "images of which one has no label": (
        lambda p: ["vae-mnist", "--data", f"array:{_unlabelled(p)}"],
        "image 2 has no label; give it one, leave that image out, or use --missing-labels unknown",
    ),
    "labels in a column that is not there": (
        lambda p: [*_parquet(p, pa.table({"image": [b"x"]})), "--label-columns", "age"],
        "no column age of --label-columns",
    ),
    "columns of labels for a source without columns": (
        lambda p: ["vae-mnist", "--data", "synthetic", "--label-columns", "age"],
        "synthetic: --label-columns age is for parquet:PATH; leave it out",
    ),
    "a projection of classes that there are not": (
        lambda p: _without_labels(p, "gan-mnist", "--conditioning", "projection"),
        "--conditioning none",
    ),
    "images that a dcgan cannot halve": (
        lambda p: ["dcgan-mnist", "--data", "synthetic", "--image-size", 30],
        "use --image-size 28 or 32",
    ),
    "a GPU where there is none": (lambda p: ["vae-mnist", "--device", "cuda"], "--device cpu"),
    "no number of threads": (lambda p: ["vae-mnist"], "GEN_DIST_THREADS"),
    "no such wandb mode": (lambda p: ["vae-mnist"], "WANDB_MODE"),
    "no compiler": (lambda p: ["vae-mnist", "--compile", "--data", "synthetic", "--steps", 2], "torch.compile failed"),
    # config files
    "a config file that is missing": (lambda p: ["--config", p.path / "none.json"], "none.json"),
    "a config file that is not JSON": (lambda p: ["--config", p.file("c.json", "{'steps': 3")], "c.json"),
    "a config file with an unknown name": (lambda p: ["--config", p.config(stepps=3)], "stepps"),
    "a config file with a wrong type": (lambda p: ["--config", p.config(steps="many")], "steps"),
    "a config file with a value out of range": (
        lambda p: ["--config", p.config(steps=0)],
        "config.json: steps 0 is less than 1",
    ),
    "a config file named after an equals sign": (lambda p: [f"--config={p.config(steps=0)}"], "steps 0 is less than 1"),
    "a network with an unknown name": (
        lambda p: p.nested_config("network", feature_mapz=[4]),
        "network.conv.feature_mapz: Unexpected keyword argument",
    ),
    "an objective with a wrong type": (
        lambda p: p.nested_config("objective", beta="x"),
        "objective.vae.beta: Input should be a valid number",
    ),
    "an objective with a value out of range": (
        lambda p: p.nested_config("objective", beta=-1),
        "objective.vae: beta -1.0",
    ),
    "an augmentation with an unknown name": (
        lambda p: ["--config", p.config(objective={"kind": "gan", "augmentation": ["blur"]})],
        "objective.gan.augmentation.0: Input should be 'colour', 'translation' or 'cutout'",
    ),
    "an objective with another one's value": (
        lambda p: ["--config", p.config(objective={"kind": "r3gan", "generator_every": 2})],
        "objective.r3gan.generator_every: Unexpected keyword argument",
    ),
    "a network of an unknown kind": (
        lambda p: p.nested_config("network", kind="cnov"),
        "network: Input tag 'cnov' found using 'kind' does not match any of the expected tags: 'mlp', 'conv'",
    ),
    "a network without a kind": (
        lambda p: p.nested_config("network", kind=ABSENT),
        "network: Unable to extract tag using discriminator 'kind'",
    ),
    "an optimizer with an unknown name": (lambda p: p.nested_config("optimization", beta=1), "optimization.beta: "),
    "a config file of bytes": (lambda p: ["--config", p.file("c.json", b"\xff\xfe\x00")], "c.json"),
    # data
    "no such source": (lambda p: ["vae-mnist", "--data", "minst"], "mnist5k"),
    "a folder that is missing": (lambda p: ["vae-mnist", "--data", f"folder:{p.path / 'none'}"], "none"),
    "a folder that is a file": (lambda p: ["vae-mnist", "--data", f"folder:{p.file('a.png', 'x')}"], "a.png"),
    "an empty folder": (lambda p: _folder(p, {}), "images"),
    "a folder without images": (lambda p: _folder(p, {"a.txt": b"text"}), "images"),
    "a folder of truncated images": (lambda p: _folder(p, {f"{i}.png": _truncated_png(p) for i in range(3)}), ".png"),
    "fewer images than a batch": (
        lambda p: ["vae-mnist", "--global-batch-size", 5000],
        "use --global-batch-size 4000 or less",
    ),
    "fewer images than micro-batches": (
        lambda p: ["vae-mnist", "--global-batch-size", 8, "--accumulation", 9],
        "less than 1 process x accumulation 9: some would have no images; use --global-batch-size 9 or more, or "
        "--accumulation 8 or less",
    ),
    "a parquet file that is cut off": (
        lambda p: ["vae-mnist", "--data", f"parquet:{p.file('train.parquet', b'PAR1' + bytes(50))}"],
        "train.parquet",
    ),
    "a parquet file without images": (lambda p: _parquet(p, pa.table({"text": ["a"]})), "image"),
    "a parquet file with broken images": (
        lambda p: _parquet(p, pa.table({"image": [{"bytes": b"no image", "path": None}] * 9, "label": [0] * 9})),
        "train.parquet",
    ),
    "an idx file that is cut off": (lambda p: _mnist(p, IDX_IMAGES[:900], IDX_LABELS), "900 bytes"),
    "an idx file of another kind": (lambda p: _mnist(p, gzip.compress(IDX_IMAGES), IDX_LABELS), "not an idx file"),
    "labels out of range": (lambda p: _mnist(p, IDX_IMAGES, IDX_LABELS[:8] + bytes([0, 1, 2, 99])), "99"),
    "a cache that is a file": (
        lambda p: ["vae-mnist", "--data", "synthetic", "--cache-dir", p.file("cache", "x") / "sub"],
        "--cache-dir",
    ),
    "a size that is no size": (lambda p: ["vae-mnist", "--image-size", "64y"], "image_size '64y' is no side"),
    "a size that is not that of the images": (
        lambda p: ["vae-mnist", "--image-size", 32, "--fit", "none"],
        "is 28x28 gray, not 32, and --fit none refuses that; give --image-size 28x28",
    ),
    # runs and checkpoints
    "a run to start from that is missing": (
        lambda p: ["vae-mnist", "--data", "synthetic", "--from", p.path / "none"],
        "none is not a run or checkpoint directory",
    ),
    "a run to start from with other networks": (
        lambda p: ["vae-mnist", "--data", "synthetic", "--from", p.run],
        "is a run of other networks",
    ),
    "a run directory that is a file": (lambda p: ["vae-mnist", "--run-dir", p.file("taken", "x")], "taken"),
    "a run of another config": (
        lambda p: (_spoiled_run(p, lambda c: None), _again(p, seed=7))[1],
        "seed 0 -> 7",
    ),
    "a run that is further on": (
        lambda p: (_spoiled_run(p, lambda c: None), _again(p, steps=3))[1],
        "steps 4 -> 3",
    ),
    "checkpoints that are all damaged": (
        lambda p: _spoiled_run(p, lambda c: os.truncate(c / "networks.safetensors", 99)),
        "--fresh",
    ),
    "checkpoints of another data set": (
        lambda p: _again(
            Place(p.path, _copied(p)),
            packing=json.loads((p.run / "config.json").read_text())["packing"] | {"synthetic_images": 300},
        ),
        "another digest",
    ),
}


def _copied(place: Place) -> Path:
    shutil.copytree(place.run, place.path / "run")
    return place.run
