"""Latents of a whole data set: every image once, the same bits whoever computes them, nothing lost or overwritten."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import gen_dist
from gen_dist import commands
from gen_dist.cli import run_command, run_subcommand
from gen_dist.config import DataConfig, LatentAutoencoderConfig, TrainConfig
from gen_dist.data import open_dataset
from gen_dist.errors import CheckpointError, ConfigError, DataError, UserError
from gen_dist.files import file_lock
from gen_dist.inference import encoding, latent_files, latent_rows
from gen_dist.inference.encoding import encode
from gen_dist.inference.latent_files import TEXT, Column, as_csv
from gen_dist.inference.latent_rows import deviation_of, statistics_of, sums_of
from gen_dist.inference.latent_set import LatentSet
from gen_dist.inference.loading import model_of, read_same_checkpoint
from gen_dist.parallel.processes import Processes
from gen_dist.training.run import train
from tests.conftest import REPOSITORY
from tests.support.children import end_with_parent
from tests.support.runs import OBJECTIVES, each_of, small_config
from tests.support.warm_python import in_two_ranks

WITH_ENCODER = [name for name, (config, _) in OBJECTIVES.items() if "encoder" not in config.lacks]
WITH_CODES = [
    name
    for name, (config, _) in OBJECTIVES.items()
    if isinstance(config, LatentAutoencoderConfig) and config.bottleneck in ("vq", "fsq")
]
FORMATS = ("parquet", "safetensors", "npz", "csv")


def _silent(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from an objective to a short run of it, trained at its first use."""
    directory = tmp_path_factory.mktemp("runs")

    def run_of(objective: str) -> Path:
        path = directory / objective.replace(" ", "-")
        if not path.exists():
            train(small_config(objective, steps=2, evaluate_every=2, sample_every=2, run_dir=str(path)), say=_silent)
        return path

    return run_of


def _encode(run: Path, out: Path, **options: Any) -> Path:
    defaults: dict[str, Any] = {"shard_size": 100, "announce": _silent}
    return encode(run, out, **(defaults | options))


def _bytes_of(out: Path) -> dict[str, bytes]:
    """Content of every file, without the empty lock."""
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name != ".encoding.lock"}


def _read_by_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Variables that the code of a set's card leaves."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(out)
    found: dict[str, Any] = {}
    exec(code, found)
    return found


def _table(out: Path, split: str) -> dict[str, Any]:
    table = pq.read_table(sorted(out.glob(f"{split}-*.parquet")))
    found = {}
    for name in table.column_names:
        values = table[name].combine_chunks()
        found[name] = (
            np.stack(values.to_numpy(zero_copy_only=False)) if name in ("mean", "logvar", "latents") else values
        )
    return found


@each_of(WITH_ENCODER, left_out=set(WITH_ENCODER) - {"vae", "autoencoder, squared error"})
def test_every_image_has_the_models_latents_once(objective: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs(objective)
    out = _encode(run, tmp_path / "out")
    model = gen_dist.load(run, announce=_silent)
    dataset = open_dataset("synthetic", ".", model.config.packing, _silent)
    for split in (dataset.train, dataset.test):
        name = "train" if split is dataset.train else "test"
        found = _table(out, name)
        images = torch.from_numpy(split.images[:])
        mean, logvar = model.encode(images)
        assert found["row"].to_pylist() == list(range(len(images)))
        assert found["label"].to_pylist() == split.labels.tolist()
        latents = found["mean" if logvar is not None else "latents"].reshape(mean.shape)
        np.testing.assert_allclose(latents, mean, rtol=1e-5, atol=1e-6)
        assert ("kl_nats" in found) == ("logvar" in found) == (logvar is not None)
        if logvar is not None:
            wide = logvar.double()
            kl_nats = 0.5 * (mean.double() ** 2 + wide.exp() - 1 - wide).flatten(1).sum(1)
            np.testing.assert_allclose(found["kl_nats"], kl_nats, rtol=1e-4, atol=1e-5)
        labels = torch.from_numpy(split.labels[:]) if model.conditional else None
        pixels = model.objective.pixels(model.decode(torch.from_numpy(latents), labels)).double()
        error = (pixels - images.double() / 255).square().flatten(1).sum(1)
        np.testing.assert_allclose(found["squared_error"], error, rtol=1e-5)


@pytest.mark.parametrize("file_format", FORMATS)
@each_of(WITH_CODES, left_out=set(WITH_CODES) - {"latent autoencoder, fsq"})
def test_codes_are_those_of_the_model(
    objective: str, file_format: str, runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = _encode(runs(objective), tmp_path / "out", split="test", file_format=file_format)
    found = _read_by_card(out, monkeypatch)
    model = gen_dist.load(runs(objective), announce=_silent)
    images = torch.from_numpy(open_dataset("synthetic", ".", model.config.packing, _silent).test.images[:])
    codes = model.objective.codes(images)
    assert np.array_equal(found["codes"].reshape(codes.shape), codes)
    assert 0 <= found["codes"].min() <= found["codes"].max() < model.objective.codebook_size
    np.testing.assert_allclose(found["latents"], model.encode(images)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_cards_code_reads_the_same_from_each_format(
    file_format: str, runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _table(_encode(runs("vae"), tmp_path / "expected"), "train")
    out = _encode(runs("vae"), tmp_path / "out", file_format=file_format)
    found = _read_by_card(out, monkeypatch)
    assert found["mean"].dtype == found["error"].dtype == np.float32
    assert np.array_equal(found["mean"], expected["mean"])
    assert np.array_equal(found["error"], expected["squared_error"])
    assert np.array_equal(found["labels"], expected["label"])
    names = {file.name for file in out.iterdir()} - {".encoding.lock", "README.md", "encoding.json"}
    assert names == set(json.loads((out / "encoding.json").read_text())["files"])


def test_bits_are_equal_for_any_threads_and_format(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_rows, "_MOST_ROWS", 20)
    one = _encode(runs("vae"), tmp_path / "one")
    monkeypatch.setenv("GEN_DIST_THREADS", "3")
    assert _bytes_of(_encode(runs("vae"), tmp_path / "three")) == _bytes_of(one)
    for file_format in ("npz", "csv"):
        first, second = (
            _encode(runs("vae"), tmp_path / f"{file_format}{size}", file_format=file_format, shard_size=size)
            for size in (40, 160)
        )
        assert (first / "train.csv").exists() == (file_format == "csv")
        name = f"train.{file_format}"
        if file_format == "csv":  # an npz holds the size of its shards
            assert (first / name).read_bytes() == (second / name).read_bytes()


def _start_two(run: Path, out: Path) -> subprocess.Popen[str]:
    words = ["-m", "gen_dist.commands", "encode", run, "--out", out, "--shard-size", "2"]
    return subprocess.Popen(
        [str(word) for word in (*in_two_ranks(), *words)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )


@pytest.mark.slow
def test_two_processes_killed_and_started_again_equal_one(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run, out = runs("vae"), tmp_path / "two"
    with _start_two(run, out) as process:
        until = time.monotonic() + 60
        while len(list(out.glob("t*.parquet"))) < 3 and time.monotonic() < until:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
    assert 3 <= len(list(out.glob("t*.parquet"))) < 160
    with _start_two(run, out) as process:
        printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert printed.splitlines() == [str(out)]
    assert re.search(r"(\d+) of 320 images are encoded already", errors)
    assert _bytes_of(out) == _bytes_of(_encode(run, tmp_path / "one", shard_size=2))


@pytest.mark.parametrize(
    "file_format", ["parquet", "npz", *(pytest.param(name, marks=pytest.mark.slow) for name in ("safetensors", "csv"))]
)
@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_interrupted_after_any_file_it_goes_on(
    file_format: str, stop: int, runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LatentSet.write
    written: list[str] = []

    def stopping(self: LatentSet, name: str, *words: Any) -> None:
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, *words)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LatentSet, "write", stopping)
        try:
            _encode(runs("vae"), tmp_path / "out", file_format=file_format)
            assert stop >= 4 and file_format in ("parquet", "safetensors")  # 3 + 1 shards
        except KeyboardInterrupt:
            pass
    done, written[:] = written[:], []
    stop = 1000
    monkeypatch.setattr(LatentSet, "write", stopping)
    out = _encode(runs("vae"), tmp_path / "out", file_format=file_format)
    assert not set(done) & set(written)
    assert _bytes_of(out) == _bytes_of(_encode(runs("vae"), tmp_path / "whole", file_format=file_format))


@pytest.mark.parametrize("file_format", ["parquet", "npz"])
@pytest.mark.parametrize("damage", ["flipped", "removed"])
def test_a_damaged_file_is_told_and_encoded_again(
    file_format: str, damage: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    out = _encode(runs("vae"), tmp_path / "out", file_format=file_format)
    whole = _bytes_of(out)
    (file,) = [out / name for name in whole if name in ("train-00001-of-00003.parquet", "train.npz")]
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(whole[file.name][:-200] + b"?" + whole[file.name][-199:])
    lines: list[str] = []
    _encode(runs("vae"), out, file_format=file_format, announce=lines.append)
    word = "is missing" if damage == "removed" else "is damaged"
    assert [line for line in lines if "encoding its images again" in line] == [
        f"{file} {word}; encoding its images again"
    ]
    assert _bytes_of(out) == whole


def test_a_directory_of_another_set_is_refused_in_a_line(runs: Callable[[str], Path], tmp_path: Path) -> None:
    out = _encode(runs("vae"), tmp_path / "out", split="test")
    before = _bytes_of(out)
    other = runs("autoencoder, squared error")
    refused: list[tuple[Path, dict[str, Any], str]] = [
        (other, {}, "holds latents of vae at step 2, not of autoencoder,-squared-error at 2"),
        (runs("vae"), {"data": "mnist5k"}, "of other images: of synthetic, not of mnist5k as they are"),
        (runs("vae"), {"shard_size": 50}, "with shard size 100, not 50"),
        (runs("vae"), {"file_format": "csv"}, "with format parquet, not csv"),
        (runs("vae"), {"split": "train"}, "with rows {'test': 64}, not {'train': 256}"),
    ]
    for run, options, line in refused:
        with pytest.raises(ConfigError, match=re.escape(line)) as found:
            _encode(run, out, **({"split": "test"} | options))
        assert "\n" not in str(found.value) and "choose another --out" in str(found.value)
    assert _bytes_of(out) == before


@pytest.mark.parametrize("name", ["README.md", "test-00000-of-00001.parquet", "encoding.json"])
def test_a_foreign_file_is_never_overwritten(name: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    with pytest.raises((ConfigError, CheckpointError), match=re.escape(name)):
        _encode(runs("vae"), out)
    assert _bytes_of(out) == {name: b"{}"}


def test_files_of_the_user_stay_beside_the_set(runs: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    _encode(runs("vae"), out)
    card = (out / "README.md").read_text().replace("# license: say", "license: mit  # say")
    (out / "README.md").write_text(card)
    (out / "test-00000-of-00001.parquet").unlink()
    _encode(runs("vae"), out)
    assert (out / "README.md").read_text() == card and (out / "notes.txt").read_text() == "mine"
    (out / "encoding.json").unlink()
    with pytest.raises(ConfigError, match="not of a set of latents, and is not overwritten"):
        _encode(runs("vae"), out)


def test_a_shard_without_its_record_is_not_overwritten(runs: Callable[[str], Path], tmp_path: Path) -> None:
    out = _encode(runs("vae"), tmp_path / "out")
    manifest = json.loads((out / "encoding.json").read_text())
    (out / "encoding.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "sha256"} | {"files": {}}))
    with pytest.raises(ConfigError, match="is not of this set of latents, and is not overwritten; move it away"):
        _encode(runs("vae"), out)


def test_names_of_files_come_with_the_latents(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in range(12):
        (tmp_path / "images" / "ab"[value % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 32), 20 * value).save(tmp_path / "images" / "ab"[value % 2] / f"{value:02}, x.png")
    source = f"folder:{tmp_path / 'images'}"
    for file_format in FORMATS:
        out = _encode(runs("vae"), tmp_path / file_format, data=source, file_format=file_format)
        found = _read_by_card(out, monkeypatch)
        dataset = open_dataset(source, ".", DataConfig(image_size=28, channels=1), _silent)
        assert list(found["names"]) == list(dataset.train.names or ())
        assert len(found["mean"]) == len(found["names"]) == 11


def test_other_images_than_those_of_the_run_are_decoded_by_pillow(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, config = read_same_checkpoint(runs("vae"), _silent, Processes(0, 0, 1, torch.device("cpu")))
    packing = replace(config.packing, packed_as="encoded", decoded_on="cuda")
    model = model_of(checkpoint, replace(config, packing=packing), torch.device("cpu"))
    found: list[DataConfig] = []

    def opened(_run: Path, config: TrainConfig, *_rest: Any, **_named: Any) -> None:
        found.append(config.packing)
        raise DataError("seen")

    monkeypatch.setattr(encoding, "open_run_data", opened)
    for data in ("folder:some", "mnist", None):
        with pytest.raises(DataError, match="seen"):
            encoding._open_data(runs("vae"), model, data, None, _silent)
    assert [(one.decoded_on, one.packed_as) for one in found] == [
        ("cpu", "encoded"),
        ("cpu", "raw"),
        ("cuda", "encoded"),
    ]


def test_a_set_begun_without_names_goes_on_without(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in range(12):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("L", (28, 28), 20 * value).save(tmp_path / "images" / f"{value:02}.png")
    options: dict[str, Any] = {"data": f"folder:{tmp_path / 'images'}", "split": "train", "shard_size": 4}
    with monkeypatch.context() as patch:  # as old versions did for shards
        patch.setattr(encoding, "_takes_names", lambda *_given: False)
        out = _encode(runs("vae"), tmp_path / "out", **options)
    whole = _bytes_of(out)
    next(out.glob("train-00001-*")).unlink()
    lines: list[str] = []
    _encode(runs("vae"), out, announce=lines.append, **options)
    assert _bytes_of(out) == whole
    assert any("was begun without names of images, and goes on without; choose another --out" in one for one in lines)


def test_latents_have_the_labels_of_the_data_that_are_encoded(runs: Callable[[str], Path], tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    labels = numbers.normal(size=(20, 2)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=numbers.integers(0, 256, (20, 28, 28), np.uint8), labels=labels)
    for file_format in ("npz", "parquet"):
        out = _encode(runs("vae"), tmp_path / file_format, data=f"array:{tmp_path / 'a.npz'}", file_format=file_format)
        found = np.load(out / "train.npz") if file_format == "npz" else _table(out, "train")
        of_rows = np.array(found["label"].tolist())
        assert of_rows.shape == (18, 2) and set(map(tuple, of_rows)) < set(map(tuple, labels.astype(float)))


def test_a_model_of_8_bit_images_encodes_deeper_files(runs: Callable[[str], Path], tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (6, 32, 40))
    lines: list[str] = []
    means = []
    for dtype, factor in ((np.uint8, 1), (np.uint16, 257)):
        (tmp_path / str(factor)).mkdir()
        for place, values in enumerate(levels):
            Image.fromarray((values * factor).astype(dtype)).save(tmp_path / str(factor) / f"{place}.png")
        source = f"folder:{tmp_path / str(factor)}"
        out = _encode(runs("vae"), tmp_path / f"out {factor}", data=source, announce=lines.append)
        means.append(_table(out, "train")["mean"])
    assert np.array_equal(*means)
    assert any("are reduced to 8" in line for line in lines)


def test_the_scaling_factor_is_that_of_latents_drawn(runs: Callable[[str], Path], tmp_path: Path) -> None:
    out = _encode(runs("vae"), tmp_path / "out")
    tables = [_table(out, split) for split in ("train", "test")]
    mean, logvar = (np.concatenate([table[name] for table in tables]).astype(np.float64) for name in ("mean", "logvar"))
    drawn = mean + np.exp(logvar / 2) * np.random.default_rng(0).standard_normal((400, *mean.shape))
    statistics = json.loads((out / "encoding.json").read_text())["statistics"]
    np.testing.assert_allclose(statistics["mean"], mean.mean(0), atol=1e-12)
    np.testing.assert_allclose(statistics["std"], drawn.std((0, 1)), rtol=0.01)
    assert statistics["scaling_factor"] == pytest.approx(1 / drawn.std(), rel=0.01)


def test_a_deviation_of_numbers_that_overflow_is_none() -> None:
    mean, logvar = np.ones((4, 3), np.float32), np.full((4, 3), 800, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isnan(deviation_of([sums_of(mean, logvar)]))
        assert statistics_of([sums_of(mean, logvar)])["scaling_factor"] is None
    assert deviation_of([sums_of(mean, np.zeros((4, 3), np.float32))]) == pytest.approx(1)


def test_a_csv_is_made_in_parts_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [Column("row", "int64", (), ""), Column("name", TEXT, (), ""), Column("mean", "float32", (100,), "")]
    means = np.random.default_rng(0).normal(size=(1000, 100)).astype(np.float32)
    rows = {"row": np.arange(1000), "name": [f'Ä/"{row}",\n.png' for row in range(1000)], "mean": means}
    whole = as_csv(columns, rows, {})
    monkeypatch.setattr(latent_files, "_NUMBERS_AS_TEXT", 1000)
    tracemalloc.start()
    try:
        assert as_csv(columns, rows, {}) == whole
        assert tracemalloc.get_traced_memory()[1] < 4 * len(whole)
    finally:
        tracemalloc.stop()


def test_what_cannot_be_encoded_is_refused_in_a_line(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="shard size 0 is less than 1"):
        _encode(runs("vae"), out, shard_size=0)
    with pytest.raises(DataError, match="there is no such directory"):
        _encode(runs("vae"), out, data=f"folder:{tmp_path / 'absent'}")
    monkeypatch.setattr(encoding, "_MOST_NUMBERS_IN_ONE_FILE", 1000)
    with pytest.raises(ConfigError, match="format csv is for small sets, and this one has 4,480 numbers"):
        _encode(runs("vae"), out, file_format="csv")
    monkeypatch.setattr(encoding, "_MOST_NUMBERS_IN_A_SHARD", 1000)
    with pytest.raises(ConfigError, match="shard size 100 is too large for memory, with 14 numbers an image; use"):
        _encode(runs("vae"), out)
    assert not out.exists()


@pytest.mark.slow
def test_a_model_without_an_encoder_is_refused_in_a_line(runs: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot encode: a GAN has no encoder"):
        _encode(runs("gan"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite_are_refused(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*words: Any) -> Any:
        model = model_of(*words)
        with torch.no_grad():
            next(model.objective.networks["encoder"].parameters()).fill_(torch.nan)
        return model

    monkeypatch.setattr(encoding, "model_of", diverged)
    with pytest.raises(UserError, match=r"latents of images 0 to 99 of the train split of synthetic are not finite"):
        _encode(runs("vae"), tmp_path / "out")


def test_two_starts_in_one_directory_are_refused(runs: Callable[[str], Path], tmp_path: Path) -> None:
    out = _encode(runs("vae"), tmp_path / "out", split="test")
    with file_lock(out / ".encoding.lock", _silent), pytest.raises(ConfigError, match="another process writes into"):
        _encode(runs("vae"), out, split="test")


def test_the_command_prints_the_directory_or_one_line(
    runs: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: run_subcommand(commands.FUNCTIONS, [str(word) for word in words], "gen-dist"))
        return ended.value.code, *capfd.readouterr()  # type: ignore[return-value]

    out = tmp_path / "out"
    code, printed, _ = run("encode", runs("vae"), "--out", out, "--split", "test", "--format", "csv")
    assert (code, printed) == (0, f"{out}\n") and (out / "test.csv").exists()
    code, printed, errors = run("encode", runs("vae"), "--out", runs("vae") / "config.json")
    assert (code, printed) == (2, "") and errors.splitlines()[-1].startswith("error: ") and "Traceback" not in errors
