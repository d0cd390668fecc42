"""JPEG files decoded by torchvision: here on the CPU, by the same functions as on a GPU, which the last test needs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gen_dist.config import DataConfig
from gen_dist.data import Dataset, TrainBatches, gpu_jpeg, open_dataset, survey_source
from gen_dist.data.gpu_jpeg import ImagesOnGpu, check_decoder, decode_jpegs, decoded_on
from gen_dist.errors import DataError
from gen_dist.parallel.facts import facts_of_start
from tests.support.runs import small_config

CPU = torch.device("cpu")
TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def photograph(number: int, width: int = 24, mode: str = "RGB", kind: str = "JPEG", **options: Any) -> bytes:
    """A smooth image: decoders differ by little on those."""
    y, x, channel = np.meshgrid(np.arange(16), np.arange(width), np.arange(3), indexing="ij")
    values = 128 + 90 * np.sin((x + number) / 5 + channel) * np.cos(y / 7 + number)
    stream = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Dataset]:
    def open_it(files: dict[str, bytes], **options: Any) -> Dataset:
        (tmp_path / "images").mkdir()
        for name, content in files.items():
            (tmp_path / "images" / name).write_bytes(content)
        packing = DataConfig(cache_dir=str(tmp_path / "cache"), packed_as="encoded", test_fraction=0.2, **options)
        return open_dataset(f"folder:{tmp_path / 'images'}", "unused", packing, lambda _line: None)

    return open_it


def files(mode: str = "RGB", count: int = 20, **options: Any) -> dict[str, bytes]:
    return {f"{number:02}.jpg": photograph(number, mode=mode, **options) for number in range(count)}


def batch(dataset: Dataset, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batches = TrainBatches(
        dataset.train,
        seed=3,
        global_batch_size=8,
        micro_batches=[(0, 8)],
        device=CPU,
        resident_budget_bytes=0,
    )
    try:
        return batches.micro_batch(step, 0)
    finally:
        batches.close()


@pytest.mark.parametrize(("mode", "channels"), [("RGB", None), ("L", None), ("L", 3)])
def test_batches_are_those_of_pillow_but_for_rounding(
    mode: str, channels: int | None, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_pillow = opened(files(mode), channels=channels)
    other = decoded_on(by_pillow, CPU)
    calls: list[int] = []

    def counted(contents: Sequence[bytes], *rest: Any) -> list[torch.Tensor]:
        calls.append(len(contents))
        return decode_jpegs(contents, *rest)

    monkeypatch.setattr(gpu_jpeg, "decode_jpegs", counted)
    (images, labels), (expected, expected_labels) = batch(other, 1), batch(by_pillow, 1)
    assert calls[:1] == [8]  # together
    assert images.shape == expected.shape
    assert (images.int() - expected.int()).abs().max() <= 3
    assert torch.equal(labels, expected_labels)
    assert np.abs(other.test.images[:2].astype(int) - by_pillow.test.images[:2]).max() <= 3


def test_another_decoder_is_other_data(opened: Callable[..., Dataset]) -> None:
    by_pillow = opened(files())
    assert decoded_on(by_pillow, CPU).digest not in ("", by_pillow.digest)
    assert decoded_on(by_pillow, CPU).digest == decoded_on(by_pillow, CPU).digest


def test_ranks_compare_the_version_of_the_decoder() -> None:
    config = small_config("vae", packing=DataConfig(packed_as="encoded", decoded_on="cuda"))
    assert facts_of_start(config, 2, True, 1)["torchvision"]
    plain = small_config("vae", packing=DataConfig(packed_as="encoded"))
    assert "torchvision" not in facts_of_start(plain, 2, True, 1)


REFUSED: dict[str, tuple[bytes, str]] = {
    "PNG": (photograph(5, kind="PNG"), "it is a PNG, not a JPEG"),
    "CMYK": (photograph(5, mode="CMYK"), "it is CMYK, not RGB or gray"),
    "turned": (photograph(5, exif=TURNED), "its EXIF data say that it lies on its side"),
    "RGB components": (photograph(5, keep_rgb=True, subsampling=0), "its components are RGB, not YCbCr"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_is_not_for_the_decoder_is_refused(name: str, opened: Callable[..., Dataset]) -> None:
    content, reason = REFUSED[name]
    dataset = opened({**files(), "05.jpg": content}, image_size="24x16")
    row = [Path(one).name for one in dataset.train.names or ()].index("05.jpg")
    images: Any = dataset.train.images
    with pytest.raises(DataError, match=reason) as told:
        ImagesOnGpu(images, CPU)[np.array([0, row])]
    assert str(told.value).endswith("; use --decoded-on cpu")
    assert "\n" not in str(told.value)
    with pytest.raises(DataError, match=reason):  # among the first images, when the data are opened
        decoded_on(dataset, CPU)


def test_images_that_would_be_resized_are_refused(opened: Callable[..., Dataset]) -> None:
    images: Any = opened(files(), image_size="12x8").train.images
    with pytest.raises(DataError, match="is 24x16, and nothing resizes it to 12x8 there"):
        ImagesOnGpu(images, CPU)[0]


def test_a_damaged_image_is_told_as_on_the_cpu(opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    images: Any = ImagesOnGpu(opened(files()).train.images, CPU)  # type: ignore[arg-type]
    read = images._encoded.read
    monkeypatch.setattr(images._encoded, "read", lambda row: read(row)[:250] if row == 2 else read(row))
    with pytest.raises(DataError, match=r"image 2 of .* is damaged"):
        images[np.arange(4)]


def test_what_a_decoder_says_is_one_line(opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_given: Any) -> list[torch.Tensor]:
        raise RuntimeError("nvjpegDecode failed: 5\nat decode_jpegs_cuda.cpp:77")

    images: Any = ImagesOnGpu(opened(files()).train.images, CPU)  # type: ignore[arg-type]
    monkeypatch.setattr(gpu_jpeg, "decode_jpegs", failing)
    with pytest.raises(DataError) as told:
        images[np.arange(4)]
    assert str(told.value).endswith("nvjpegDecode failed: 5 at decode_jpegs_cuda.cpp:77; use --decoded-on cpu")
    with pytest.raises(DataError, match="torchvision does not decode JPEG on cpu here: nvjpegDecode failed"):
        check_decoder(CPU)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "is for encoded images; leave it out, or add --packed-as encoded"),
        ({"packed_as": "encoded"}, "needs a GPU with CUDA, and this host shows none; use --decoded-on cpu"),
    ],
)
def test_a_host_or_a_set_without_it_is_refused_before_packing(
    options: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not options:
        monkeypatch.setattr(gpu_jpeg, "own_gpu", lambda: CPU)
        monkeypatch.setattr(gpu_jpeg, "check_decoder", lambda _device: None)
    (tmp_path / "images").mkdir()
    for name, content in files().items():
        (tmp_path / "images" / name).write_bytes(content)
    packing = DataConfig(cache_dir=str(tmp_path / "cache"), decoded_on="cuda", **options)
    with pytest.raises(DataError, match=reason):
        open_dataset(f"folder:{tmp_path / 'images'}", "unused", packing, lambda _line: None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "RGB components"])
def test_a_survey_tells_what_training_would_refuse(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for file, content in {**files(), "05.jpg": REFUSED[name][0]}.items():
        (tmp_path / "images" / file).write_bytes(content)
    for size in ("24x16", None, "12x8"):
        packing = DataConfig(cache_dir=str(tmp_path), packed_as="encoded", decoded_on="cuda", image_size=size)
        problem = survey_source(f"folder:{tmp_path / 'images'}", "", packing, lambda _line: None).problem
        assert "cannot be decoded on a GPU: it" in str(problem)


def test_a_survey_tells_colours_that_would_have_to_become_gray(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for file, content in files(count=6).items():
        (tmp_path / "images" / file).write_bytes(content)
    packing = DataConfig(cache_dir=str(tmp_path), packed_as="encoded", decoded_on="cuda", channels=1)
    problem = survey_source(f"folder:{tmp_path / 'images'}", "", packing, lambda _line: None).problem
    assert str(problem).endswith("it has colours, and gray is wanted; use --decoded-on cpu")


def test_threads_decode_on_the_gpu_of_their_process(
    opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)  # of this thread; that of a new one is 0
    devices: list[torch.device] = []

    def decoding(contents: Sequence[bytes], channels: int, device: torch.device) -> list[torch.Tensor]:
        devices.append(device)
        return decode_jpegs(contents, channels, CPU)

    monkeypatch.setattr(gpu_jpeg, "decode_jpegs", decoding)
    opened(files(), decoded_on="cuda").train.images[np.arange(4)]
    assert set(devices) == {torch.device("cuda", 1)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_a_gpu_decodes_the_images_of_the_cpu(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    by_pillow = opened(files())
    check_decoder(torch.device("cuda"))
    found = decoded_on(by_pillow, torch.device("cuda"))
    (images, labels), (expected, expected_labels) = batch(found), batch(by_pillow)
    assert (images.int() - expected.int()).abs().float().mean() < 2
    assert torch.equal(labels, expected_labels)
    assert torch.equal(images, batch(found)[0])
