"""Where the pixels of batches lie: images are decoded straight into a batch, and its memory is used again."""

from __future__ import annotations

import gc
import io

import numpy as np
import pytest
import torch
from PIL import Image

from gen_dist.data import decoding
from gen_dist.data.batch_memory import BatchMemory
from gen_dist.data.eight_bits import as_pixels


def noise(height: int, width: int, mode: str) -> Image.Image:
    values = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "1")]
)
def test_images_decoded_into_a_batch_are_those_decoded_apart(kind: str, mode: str, channels: int) -> None:
    content = encoded(noise(13, 37, mode), kind)
    apart = decoding.decode_image(content, None, channels)
    batch = np.full((3, channels, 13, 37), 7, np.uint8)
    out = batch[1]
    found = decoding.decode_image(content, None, channels, out=out)
    assert found.pixels is out
    assert np.array_equal(out, apart.pixels)
    assert found[1:] == apart[1:]
    assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize(("shape", "dtype"), [((3, 37, 13), "uint8"), ((1, 13, 37), "uint8"), ((3, 13, 37), "uint16")])
def test_memory_of_another_form_is_left_alone(shape: tuple[int, ...], dtype: str) -> None:
    out = np.full(shape, 7, dtype)
    found = decoding.decode_image(encoded(noise(13, 37, "RGB"), "PNG"), None, 3, out=out)
    assert found.pixels is not out
    assert (out == 7).all()


def test_an_image_of_several_megabytes_is_decoded_into_memory_all_the_same() -> None:
    image = Image.new("RGB", (2_500, 2_000))  # PIL has pieces of 16 MB
    image.paste(noise(100, 2_500, "RGB"), (0, 1_900))
    out = np.zeros((3, 2_000, 2_500), np.uint8)
    assert np.array_equal(as_pixels(image, 3, out), np.asarray(image).transpose(2, 0, 1))


def test_memory_that_is_not_contiguous_is_left_alone() -> None:
    out = np.zeros((3, 9, 22), np.uint8)[..., ::2]
    image = noise(9, 11, "RGB")
    assert np.array_equal(as_pixels(image, 3, out), np.asarray(image).transpose(2, 0, 1))
    assert not out.any()


def test_memory_is_used_again_once_nobody_holds_a_view_of_it() -> None:
    memory = BatchMemory()
    first = memory.empty((4, 3), torch.float32)
    place = first.data_ptr()
    view = first[1:].reshape(-1)
    del first
    gc.collect()
    other = memory.empty((4, 3), torch.float32)
    assert other.data_ptr() != place  # a view holds it
    del view
    gc.collect()
    assert memory.empty((12,), torch.float32).data_ptr() == place
    assert other.data_ptr() != place


def test_memory_outlives_its_allocator() -> None:
    memory = BatchMemory()
    held = memory.empty((1000,), torch.int64)
    held.fill_(5)
    del memory
    gc.collect()
    torch.empty(1000, dtype=torch.int64).fill_(6)
    assert (held == 5).all()


def test_memory_of_no_images_is_empty() -> None:
    assert BatchMemory().empty((0, 3, 4, 4), torch.uint8).shape == (0, 3, 4, 4)
