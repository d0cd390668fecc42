"""User errors: each prints one line with the values and the way out, and exits with code 2."""

from __future__ import annotations

import errno
import gzip
import json
import os
import runpy
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gen_dist import commands
from gen_dist.cli import run_command
from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError, DataError, UserError
from gen_dist.parallel.barrier import PeerDiedError
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.training.run import train
from tests.conftest import REPOSITORY
from tests.support.runs import OBJECTIVES, small_config, write_config


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    train(small_config("vae", steps=4, checkpoint_every=2, run_dir=str(path)), say=lambda _line: None)
    return path


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
    "a batch that cannot be shared": (lambda p: ["vae-mnist", "--accumulation", 500], "use at least 500"),
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
    "fewer images than a batch": (lambda p: ["vae-mnist", "--global-batch-size", 5000], "use at most 4000"),
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


@contextmanager
def _without_compiler(cache: Path) -> Iterator[None]:
    """Take away the compiler and its results: a process that has compiled the same step keeps them in memory."""
    from torch._inductor import config, utils

    torch._dynamo.reset()
    # config.patch, as monkeypatch would lose the name on undoing.
    with utils.fresh_cache(dir=str(cache)), config.patch({"cpp.cxx": (None, "/no/compiler")}):
        yield


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gives_one_line_and_exit_code_2(
    name: str,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, mentioned = CASES[name]
    monkeypatch.chdir(tmp_path)
    if name == "no number of threads":
        monkeypatch.setenv("GEN_DIST_THREADS", "two")
    if name == "no such wandb mode":
        monkeypatch.setenv("WANDB_MODE", "shout")
    arguments = [str(word) for word in words(Place(tmp_path, finished_run))]
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *arguments])
    with _without_compiler(tmp_path) if name == "no compiler" else nullcontext(), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "launch/train.py"), run_name="__main__")
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2, output.err
    assert len(errors) == 1, output.err
    assert mentioned in errors[0]
    assert output.err.rstrip().endswith(errors[0])
    assert "Traceback" not in output.err
    assert len(errors[0]) < 500


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--fresh", "--data", "minst"],
        ["--fresh", "--global-batch-size", "5000"],
        ["--fresh", "--accumulation", "50"],
        ["--fresh", "--network.hidden-sizes"],
    ],
    ids=" ".join,
)
def test_what_was_written_survives_a_refusal(
    words: list[str], finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run, path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    config = write_config(tmp_path / "config.json", small_config("vae", steps=4, seed=3, run_dir=str(path)))
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--config", str(config), *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "launch/train.py"), run_name="__main__")
    assert stop.value.code == 2
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("error", "environment", "printed"),
    [
        (ConfigError("seed -1"), {}, "error: seed -1\n"),
        (ConfigError("seed -1"), {"LOCAL_RANK": "3"}, "error: seed -1\n"),  # left over from another launch
        (ConfigError("seed -1"), {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "error: seed -1\n"),
        (ConfigError("seed -1"), {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, ""),
        (ConfigError("seed -1"), {"WORLD_SIZE": "9", "RANK": "8", "LOCAL_RANK": "0"}, "rank 8: error: seed -1\n"),
        (ConfigError("seed -1"), {"WORLD_SIZE": "4", "RANK": "3"}, "rank 3: error: seed -1\n"),
        (DataError("no images"), {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "rank 1: error: no images\n"),
    ],
)
def test_one_process_a_host_says_what_is_wrong_with_a_config(
    error: UserError,
    environment: dict[str, str],
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unset = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    monkeypatch.setattr(
        os, "environ", {name: value for name, value in os.environ.items() if name not in unset} | environment
    )

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == printed


_ALLOCATION = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "6272000000 bytes. Error code 12 (Cannot allocate memory)\nframe #0: c10::ThrowEnforceNotMet"
)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), ["/root/x: Permission denied", "may read"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "y" * 4000), ["yyy ... yyy", "use a shorter one"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["error: No space left on device; free some space"]),
        (OSError(errno.EROFS, "Read-only file system", b"/mnt/a"), ["/mnt/a: Read-only file system; use one that"]),
        (OSError(errno.EMFILE, "Too many open files", "a"), ["ulimit -n"]),
        (OSError(errno.EIO, "Input/output error", "a", None, "b"), ["a to b: Input/output error; fix that"]),
        (OSError("a library's own words"), ["error: a library's own words; fix that"]),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ["error: Broken pipe"]),
        (FileNotFoundError(errno.ENOENT, "No such file", "r\n\x1b[2Jun"), [r"r\n\x1b[2Jun"]),
        (RuntimeError("Symlink loop from '/a/loop'"), ["/a/loop", "leads to itself"]),
        (MemoryError(), ["out of memory (MemoryError)", "--accumulation 2"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ["out of memory", "a smaller batch"]),
        (RuntimeError(_ALLOCATION), ["out of memory", "6272000000 bytes", "a smaller network"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["out of memory (CUDA", "2 GiB"]),
        (RuntimeError("std::bad_alloc"), ["out of memory (std::bad_alloc)"]),
        (RuntimeError("can't start new thread"), ["ulimit -u"]),
        (PeerDiedError("rank 1 (process 7) of this run died"), ["rank 1 (process 7) of this run died", "its output"]),
        (
            RuntimeError("[/a/gloo/pair.cc:545] Read error [127.0.0.1]:3: Connection reset by peer. This often means"),
            ["has ended or cannot be reached (Read error [127.0.0.1]:3: Connection reset by peer); see its output"],
        ),
    ],
    ids=repr,
)
def test_what_the_machine_refuses_is_told_in_one_line(
    error: Exception, told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(fail)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in told), line
    assert len(line) < 500


@pytest.mark.parametrize("fault", [AssertionError("a fault"), KeyError("name"), RuntimeError("shapes differ")])
def test_a_fault_of_the_program_keeps_its_traceback(fault: Exception) -> None:
    def fail() -> None:
        raise fault

    with pytest.raises(type(fault)):
        run_command(fail)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "{run}", "--out", ""], "--out is empty"),
        (["sample", "{run}", "--out="], "--out is empty"),
        (["evaluate", ""], "an argument is empty"),
        (["train", "vae-mnist", "--run-dir", ""], "--run-dir is empty"),
        (["train", "", "--fresh"], "an argument is empty"),
        (["compare", "{run}", "{run}", "--out", ""], "--out is empty"),
    ],
)
def test_an_empty_word_is_not_the_current_directory(
    words: list[str], told: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gen-dist", *(word.format(run=finished_run) for word in words)])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_a_run_directory_in_a_home_directory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert TrainConfig(run_dir="~/runs/first").run_path == Path("/home/of/someone/runs/first")
    with pytest.raises(ConfigError, match="~nobody-of-this-name/run: there is no such home"):
        TrainConfig(run_dir="~nobody-of-this-name/run").run_path  # noqa: B018


@pytest.mark.parametrize(
    "name", ["r\udce9un", "\udcff", "r\xfcn", "\U0001f480 \\udce9 \U0010ffff", "[b]*[/b]", "a\\\udc80"]
)
def test_a_config_keeps_a_path_that_is_no_utf_8(name: str) -> None:
    config = small_config("vae", run_dir=f"/runs/{name}", data=f"folder:/{name}")
    config = replace(config, packing=replace(config.packing, cache_dir=name))
    assert TrainConfig.from_json(config.to_json(), "config.json") == config


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_config_comes_back_equal_from_its_json(objective: str) -> None:
    config = small_config(objective)
    assert TrainConfig.from_json(config.to_json(), "config.json") == config
