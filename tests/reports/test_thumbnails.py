"""Pictures of a page stay legible and within its budget."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen_dist.errors import CheckpointError
from gen_dist.reports import thumbnails as module
from gen_dist.reports.thumbnails import LARGEST_SHARE, PAGE_BYTES, SHOWN_PIXELS, thumbnails


def _picture(path: Path, side: int, *, noisy: bool = True, mode: str = "RGB") -> Path:
    rng = np.random.default_rng(side)
    channels = {"RGB": (3,), "L": (), "RGBA": (4,)}[mode]
    pixels = rng.integers(0, 256, (side, side, *channels), dtype=np.uint8)
    if not noisy:
        pixels = (pixels[:8, :8] // 128 * 255).repeat(side // 8, axis=0).repeat(side // 8, axis=1).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _opened(uri: str) -> tuple[Image.Image, int]:
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    content = base64.b64decode(data)
    return Image.open(io.BytesIO(content)), len(content)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_small_pictures_keep_every_pixel(mode: str, tmp_path: Path) -> None:
    path = _picture(tmp_path / "a.png", 64, noisy=False, mode=mode)
    (uri,) = thumbnails([path], 10)
    expected = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(_opened(uri)[0].convert("RGB")), expected)


def test_wide_pictures_have_the_width_that_is_shown(tmp_path: Path) -> None:
    image, size = _opened(*thumbnails([_picture(tmp_path / "a.png", 2 * SHOWN_PIXELS, noisy=False)], 4))
    assert image.width == SHOWN_PIXELS and size <= LARGEST_SHARE


@pytest.mark.parametrize("pages", [20, 60, 90])
def test_noise_fits_its_share_of_the_page(pages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_BYTES", PAGE_BYTES // 16)  # of pictures a quarter as wide
    paths = [_picture(tmp_path / f"{place}.png", 256) for place in range(3)]
    sizes = [_opened(uri)[1] for uri in thumbnails(paths, pages)]
    assert max(sizes) <= module.PAGE_BYTES // pages


def test_a_damaged_picture_is_named_in_one_line(tmp_path: Path) -> None:
    path = _picture(tmp_path / "step_00000008.png", 64)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"GIF89a", whole[:40] + bytes(40) + whole[80:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"step_00000008\.png is damaged: [^\n]*; remove it"):
            thumbnails([path], 4)
