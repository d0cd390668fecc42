"""Pictures composed of images as PNG files: grids, reconstructions, walks. A killed run leaves no half picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gen_dist.errors import ConfigError
from gen_dist.files import write_atomically

Images = NDArray[np.uint8]
Bar = tuple[str, str] | str
"""Values of black and of white, or a line of text in the place of their scale."""

PLEASANT_WIDTH = 720
"""Width in pixels that the rows of a grid come near to: small images are enlarged by a whole factor."""
MARGIN = 12
PAIRS_TITLE = "in each pair: the original on the left, its reconstruction on the right"
PAIR_GAPS, PAIR_ROW_GAP = [12, 1], 6
"""Space in pixels before an original and before its reconstruction, and between rows."""
FONT_SIZE = 14
BAR = FONT_SIZE + MARGIN
"""Height of a scale of values with its margin."""
_BAR_LENGTH = 128
INK = 70
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_SAVED_AS: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 3},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
}
_LONGEST_SIDES = {"JPEG": 65_500, "WEBP": 16_383}
"""Pixels that the library of a format writes; PNG has no bound that a picture here comes near to."""
PAPER = 255


def save_grid(
    path: Path, images: Images, columns: int = 8, captions: Sequence[str] | None = None, bar: Bar | None = None
) -> None:
    """Draw images in rows of `columns`, with thin gaps.

    Args:
        path: the PNG file.
        images: uint8 [N, C, H, W], N >= 1, C = 1 or 3.
        columns: images a row. Fewer images make fewer columns.
        captions: one text a row, on its left.
        bar: values of black and white, drawn as a scale below.

    Raises:
        ConfigError: the file's name is of a format that is not written, or that has no pictures of this size.
        ValueError: the array is not a batch of images, or the number of captions is not that of the rows.
    """
    canvas = grid(images, columns)
    _check_captions(captions, -(-len(images) // min(columns, len(images))))
    _save_canvas(path, canvas, captions=captions, bar=bar)


def grid(images: Images, columns: int) -> Images:
    """The images of `save_grid` as one of [height, width, C], without a margin.

    Raises:
        ValueError: the array is not a batch of images.
    """
    _check_images(images)
    columns = min(columns, len(images))
    return mosaic(images, [2] * columns, 2, _scale(columns * images.shape[3]))


def save_reconstructions(
    path: Path, originals: Images, reconstructions: Images, pairs_per_row: int = 8, bar: Bar | None = None
) -> None:
    """Draw pairs in rows: originals in odd columns, their reconstructions beside them in even ones.

    Args:
        path: the PNG file.
        originals: uint8 [N, C, H, W], N >= 1, C = 1 or 3.
        reconstructions: uint8 [N, C, H, W], in the order of the originals.
        pairs_per_row: pairs a row. Fewer pairs make shorter rows.
        bar: values of black and white, drawn as a scale below.

    Raises:
        ValueError: an array is not a batch of images, or the shapes differ.
    """
    save_pairs(path, originals, reconstructions, PAIRS_TITLE, pairs_per_row, bar)


def save_pairs(
    path: Path, left: Images, right: Images, title: str, pairs_per_row: int = 8, bar: Bar | None = None
) -> None:
    """Draw pairs of images in rows under a title; see `save_reconstructions`."""
    _check_images(left)
    _check_images(right)
    if left.shape != right.shape:
        raise ValueError(f"images {left.shape} and {right.shape} of pairs differ in shape")
    pairs = min(pairs_per_row, len(left))
    both = np.stack([left, right], axis=1).reshape(-1, *left.shape[1:])
    canvas = mosaic(both, PAIR_GAPS * pairs, PAIR_ROW_GAP, _scale(2 * pairs * left.shape[3]))
    _save_canvas(path, canvas, title=title, bar=bar)


def split_pairs(
    picture: Images, image_shape: tuple[int, int, int], most_pairs: int = 8, *, has_bar: bool = False
) -> tuple[Images, Images] | None:
    """Originals and reconstructions uint8 [N, C, H, W] from a picture of `save_reconstructions`.

    Places of a last row without images are white. None for a picture of another layout.

    Args:
        picture: uint8 [height, width, C].
        image_shape: (C, H, W) of the images.
        most_pairs: pairs a row at most.
        has_bar: True if a scale of values is below. It may be as high as a row.
    """
    channels, height, width = image_shape
    top, least_width = 2 * MARGIN + FONT_SIZE, int(ImageFont.load_default(size=FONT_SIZE).getlength(PAIRS_TITLE))
    canvas = picture[top : picture.shape[0] - MARGIN - (BAR if has_bar else 0), MARGIN:]
    for pairs in range(most_pairs, 0, -1):
        scale = _scale(2 * pairs * width)
        tile, step = width * scale, height * scale + PAIR_ROW_GAP
        lefts = np.cumsum([0, *(PAIR_GAPS * pairs)[1:]]) + np.arange(2 * pairs) * tile
        rows, rest = divmod(canvas.shape[0] + PAIR_ROW_GAP, step)
        if max(int(lefts[-1]) + tile, least_width) + 2 * MARGIN == picture.shape[1] and rows and not rest:
            break
    else:
        return None
    tiles = [
        canvas[row * step : row * step + height * scale : scale, left : left + tile : scale]
        for row in range(rows)
        for left in lefts.tolist()
    ]
    both = np.stack(tiles).transpose(0, 3, 1, 2)
    return (both[::2], both[1::2]) if both.shape[1] == channels else None


def save_manifold(path: Path, images: Images, columns: int, title: str | None = None, bar: Bar | None = None) -> None:
    """Draw decoded latents edge to edge, as one surface.

    Args:
        path: the PNG file.
        images: uint8 [N, C, H, W], row by row, C = 1 or 3.
        columns: images a row.
        title: one line above.
        bar: values of black and white, drawn as a scale below.

    Raises:
        ValueError: the array is not a batch of images.
    """
    _check_images(images)
    canvas = mosaic(images, [0] * columns, 0, _scale(columns * images.shape[3]))
    _save_canvas(path, canvas, title=title, bar=bar)


def save_strips(
    path: Path,
    images: Images,
    columns: int,
    captions: Sequence[str] | None = None,
    title: str | None = None,
    bar: Bar | None = None,
) -> None:
    """Draw walks through the latents: the images of a row edge to edge, with gaps between rows.

    Args:
        path: the PNG file.
        images: uint8 [N, C, H, W], row by row, C = 1 or 3.
        columns: images a row.
        captions: one text a row, on its left.
        title: one line above.
        bar: values of black and white, drawn as a scale below.

    Raises:
        ValueError: the array is not a batch of images, or the number of captions is not that of the rows.
    """
    _check_images(images)
    _check_captions(captions, -(-len(images) // columns))
    canvas = mosaic(images, [0] * columns, 4, _scale(columns * images.shape[3]))
    _save_canvas(path, canvas, title=title, captions=captions, bar=bar)


def _check_images(images: Images) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or images.size == 0:
        raise ValueError(f"expected uint8 [N, 1 or 3, H, W] with N >= 1, got {images.dtype} {list(images.shape)}")


def _check_captions(captions: Sequence[str] | None, rows: int) -> None:
    if captions is not None and len(captions) != rows:
        raise ValueError(f"{len(captions)} captions for {rows} rows")


def _scale(width: int) -> int:
    """Whole factor that brings a row of images near PLEASANT_WIDTH."""
    return max(1, round(PLEASANT_WIDTH / width))


def mosaic(images: Images, gaps: Sequence[int], row_gap: int, scale: int) -> Images:
    """Lay images out on paper, enlarged `scale` times: [height, width, C].

    `gaps[i]` is the space in pixels before column i. There is none before the first.
    """
    count, channels, height, width = images.shape
    enlarged = images.transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    columns, rows = len(gaps), -(-count // len(gaps))
    lefts = np.cumsum([0, *gaps[1:]]) + np.arange(columns) * width * scale
    tops = np.arange(rows) * (height * scale + row_gap)
    canvas = np.full((tops[-1] + height * scale, lefts[-1] + width * scale, channels), PAPER, dtype=np.uint8)
    for index, image in enumerate(enlarged):
        top, left = tops[index // columns], lefts[index % columns]
        canvas[top : top + height * scale, left : left + width * scale] = image
    return canvas


def _save_canvas(
    path: Path,
    canvas: Images,
    title: str | None = None,
    captions: Sequence[str] | None = None,
    bar: Bar | None = None,
) -> None:
    """Write a mosaic with a margin around it, a title above, evenly spaced captions on its left and a scale below."""
    format = format_of(path)
    title_font = ImageFont.load_default(size=FONT_SIZE)
    font: Any = title_font
    if captions is not None and not "".join(captions).isascii():
        captions, font = _in_another_font(captions)
    left = MARGIN + (0 if captions is None else max(int(font.getlength(text)) for text in captions) + MARGIN)
    top = MARGIN + (0 if title is None else FONT_SIZE + MARGIN)
    height, width, channels = canvas.shape
    width = max(width, 0 if title is None else int(title_font.getlength(title)))
    width = max(width, 0 if bar is None else _bar_width(bar, title_font))
    mode = "L" if channels == 1 else "RGB"
    size = left + width + MARGIN, top + height + MARGIN + (0 if bar is None else BAR)
    if max(size) > (most := _LONGEST_SIDES.get(format, max(size))):
        raise ConfigError(f"{path} would be {size[0]} x {size[1]} pixels, and {format} has at most {most}; name a .png")
    page = Image.new(mode, size, (PAPER,) * channels)
    page.paste(Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas), (left, top))
    draw = ImageDraw.Draw(page)
    ink = (INK,) * channels
    if title is not None:
        draw.text((left, MARGIN), title, fill=ink, font=title_font)
    for row, text in enumerate(captions or ()):
        middle = top + height * (row + 0.5) / len(captions or ())
        draw.text((left - MARGIN, middle), text, fill=ink, font=font, anchor="rm")
    if bar is not None:
        _draw_bar(page, (left, top + height + MARGIN), bar, title_font)
    buffer = io.BytesIO()
    page.save(buffer, format=format, **_SAVED_AS[format])
    write_atomically(path, buffer.getvalue())


def _bar_width(bar: Bar, font: Any) -> int:
    if isinstance(bar, str):
        return int(font.getlength(bar))
    return _BAR_LENGTH + MARGIN + sum(int(font.getlength(text)) for text in bar)


def _draw_bar(page: Image.Image, place: tuple[int, int], bar: Bar, font: Any) -> None:
    """Draw a ramp from black to white between the values that they stand for."""
    if isinstance(bar, str):
        ImageDraw.Draw(page).text(place, bar, fill=(INK,) * len(page.getbands()), font=font)
        return
    (left, top), (low, high) = place, bar
    start = left + int(font.getlength(low)) + MARGIN // 2
    ramp = np.tile(np.linspace(0, PAPER, _BAR_LENGTH).astype(np.uint8), (FONT_SIZE, 1))
    page.paste(Image.fromarray(ramp), (start, top))
    draw, ink = ImageDraw.Draw(page), (INK,) * len(page.getbands())
    draw.rectangle((start - 1, top - 1, start + _BAR_LENGTH, top + FONT_SIZE), outline=ink)  # white on paper
    draw.text((left, top), low, fill=ink, font=font)
    draw.text((start + _BAR_LENGTH + MARGIN // 2, top), high, fill=ink, font=font)


def format_of(path: Path) -> str:
    """Format of a picture by its file's name: PNG, JPEG or WEBP.

    Raises:
        ConfigError: the name is of none of them.
    """
    format = _FORMATS.get(path.suffix.lower())
    if format is None:
        raise ConfigError(f"{path} cannot be written: name a file of {', '.join(_FORMATS)}")
    return format


def _in_another_font(captions: Sequence[str]) -> tuple[Sequence[str], Any]:
    """Captions, and a font with their letters. Without one, each is its row's number."""
    from gen_dist.pictures.lettering import lettering_of, usual_font

    lettering = lettering_of(captions)
    file = lettering.font.file if lettering.font else usual_font()
    return lettering.names, ImageFont.truetype(file, FONT_SIZE)
